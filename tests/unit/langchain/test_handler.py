"""Every model call has one session, with the right ids and the right place in the agent's work."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import re
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.language_models import FakeListChatModel, FakeListLLM
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.outputs import LLMResult
from langchain_core.runnables import RunnableLambda, RunnableParallel
from langchain_core.tools import tool
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from nla_monitor_langchain import ChatNLAModel, NLACallbackHandler, watch
from nla_monitor_langchain.extract import Encoded
from nla_monitor_langchain.outline import Outliner
from nla_monitor_langchain.tracker import Tracker, tracker_for
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from nla_monitor.errors import ConfigError
from tests.langchain_support import RecordingMonitor, byte_tokenizer, text_pipeline

DONE = LLMResult(generations=[])


def kinds(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    pipe = HuggingFacePipeline(pipeline=text_pipeline(model, tokenizer))
    return {
        "pipeline": pipe,
        "chat_huggingface": ChatHuggingFace(llm=pipe, tokenizer=tokenizer),
        "chat_nla": ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=4),
    }


@pytest.fixture(params=["pipeline", "chat_huggingface", "chat_nla"])
def any_llm(request: pytest.FixtureRequest, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Any:
    return kinds(model, tokenizer)[request.param]


class Witness(BaseCallbackHandler):
    """Run id of each model call, by what its prompt ends with: LangChain drops a given run id in some batch paths."""

    run_inline = True

    def __init__(self) -> None:
        self.runs: dict[str, str] = {}

    def on_llm_start(self, serialized: Any, prompts: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.runs[str(run_id)] = prompts[0]

    def on_chat_model_start(self, serialized: Any, messages: list[BaseMessage], *, run_id: Any, **kwargs: Any) -> None:
        self.runs[str(run_id)] = messages[0][-1].text


def config_of(handler: NLACallbackHandler, **more: Any) -> dict:
    return {"callbacks": [handler], "run_id": uuid.uuid4(), **more}


async def _drain(stream: Any) -> list:
    return [piece async for piece in stream]


def call(llm: HuggingFacePipeline, how: str, prompt: str, config: dict) -> None:
    calls = {
        "invoke": lambda: llm.invoke(prompt, config),
        "stream": lambda: list(llm.stream(prompt, config)),
        "batch": lambda: llm.batch([prompt], config),
        "ainvoke": lambda: asyncio.run(llm.ainvoke(prompt, config)),
        "astream": lambda: asyncio.run(_drain(llm.astream(prompt, config))),
        "abatch": lambda: asyncio.run(llm.abatch([prompt], config)),
    }
    calls[how]()


@pytest.mark.parametrize("how", ["invoke", "stream", "batch", "ainvoke", "astream", "abatch"])
def test_each_way_of_calling_ties_the_forward_pass_to_its_run(
    any_llm: Any, monitor: RecordingMonitor, how: str
) -> None:
    if isinstance(any_llm, ChatHuggingFace) and how.startswith("a"):
        assert_it_fails_by_itself(any_llm, monitor, how)
        return
    handler = NLACallbackHandler(monitor, llm=any_llm)
    witness = Witness()
    call(any_llm, how, "hello there", {"callbacks": [handler, witness]})
    (session,) = monitor.sessions
    assert [session.context.agent_run_id] == list(witness.runs)
    assert session.forwards == 1
    assert session.closed
    assert monitor.stray == []
    assert handler.stats.open_calls == handler.stats.open_runs == 0


def assert_it_fails_by_itself(chat: ChatHuggingFace, monitor: RecordingMonitor, how: str) -> None:
    """ChatHuggingFace has no async over a local pipeline: its own error must come out as without us."""
    with pytest.raises((NotImplementedError, AttributeError)) as plain:
        call(chat, how, "hello", {})
    handler = NLACallbackHandler(monitor, llm=chat)
    with pytest.raises(type(plain.value), match=re.escape(str(plain.value))):
        call(chat, how, "hello", config_of(handler))
    assert (monitor.open, handler.stats.open_calls) == ([], 0)


def test_a_batch_gives_each_prompt_its_own_run(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monitor: RecordingMonitor
) -> None:
    llm = HuggingFacePipeline(pipeline=text_pipeline(model, tokenizer, batch_size=3))
    prompts = ["a", "a longer prompt", "a middling"]
    witness = Witness()
    llm.batch(prompts, {"callbacks": [NLACallbackHandler(monitor, llm=llm), witness]})
    seen = {run: monitor.session(run).seen for run in witness.runs}
    assert {run: tokenizer.decode(ids[0], skip_special_tokens=True) for run, ids in seen.items()} == witness.runs
    assert sorted(witness.runs.values()) == sorted(prompts)


@pytest.mark.parametrize("same_prompt", [False, True])
def test_concurrent_calls_from_threads_keep_apart(any_llm: Any, monitor: RecordingMonitor, same_prompt: bool) -> None:
    handler = NLACallbackHandler(monitor, llm=any_llm)
    configs = [config_of(handler) for _ in range(12)]
    prompts = ["the same" if same_prompt else f"prompt {number}" for number in range(12)]
    # A pipeline streams from a bare thread: nothing tells two streams of one prompt apart.
    exact = isinstance(any_llm, ChatNLAModel) or not same_prompt
    hows = ["invoke", "stream" if exact else "invoke"] * 6
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: call(any_llm, *job), zip(hows, prompts, configs, strict=True)))
    assert [monitor.session(config["run_id"]).forwards for config in configs] == [1] * 12
    assert (monitor.stray, monitor.open) == ([], [])


def test_concurrent_async_calls_keep_apart(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monitor: RecordingMonitor
) -> None:
    llm = ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=3)
    handler = NLACallbackHandler(monitor)
    configs = [config_of(handler) for _ in range(8)]

    async def run() -> None:
        await asyncio.gather(
            *(llm.ainvoke("same", config) for config in configs[:4]),
            *(_drain(llm.astream("same", config)) for config in configs[4:]),
        )

    asyncio.run(run())
    assert [monitor.session(config["run_id"]).forwards for config in configs] == [1] * 8
    assert monitor.stray == []


# --- place in the agent's work --------------------------------------------------------------------------------------


@tool
def count_rows(table: str) -> str:
    """Count rows."""
    return f"{table} holds 3 rows"


def agent(llm: HuggingFacePipeline) -> Any:
    def work(question: str) -> str:
        llm.invoke(f"which table for {question}?")
        answer = count_rows.invoke({"table": "sales"})
        llm.invoke(f"tool said: {answer}")
        return llm.invoke("write the answer")

    return RunnableLambda(work)


def test_only_the_call_that_reads_the_tool_carries_it(llm: HuggingFacePipeline, monitor: RecordingMonitor) -> None:
    config = config_of(NLACallbackHandler(monitor, llm=llm))
    agent(llm).invoke("sales", config)
    first, reading, last = (session.context for session in monitor.sessions)
    assert [first.tool, reading.tool, last.tool] == [None, "count_rows", None]
    root = str(config["run_id"])
    assert {item.parent_run_id for item in (first, reading, last)} == {root}
    assert {item.root_run_id for item in (first, reading, last)} == {root}
    assert "tool_run_id" in monitor.sessions[1].attributes


def test_a_tool_in_the_same_sequence_counts_even_if_its_words_are_gone(
    llm: HuggingFacePipeline, monitor: RecordingMonitor
) -> None:
    chain = RunnableLambda(lambda x: {"table": x}) | count_rows | RunnableLambda(lambda text: str(len(text))) | llm
    chain.invoke("sales", config_of(NLACallbackHandler(monitor, llm=llm)))
    assert [session.context.tool for session in monitor.sessions] == ["count_rows"]
    context = monitor.sessions[0].context
    assert context.parent_run_id == context.root_run_id != context.agent_run_id


def test_a_branch_beside_the_tool_does_not_carry_it(llm: HuggingFacePipeline, monitor: RecordingMonitor) -> None:
    fan = RunnableParallel(rows=RunnableLambda(lambda x: {"table": x}) | count_rows, words=llm)
    chain = fan | RunnableLambda(lambda both: f"note: {both['rows']}") | llm
    chain.invoke("sales", config_of(NLACallbackHandler(monitor, llm=llm)))
    assert [session.context.tool for session in monitor.sessions] == [None, "count_rows"]


def test_another_agent_at_the_same_time_does_not_carry_the_tool(
    llm: HuggingFacePipeline, monitor: RecordingMonitor
) -> None:
    handler = NLACallbackHandler(monitor, llm=llm)
    middle = threading.Barrier(2, timeout=30)

    def with_tool(x: str) -> None:
        answer = count_rows.invoke({"table": x})
        middle.wait()
        llm.invoke(answer)

    def without(x: str) -> None:
        middle.wait()
        llm.invoke("sales holds 3 rows, I guess")

    configs = [config_of(handler), config_of(handler)]
    with ThreadPoolExecutor(2) as pool:
        jobs = zip((with_tool, without), configs, strict=True)
        list(pool.map(lambda job: RunnableLambda(job[0]).invoke("sales", job[1]), jobs))
    tools = {session.context.root_run_id: session.context.tool for session in monitor.sessions}
    assert tools == {str(configs[0]["run_id"]): "count_rows", str(configs[1]["run_id"]): None}


def test_a_retry_after_an_error_still_reads_the_tool(llm: HuggingFacePipeline, monitor: RecordingMonitor) -> None:
    handler = NLACallbackHandler(monitor, llm=llm)
    chain, first, second = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
    handler.on_chain_start({}, {}, run_id=chain)
    tool_run = uuid.uuid4()
    handler.on_tool_start({"name": "grep"}, "x", run_id=tool_run, parent_run_id=chain)
    handler.on_tool_end("found in line 12", run_id=tool_run, parent_run_id=chain)
    for run in (first, second):
        handler.on_llm_start({}, ["so: found in line 12"], run_id=run, parent_run_id=chain)
        handler.on_llm_error(TimeoutError(), run_id=run, parent_run_id=chain)
    assert [session.context.tool for session in monitor.sessions] == ["grep", "grep"]
    handler.on_chain_end({}, run_id=chain)
    assert handler.stats.open_runs == 0


def test_a_failed_tool_has_no_result(llm: HuggingFacePipeline, monitor: RecordingMonitor) -> None:
    handler = NLACallbackHandler(monitor, llm=llm)

    @tool
    def broken() -> str:
        """Fail."""
        raise OSError("no disk")

    def work(_: str) -> None:
        with pytest.raises(OSError, match="no disk"):
            broken.invoke({})
        llm.invoke("no disk")

    RunnableLambda(work).invoke("x", config_of(handler))
    assert [session.context.tool for session in monitor.sessions] == [None]
    assert handler.stats.open_runs == 0


def test_tool_messages_name_their_tool_for_a_chat_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monitor: RecordingMonitor
) -> None:
    chat = ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=2)
    asked = AIMessage("", tool_calls=[{"name": "read_file", "args": {}, "id": "7"}])
    chat.invoke(
        [HumanMessage("go"), asked, ToolMessage("data", tool_call_id="7")], config_of(NLACallbackHandler(monitor))
    )
    assert monitor.sessions[0].context.tool == "read_file"


def test_graph_node_and_conversation_come_from_the_metadata(
    llm: HuggingFacePipeline, monitor: RecordingMonitor
) -> None:
    metadata = {"langgraph_node": "agent", "thread_id": "conversation-9"}
    llm.invoke("x", config_of(NLACallbackHandler(monitor, llm=llm), metadata=metadata))
    chain = RunnableLambda(lambda x: x) | llm
    chain.invoke("x", config_of(NLACallbackHandler(monitor, llm=llm), configurable={"thread_id": "t1"}))
    first, second = (session.context for session in monitor.sessions)
    assert (first.node, first.conversation_id) == ("agent", "conversation-9")
    assert (second.node, second.conversation_id) == (None, "t1")


def test_the_callers_trace_goes_with_the_session_and_is_left_alone(any_llm: Any, monitor: RecordingMonitor) -> None:
    handler = NLACallbackHandler(monitor, llm=any_llm)
    tracer = TracerProvider().get_tracer("test")
    with tracer.start_as_current_span("agent") as span:
        call(any_llm, "stream", "x", config_of(handler))
        assert trace.get_current_span() is span
    context = span.get_span_context()
    expected = f"00-{context.trace_id:032x}-{context.span_id:016x}-"
    assert [session.traceparent[:-2] for session in monitor.sessions] == [expected]
    call(any_llm, "invoke", "x", config_of(handler))
    assert monitor.sessions[-1].traceparent is None


# --- things that go wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "forget"])
def test_a_cancelled_stream_leaves_nothing_open(any_llm: Any, monitor: RecordingMonitor, end: str) -> None:
    handler = NLACallbackHandler(monitor, llm=any_llm)
    stream = any_llm.stream("hello", config_of(handler))
    next(stream)
    if end == "close":
        stream.close()
    del stream
    gc.collect()
    assert monitor.open == []
    assert handler.stats.open_calls == 0


def test_a_cancelled_async_stream_leaves_nothing_open(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monitor: RecordingMonitor
) -> None:
    chat = ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=200)
    handler = NLACallbackHandler(monitor)

    async def run() -> None:
        stream = chat.astream("hello", config_of(handler))
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(run())
    gc.collect()
    deadline = time.monotonic() + 10
    while monitor.open and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (monitor.open, handler.stats.open_calls) == ([], 0)


def test_what_never_ends_is_bounded_and_counted(monitor: RecordingMonitor) -> None:
    clock = [0.0]
    tracker = Tracker(monitor, max_calls=10, max_runs=10, ttl_seconds=60, clock=lambda: clock[0])
    handler = NLACallbackHandler(monitor)
    handler._tracker = tracker
    handler._encoder = CharacterEncoder()
    for _ in range(25):
        handler.on_chain_start({}, {}, run_id=uuid.uuid4())
        handler.on_llm_start({}, ["x"], run_id=uuid.uuid4())
    stats = handler.stats
    assert (stats.open_calls, stats.open_runs, stats.expired, len(monitor.open)) == (10, 10, 15, 10)
    clock[0] = 61.0
    handler.on_llm_start({}, ["x"], run_id=uuid.uuid4())
    assert (handler.stats.open_calls, handler.stats.expired, len(monitor.open)) == (1, 25, 1)


class CharacterEncoder:
    outliner = Outliner(None)

    def encode_text(self, prompt: str, params: Any) -> list[int]:
        return [ord(letter) for letter in prompt]

    def encode_messages(self, messages: list[BaseMessage], params: Any) -> Encoded:
        text = "".join(message.text for message in messages)
        return Encoded([ord(letter) for letter in text], text)

    def serves(self, model_type: str, *, chat: bool) -> bool:
        return True


def test_a_handler_installed_twice_opens_one_session(
    any_llm: Any, monitor: RecordingMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = (NLACallbackHandler(monitor, llm=any_llm) for _ in range(2))
    config = {"callbacks": [one, two], "run_id": uuid.uuid4()}
    for how in ("invoke", "stream"):
        call(any_llm, how, "hello", {**config, "run_id": uuid.uuid4()})
    assert len(monitor.sessions) == 2
    assert (one.stats.duplicates, one.stats.sessions) == (2, 2)
    assert (monitor.open, monitor.stray) == ([], [])
    assert "Error in" not in caplog.text


@pytest.mark.parametrize("known", ["nothing", "another llm", "a tokenizer without a template"])
def test_an_api_model_is_counted_and_said_once(
    monitor: RecordingMonitor, llm: HuggingFacePipeline, caplog: pytest.LogCaptureFixture, known: str
) -> None:
    bare = byte_tokenizer(chat=False) if known.startswith("a tokenizer") else None
    handler = NLACallbackHandler(monitor, llm=llm if known == "another llm" else None, tokenizer=bare)
    api = FakeListChatModel(responses=["fine"])
    for _ in range(3):
        assert api.invoke("hi", config_of(handler)).content == "fine"
    assert handler.stats.unwatched == {"fake-list-chat-model": 3}
    assert caplog.text.count("is not watched") == 1
    assert monitor.sessions == []


def test_a_call_without_a_forward_pass_is_counted_and_said_once(
    monitor: RecordingMonitor, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    handler = NLACallbackHandler(monitor, tokenizer=tokenizer)
    for _ in range(3):
        FakeListLLM(responses=["fine"]).invoke("hi", config_of(handler))
    assert handler.stats.without_activations == {}  # its forward pass may still be under way in the background
    handler._tracker._settle_seconds = 0.0
    assert handler.stats.without_activations == {"fake-list": 3}
    assert caplog.text.count("without one forward pass") == 1
    assert monitor.open == []


def test_the_monitors_tokenizer_is_used_when_nothing_else_is_known(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, llm: HuggingFacePipeline
) -> None:
    monitor = RecordingMonitor()
    handler = NLACallbackHandler(monitor)
    monitor.tokenizer = tokenizer
    with monitor.watching(model):
        llm.invoke("hello", config_of(handler))
    assert [session.forwards for session in monitor.sessions] == [1]


class _Broken(RecordingMonitor):
    def open_session(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a fault of ours")


@pytest.mark.parametrize("how", ["invoke", "stream"])
def test_a_fault_of_ours_never_reaches_the_agent(
    any_llm: Any, model: LlamaForCausalLM, how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NLA_MONITOR_STRICT")
    monitor = _Broken()
    call(any_llm, how, "hello", config_of(NLACallbackHandler(monitor, llm=any_llm)))
    call(any_llm, how, "hello", config_of(NLACallbackHandler(monitor, llm=any_llm)))
    assert sum(monitor.guard.faults.values()) == 2
    assert caplog.text.count("a fault of ours\nTraceback") <= 1


def test_an_error_of_the_model_reaches_the_caller_and_closes_the_session(
    monitor: RecordingMonitor, llm: HuggingFacePipeline, model: LlamaForCausalLM
) -> None:
    handler = NLACallbackHandler(monitor, llm=llm)
    hook = model.register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError("out of memory")))
    try:
        with pytest.raises(MemoryError, match="out of memory"):
            llm.invoke("hello", config_of(handler))
    finally:
        hook.remove()
    assert (monitor.open, handler.stats.open_calls, handler.stats.without_activations) == ([], 0, {})


def test_a_detached_monitor_is_said(llm: HuggingFacePipeline, caplog: pytest.LogCaptureFixture) -> None:
    class Detached(RecordingMonitor):
        def open_session(self, *args: Any, **kwargs: Any) -> Any:
            return None

    handler = NLACallbackHandler(Detached(), llm=llm)
    llm.invoke("hello", config_of(handler))
    llm.invoke("hello", config_of(handler))
    assert handler.stats.sessions == 0
    assert caplog.text.count("attached to no model") == 1


def test_unknown_end_events_and_odd_payloads_are_harmless(monitor: RecordingMonitor, llm: HuggingFacePipeline) -> None:
    handler = NLACallbackHandler(monitor, llm=llm)
    nobody = uuid.uuid4()
    handler.on_llm_end(DONE, run_id=nobody)
    handler.on_llm_error(ValueError(), run_id=nobody)
    handler.on_chain_error(ValueError(), run_id=nobody)
    handler.on_tool_end(object(), run_id=nobody)
    handler.on_tool_error(ValueError(), run_id=nobody)
    handler.on_tool_start(None, "x", run_id=nobody, name=None)
    handler.on_tool_end(float("nan"), run_id=nobody)
    assert handler.stats.open_runs == 0


def test_a_handler_needs_a_local_model() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        NLACallbackHandler(RecordingMonitor(), llm=FakeListLLM(responses=["x"]))


def test_copies_are_the_handler_itself(monitor: RecordingMonitor) -> None:
    handler = NLACallbackHandler(monitor)
    assert copy.copy(handler) is copy.deepcopy(handler) is handler


def test_a_watched_model_needs_no_config(llm: HuggingFacePipeline, monitor: RecordingMonitor) -> None:
    watched = watch(llm, monitor)
    chain = RunnableLambda(lambda x: x) | watched
    run_id = uuid.uuid4()
    chain.invoke("hello", {"run_id": run_id})
    assert [(s.forwards, s.context.parent_run_id) for s in monitor.sessions] == [(1, str(run_id))]
    assert monitor.open == []


def test_a_thousand_runs_leave_nothing_behind_and_an_event_costs_little(caplog: pytest.LogCaptureFixture) -> None:
    monitor = RecordingMonitor()
    handler = NLACallbackHandler(monitor)
    handler._encoder = CharacterEncoder()
    started = time.perf_counter()
    for number in range(1000):
        chain, tool_run, run = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
        handler.on_chain_start({}, {}, run_id=chain)
        handler.on_tool_start({"name": "t"}, "", run_id=tool_run, parent_run_id=chain)
        handler.on_tool_end("a result", run_id=tool_run, parent_run_id=chain)
        handler.on_llm_start({}, ["read a result"], run_id=run, parent_run_id=chain)
        if number % 10:
            handler.on_llm_end(DONE, run_id=run)
        else:
            handler.on_llm_error(asyncio.CancelledError(), run_id=run)
        handler.on_chain_end({}, run_id=chain)
    seconds = time.perf_counter() - started
    stats = handler.stats
    assert (stats.open_calls, stats.open_runs, stats.sessions) == (0, 0, 1000)
    assert len(tracker_for(monitor)._ledgers) == 0
    # Generous for a busy machine: a few tens of microseconds an event.
    assert seconds / 6000 < 1e-3


def test_the_tracker_goes_with_its_monitor(caplog: pytest.LogCaptureFixture) -> None:
    monitor = RecordingMonitor()
    NLACallbackHandler(monitor)
    assert tracker_for(monitor) is tracker_for(monitor)
    from nla_monitor_langchain.tracker import trackers

    mine = tracker_for(monitor)
    del monitor
    gc.collect()
    assert mine not in trackers()


def test_messages_of_ours_are_warnings_on_our_logger(
    monitor: RecordingMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="nla_monitor"):
        FakeListChatModel(responses=["x"]).invoke("hi", config_of(NLACallbackHandler(monitor)))
    assert {record.name for record in caplog.records} == {"nla_monitor"}
