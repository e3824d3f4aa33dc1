"""``NLATraceProcessor``: the SDK's own spans say which model call a forward is part of.

The SDK keeps its current span in a context variable, which follows the code into tasks and ``asyncio.to_thread``; a
forward belongs to the innermost of them (``nla_monitor.agent_calls``). A model that opens a generation or response span
has its samples there; one that opens none has them on the turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from agents.tracing import Span as SdkSpan
from agents.tracing import Trace, TracingProcessor, get_current_span, get_current_trace

from nla_monitor.agent_calls import CallStats, SpanMonitor, shared
from nla_monitor.agent_spans import CallInfo, Span, ToolResult, current_traceparent
from nla_monitor.records import AgentContext, Completion, Scalar
from nla_monitor_openai_agents.messages import answer_of, result_read, visible_answer, visible_prompt

FRAMEWORK = "openai_agents"

_MODEL_CALLS = ("generation", "response")
_NO_SPAN = "no-op"
"""Id of the SDK's spans where tracing is off."""


@dataclass(slots=True)
class Step:
    """What is kept of a span while it is open."""

    span: SdkSpan[Any] | None
    """None for a call that ``NLARunHooks`` announced."""
    name: str
    conversation: str | None
    messages: Sequence[Any] = ()
    """The call's input items, where hooks told them."""
    system: str | None = None
    """Its instructions, where hooks told them."""
    told: bool = False
    """A model call within it has told its text."""


class NLATraceProcessor(TracingProcessor):
    """Give it to ``agents.add_trace_processor``: no code of the agent changes.

    Samples of a model call carry the span's id as ``agent_run_id``, its parent, the outermost span of the run, the
    agent's name, the trace's ``group_id`` as conversation, the tool whose result the model reads, and the current
    OpenTelemetry context, if there is one. The SDK's own tracing must be on (the exporter need not be: with
    ``agents.set_trace_processors([NLATraceProcessor(monitor)])`` nothing leaves the process).

    Two processors of one monitor share their state. No exception leaves it.

    Args:
        monitor: a ``Monitor`` attached to the model.
    """

    def __init__(self, monitor: SpanMonitor) -> None:
        self._monitor = monitor
        self._calls = shared(monitor, FRAMEWORK, Spans)
        self._on = True

    @property
    def stats(self) -> CallStats:
        """Counters of all processors and hooks of this monitor."""
        return self._calls.stats

    def on_trace_start(self, trace: Trace) -> None:
        """A trace has started; its spans tell all that is needed."""

    def on_trace_end(self, trace: Trace) -> None:
        """A trace has ended."""

    def on_span_start(self, span: SdkSpan[Any]) -> None:
        """A span has started, in the calling context."""
        with self._monitor.guard("openai_agents.on_span_start"):
            if self._on and span.span_id != _NO_SPAN:
                self._calls.start(span.span_id, span.parent_id, Step(span, name_of(span), conversation()))

    def on_span_end(self, span: SdkSpan[Any]) -> None:
        """A span has ended."""
        with self._monitor.guard("openai_agents.on_span_end"):
            data, tool = span.span_data, None
            if data.type == "function":
                tool = ToolResult(str(data.name), span.span_id)
            answer = answer_of(getattr(data, "output", None)) if data.type == "generation" else None
            ended = self._calls.end(
                span.span_id,
                model_call=data.type in _MODEL_CALLS,
                name=name_of(span),
                failed=span.error is not None,
                completion=None if answer is None else Completion(text=answer),
                tool=tool,
            )
            if ended is not None and data.type == "generation" and data.input and self._calls.keeps_text:
                self._tell(ended, tuple(data.input), tuple(data.output or ()))

    def _tell(self, span: Span, prompt: Sequence[Any], output: Sequence[Any]) -> None:
        for step in span.parents[-1:]:
            step.payload.told = True
        self._calls.said(span, partial(visible_prompt, None, prompt), partial(visible_answer, output))

    def shutdown(self) -> None:
        """The application stops; with the monitor's last processor or hooks open sessions are closed."""
        with self._monitor.guard("openai_agents.shutdown"):
            if self._on:
                self._on = False
                self._calls.release()

    def force_flush(self) -> None:
        """Nothing waits here: samples are the monitor's (``Monitor.flush``)."""


class Spans:
    """The SDK's spans, for ``AgentCalls``."""

    def current(self) -> str | None:
        """Key of the SDK's current span in the calling context."""
        return current_span_id()

    def is_step(self, span: Span) -> bool:
        """Every span of the SDK is a step of an agent."""
        return True

    def describe(self, span: Span) -> CallInfo:
        """What the samples of a step carry."""
        step: Step = span.payload
        by_order = span.model_fed()
        messages = step.messages or getattr(getattr(step.span, "span_data", None), "input", None) or ()
        read = result_read(messages if isinstance(messages, Sequence) else ())
        tool = read.tool if read is not None else None
        call_id = read.call_id if read is not None else None
        around = [one.payload for one in span.chain()]
        context = AgentContext(
            agent_run_id=span.key,
            parent_run_id=span.parents[-1].key if span.parents else None,
            root_run_id=span.parents[0].key if span.parents else span.key,
            tool=tool or (by_order.tool if by_order is not None else None),
            conversation_id=step.conversation,
            tool_call_id=call_id or (by_order.call_id if by_order is not None else None),
        )
        extra: dict[str, Scalar] = {"model_type": step.name}
        agent = next((name for one in around if (name := _agent_of(one)) is not None), None)
        if agent is not None:
            extra["agent"] = agent
        if by_order is not None:
            extra["tool_run_id"] = by_order.run_id
        return CallInfo(context, step.name, current_traceparent(), extra)


def current_span_id() -> str | None:
    """Id of the SDK's current span in the calling context; None without one, and where tracing is off."""
    span = get_current_span()
    return None if span is None or span.span_id == _NO_SPAN else span.span_id


def conversation() -> str | None:
    """What the current trace names as its group: the conversation."""
    trace = get_current_trace()
    exported: Mapping[str, Any] = (trace.export() or {}) if trace is not None else {}
    group = exported.get("group_id")
    return None if group is None else str(group)


def name_of(span: SdkSpan[Any]) -> str:
    """The model's name, else what kind of span it is."""
    data = span.span_data
    return str(getattr(data, "model", None) or data.type)


def _agent_of(step: Step) -> str | None:
    data = getattr(step.span, "span_data", None)
    if data is None:
        return None
    if data.type == "agent":
        return str(data.name)
    return str(data.agent_name) if data.type == "turn" else None
