"""Spans over several sources: how late work in another process relates to the traces that it is about.

A batch of the worker covers samples of many traces whose spans ended long ago. The default (``link``) is a trace of its
own with one link per distinct source; ``child`` puts one span into every source's trace, for backends that hide links.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Literal

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from nla_monitor import semconv
from nla_monitor.guard import Guard

_PROPAGATOR = TraceContextTextMapPropagator()
_PROVIDER = "nla_monitor"

Relation = Literal["link", "child"]
Attributes = Mapping[str, AttributeValue]


def current_traceparent() -> str | None:
    """W3C ``traceparent`` of the caller's current span, or None: what a sample carries into the worker."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent")


@lru_cache(maxsize=1024)
def source_context(traceparent: str | None) -> Context | None:
    """The context of a source span; None when there is none or the text is no valid ``traceparent``."""
    if not traceparent:
        return None
    context = _PROPAGATOR.extract({"traceparent": traceparent}, context=Context())
    return context if trace.get_current_span(context).get_span_context().is_valid else None


def distinct_sources(traceparents: Iterable[str | None]) -> list[Context]:
    """Contexts of the distinct, valid sources, in order of first appearance."""
    contexts = (source_context(traceparent) for traceparent in dict.fromkeys(traceparents))
    return [context for context in contexts if context is not None]


class Spans:
    """Opens spans whose faults never reach the block that they surround.

    Args:
        tracer: of the injected or global provider.
        guard: swallows what a provider or processor raises.
        relation: how a batch span relates to its sources.
    """

    def __init__(self, tracer: trace.Tracer, guard: Guard, relation: Relation) -> None:
        self._tracer = tracer
        self._guard = guard
        self._relation = relation

    @contextmanager
    def about(
        self,
        name: str,
        operation: str,
        traceparents: Iterable[str | None],
        attributes: Attributes,
        relation: Relation | None = None,
    ) -> Iterator[trace.Span]:
        """A span about work on ``traceparents``; it is the current span inside the block.

        An exception of the block leaves it unchanged; the span is marked with its type (never its text, which may hold
        content).
        """
        spans: Sequence[trace.Span] = ()
        with self._guard("telemetry.span"):
            sources = distinct_sources(traceparents)
            everything = {
                semconv.GEN_AI_OPERATION: operation,
                semconv.GEN_AI_PROVIDER: _PROVIDER,
                semconv.OPENINFERENCE_KIND: semconv.KIND_EVALUATOR,
                semconv.ATTR_BATCH_SOURCES: len(sources),
                **attributes,
            }
            spans = self._start(name, sources, everything, relation or self._relation)
        current = spans[0] if spans else trace.INVALID_SPAN
        with ExitStack() as stack:
            # The only telemetry call between start and end that could raise: attaching the context.
            with self._guard("telemetry.span"):
                stack.enter_context(
                    trace.use_span(current, end_on_exit=False, record_exception=False, set_status_on_exception=False)
                )
            failure: BaseException | None = None
            try:
                yield current
            except BaseException as error:
                failure = error
                raise
            finally:
                with self._guard("telemetry.span"):
                    _end(spans, failure)

    def _start(
        self, name: str, sources: Sequence[Context], attributes: Attributes, relation: Relation
    ) -> list[trace.Span]:
        if relation == "child" and sources:
            return [self._tracer.start_span(name, context=source, attributes=attributes) for source in sources]
        links = [trace.Link(trace.get_current_span(source).get_span_context()) for source in sources]
        # Without sources the span may nest in one of ours; with sources it is the root of its own trace.
        context = Context() if sources else None
        return [self._tracer.start_span(name, context=context, attributes=attributes, links=links)]


def _end(spans: Sequence[trace.Span], error: BaseException | None) -> None:
    for span in spans:
        if error is not None:
            span.set_attribute(semconv.ERROR_TYPE, type(error).__qualname__)
            span.set_status(trace.StatusCode.ERROR, type(error).__qualname__)
        span.end()
