"""Steps of an agent as a framework announces them (spans), and which tool's result a model call reads.

Frameworks say when a tool ran and what its name is; seldom which model call reads its result. From spans alone it
follows where the order leaves no choice: a tool that ran after a model call ended, in the innermost step around both,
is read by the next model call of that step. Where calls of one step overlap, the order says nothing, and neither do we.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from nla_monitor.records import AgentContext, Scalar

_PROPAGATOR: Final = TraceContextTextMapPropagator()

MAX_RESULTS: Final = 64
"""Unread tool results remembered for one step."""


@dataclass(frozen=True, slots=True)
class CallInfo:
    """What the samples of a model call will carry."""

    context: AgentContext
    model_type: str
    """By which calls are told apart in counters and warnings: the model's or the span's name."""
    traceparent: str | None = None
    attributes: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ToolResult:
    """A tool has returned something."""

    tool: str
    run_id: str
    """Key of its span."""
    call_id: str | None = None
    """The framework's id of the call that it answered."""


@dataclass(eq=False, slots=True)
class Span:
    """A step that has started; its owner's lock guards what changes."""

    key: str
    parents: tuple[Span, ...]
    """Open when it started, outermost first."""
    payload: Any
    """The framework's own span."""
    is_open: bool = True
    info: CallInfo | None = None
    """Set when a forward or a prompt asks for it."""
    opened: list[Any] = field(default_factory=list)
    """Sessions of known prompts."""
    here: Any = None
    """Session of forwards that are found by their context."""
    claimed: bool = False
    """Some forward is part of it, or of a step within it."""
    crowded: bool = False
    """Its forward could be another's as well."""
    reads: tuple[ToolResult, ...] = ()
    """Results that were unread when its model was fed."""
    asked: bool = False
    """A model call within it has ended: a tool that runs now was asked for by one."""
    running: int = 0
    """Model calls within it that a forward was seen of and that have not ended."""
    runs: bool = False
    """It is such a call itself."""
    counted: bool = False
    """It is among the ``running`` of its parents."""
    mixed: bool = False
    """Model calls within it have overlapped."""
    unread: list[ToolResult] = field(default_factory=list)

    def chain(self) -> Iterator[Span]:
        """The step itself and those around it, innermost first."""
        yield self
        yield from reversed(self.parents)

    def claim(self) -> None:
        """A forward is part of it."""
        if not self.runs:
            self.runs = True
            self.counted = not any(step.runs for step in self.parents)  # a call within a call is one call
            if self.counted:
                for step in self.parents:
                    step.mixed = step.mixed or step.running > 0
                    step.running += 1
        for step in self.chain():
            step.claimed = True

    def model_fed(self) -> ToolResult | None:
        """Its model is about to read: the newest tool result that it must be reading, or None."""
        scope = next((step for step in reversed(self.parents) if step.unread), None)
        if scope is None or scope.mixed:
            return None
        self.reads = tuple(scope.unread)
        return self.reads[-1]

    def model_ended(self, *, failed: bool) -> None:
        """It was a model call and has ended; what it read is read, unless it failed."""
        for step in self.parents:
            step.asked = True
            if not failed:
                step.unread = [result for result in step.unread if result not in self.reads]

    def tool_ended(self, result: ToolResult) -> None:
        """It was a tool and has returned."""
        for number in range(len(self.parents) - 1, -1, -1):
            step = self.parents[number]
            if step.runs and number:  # a turn that called the model and now runs what it asked for
                step = self.parents[number - 1]
            elif not step.asked:
                continue
            step.unread = [*step.unread[1 - MAX_RESULTS :], result]
            return

    def ended(self) -> None:
        """It has ended."""
        self.is_open = False
        self.runs = False
        if self.counted:
            for step in self.parents:
                step.running -= 1


def current_traceparent() -> str | None:
    """W3C trace context of OpenTelemetry's current span, or None."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent")
