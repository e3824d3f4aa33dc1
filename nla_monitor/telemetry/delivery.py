"""What became of our own telemetry: each span, event and data point is exported, lost, or still waiting, and counted.

The SDK does not say. Its queue drops without a word to us when it is full, a failed export is gone, and ``force_flush``
returns True either way. So a gate in front of each batch processor counts what goes in and keeps the queue below its
limit, and the exporter's answers are counted behind it:

    emitted = exported + lost (queue_full, export_failed, unsent) + waiting

``unsent`` is what was left when the process had to end. A request whose answer never came counts as lost, although the
receiver may have it. Metrics are cumulative: a lost export of theirs is made good by the next one.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any, Final, Literal

from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
from opentelemetry.sdk._logs import LogRecordProcessor
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from nla_monitor import semconv

logger = logging.getLogger("nla_monitor.telemetry")

Signal = Literal["traces", "metrics", "logs"]

QUEUE_FULL: Final = "queue_full"
EXPORT_FAILED: Final = "export_failed"
UNSENT: Final = "unsent"
REASONS: Final = (QUEUE_FULL, EXPORT_FAILED, UNSENT)

_EXPORTERS: Final = "opentelemetry.exporter.otlp"


class Tally:
    """Counts of one signal on its way to one exporter; safe for use from several threads.

    Args:
        signal: ``traces``, ``metrics`` or ``logs``.
        exporter: by the name that the environment gives it.
        capacity: of the queue in front of it; None: there is none.
    """

    def __init__(self, signal: Signal, exporter: str, capacity: int | None = None) -> None:
        self.signal = signal
        self.exporter = exporter
        self._capacity = capacity
        self._begin()
        if hasattr(os, "register_at_fork"):
            begin = weakref.WeakMethod(self._begin)
            os.register_at_fork(after_in_child=lambda: (found := begin()) and found())

    def _begin(self) -> None:
        """From nothing; also in the child of a fork, where the SDK forgets its queue and the lock may never be free."""
        self._lock = threading.Lock()
        self._emitted = 0
        self._queued = 0
        self._exported = 0
        self._lost = dict.fromkeys(REASONS, 0)
        self._closed = False
        self.end: Callable[[], object] = lambda: None
        """Ends the exporter: a request that it would try again for a while is given up at once."""
        self._failing = False
        self._full = False

    def enter(self) -> bool:
        """A record is to be queued; False: there is no room, and it is lost."""
        with self._lock:
            self._emitted += 1
            if self._closed:
                self._lost[UNSENT] += 1
                return False
            if self._capacity is not None and self._queued >= self._capacity:
                self._lost[QUEUE_FULL] += 1
                first, self._full = not self._full, True
            else:
                self._queued += 1
                return True
        if first:
            logger.warning(
                "telemetry: %s come faster than they are exported (%s); what finds no room is lost and counted",
                self.signal,
                self.exporter,
            )
        return False

    def leave(self, count: int) -> None:
        """So many records have left the queue."""
        with self._lock:
            self._queued -= count

    def came(self, count: int) -> None:
        """So many records go straight to the exporter."""
        with self._lock:
            self._emitted += count

    def done(self, count: int, why: str | None) -> None:
        """An export has ended.

        Args:
            count: of its records.
            why: None: it was acknowledged; otherwise how it failed, in a word.
        """
        with self._lock:
            if self._closed:  # they were given up already
                return
            if why is None:
                self._exported += count
            else:
                self._lost[EXPORT_FAILED] += count
            lost = sum(self._lost.values())
            turned, self._failing = self._failing is (why is None), why is not None
        if not turned:
            return
        if why is None:
            logger.warning("telemetry: %s are exported again (%s); lost so far: %d", self.signal, self.exporter, lost)
        else:
            logger.warning(
                "telemetry: %s cannot be exported (%s, %s), trying on; what is lost is counted. Is the endpoint up, "
                "and are OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_EXPORTER_OTLP_HEADERS right?",
                self.signal,
                self.exporter,
                why,
            )

    def close(self) -> None:
        """Nobody waits any longer: what has no answer by now is lost."""
        with self._lock:
            self._closed = True
            self._lost[UNSENT] = 0
            self._lost[UNSENT] = self._emitted - self._exported - sum(self._lost.values())

    @property
    def counts(self) -> dict[str, int]:
        """``emitted``, ``exported``, ``waiting``, and what is lost by reason; the last four add up to the first."""
        with self._lock:
            waiting = self._emitted - self._exported - sum(self._lost.values())
            return {"emitted": self._emitted, "exported": self._exported, **self._lost, "waiting": waiting}


class CountedSpans(SpanProcessor):
    """The gate in front of a batch processor of spans.

    Args:
        inner: the batch processor, whose queue is no smaller than the tally's.
        tally: counts what comes.
    """

    def __init__(self, inner: SpanProcessor, tally: Tally) -> None:
        self._inner = inner
        self._tally = tally

    def on_start(self, span: Span, parent_context: Any = None) -> None:
        """Handed on."""
        self._inner.on_start(span, parent_context)

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a span that was sampled, if there is room."""
        if span.context is not None and span.context.trace_flags.sampled and self._tally.enter():
            self._inner.on_end(span)

    def shutdown(self) -> None:
        """Export what waits; as long as the SDK takes."""
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """As the SDK does: True says nothing of what arrived."""
        return self._inner.force_flush(timeout_millis)


class CountedLogs(LogRecordProcessor):
    """The gate in front of a batch processor of log records.

    Args:
        inner: the batch processor, whose queue is no smaller than the tally's.
        tally: counts what comes.
    """

    def __init__(self, inner: LogRecordProcessor, tally: Tally) -> None:
        self._inner = inner
        self._tally = tally

    def on_emit(self, log_record: Any) -> None:
        """Queue a record, if there is room."""
        if self._tally.enter():
            self._inner.on_emit(log_record)

    def shutdown(self) -> None:
        """Export what waits; as long as the SDK takes."""
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """As the SDK does: True says nothing of what arrived."""
        return self._inner.force_flush(timeout_millis)


def counted(exporter: Any, tally: Tally) -> Any:
    """The exporter itself, whose answers are counted from now on; what it raises is an answer, too.

    Its ``export`` is replaced on the object, so that everything else the SDK asks of it (temporality, the arguments
    of ``shutdown``) stays its own.
    """
    inner: Callable[..., Any] = exporter.export
    tally.end = exporter.shutdown

    def export(batch: Any, *arguments: Any, **named: Any) -> Any:
        count = _size(batch, tally)
        _REASON.text = None
        try:
            result = inner(batch, *arguments, **named)
        except Exception as error:  # noqa: BLE001 -- whatever an exporter raises is one failed export; it is raised on
            tally.done(count, type(error).__name__)
            raise _ExportError(type(error).__name__) from None
        tally.done(
            count, None if result.name == "SUCCESS" else _REASON.text or "refused, or no answer within its timeout"
        )
        return result

    exporter.export = export
    return exporter


class _ExportError(Exception):
    """An export that raised, without the exporter's own words: they may hold the endpoint's URL with its token."""


def _size(batch: Any, tally: Tally) -> int:
    """Records of a batch, which leave the queue; of metrics the data points, which never were in one."""
    if tally.signal != "metrics":
        tally.leave(len(batch))
        return len(batch)
    scopes = (scope for resource in batch.resource_metrics for scope in resource.scope_metrics)
    count = sum(len(metric.data.data_points) for scope in scopes for metric in scope.metrics)
    tally.came(count)
    return count


_REASON = threading.local()
"""How the export that runs in this thread has failed."""


class _Reasons(logging.Handler):
    """Takes from an exporter's own log why it failed, and nothing else: its texts hold URLs and servers' answers."""

    def emit(self, record: logging.LogRecord) -> None:
        """Called in the exporting thread."""
        for value in record.args or () if isinstance(record.args, tuple) else ():
            if isinstance(value, int) and not isinstance(value, bool) and 100 <= value < 600:
                _REASON.text = f"HTTP {value}"
            elif isinstance(value, BaseException):
                _REASON.text = type(value).__name__
            elif isinstance(value, Enum):  # gRPC's status
                _REASON.text = value.name


def in_own_words() -> None:
    """From now on failures of OTLP exporters are told by their tallies only; for processes of ours.

    It is never undone: an export that did not end in time may have something to say when all else has ended.
    """
    theirs = logging.getLogger(_EXPORTERS)
    if not any(isinstance(one, _Reasons) for one in theirs.handlers):
        theirs.addHandler(_Reasons())
    theirs.propagate = False


def observe(meter_provider: MeterProvider, tallies: Iterable[Tally]) -> None:
    """Tell the counts as metrics, whenever these are collected."""
    kept = list(tallies)

    def reading(pick: Callable[[Mapping[str, int]], Mapping[str, int]]) -> Callable[..., Iterable[Observation]]:
        def observations(_: CallbackOptions) -> Iterable[Observation]:
            for tally in kept:
                labels = {semconv.ATTR_SIGNAL: tally.signal, semconv.ATTR_EXPORTER: tally.exporter}
                for reason, count in pick(tally.counts).items():
                    yield Observation(count, {**labels, semconv.ATTR_REASON: reason} if reason else labels)

        return observations

    meter = meter_provider.get_meter(semconv.SCOPE)
    for name, description, pick in (
        (semconv.METRIC_TELEMETRY_EMITTED, "Records of our own telemetry", lambda counts: {"": counts["emitted"]}),
        (
            semconv.METRIC_TELEMETRY_EXPORTED,
            "Records of our own telemetry that the receiver has acknowledged",
            lambda counts: {"": counts["exported"]},
        ),
        (
            semconv.METRIC_TELEMETRY_LOST,
            "Records of our own telemetry that did not arrive, by reason",
            lambda counts: {reason: counts[reason] for reason in REASONS},
        ),
    ):
        meter.create_observable_counter(name, [reading(pick)], "{record}", description)
