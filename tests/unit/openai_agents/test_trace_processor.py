"""The OpenAI Agents SDK over a local model: each forward on its agent, turn and call."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from agents import (
    Agent,
    ModelResponse,
    RunConfig,
    RunContextWrapper,
    Runner,
    Usage,
    function_tool,
    set_trace_processors,
    set_tracing_disabled,
)
from agents.models.interface import Model
from agents.tracing import generation_span, get_current_span
from nla_monitor_openai_agents import NLARunHooks, NLATraceProcessor
from nla_monitor_openai_agents.messages import chat_messages
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
)

from tests.agents_support import CaptureMonitor, Spoken, generate
from tests.langchain_support import byte_tokenizer, tiny_llama

PLAN = ("count_rows", "find_owner", None)


class LocalModel(Model):
    """Weights in this process. It runs a real forward over the prompt; what it asks for follows a plan."""

    def __init__(self, weights: Any, tokenizer: Any, *, spans: bool = True, bare: bool = False) -> None:
        self.weights = weights
        self.tokenizer = tokenizer
        self.spans = spans
        self.bare = bare
        self.calls: dict[str, list[int]] = {}
        self.fail = False
        self.called = asyncio.Event()

    async def get_response(
        self,
        system_instructions: Any,
        input: Any,  # noqa: A002 -- the SDK's name
        *_: Any,
        **__: Any,
    ) -> ModelResponse:
        items = [{"role": "user", "content": input}] if isinstance(input, str) else list(input)
        encoded = self.tokenizer.apply_chat_template(
            chat_messages(system_instructions, items), add_generation_prompt=True, tokenize=True, return_dict=True
        )
        if self.spans:
            with generation_span(input=items, model="tiny"):
                await self._write(list(encoded["input_ids"]))
        else:
            await self._write(list(encoded["input_ids"]))
        wanted = PLAN[sum(item.get("type") == "function_call_output" for item in items)]
        output: Any = _answer() if wanted is None else _call(wanted, f"call-{len(items)}")
        return ModelResponse(output=[output], usage=Usage(), response_id=None)

    async def _write(self, ids: list[int]) -> None:
        span = get_current_span()
        self.calls["" if span is None else span.span_id] = ids
        self.called.set()
        if self.bare:
            done, loop = asyncio.Event(), asyncio.get_running_loop()

            def write() -> None:
                generate(self.weights, ids)
                loop.call_soon_threadsafe(done.set)

            threading.Thread(target=write).start()
            await done.wait()
            return
        await asyncio.to_thread(generate, self.weights, ids)
        if self.fail:
            raise RuntimeError("the model broke")

    async def stream_response(self, system_instructions: Any, input: Any, *_: Any, **__: Any) -> Any:  # noqa: A002
        answered = await self.get_response(system_instructions, input)
        response = Response(
            id="r",
            created_at=0,
            model="tiny",
            object="response",
            output=answered.output,
            tool_choice="auto",
            tools=[],
            parallel_tool_calls=False,
        )
        yield ResponseCompletedEvent(type="response.completed", sequence_number=0, response=response)


def _answer() -> Any:
    text = ResponseOutputText(text="done", type="output_text", annotations=[])
    return ResponseOutputMessage(id="m", content=[text], role="assistant", status="completed", type="message")


def _call(name: str, call_id: str) -> Any:
    return ResponseFunctionToolCall(name=name, call_id=call_id, arguments='{"table": "sales"}', type="function_call")


@function_tool
def count_rows(table: str) -> str:
    """Count rows."""
    return f"{table} holds 3 rows"


@function_tool
def find_owner(table: str) -> str:
    """Find an owner."""
    return f"{table} belongs to accounting"


@pytest.fixture
def weights() -> Any:
    return tiny_llama()


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def monitor(weights: Any, tokenizer: Any) -> Iterator[CaptureMonitor]:
    with CaptureMonitor(weights, tokenizer) as made:
        yield made


@pytest.fixture
def processor(monitor: CaptureMonitor) -> Iterator[NLATraceProcessor]:
    made = NLATraceProcessor(monitor)
    set_tracing_disabled(False)
    set_trace_processors([made])
    yield made
    set_trace_processors([])


def clerk(model: LocalModel) -> Agent[Any]:
    return Agent(name="clerk", instructions="Count.", model=model, tools=[count_rows, find_owner])


async def converse(model: LocalModel, number: int, **settings: Any) -> None:
    config = RunConfig(group_id=f"c-{number}", workflow_name="w")
    await Runner.run(clerk(model), f"question {number}", run_config=config, **settings)


def three_at_once(model: LocalModel, **settings: Any) -> None:
    async def main() -> None:
        await asyncio.gather(*(converse(model, number, **settings) for number in range(3)))

    asyncio.run(main())


@pytest.mark.parametrize("spans", [True, False], ids=["generation span", "turn only"])
def test_three_runs_at_once(
    weights: Any, tokenizer: Any, monitor: CaptureMonitor, processor: NLATraceProcessor, spans: bool
) -> None:
    """Each sample on its span, conversation, agent and tool; nothing on the others."""
    model = LocalModel(weights, tokenizer, spans=spans)
    three_at_once(model)
    runs = monitor.runs()
    assert len(runs) == 9
    assert set(runs) == set(model.calls)
    tools: dict[Any, list[Any]] = {}
    roots: dict[Any, set[Any]] = {}
    for run, samples in runs.items():
        ids = model.calls[run]
        context = samples[0].agent
        assert context is not None
        tools.setdefault(context.conversation_id, []).append((len(ids), context.tool))
        roots.setdefault(context.conversation_id, set()).add(context.root_run_id)
        for sample in samples:
            assert sample.agent is not None
            assert sample.agent.generated or sample.token_id == ids[sample.position]
            assert sample.attributes["agent"] == "clerk"
            assert (sample.agent.tool, sample.agent.root_run_id) == (context.tool, context.root_run_id)
            if spans:
                assert (sample.agent.tool is None) is (sample.agent.tool_call_id is None)
    assert sorted(tools) == ["c-0", "c-1", "c-2"]
    assert all([tool for _, tool in sorted(found)] == [None, "count_rows", "find_owner"] for found in tools.values())
    assert all(len(found) == 1 for found in roots.values())
    assert processor.stats.without_activations == {}
    assert processor.stats.open_spans == 0


def test_without_the_processor_the_agent_does_the_same(weights: Any, tokenizer: Any) -> None:
    """Prompts that the model is fed, watched or not."""
    plain = LocalModel(weights, tokenizer, spans=False)
    set_trace_processors([])
    asyncio.run(converse(plain, 0))
    with CaptureMonitor(weights, tokenizer) as monitor:
        set_trace_processors([NLATraceProcessor(monitor)])
        watched = LocalModel(weights, tokenizer, spans=False)
        asyncio.run(converse(watched, 0))
        set_trace_processors([])
    assert list(watched.calls.values()) == list(plain.calls.values())


def test_hooks_reach_a_bare_thread(weights: Any, tokenizer: Any, monitor: CaptureMonitor, processor: Any) -> None:
    """By the prompt's tokens; without the hooks these forwards are a counted miss."""
    three_at_once(LocalModel(weights, tokenizer, bare=True))
    assert set(monitor.runs()) <= {""}
    assert processor.stats.without_activations == {"tiny": 9}
    three_at_once(LocalModel(weights, tokenizer, bare=True), hooks=NLARunHooks(monitor, tokenizer=tokenizer))
    runs = {run: samples for run, samples in monitor.runs().items() if run}
    assert len(runs) == 9
    assert {sample.agent.tool for samples in runs.values() for sample in samples if sample.agent} == {
        None,
        "count_rows",
        "find_owner",
    }
    assert {completion.text for completion in monitor.completions if completion} == {"done"}


@pytest.mark.parametrize("complete", [True, False], ids=["to its end", "left early"])
def test_a_streamed_run(
    weights: Any, tokenizer: Any, monitor: CaptureMonitor, processor: NLATraceProcessor, complete: bool
) -> None:
    """Its model runs in a task of the SDK's own."""
    model = LocalModel(weights, tokenizer)

    async def main() -> None:
        result = Runner.run_streamed(clerk(model), "question", run_config=RunConfig(group_id="c"))
        async for event in result.stream_events():
            if not complete and event.type == "raw_response_event":
                result.cancel()

    asyncio.run(main())
    runs = monitor.runs()
    assert set(runs) == set(model.calls)
    assert len(runs) == (3 if complete else 1)
    assert {sample.agent.conversation_id for samples in runs.values() for sample in samples if sample.agent} == {"c"}
    assert processor.stats.open_spans == 0
    assert len(monitor.capture.sessions) == 0


@pytest.mark.parametrize("spans", [True, False], ids=["by spans", "by hooks"])
def test_the_visible_side_is_told_once(
    weights: Any, tokenizer: Any, monitor: CaptureMonitor, processor: NLATraceProcessor, spans: bool
) -> None:
    """By generation spans where there are any, by the hooks otherwise."""
    monitor.transcripts = Spoken()
    model = LocalModel(weights, tokenizer, spans=spans)
    asyncio.run(converse(model, 0, hooks=NLARunHooks(monitor, tokenizer=tokenizer)))
    last = max(monitor.transcripts.prompts.values(), key=len)
    assert len(monitor.transcripts.prompts) == len(monitor.transcripts.answers) == 3
    assert [(one.role, one.name) for one in last if one.role != "system"] == [
        ("user", None),
        ("assistant", None),
        ("tool", "count_rows"),
        ("assistant", None),
        ("tool", "find_owner"),
    ]
    if not spans:
        said = [one for one in monitor.transcripts.answers.values() if one]
        assert [[call["name"] for call in one.tool_calls] for one in said] == [["count_rows"], ["find_owner"], []]
        assert said[-1].text == "done"


def test_hooks_work_with_tracing_off(weights: Any, tokenizer: Any, monitor: CaptureMonitor) -> None:
    """No span is made then; tokens and the messages' call ids are all there is."""
    set_tracing_disabled(True)
    try:
        hooks = NLARunHooks(monitor, tokenizer=tokenizer)
        asyncio.run(converse(LocalModel(weights, tokenizer), 0, hooks=hooks))
    finally:
        set_tracing_disabled(False)
    assert len(monitor.runs()) == 3
    assert hooks.stats.open_spans == 0


def test_a_model_that_fails(weights: Any, tokenizer: Any, monitor: CaptureMonitor, processor: Any) -> None:
    """The host gets its own exception; nothing of ours stays open."""
    model = LocalModel(weights, tokenizer)
    model.fail = True
    hooks = NLARunHooks(monitor, tokenizer=tokenizer)
    with pytest.raises(RuntimeError, match="the model broke"):
        asyncio.run(converse(model, 0, hooks=hooks))
    assert len(monitor.runs()) == 1
    model.fail = False
    asyncio.run(converse(model, 1, hooks=hooks))
    assert len(monitor.runs()) == 4


def test_a_call_whose_end_was_never_told(tokenizer: Any, monitor: CaptureMonitor) -> None:
    """The next call of the same run closes it."""
    hooks = NLARunHooks(monitor, tokenizer=tokenizer)
    context: Any = RunContextWrapper(None)
    agent: Agent[Any] = Agent(name="clerk")

    async def main() -> None:
        for _ in range(3):
            await hooks.on_llm_start(context, agent, "Count.", [{"role": "user", "content": "hello"}])
        assert hooks.stats.open_spans == 1
        assert len(monitor.capture.sessions) == 1
        await hooks.on_llm_end(context, agent, ModelResponse(output=[_answer()], usage=Usage(), response_id=None))

    asyncio.run(main())
    assert hooks.stats.open_spans == 0
    assert len(monitor.capture.sessions) == 0


def test_a_cancelled_run(weights: Any, tokenizer: Any, monitor: CaptureMonitor, processor: Any) -> None:
    """Cancelled while the model writes: its spans end, and so do our sessions."""
    model = LocalModel(weights, tokenizer)

    async def main() -> None:
        task = asyncio.create_task(converse(model, 0))
        await model.called.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert processor.stats.open_spans == 0
    assert len(monitor.capture.sessions) == 0


def test_a_fault_of_ours_reaches_nobody(
    weights: Any, tokenizer: Any, monitor: CaptureMonitor, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every entry point broken: the agent ends as it would."""
    monkeypatch.setenv("NLA_MONITOR_STRICT", "0")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("ours")

    hooks = NLARunHooks(monitor, tokenizer=tokenizer)
    for name in ("start", "end", "open_prompt", "_innermost"):
        monkeypatch.setattr(f"nla_monitor.agent_calls.AgentCalls.{name}", broken)
    asyncio.run(converse(LocalModel(weights, tokenizer), 0, hooks=hooks))
    assert {"openai_agents.on_span_start", "openai_agents.on_span_end"} <= set(monitor.guard.faults)
    processor.shutdown()
