"""Spans of any framework over a local model: each forward on the innermost span of its context, or on none."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nla_monitor_opentelemetry import NLASpanProcessor
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Status, StatusCode, Tracer

from nla_monitor.records import Phase
from tests.agents_support import CaptureMonitor, generate
from tests.langchain_support import byte_tokenizer, tiny_llama

CHAT = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "tiny"}
AGENT = {"gen_ai.operation.name": "invoke_agent", "gen_ai.agent.name": "clerk"}
TOOL = {"gen_ai.operation.name": "execute_tool"}


@pytest.fixture
def model() -> Any:
    return tiny_llama()


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def monitor(model: Any, tokenizer: Any) -> Iterator[CaptureMonitor]:
    with CaptureMonitor(model, tokenizer) as made:
        yield made


@pytest.fixture
def processor(monitor: CaptureMonitor) -> NLASpanProcessor:
    return NLASpanProcessor(monitor)


@pytest.fixture
def tracer(processor: NLASpanProcessor) -> Tracer:
    return traced(processor)


def traced(*processors: Any) -> Tracer:
    provider = TracerProvider(shutdown_on_exit=False)
    for one in processors:
        provider.add_span_processor(one)
    return provider.get_tracer("a.framework")


def run_of(span: Any) -> str:
    return f"{span.get_span_context().span_id:016x}"


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def test_a_call_inside_an_agent(model: Any, monitor: CaptureMonitor, tracer: Tracer) -> None:
    """Run, parent, root, conversation, agent and trace context are those of the very span."""
    with (
        tracer.start_as_current_span("agent", attributes={**AGENT, "gen_ai.conversation.id": "c-1"}) as agent,
        tracer.start_as_current_span("step"),
        tracer.start_as_current_span("chat tiny", attributes=CHAT) as chat,
    ):
        generate(model, [5, 6, 7])
    (run,) = monitor.runs().items()
    assert run[0] == run_of(chat)
    for sample in run[1]:
        assert sample.phase is Phase.AGENT
        assert sample.agent is not None
        assert sample.agent.root_run_id == run_of(agent)
        assert sample.agent.conversation_id == "c-1"
        assert sample.attributes["agent"] == "clerk"
        assert sample.attributes["model_type"] == "tiny"
        assert sample.traceparent is not None
        assert sample.traceparent.split("-")[1:3] == [f"{chat.get_span_context().trace_id:032x}", run_of(chat)]
    assert {sample.agent.generated for sample in run[1] if sample.agent} == {False, True}


def test_attributes_set_after_the_start_count(model: Any, monitor: CaptureMonitor, tracer: Tracer) -> None:
    """Much instrumentation starts a bare span and says later what it is."""
    with tracer.start_as_current_span("call") as span:
        span.set_attributes(CHAT)
        generate(model, [5, 6, 7])
    assert set(monitor.runs()) == {run_of(span)}


@pytest.mark.parametrize("name", ["GET /chat", "SELECT"])
def test_spans_of_others_are_no_agents(model: Any, monitor: CaptureMonitor, tracer: Tracer, name: str) -> None:
    """A forward under a web request only is nobody's."""
    with tracer.start_as_current_span(name, attributes={"http.request.method": "GET"}):
        generate(model, [5, 6, 7])
    assert set(monitor.runs()) <= {""}


def test_after_its_span_ended_a_forward_is_nobodys(model: Any, monitor: CaptureMonitor, tracer: Tracer) -> None:
    """Neither thread nor context of an ended call keep anything."""
    with tracer.start_as_current_span("chat", attributes=CHAT) as span:
        generate(model, [5, 6, 7])
    generate(model, [8, 9, 10])
    tracer.start_span("chat", attributes=CHAT).end()
    generate(model, [11, 12, 13])
    assert set(monitor.runs()) - {""} == {run_of(span)}
    assert all(sample.agent is not None for sample in monitor.samples if sample.token_id in (5, 6, 7))


def test_spans_that_are_never_current(model: Any, monitor: CaptureMonitor, tracer: Tracer) -> None:
    """Callback-driven instrumentation starts and ends spans without making them current."""
    agent = tracer.start_span("agent", attributes=AGENT)
    above = trace.set_span_in_context(agent)
    runs = []
    for prompt in ([5, 6, 7], [8, 9, 10]):
        chat = tracer.start_span("chat", context=above, attributes=CHAT)
        generate(model, prompt)
        chat.end()
        runs.append(run_of(chat))
    generate(model, [11, 12, 13])
    agent.end()
    assert set(monitor.runs()) == {*runs, run_of(agent)}


def test_two_calls_announced_before_one_forward(model: Any, monitor: CaptureMonitor, tracer: Tracer) -> None:
    """A batch of prompts: which row is whose cannot be known, so that nobody gets any."""
    first, second = (tracer.start_span("chat", attributes=CHAT) for _ in range(2))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]]))
    first.end()
    second.end()
    assert set(monitor.runs()) <= {""}


def test_what_was_missed_is_counted(
    model: Any, monitor: CaptureMonitor, processor: NLASpanProcessor, tracer: Tracer, caplog: Any
) -> None:
    """Ambiguous calls, and calls without any forward; said once."""
    spans = [tracer.start_span("chat", attributes=CHAT) for _ in range(2)]
    generate(model, [5, 6, 7])
    for span in spans:
        span.end()
    for _ in range(2):
        with tracer.start_as_current_span("chat", attributes={**CHAT, "gen_ai.request.model": "gpt-x"}):
            pass
    with tracer.start_as_current_span("chat", attributes=CHAT) as failed:
        failed.set_status(Status(StatusCode.ERROR))
    assert processor.stats.ambiguous == 2
    assert processor.stats.without_activations == {"tiny": 2, "gpt-x": 2}
    assert [record.message.count("gpt-x") for record in caplog.records if "gpt-x" in record.message] == [1]
    assert "replay" in caplog.text


def test_a_call_within_a_call_is_one(
    model: Any, monitor: CaptureMonitor, processor: NLASpanProcessor, tracer: Tracer
) -> None:
    """Two instrumentations of one call: the inner span has the samples, the outer misses nothing."""
    with (
        tracer.start_as_current_span("chat", attributes=CHAT),
        tracer.start_as_current_span("chat again", attributes=CHAT) as inner,
    ):
        generate(model, [5, 6, 7])
    assert set(monitor.runs()) == {run_of(inner)}
    assert processor.stats.without_activations == {}


def test_installed_twice(model: Any, monitor: CaptureMonitor) -> None:
    """Two processors of one monitor take no sample twice and miss none."""
    one, two = NLASpanProcessor(monitor), NLASpanProcessor(monitor)
    tracer = traced(one, one, two)
    with tracer.start_as_current_span("chat", attributes=CHAT) as span:
        generate(model, [5, 6, 7])
    taken = len(monitor.runs()[run_of(span)])
    with traced(NLASpanProcessor(monitor)).start_as_current_span("chat", attributes=CHAT) as again:
        generate(model, [5, 6, 7])
    assert len(monitor.runs()[run_of(again)]) == taken
    assert one.stats.without_activations == {}


async def conversation(model: Any, tracer: Tracer, number: int, turns: int, expected: dict[str, Any]) -> None:
    """An async agent: model, tool, model; its forwards run in worker threads."""
    common = {"gen_ai.conversation.id": f"c-{number}"}
    for turn in range(turns):
        with tracer.start_as_current_span("invoke_agent", attributes={**AGENT, **common}) as agent:
            tool = None
            for step in range(2):
                prompt = [3 + number, 30 + turn, 100 + step]
                with tracer.start_as_current_span("chat tiny", attributes=CHAT) as chat:
                    await asyncio.sleep(0)
                    await asyncio.to_thread(generate, model, prompt)
                expected[run_of(chat)] = (tuple(prompt), run_of(agent), f"c-{number}", tool)
                with tracer.start_as_current_span(f"run {turn}", attributes=TOOL) as ran:
                    tool = f"tool-{number}-{turn}"
                    ran.set_attribute("gen_ai.tool.name", tool)
                    await asyncio.sleep(0)


def test_concurrent_conversations(model: Any, monitor: CaptureMonitor, tracer: Tracer) -> None:
    """Three conversations at once in one event loop: every sample on its call, conversation and tool."""
    expected: dict[str, Any] = {}

    async def main() -> None:
        await asyncio.gather(*(conversation(model, tracer, number, 4, expected) for number in range(3)))

    asyncio.run(main())
    runs = monitor.runs()
    assert set(runs) == set(expected)
    assert len(runs) == 24
    for run, samples in runs.items():
        prompt, root, conversation_id, tool = expected[run]
        for sample in samples:
            assert sample.agent is not None
            assert sample.agent.generated or sample.token_id == prompt[sample.position]
            assert (sample.agent.root_run_id, sample.agent.conversation_id) == (root, conversation_id)
            assert sample.agent.tool == tool


def test_threads_of_a_pool_with_contexts(model: Any, monitor: CaptureMonitor, tracer: Tracer) -> None:
    """The thread decides nothing: spans start here, forwards run in whichever worker, with the context handed on."""
    expected = {}
    with ThreadPoolExecutor(2) as pool:
        for prompt in ([5, 6, 7], [8, 9, 10], [11, 12, 13]):
            with tracer.start_as_current_span("chat", attributes=CHAT) as span:
                expected[run_of(span)] = prompt
                pool.submit(copy_context().run, generate, model, prompt).result()
    runs = monitor.runs()
    assert set(runs) == set(expected)
    for run, samples in runs.items():
        assert {s.token_id for s in samples if s.agent and not s.agent.generated} <= set(expected[run])


def in_bare_thread(function: Any, *arguments: Any) -> None:
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    thread.join()


def test_a_bare_thread_is_a_counted_miss(
    model: Any, monitor: CaptureMonitor, processor: NLASpanProcessor, tracer: Tracer
) -> None:
    """No context reaches it: its forward is nobody's, not somebody's."""
    with tracer.start_as_current_span("chat", attributes=CHAT):
        in_bare_thread(generate, model, [5, 6, 7])
    assert set(monitor.runs()) <= {""}
    assert processor.stats.without_activations == {"tiny": 1}


def test_a_bare_thread_is_reached_by_the_prompts_tokens(model: Any, tokenizer: Any, monitor: CaptureMonitor) -> None:
    """Where the span tells the prompt at its start and the tokenizer is known."""
    tracer = traced(NLASpanProcessor(monitor, tokenizer=tokenizer))
    messages = [{"role": "user", "parts": [{"type": "text", "content": "hello"}]}]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    said = {**CHAT, "gen_ai.input.messages": json.dumps(messages)}
    with tracer.start_as_current_span("chat", attributes=said) as span:
        in_bare_thread(generate, model, list(rendered["input_ids"]))
    assert set(monitor.runs()) == {run_of(span)}


def test_a_tool_is_known_by_the_prompt(model: Any, tokenizer: Any, monitor: CaptureMonitor, tracer: Tracer) -> None:
    """Messages say more than the order of spans: the tool and the id of its call."""
    messages = [
        {"role": "user", "parts": [{"type": "text", "content": "how many?"}]},
        {"role": "assistant", "parts": [{"type": "tool_call", "id": "call-7", "name": "count", "arguments": {}}]},
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "call-7", "response": "3"}]},
    ]
    said = {**CHAT, "gen_ai.input.messages": json.dumps(messages)}
    with tracer.start_as_current_span("chat", attributes=said):
        generate(model, [5, 6, 7])
    (samples,) = monitor.runs().values()
    assert {(s.agent.tool, s.agent.tool_call_id) for s in samples if s.agent} == {("count", "call-7")}


def test_overlapping_calls_of_one_agent_name_no_tool(model: Any, monitor: CaptureMonitor, tracer: Tracer) -> None:
    """Where the order of spans could mean either, the tool is left out."""
    with tracer.start_as_current_span("agent", attributes=AGENT) as agent:
        above = trace.set_span_in_context(agent)
        left = tracer.start_span("chat", context=above, attributes=CHAT)
        generate(model, [5, 6, 7])
        right = tracer.start_span("chat", context=above, attributes=CHAT)
        generate(model, [8, 9, 10])
        left.end()
        with tracer.start_as_current_span("run tool", attributes={**TOOL, "gen_ai.tool.name": "t"}):
            pass
        with tracer.start_as_current_span("chat", attributes=CHAT) as after:
            generate(model, [11, 12, 13])
        right.end()
    assert {s.agent.tool for s in monitor.runs()[run_of(after)] if s.agent} == {None}


@pytest.mark.parametrize("error", [ValueError("broken"), asyncio.CancelledError(), KeyboardInterrupt()])
def test_an_agent_that_fails_or_is_cancelled(
    model: Any, monitor: CaptureMonitor, processor: NLASpanProcessor, tracer: Tracer, error: BaseException
) -> None:
    """The host's own exception passes untouched; nothing stays open."""

    def agent() -> None:
        with (
            tracer.start_as_current_span("agent", attributes=AGENT),
            tracer.start_as_current_span("chat", attributes=CHAT),
        ):
            generate(model, [5, 6, 7])
            raise error

    with pytest.raises(type(error)) as caught:
        agent()
    assert caught.value is error
    assert processor.stats.open_spans == 0
    assert len(monitor.capture.sessions) == 0


def test_a_fault_of_ours_reaches_nobody(
    model: Any, monitor: CaptureMonitor, tracer: Tracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever breaks on our side, span and text are as without us."""
    monkeypatch.setenv("NLA_MONITOR_STRICT", "0")
    plain = generate(model, [5, 6, 7])

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("nla_monitor.agent_calls.AgentCalls.end", broken)
    monkeypatch.setattr("nla_monitor.agent_calls.AgentCalls._innermost", broken)
    with tracer.start_as_current_span("chat", attributes=CHAT):
        assert generate(model, [5, 6, 7]) == plain
    monkeypatch.setattr("nla_monitor.agent_calls.AgentCalls.start", broken)
    with tracer.start_as_current_span("chat", attributes=CHAT):
        assert generate(model, [5, 6, 7]) == plain
    assert set(monitor.guard.faults) == {"agents.find", "opentelemetry.on_start", "opentelemetry.on_end"}


def test_shut_down_it_lets_go(model: Any, monitor: CaptureMonitor, processor: NLASpanProcessor, tracer: Tracer) -> None:
    """Later spans are not looked at, open ones are given up; another provider may begin anew."""
    with tracer.start_as_current_span("chat", attributes=CHAT):
        generate(model, [5, 6, 7])
        processor.shutdown()
        generate(model, [8, 9, 10])
    assert processor.force_flush()
    assert len(monitor.capture.sessions) == 0
    with traced(NLASpanProcessor(monitor)).start_as_current_span("chat", attributes=CHAT) as anew:
        generate(model, [11, 12, 13])
    runs = monitor.runs()
    assert len(set(runs) - {""}) == 2
    assert run_of(anew) in runs


def test_of_two_providers_one_shuts_down(model: Any, monitor: CaptureMonitor) -> None:
    """The other one goes on; shutting down twice is harmless."""
    first, second = NLASpanProcessor(monitor), NLASpanProcessor(monitor)
    left, right = traced(first), traced(second)
    first.shutdown()
    first.shutdown()
    with left.start_as_current_span("chat", attributes=CHAT):
        generate(model, [5, 6, 7])
    with right.start_as_current_span("chat", attributes=CHAT) as span:
        generate(model, [8, 9, 10])
    assert set(monitor.runs()) - {""} == {run_of(span)}


def test_late_calls_are_announced_before_the_thread_ends(monitor: CaptureMonitor, tokenizer: Any) -> None:
    """A provider that shuts down at once loses no call that was answered elsewhere; what has no prompt is counted."""
    monitor.source = SimpleNamespace(tokenizer=tokenizer)
    processor = NLASpanProcessor(monitor)
    tracer = traced(processor)
    for prompt in ("one", "two", None):
        with tracer.start_as_current_span("chat", attributes=CHAT) as span:
            span.set_attribute("output.value", f"answer {prompt}")
            if prompt is not None:
                span.set_attribute("llm.prompts", [prompt])
    stats = processor.stats
    processor.shutdown()
    assert processor.force_flush()
    assert {one.text for one in monitor.completions if one} == {"answer one", "answer two"}
    assert stats.ambiguous == 0
    assert processor.stats.without_activations == {"tiny": 1}


def test_spans_of_our_own_are_no_agents(model: Any, monitor: CaptureMonitor, processor: NLASpanProcessor) -> None:
    """The monitor does not watch itself."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    said = {"gen_ai.operation.name": "verbalize", "gen_ai.request.model": "av"}
    with provider.get_tracer("nla_monitor").start_as_current_span("nla_monitor.verbalize", attributes=said):
        generate(model, [5, 6, 7])
    assert set(monitor.runs()) <= {""}


def test_unsampled_spans_are_not_seen(model: Any, monitor: CaptureMonitor) -> None:
    """A sampler's drop reaches no processor: nothing is read for it, and nothing breaks."""
    provider = TracerProvider(sampler=trace_sampler_off(), shutdown_on_exit=False)
    provider.add_span_processor(NLASpanProcessor(monitor))
    with provider.get_tracer("a").start_as_current_span("chat", attributes=CHAT):
        generate(model, [5, 6, 7])
    assert set(monitor.runs()) <= {""}


def trace_sampler_off() -> Any:
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

    return ALWAYS_OFF
