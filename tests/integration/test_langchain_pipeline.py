"""Activations of a local model under LangChain: each sample on the right run, tool and token, and the right vector.

Real langchain-core, langchain-huggingface, transformers and our capture; only the store is a list.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import tool
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from nla_monitor_langchain import ChatNLAModel, NLACallbackHandler

from nla_monitor.capture import Capture, SessionHandle
from nla_monitor.config import CaptureConfig, QueueConfig
from nla_monitor.guard import Guard
from nla_monitor.records import ActivationSample, AgentContext, Completion, Phase, Scalar
from tests.langchain_support import LAYER, byte_tokenizer, text_pipeline, tiny_llama

TOKENS = 6


class CaptureMonitor:
    """The part of ``Monitor`` that the handler uses, over a real capture; samples end in a list."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.guard = Guard()
        self.tokenizer = tokenizer
        self.samples: list[ActivationSample] = []
        config = CaptureConfig(tokens_per_sequence=3, generated_tokens=4, skip_special_tokens=False)
        self.capture = Capture(
            config,
            run_id="run",
            layer=LAYER,
            sink=self.samples.extend,
            guard=self.guard,
            queue=QueueConfig(write_interval_seconds=0.01),
            tokenizer=tokenizer,
        )
        self.capture.attach(model)

    def open_session(
        self,
        context: AgentContext,
        token_ids: Sequence[int] | None,
        *,
        traceparent: str | None = None,
        attributes: Mapping[str, Scalar] | None = None,
    ) -> SessionHandle:
        return self.capture.sessions.open(context, token_ids, traceparent=traceparent, attributes=attributes)

    def close_session(self, handle: SessionHandle, *, completion: Completion | None = None) -> None:
        self.capture.sessions.close(handle)

    def runs(self) -> dict[str, list[ActivationSample]]:
        """Samples by agent run."""
        assert self.capture.flush(30)
        assert self.guard.faults == {}
        found: dict[str, list[ActivationSample]] = {}
        for sample in self.samples:
            assert sample.agent is not None
            assert sample.phase is Phase.AGENT
            found.setdefault(sample.agent.agent_run_id, []).append(sample)
        return found


class Witness(BaseCallbackHandler):
    """What LangChain itself says of each model call."""

    run_inline = True

    def __init__(self) -> None:
        self.prompts: dict[str, str] = {}
        self.parents: dict[str, str | None] = {}

    def on_llm_start(self, serialized: Any, prompts: Any, *, run_id: Any, parent_run_id: Any = None, **_: Any) -> None:
        self._note(run_id, parent_run_id, prompts[0])

    def on_chat_model_start(
        self, serialized: Any, messages: Any, *, run_id: Any, parent_run_id: Any = None, **_: Any
    ) -> None:
        self._note(run_id, parent_run_id, messages[0][-1].text)

    def _note(self, run_id: Any, parent: Any, prompt: str) -> None:
        self.prompts[str(run_id)] = prompt
        self.parents[str(run_id)] = None if parent is None else str(parent)


@pytest.fixture
def model() -> Any:
    return tiny_llama()


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def monitor(model: Any, tokenizer: Any) -> Iterator[CaptureMonitor]:
    made = CaptureMonitor(model, tokenizer)
    yield made
    made.capture.close(10)


@pytest.fixture
def truth(tokenizer: Any) -> Callable[[list[int]], tuple[list[int], np.ndarray]]:
    """Of a prompt's ids: all ids and the states behind block K ``[token, d_model]``, by a model that nobody taps."""
    plain = tiny_llama()
    plain.generation_config.max_length = None

    @functools.cache
    def states(ids: tuple[int, ...]) -> tuple[list[int], np.ndarray]:
        with torch.no_grad():
            out = plain.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=TOKENS,
                do_sample=False,
                output_hidden_states=True,
                return_dict_in_generate=True,
            )
        rows = torch.cat([step[LAYER + 1][0] for step in out.hidden_states])
        return out.sequences[0].tolist(), rows.numpy()

    return lambda ids: states(tuple(ids))


def check(samples: Sequence[ActivationSample], ids: list[int], truth: Any, *, exact: bool = True) -> None:
    """Every sample is of the token and position that it says, with the state that the plain model has there."""
    everything, states = truth(ids)
    assert {sample.agent.generated for sample in samples if sample.agent} == {False, True}
    for sample in samples:
        assert sample.agent is not None
        assert sample.token_id == everything[sample.position]
        assert sample.agent.generated is (sample.position >= len(ids))
        assert sample.agent.token_index == (sample.position - len(ids) if sample.agent.generated else None)
        if exact:
            assert np.array_equal(sample.vector, states[sample.position])
        else:
            assert np.allclose(sample.vector, states[sample.position], atol=1e-5)


def text_ids(tokenizer: Any, prompt: str) -> list[int]:
    return list(tokenizer(prompt)["input_ids"])


def chat_huggingface_ids(tokenizer: Any, prompt: str) -> list[int]:
    return text_ids(tokenizer, f"<|user|>{prompt}<eos><|assistant|>")


def chat_nla_ids(tokenizer: Any, prompt: str) -> list[int]:
    return chat_huggingface_ids(tokenizer, prompt)[1:]


@pytest.fixture(params=["pipeline", "chat_huggingface", "chat_nla"])
def case(request: pytest.FixtureRequest, model: Any, tokenizer: Any) -> tuple[Any, Callable[[Any, str], list[int]]]:
    """A LangChain model, and the ids that it is fed for a prompt."""
    pipe = HuggingFacePipeline(pipeline=text_pipeline(model, tokenizer, max_new_tokens=TOKENS))
    made: dict[str, tuple[Any, Callable[[Any, str], list[int]]]] = {
        "pipeline": (pipe, text_ids),
        "chat_huggingface": (ChatHuggingFace(llm=pipe, tokenizer=tokenizer), chat_huggingface_ids),
        "chat_nla": (ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=TOKENS), chat_nla_ids),
    }
    return made[request.param]


def as_input(llm: Any, prompt: str) -> Any:
    return prompt if isinstance(llm, HuggingFacePipeline) else [HumanMessage(prompt)]


async def drain(stream: Any) -> None:
    async for _ in stream:
        pass


@pytest.mark.parametrize("how", ["invoke", "stream", "ainvoke", "astream"])
def test_one_call(case: Any, monitor: CaptureMonitor, tokenizer: Any, truth: Any, how: str) -> None:
    """Position, token and vector are exact to the bit, streamed or not, sync or async."""
    llm, ids = case
    if isinstance(llm, ChatHuggingFace):
        how = how.removeprefix("a")  # over a pipeline it has no async of its own
    run_id = uuid.uuid4()
    config = {"callbacks": [NLACallbackHandler(monitor, llm=llm)], "run_id": run_id}
    prompt = as_input(llm, "hello there")
    {
        "invoke": lambda: llm.invoke(prompt, config),
        "stream": lambda: list(llm.stream(prompt, config)),
        "ainvoke": lambda: asyncio.run(llm.ainvoke(prompt, config)),
        "astream": lambda: asyncio.run(drain(llm.astream(prompt, config))),
    }[how]()
    assert set(monitor.runs()) == {str(run_id)}
    check(monitor.samples, ids(tokenizer, "hello there"), truth)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_of_three_prompts(
    model: Any, tokenizer: Any, monitor: CaptureMonitor, truth: Any, batch_size: int
) -> None:
    """Rows of one padded forward go to three runs."""
    pipe = text_pipeline(model, tokenizer, max_new_tokens=TOKENS, batch_size=batch_size)
    llm, witness = HuggingFacePipeline(pipeline=pipe), Witness()
    prompts = ["a", "a much longer prompt", "in between"]
    llm.batch(prompts, {"callbacks": [NLACallbackHandler(monitor, llm=llm), witness]})
    runs = monitor.runs()
    assert {witness.prompts[run] for run in runs} == set(prompts)
    for run, samples in runs.items():
        # A padded batch has another shape, so its sums run in another order.
        check(samples, text_ids(tokenizer, witness.prompts[run]), truth, exact=batch_size == 1)


def test_four_threads_at_once(case: Any, monitor: CaptureMonitor, tokenizer: Any, truth: Any) -> None:
    """Concurrent calls on one model, streamed and not: no sample on another's run."""
    llm, ids = case
    handler, witness = NLACallbackHandler(monitor, llm=llm), Witness()
    config = {"callbacks": [handler, witness]}
    start = threading.Barrier(4, timeout=30)

    def work(number: int) -> None:
        start.wait()
        for turn in range(3):
            prompt = as_input(llm, f"thread {number} turn {turn}")
            if turn % 2:
                list(llm.stream(prompt, config))
            else:
                llm.invoke(prompt, config)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    runs = monitor.runs()
    assert set(runs) == set(witness.prompts)
    assert len(runs) == 12
    for run, samples in runs.items():
        check(samples, ids(tokenizer, witness.prompts[run]), truth)


def test_identical_prompts_at_once_with_the_exact_model(model: Any, tokenizer: Any, monitor: CaptureMonitor) -> None:
    """Same prompt, different sampled texts: each run gets the tokens that it wrote itself."""
    chat = ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=TOKENS, temperature=3.0)
    ids = {}
    lock = threading.Lock()

    def work(seed: int) -> None:
        run_id = uuid.uuid4()
        config = {"callbacks": [NLACallbackHandler(monitor)], "run_id": run_id}
        answer = chat.invoke("same", config, seed=seed)
        with lock:
            ids[str(run_id)] = answer.text

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert len(set(ids.values())) == 8
    runs = monitor.runs()
    assert set(runs) == set(ids)
    for run, samples in runs.items():
        written = [sample for sample in samples if sample.agent and sample.agent.generated]
        assert written
        expected = chat_written(chat, run, ids)
        for sample in written:
            assert sample.agent is not None
            assert sample.token_id in expected


def test_identical_prompts_at_once_through_a_pipeline(model: Any, tokenizer: Any, monitor: CaptureMonitor) -> None:
    """Sync and async: the forward runs in the context that announced the call, which tells equal prompts apart."""
    llm = HuggingFacePipeline(pipeline=text_pipeline(model, tokenizer, max_new_tokens=TOKENS))
    written: dict[str, list[int]] = {}
    generate = model.generate
    here = threading.local()

    def remember(*args: Any, **kwargs: Any) -> Any:
        output = generate(*args, **{**kwargs, "do_sample": True, "temperature": 5.0})
        here.written = output[0, kwargs["input_ids"].shape[1] :].tolist()
        return output

    def work(run_id: uuid.UUID) -> None:
        llm.invoke("same", {"callbacks": [NLACallbackHandler(monitor, llm=llm)], "run_id": run_id})
        written[str(run_id)] = here.written

    model.generate = remember
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [uuid.uuid4() for _ in range(16)]))
    runs = monitor.runs()
    assert set(runs) == set(written)
    for run, samples in runs.items():
        for sample in samples:
            if sample.agent is not None and sample.agent.token_index is not None:
                assert sample.token_id == written[run][sample.agent.token_index]


def chat_written(chat: ChatNLAModel, run: str, texts: Mapping[str, str]) -> set[int]:
    # Bytes that are no valid text decode to U+FFFD, so compare over every seed's ids of that very text.
    every = [
        chat._decode(chat.prompt_ids([HumanMessage("same")]), [], threading.Event(), {"seed": s}) for s in range(8)
    ]
    (mine,) = [item for item in every if chat.tokenizer.decode(item, skip_special_tokens=True) == texts[run]]
    return set(mine)


@tool
def count_rows(table: str) -> str:
    """Count rows."""
    return f"{table} holds 3 rows"


def test_a_tool_between_two_calls(case: Any, monitor: CaptureMonitor, tokenizer: Any, truth: Any) -> None:
    """Only the call that reads the tool's result carries its name; parent and root are the agent's run."""
    llm, ids = case

    def agent(question: str) -> None:
        llm.invoke(as_input(llm, f"which table for {question}?"))
        answer = count_rows.invoke({"table": question})
        list(llm.stream(as_input(llm, f"tool said {answer}")))
        llm.invoke(as_input(llm, "now sum up"))

    root, witness = uuid.uuid4(), Witness()
    config = {"callbacks": [NLACallbackHandler(monitor, llm=llm), witness], "run_id": root}
    RunnableLambda(agent).invoke("sales", config)
    runs = monitor.runs()
    assert set(runs) == set(witness.prompts)
    for run, samples in runs.items():
        prompt = witness.prompts[run]
        reads = "count_rows" if prompt.endswith("tool said sales holds 3 rows") else None
        contexts = [sample.agent for sample in samples if sample.agent]
        assert {context.tool for context in contexts} == {reads}
        assert {context.parent_run_id for context in contexts} == {witness.parents[run]} == {str(root)}
        assert {context.root_run_id for context in contexts} == {str(root)}
        check(samples, ids(tokenizer, prompt), truth)
    assert {sample.agent.tool for sample in monitor.samples if sample.agent} == {None, "count_rows"}


def test_a_sequence_with_a_tool_in_it(model: Any, tokenizer: Any, monitor: CaptureMonitor) -> None:
    """A runnable sequence: model, function, tool, function, model."""
    llm = HuggingFacePipeline(pipeline=text_pipeline(model, tokenizer, max_new_tokens=TOKENS))
    chain = llm | (lambda _: {"table": "sales"}) | count_rows | (lambda text: text.upper()) | llm
    root, witness = uuid.uuid4(), Witness()
    chain.invoke("begin", {"callbacks": [NLACallbackHandler(monitor, llm=llm), witness], "run_id": root})
    tools = {
        witness.prompts[run]: {sample.agent.tool for sample in samples if sample.agent}
        for run, samples in monitor.runs().items()
    }
    assert tools == {"begin": {None}, "SALES HOLDS 3 ROWS": {"count_rows"}}
    assert set(witness.parents.values()) == {str(root)}


def test_installed_twice_samples_are_not_doubled(case: Any, monitor: CaptureMonitor) -> None:
    """Constructor and config, or two handlers: the same samples as with one."""
    llm, _ = case
    one, two = (NLACallbackHandler(monitor, llm=llm) for _ in range(2))
    llm.invoke(as_input(llm, "hello"), {"callbacks": [one]})
    assert monitor.capture.flush(30)
    single = len(monitor.samples)
    llm.invoke(as_input(llm, "hello"), {"callbacks": [one, two]})
    assert monitor.capture.flush(30)
    assert len(monitor.samples) == 2 * single


def test_a_cancelled_stream_keeps_what_it_read_and_leaves_no_session(case: Any, monitor: CaptureMonitor) -> None:
    """Leaving a stream early harms neither the agent nor the next call."""
    llm, _ = case
    handler = NLACallbackHandler(monitor, llm=llm)
    config: Any = {"callbacks": [handler], "run_id": uuid.uuid4()}
    stream = llm.stream(as_input(llm, "hello"), config)
    next(stream)
    stream.close()
    after = {"callbacks": [handler], "run_id": uuid.uuid4()}
    llm.invoke(as_input(llm, "and another"), after)
    assert set(monitor.runs()) == {str(config["run_id"]), str(after["run_id"])}
    assert len(monitor.capture.sessions) == 0


def test_forwards_of_others_are_not_an_agents(case: Any, monitor: CaptureMonitor, model: Any) -> None:
    """A forward that belongs to no run, while a session is open, carries no run."""
    llm, _ = case
    stream = llm.stream(as_input(llm, "hello"), {"callbacks": [NLACallbackHandler(monitor, llm=llm)]})
    next(stream)
    with torch.no_grad():
        model(input_ids=torch.tensor([[9, 8, 7, 6]]))
    list(stream)
    assert monitor.capture.flush(30)
    foreign = [sample for sample in monitor.samples if sample.phase is not Phase.AGENT]
    assert foreign
    assert all(sample.agent is None and sample.token_id in {9, 8, 7, 6} for sample in foreign)
    assert len(foreign) < len(monitor.samples)


def test_the_text_is_the_same_with_and_without_the_handler(case: Any, model: Any, tokenizer: Any) -> None:
    """Monitoring changes no token."""
    llm, _ = case
    before = llm.invoke(as_input(llm, "hello"))
    watched = CaptureMonitor(model, tokenizer)
    try:
        after = llm.invoke(as_input(llm, "hello"), {"callbacks": [NLACallbackHandler(watched, llm=llm)]})
    finally:
        watched.capture.close(10)
    texts = [answer if isinstance(answer, str) else answer.text for answer in (before, after)]
    assert texts[0] == texts[1]
