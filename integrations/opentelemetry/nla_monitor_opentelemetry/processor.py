"""``NLASpanProcessor``: whatever framework drives a local model, the spans that it emits say whose forward it is.

No code of the agent changes. A processor is told of spans as they start and end, in the thread that does so. Most
instrumentations tell the prompt only at the end, when the forward is long over, and some even the kind of the span.
So a forward is tied to the innermost open span of the context that it runs in (``nla_monitor.agent_calls``), looked up
when the forward starts; attributes are read then, as far as they are set.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context, get_value
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace import Span as SdkSpan
from opentelemetry.trace import SpanContext, StatusCode

from nla_monitor import semconv
from nla_monitor.agent_calls import CallStats, SpanMonitor, shared
from nla_monitor.agent_spans import CallInfo, Span, ToolResult
from nla_monitor.records import AgentContext, Completion, Scalar
from nla_monitor_opentelemetry import attributes as told
from nla_monitor_opentelemetry import visible
from nla_monitor_opentelemetry.attributes import Attributes, Kind
from nla_monitor_opentelemetry.late import LateCall, LateCalls
from nla_monitor_opentelemetry.prompts import PromptEncoder


@dataclass(frozen=True, slots=True)
class _Step:
    """What is kept of a span while it is open."""

    span: ReadableSpan
    scope: str
    conversation: str | None
    """From the context in which it was started."""

    @property
    def said(self) -> Attributes:
        """Its attributes, as far as they are set."""
        return self.span.attributes or {}

    @property
    def kind(self) -> Kind | None:
        return told.kind_of(self.said, self.scope)


class NLASpanProcessor(SpanProcessor):
    """Ties activations of a local model to the GenAI or OpenInference span that caused them.

        provider = TracerProvider()
        provider.add_span_processor(NLASpanProcessor(monitor))

    Samples of a model call then carry ``agent_run_id`` (the span's id), ``parent_run_id``, ``root_run_id`` (outermost
    span of an agent), the tool whose result the model reads, the conversation and the trace context of that very span.

    What it can know is what the context of a forward says. The model must run in the context of its span: the same
    thread, a task, ``asyncio.to_thread``, any executor that hands contexts on. Into a bare thread no context follows;
    there a forward is recognised by its prompt's tokens, if the span tells the prompt when it starts and ``tokenizer``
    is given. Forwards that cannot be tied to one span surely are given to none; the misses are in ``stats``.
    Spans that a sampler drops never reach a processor.

    Where the monitor has a source of its own (``Monitor.attach_source``: replay), calls that no forward was seen of are
    given to it with prompt and answer as their spans tell them at the end.

    With ``capture.store_transcript`` the text that spans tell of model calls is kept as the conversation's transcript.

    Two processors of one monitor share their state. No exception leaves it.

    Args:
        monitor: a ``Monitor`` attached to the model.
        tokenizer: of the model; makes prompts that spans tell at their start into tokens, in the thread that starts the
            span (as long as tokenizing the prompt takes). None: prompts are looked at only for a source that reads
            calls when they are over, with its tokenizer and on a thread of ours.
    """

    def __init__(self, monitor: SpanMonitor, *, tokenizer: Any = None) -> None:
        self._monitor = monitor
        self._calls = shared(monitor, "opentelemetry", _Spans)
        self._encoder = None if tokenizer is None else PromptEncoder(tokenizer)
        self._on = True
        self._late = LateCalls(self._calls, monitor.guard, lambda: tokenizer or _tokenizer_of_source(monitor))

    @property
    def stats(self) -> CallStats:
        """Counters of all processors of this monitor."""
        return self._calls.stats

    def on_start(self, span: SdkSpan, parent_context: Context | None = None) -> None:
        """A span has started, in the calling thread."""
        with self._monitor.guard("opentelemetry.on_start"):
            scope = "" if span.instrumentation_scope is None else span.instrumentation_scope.name
            context = span.get_span_context()
            if not self._on or context is None or scope == semconv.SCOPE:
                return
            session = get_value(told.SESSION_ID, parent_context)
            step = _Step(span, scope, None if session is None else str(session))
            kind = step.kind
            parent = None if span.parent is None else key_of(span.parent)
            started = self._calls.start(key_of(context), parent, step, mark=kind is not None)
            if started is not None and self._encoder is not None and kind in (Kind.MODEL, Kind.OTHER):
                ids = self._encoder.encode(step.said)
                if ids is not None:
                    self._calls.open_prompt(started, ids)

    def on_end(self, span: ReadableSpan) -> None:
        """A span has ended: only now some instrumentations say what it was."""
        with self._monitor.guard("opentelemetry.on_end"):
            context = span.get_span_context()
            scope = "" if span.instrumentation_scope is None else span.instrumentation_scope.name
            if context is None or scope == semconv.SCOPE:
                return
            said = span.attributes or {}
            kind = told.kind_of(said, scope)
            tool = None
            if kind is Kind.TOOL:
                tool = ToolResult(told.tool_of(said) or span.name, key_of(context), told.tool_call_of(said))
            failed = span.status.status_code is StatusCode.ERROR
            self._end(key_of(context), said, kind, tool, name=told.model_of(said) or span.name, failed=failed)

    def _end(
        self, key: str, said: Attributes, kind: Kind | None, tool: ToolResult | None, *, name: str, failed: bool
    ) -> None:
        call = kind is Kind.MODEL
        # Answers are looked at only where somebody runs them again.
        elsewhere = call and self._monitor.source is not None and not failed
        answer = told.answer_text(said) if elsewhere else None
        completion = None if answer is None else Completion(text=answer)
        ended = self._calls.end(
            key,
            model_call=call,
            name=name,
            failed=failed,
            completion=completion,
            tool=tool,
            read_later=completion is not None,
        )
        if call and ended is not None and self._calls.keeps_text:
            text = dict(said)  # read on the transcript's own thread
            self._calls.said(ended, partial(visible.prompt, text), None if failed else partial(visible.answer, text))
        if completion is not None and ended is not None and not (ended.claimed or ended.opened):
            self._late.put(LateCall(self._calls.info(ended), dict(said), completion))

    def shutdown(self) -> None:
        """The provider shuts down; with the monitor's last processor open sessions are closed."""
        with self._monitor.guard("opentelemetry.shutdown"):
            if self._on:
                self._on = False
                self._late.close()
                self._calls.release()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Wait until calls that were answered elsewhere are announced; for samples there is ``Monitor.flush``."""
        return self._late.flush(timeout_millis / 1000)


def _tokenizer_of_source(monitor: SpanMonitor) -> Any:
    return getattr(monitor.source, "tokenizer", None)


def key_of(context: SpanContext) -> str:
    """A span's id as it stands in ``agent_run_id``: 16 hexadecimal digits."""
    return f"{context.span_id:016x}"


class _Spans:
    """OpenTelemetry's spans, for ``AgentCalls``."""

    def current(self) -> str | None:
        """Key of the span that is current in the calling context."""
        context = trace.get_current_span().get_span_context()
        return key_of(context) if context.is_valid else None

    def is_step(self, span: Span) -> bool:
        """Whether a span is an agent's, by what it says now."""
        step: _Step = span.payload
        return step.kind is not None

    def describe(self, span: Span) -> CallInfo:
        """What the samples of a step carry."""
        step: _Step = span.payload
        around: list[_Step] = [one.payload for one in span.chain()]
        said, parent = step.said, step.span.parent
        tool, call_id, read = _reads(span, said)
        context = AgentContext(
            agent_run_id=span.key,
            parent_run_id=None if parent is None else key_of(parent),
            root_run_id=[one.key for one in span.chain() if self.is_step(one)][-1],
            tool=tool,
            node=_nearest(told.node_of(one.said) for one in around),
            conversation_id=_nearest(told.conversation_of(one.said) or one.conversation for one in around),
            tool_call_id=call_id,
        )
        name = told.model_of(said) or step.span.name
        extra: dict[str, Scalar] = {"model_type": name}
        agent = _nearest(told.agent_of(one.said) for one in around)
        if agent is not None:
            extra["agent"] = agent
        if read is not None:
            extra["tool_run_id"] = read.run_id
        return CallInfo(context, name, _traceparent(step.span.get_span_context()), extra)


def _reads(span: Span, said: Attributes) -> tuple[str | None, str | None, ToolResult | None]:
    """Tool and call id of the result that a call reads, and the tool's step: by messages, else by order."""
    by_order = span.model_fed()
    messages = told.prompt_messages(said)
    if not messages:
        return (None, None, None) if by_order is None else (by_order.tool, by_order.call_id, by_order)
    message = told.result_read(messages)
    if message is None:
        return None, None, None
    same = by_order is not None and message.tool in (None, by_order.tool)
    return message.tool or (by_order.tool if by_order else None), message.tool_call_id, by_order if same else None


def _nearest(values: Iterable[str | None]) -> str | None:
    return next((value for value in values if value is not None), None)


def _traceparent(context: SpanContext | None) -> str | None:
    """W3C trace context (version 00) of a span."""
    if context is None:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
