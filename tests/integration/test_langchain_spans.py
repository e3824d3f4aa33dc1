"""Beside OpenInference's instrumentation, each sample of the callback handler names the span of its own model call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_huggingface import HuggingFacePipeline
from nla_monitor_langchain import ChatNLAModel, NLACallbackHandler, watching
from nla_monitor_langchain.spans import finder
from nla_monitor_opentelemetry import NLASpanProcessor
from nla_monitor_opentelemetry.attributes import prompt_text
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

from nla_monitor.records import ActivationSample, uuid7
from tests.agents_support import CaptureMonitor
from tests.integration.test_agents_opentelemetry import at_once, converse, instrumented, make_agent
from tests.langchain_support import byte_tokenizer, text_pipeline, tiny_llama


class Calls(SpanProcessor):
    """The instrumentation's spans of model calls, by trace and span id, with their prompts."""

    def __init__(self) -> None:
        self.prompts: dict[tuple[str, str], str | None] = {}

    def on_end(self, span: Any) -> None:
        if span.attributes.get("openinference.span.kind") == "LLM":
            context = span.get_span_context()
            self.prompts[f"{context.trace_id:032x}", f"{context.span_id:016x}"] = prompt_text(span.attributes)


@pytest.fixture
def pipe() -> Any:
    return text_pipeline(tiny_llama(), byte_tokenizer(), max_new_tokens=4)


def place(sample: ActivationSample) -> tuple[str, str]:
    assert sample.traceparent is not None, "no trace context"
    _, trace_id, span_id, flags = sample.traceparent.split("-")
    assert int(flags, 16) & 1  # sampled; newer SDKs also say that the id is random
    return trace_id, span_id


def check(samples: list[ActivationSample], calls: Calls) -> None:
    """Every call's span has samples, no run has two spans, and prompt tokens are those of the span's prompt."""
    assert {place(sample) for sample in samples} == set(calls.prompts)
    runs = {(sample.agent.agent_run_id if sample.agent else None, place(sample)) for sample in samples}
    assert len(runs) == len(calls.prompts)


def test_conversations_at_once(pipe: Any) -> None:
    """Of a LangGraph agent with tools: prompts tell the calls apart, token by token."""
    llm, calls = HuggingFacePipeline(pipeline=pipe), Calls()
    agent = make_agent(llm)
    with CaptureMonitor(pipe.model, pipe.tokenizer) as monitor, instrumented(calls):
        handler = NLACallbackHandler(monitor, llm=llm)
        at_once(lambda number: converse(agent, number, callbacks=[handler]))
        monitor.runs()
    check(monitor.samples, calls)
    for sample in monitor.samples:
        ids = pipe.tokenizer(calls.prompts[place(sample)])["input_ids"]
        if sample.agent is not None and not sample.agent.generated:
            assert sample.token_id == ids[sample.position]


def test_by_the_span_processor(pipe: Any) -> None:
    """Which is fed by these very spans."""
    agent, calls = make_agent(HuggingFacePipeline(pipeline=pipe)), Calls()
    with CaptureMonitor(pipe.model, pipe.tokenizer) as monitor, instrumented(NLASpanProcessor(monitor), calls):
        at_once(lambda number: converse(agent, number))
        monitor.runs()
    check(monitor.samples, calls)


def test_the_call_s_span_goes_before_one_around_it(pipe: Any) -> None:
    """Somebody else's span is current: the trace is the same, the span is the call's own."""
    llm, calls = HuggingFacePipeline(pipeline=pipe), Calls()
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("of the host")
    with (
        CaptureMonitor(pipe.model, pipe.tokenizer) as monitor,
        instrumented(calls),
        tracer.start_as_current_span("request"),
    ):
        llm.invoke("hello", {"callbacks": [NLACallbackHandler(monitor, llm=llm)]})
        monitor.runs()
    check(monitor.samples, calls)


CHATS: dict[str, Callable[[Any, Any], Any]] = {
    "at once": lambda chat, config: chat.invoke([HumanMessage("hello")], config),
    "stream": lambda chat, config: list(chat.stream([HumanMessage("hello")], config)),
    "async": lambda chat, config: asyncio.run(chat.ainvoke([HumanMessage("hello")], config)),
}


@pytest.mark.parametrize("way", CHATS)
@pytest.mark.parametrize("ambient", [False, True])
def test_a_chat_model_of_ours(ambient: bool, way: str, pipe: Any) -> None:
    """Also where the handler is put in by ``watching``, behind the instrumentation's."""
    calls = Calls()
    chat = ChatNLAModel(model=pipe.model, tokenizer=pipe.tokenizer, max_new_tokens=4)
    with CaptureMonitor(pipe.model, pipe.tokenizer) as monitor, instrumented(calls):
        if ambient:
            with watching(monitor):
                CHATS[way](chat, {})
        else:
            CHATS[way](chat, {"callbacks": [NLACallbackHandler(monitor)]})
        monitor.runs()
    check(monitor.samples, calls)


def test_without_the_instrumentation_nothing_is_looked_for(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    llm = HuggingFacePipeline(pipeline=pipe)
    with instrumented():
        assert finder(uuid7()) is not None  # type: ignore[arg-type]  # whatever the run
    assert finder(uuid7()) is None  # type: ignore[arg-type]
    with CaptureMonitor(pipe.model, pipe.tokenizer) as monitor:
        llm.invoke("hello", {"callbacks": [NLACallbackHandler(monitor, llm=llm)]})
        assert monitor.runs()
    assert {sample.traceparent for sample in monitor.samples} == {None}
    assert capsys.readouterr().out == ""
