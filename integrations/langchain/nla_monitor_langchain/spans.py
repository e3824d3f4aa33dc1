"""Which span is a run's? Trace UIs show a finding on the span of the model call that it was made in.

OpenInference's instrumentation (0.1.80), which Phoenix is fed by, keeps its spans by run and makes none of them
current, so that the ambient context names an outer span or none at all. It is also a handler of LangChain's that mostly
stands behind ours: when a model call begins, its span is not there yet. So the span is asked for by the run's id, and
asked for again while the call goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from uuid import UUID

from opentelemetry.trace import Span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_MODULE = "openinference.instrumentation.langchain"
_PROPAGATOR = TraceContextTextMapPropagator()


def current_traceparent() -> str | None:
    """W3C trace context of the current span, or None. Read only: attaching one in a callback breaks other tracers."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent")


def finder(run_id: UUID) -> Callable[[], str | None] | None:
    """What finds the trace context of a run's own span, None until there is one; None: nobody makes such spans.

    Args:
        run_id: LangChain's.
    """
    instrumentation = sys.modules.get(_MODULE)  # what the host has not imported traces nothing
    instrumentor = getattr(instrumentation, "LangChainInstrumentor", None)
    if instrumentor is None or not instrumentor().is_instrumented_by_opentelemetry:
        return None
    return partial(_span_of, instrumentor().get_span, run_id)


def _span_of(get_span: Callable[[UUID], Span | None], run_id: UUID) -> str | None:
    span = get_span(run_id)
    context = None if span is None else span.get_span_context()
    if context is None or not context.is_valid:
        return None
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
