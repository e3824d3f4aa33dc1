"""A LangGraph agent seen through OpenInference's spans: the samples that the callback handler takes, to the bit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypedDict

import pytest
from langchain_core.tools import tool
from langchain_huggingface import HuggingFacePipeline
from langgraph.graph import END, START, StateGraph
from nla_monitor_langchain import NLACallbackHandler
from nla_monitor_opentelemetry import NLASpanProcessor
from nla_monitor_opentelemetry.attributes import prompt_text
from openinference.instrumentation import using_session
from openinference.instrumentation.langchain import LangChainInstrumentor
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

from nla_monitor.records import ActivationSample
from tests.agents_support import TOKENS, CaptureMonitor, vectors
from tests.langchain_support import byte_tokenizer, text_pipeline, tiny_llama

CONVERSATIONS = 3


class State(TypedDict):
    """What the agent knows."""

    notes: list[str]
    step: int


@tool
def count_rows(table: str) -> str:
    """Count rows."""
    return f"{table} holds 3 rows"


@tool
def find_owner(table: str) -> str:
    """Find an owner."""
    return f"{table} belongs to accounting"


def make_agent(llm: Any) -> Any:
    """Model, tool, model, other tool, model; the tools' results go into the next prompt."""

    def think(state: State) -> State:
        llm.invoke(" / ".join(state["notes"]))
        return {"notes": state["notes"], "step": state["step"] + 1}

    def act(state: State) -> State:
        chosen = (count_rows, find_owner)[(state["step"] - 1) % 2]
        result = chosen.invoke({"table": state["notes"][0]})
        return {"notes": [*state["notes"], result], "step": state["step"]}

    graph = StateGraph(State)
    graph.add_node("think", think)
    graph.add_node("act", act)
    graph.add_edge(START, "think")
    graph.add_conditional_edges("think", lambda state: END if state["step"] > 2 else "act")
    graph.add_edge("act", "think")
    return graph.compile()


@pytest.fixture
def pipe() -> Any:
    return text_pipeline(tiny_llama(), byte_tokenizer(), max_new_tokens=TOKENS)


@contextmanager
def instrumented(*processors: Any) -> Iterator[None]:
    provider = TracerProvider(shutdown_on_exit=False)
    for one in processors:
        provider.add_span_processor(one)
    instrumentor = LangChainInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    try:
        yield
    finally:
        instrumentor.uninstrument()


def converse(agent: Any, number: int, **config: Any) -> None:
    with using_session(f"c-{number}"):
        settings = {**config, "configurable": {"thread_id": f"c-{number}"}}
        agent.invoke({"notes": [f"table {number}"], "step": 0}, settings)


def at_once(work: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(CONVERSATIONS) as pool:
        list(pool.map(work, range(CONVERSATIONS)))


def told(samples: list[ActivationSample]) -> dict[Any, tuple[Any, ...]]:
    """What each text's samples say of where they were taken."""
    found: dict[Any, tuple[Any, ...]] = {}
    for sample in samples:
        if sample.agent is not None:
            said = (sample.agent.tool, sample.agent.conversation_id)
            assert found.setdefault(sample.sequence_id, said) == said
    return found


def test_the_same_samples_as_with_the_handler(pipe: Any) -> None:
    """Three conversations at once, two tools: run, tool, conversation and every bit of the vectors."""
    agent = make_agent(HuggingFacePipeline(pipeline=pipe))
    with CaptureMonitor(pipe.model, pipe.tokenizer) as monitor:
        handler = NLACallbackHandler(monitor, llm=HuggingFacePipeline(pipeline=pipe))
        at_once(lambda number: converse(agent, number, callbacks=[handler]))
        with_handler = list(monitor.samples) if monitor.runs() else []
    pipe.model.eval()
    with CaptureMonitor(pipe.model, pipe.tokenizer) as monitor:
        processor = NLASpanProcessor(monitor)
        with instrumented(processor):
            at_once(lambda number: converse(agent, number))
        runs = monitor.runs()
        with_spans = list(monitor.samples)
    assert len(runs) == 3 * CONVERSATIONS
    assert "" not in runs
    assert len(with_spans) == len(with_handler)
    assert vectors(with_spans) == vectors(with_handler)
    expected = {conversation for _, conversation in told(with_handler).values()}
    assert {conversation for _, conversation in told(with_spans).values()} == expected
    assert told(with_spans) == told(with_handler)
    assert {name for name, _ in told(with_spans).values()} == {None, "count_rows", "find_owner"}
    assert processor.stats.without_activations == {}
    assert processor.stats.ambiguous == 0


def test_each_conversation_has_one_root(pipe: Any) -> None:
    """The root is the span of the graph; each call has its own run under it."""
    agent = make_agent(HuggingFacePipeline(pipeline=pipe))
    with CaptureMonitor(pipe.model, pipe.tokenizer) as monitor, instrumented(NLASpanProcessor(monitor)):
        at_once(lambda number: converse(agent, number))
        runs = monitor.runs()
    roots: dict[Any, set[str]] = {}
    for run, samples in runs.items():
        for sample in samples:
            assert sample.agent is not None
            assert sample.agent.root_run_id != run
            roots.setdefault(sample.agent.conversation_id, set()).add(str(sample.agent.root_run_id))
    assert sorted(roots) == [f"c-{number}" for number in range(CONVERSATIONS)]
    assert all(len(found) == 1 for found in roots.values())


def test_handler_and_processor_together_take_no_sample_twice(pipe: Any) -> None:
    """Both installed: the prompt's tokens decide, and nobody counts a miss."""
    llm = HuggingFacePipeline(pipeline=pipe)
    agent = make_agent(llm)
    with CaptureMonitor(pipe.model, pipe.tokenizer) as monitor:
        handler, processor = NLACallbackHandler(monitor, llm=llm), NLASpanProcessor(monitor)
        with instrumented(processor):
            converse(agent, 0, callbacks=[handler])
        both = monitor.runs()
        assert handler.stats.without_activations == {}
        assert processor.stats.without_activations == {}
    with CaptureMonitor(pipe.model, pipe.tokenizer) as monitor:
        converse(agent, 0, callbacks=[NLACallbackHandler(monitor, llm=llm)])
        one = monitor.runs()
    assert sum(map(len, both.values())) == sum(map(len, one.values()))


def test_where_no_context_follows_it_is_counted(pipe: Any) -> None:
    """A pipeline streams from a bare thread, an async call's callbacks run in another context: misses, not mistakes."""
    llm = HuggingFacePipeline(pipeline=pipe)
    with CaptureMonitor(pipe.model, pipe.tokenizer) as monitor:
        processor = NLASpanProcessor(monitor)
        with instrumented(processor):
            list(llm.stream("hello"))
            asyncio.run(llm.ainvoke("hello again"))
        assert set(monitor.runs()) <= {""}
        assert processor.stats.without_activations == {"HuggingFacePipeline": 2}


@pytest.mark.slow
def test_five_hundred_calls_at_once(pipe: Any) -> None:
    """Every sample on the right call, tool and token, on no other: 100 % of at least 500 generations."""
    agent = make_agent(HuggingFacePipeline(pipeline=pipe))
    conversations = 168
    with CaptureMonitor(pipe.model, pipe.tokenizer, tokens_per_sequence=2, generated_tokens=2) as monitor:
        processor, expected = NLASpanProcessor(monitor), Prompts()
        with instrumented(processor, expected), ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda number: converse(agent, number), range(conversations)))
        runs = monitor.runs()
        assert monitor.capture.stats.dropped == {}
    assert len(runs) == 3 * conversations
    wrong = 0
    for run, samples in runs.items():
        prompt, tool_read = expected.of[run]
        ids = pipe.tokenizer(prompt)["input_ids"]
        for sample in samples:
            assert sample.agent is not None
            right = sample.agent.generated or sample.token_id == ids[sample.position]
            wrong += not right or sample.agent.tool != tool_read
            wrong += sample.agent.conversation_id != f"c-{prompt.split(' / ', maxsplit=1)[0].removeprefix('table ')}"
    assert wrong == 0
    assert processor.stats.ambiguous == 0
    assert processor.stats.without_activations == {}


class Prompts(SpanProcessor):
    """What the instrumentation itself says of each model call, when it is over."""

    def __init__(self) -> None:
        self.of: dict[str, tuple[str, str | None]] = {}

    def on_end(self, span: Any) -> None:
        if span.attributes.get("openinference.span.kind") == "LLM":
            prompt = prompt_text(span.attributes)
            assert prompt is not None
            read = {"3 rows": "count_rows", "accounting": "find_owner"}
            tool_read = next((name for end, name in read.items() if prompt.endswith(end)), None)
            self.of[f"{span.get_span_context().span_id:016x}"] = prompt, tool_read
