"""Telemetry: everything that the monitor and the worker say to OpenTelemetry.

Depends on the OpenTelemetry API only and sets no global: providers are injected, or the application's own are used. No
method raises: a fault of a provider, processor or exporter is logged once and counted (``faults``), the work goes on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final

from opentelemetry import metrics, trace

from nla_monitor import semconv
from nla_monitor.config import TelemetryConfig
from nla_monitor.guard import Guard
from nla_monitor.records import ActivationSample, Alert, Match, Phase, Reading, RuleHeader, Support
from nla_monitor.telemetry import bounded, events
from nla_monitor.telemetry.metrics import Instruments
from nla_monitor.telemetry.spans import Spans, source_context

logger = logging.getLogger("nla_monitor.telemetry")

CLOCK_TOLERANCE: Final = 0.05
"""Seconds by which clocks of two hosts may differ without a word: what NTP keeps within a site."""


def _version() -> str:
    try:
        return version("nla-monitor")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0"


class Telemetry:
    """Spans, metrics and events of one monitor or worker; safe for use from several threads.

    Args:
        tracer_provider, meter_provider, logger_provider: where signals go; the global ones by default.
        config: ``enabled: false`` makes every method do nothing; ``parent`` chooses links or child spans.
    """

    def __init__(
        self,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
        logger_provider: events.LoggerProvider | None = None,
        config: TelemetryConfig | None = None,
    ) -> None:
        config = config or TelemetryConfig()
        if not config.enabled:
            tracer_provider = trace.NoOpTracerProvider()
            meter_provider = metrics.NoOpMeterProvider()
            logger_provider = events.NoOpLoggerProvider()
        # A guard of its own without a callback: a fault here must not be reported to the telemetry that has the fault.
        self._guard = Guard()
        scope: dict[str, Any] = {"schema_url": semconv.SCHEMA_URL}
        tracer = trace.get_tracer(semconv.SCOPE, _version(), tracer_provider, **scope)
        self._spans = Spans(tracer, self._guard, config.parent)
        meter = metrics.get_meter(semconv.SCOPE, _version(), meter_provider, **scope)
        guard = self._guard
        self._metrics = Instruments(meter, lambda: guard.faults)
        self._events = events.get_logger(semconv.SCOPE, _version(), logger_provider, **scope)
        self._content = events.CapturedContent.from_environment()
        self._skew_said = False

    @property
    def faults(self) -> dict[str, int]:
        """Faults of telemetry itself that were swallowed, by place."""
        return self._guard.faults

    # -- spans -------------------------------------------------------------------------------------------------

    def capture_span(self, samples: Sequence[ActivationSample]) -> AbstractContextManager[trace.Span]:
        """Around the hand-over of ``samples`` to the spool.

        In the source's trace when all samples come from one, since it may still be running; linked otherwise.
        """
        sources = {sample.traceparent for sample in samples if sample.traceparent}
        return self._spans.about(
            semconv.SPAN_CAPTURE,
            semconv.OPERATION_CAPTURE,
            [sample.traceparent for sample in samples],
            _batch_attributes(samples),
            relation="child" if len(sources) == 1 else "link",
        )

    def verbalize_span(
        self, samples: Sequence[ActivationSample], av_hash: str | None = None
    ) -> AbstractContextManager[trace.Span]:
        """Around AV and AR on one leased batch."""
        attributes = _batch_attributes(samples)
        if av_hash:
            attributes[semconv.ATTR_AV_HASH] = av_hash
        return self._spans.about(
            semconv.SPAN_VERBALIZE,
            semconv.OPERATION_VERBALIZE,
            [sample.traceparent for sample in samples],
            attributes,
        )

    def evaluate_span(self, readings: int | Sequence[Reading]) -> AbstractContextManager[trace.Span]:
        """Around the rules on one batch, given as readings (linked to their sources) or only their number."""
        samples = [] if isinstance(readings, int) else [reading.sample for reading in readings]
        attributes = _batch_attributes(samples)
        attributes[semconv.ATTR_BATCH_SIZE] = readings if isinstance(readings, int) else len(readings)
        return self._spans.about(
            semconv.SPAN_EVALUATE,
            semconv.OPERATION_EVALUATE,
            [sample.traceparent for sample in samples],
            attributes,
        )

    # -- matches and alerts ------------------------------------------------------------------------------------

    def evaluation_event(
        self,
        match: Match,
        reading: Reading,
        support: Support | None = None,
        calibration: Mapping[str, object] | None = None,
    ) -> None:
        """A rule matched: one event in the source's context, one count.

        Args:
            match: the match.
            reading: that met the rule.
            support: what the controls measured of it.
            calibration: what stands behind the rule, as ``Alert.calibration``.
        """
        with self._guard("telemetry.match"):
            source = source_context(reading.sample.traceparent)
            self._metrics.matches.add(1, {semconv.ATTR_RULE: bounded.name(match.rule_id)}, context=source)
            attributes = events.match_attributes(match, reading, support, calibration)
            if self._content.events:
                attributes[semconv.EVALUATION_EXPLANATION] = bounded.content(reading.explanation.text)
            events.emit_evaluation(self._events, match.severity, attributes, source)

    def alert(self, alert: Alert, event: str, delay: float | None = None, reading: Reading | None = None) -> None:
        """An alert fired, was updated or resolved.

        Args:
            alert: as saved.
            event: ``fired`` (counted, span, event), ``resolved`` (span, event) or ``updated`` (nothing: no news).
            delay: seconds from the capture of the exhibit to the alert; below 0 where the clocks of the two hosts
                disagree, which is counted, said once in the log, and recorded as 0.
            reading: that the alert shows; says which checkpoints read it.
        """
        if event == "updated":
            return
        with self._guard("telemetry.alert"):
            source = source_context(alert.traceparent)
            severity = {semconv.ATTR_SEVERITY: alert.severity.value}
            if event == "fired":
                labels = {semconv.ATTR_RULE: bounded.name(alert.rule_id), **severity}
                self._metrics.alerts.add(1, labels, context=source)
                if delay is not None:
                    # A histogram by rule would be seventeen series for each of them.
                    self._metrics.detection_delay.record(max(delay, 0.0), severity, context=source)
                    self._skewed(delay)
        self.alert_event(alert, reading)

    def _skewed(self, delay: float) -> None:
        """Count an alert from the future, and say so once."""
        if delay >= -CLOCK_TOLERANCE:
            return
        self._metrics.skewed.add(1)
        if not self._skew_said:
            self._skew_said = True
            logger.warning(
                "an alert was captured %.1f s after it fired: the clocks of host and worker disagree, and delays are "
                "wrong by as much; let both keep time (NTP)",
                -delay,
            )

    def alert_event(self, alert: Alert, reading: Reading | None = None) -> None:
        """The span ``nla_monitor.alert`` and the evaluation event of an alert, without counting it."""
        attributes: events.Attributes = {}
        with self._guard("telemetry.alert"):
            attributes = events.alert_attributes(alert, reading)
        on_span, on_event = dict(attributes), dict(attributes)
        if self._content.spans:
            on_span[semconv.EVALUATION_EXPLANATION] = bounded.content(alert.explanation)
        if self._content.events:
            on_event[semconv.EVALUATION_EXPLANATION] = bounded.content(alert.explanation)
        with (
            self._spans.about(semconv.SPAN_ALERT, semconv.OPERATION_ALERT, [alert.traceparent], on_span),
            self._guard("telemetry.alert"),
        ):
            # Without a source the event belongs to the alert's own span, which is the current one here.
            events.emit_evaluation(self._events, alert.severity, on_event, source_context(alert.traceparent))

    def unjudged(self, rule_id: str, count: int) -> None:
        """A rule's judge or classifier could not be asked about so many readings."""
        with self._guard("telemetry.unjudged"):
            self._metrics.unjudged.add(count, {semconv.ATTR_RULE: bounded.name(rule_id)})

    def delivery(self, sink: str, outcome: str) -> None:
        """Count a post about an alert: ``delivered``, ``failed`` (tried again perhaps), ``refused`` or ``no_span``."""
        with self._guard("telemetry.delivery"):
            self._metrics.deliveries.add(1, {semconv.ATTR_SINK: bounded.name(sink), semconv.ATTR_OUTCOME: outcome})

    def expect_sinks(self, names: Iterable[str]) -> None:
        """Begin each sink's counts at 0, so that its first failure is seen as an increase."""
        with self._guard("telemetry.expect_sinks"):
            for name in names:
                sink = bounded.name(name)
                for outcome in ("delivered", "failed", "refused", "no_span"):
                    self._metrics.deliveries.add(0, {semconv.ATTR_SINK: sink, semconv.ATTR_OUTCOME: outcome})

    def guarantee_voided(self, rule_id: str) -> None:
        """Drift has ended what a rule's calibration promised for a run."""
        with self._guard("telemetry.guarantee"):
            self._metrics.voided.add(1, {semconv.ATTR_RULE: bounded.name(rule_id)})

    def expect_rules(self, headers: Iterable[RuleHeader]) -> None:
        """Start every rule's counters at 0, so that a rate over the first alert is not lost."""
        with self._guard("telemetry.rules"):
            for header in headers:
                labels = {semconv.ATTR_RULE: bounded.name(header.rule_id)}
                self._metrics.matches.add(0, labels)
                self._metrics.voided.add(0, labels)
                self._metrics.unjudged.add(0, labels)
                self._metrics.alerts.add(0, {**labels, semconv.ATTR_SEVERITY: header.severity.value})
            self._metrics.skewed.add(0)
            for outcome in ("ok", "error"):
                self._metrics.verbalizations.add(0, {semconv.ATTR_OUTCOME: outcome})

    # -- numbers -----------------------------------------------------------------------------------------------

    def sampled(self, count: int, phase: Phase | None = None) -> None:
        """``count`` activations were sampled."""
        with self._guard("telemetry.sampled"):
            self._metrics.sampled.add(count, {semconv.ATTR_PHASE: phase.value} if phase is not None else {})

    def dropped(self, reason: str, count: int) -> None:
        """``count`` sampled activations will not be stored."""
        with self._guard("telemetry.dropped"):
            self._metrics.dropped.add(count, {semconv.ATTR_REASON: bounded.name(reason)})

    def fault(self, where: str, error: BaseException | None = None) -> None:
        """A fault of the monitor was swallowed at the host boundary; fits ``Guard(on_fault=telemetry.fault)``."""
        with self._guard("telemetry.fault"):
            labels = {semconv.ATTR_PLACE: bounded.name(where)}
            if error is not None:
                labels[semconv.ERROR_TYPE] = bounded.name(type(error).__qualname__)
            self._metrics.faults.add(1, labels)

    def verbalized(self, count: int, outcome: str, seconds: float) -> None:
        """``count`` activations went through the AV (and AR) with ``outcome`` ok or error.

        Args:
            count: number of activations.
            outcome: ``ok`` or ``error``.
            seconds: duration of the batch; 0 when it was not measured on its own (nothing is recorded then).
        """
        with self._guard("telemetry.verbalized"):
            self._metrics.verbalizations.add(count, {semconv.ATTR_OUTCOME: outcome})
            if seconds > 0:
                self._metrics.verbalize_duration.record(seconds, {semconv.ATTR_OUTCOME: outcome})

    def fidelity(self, reading: Reading) -> None:
        """The FVE of one reading, where a denominator is known."""
        with self._guard("telemetry.fidelity"):
            fve = None if reading.fidelity is None else reading.fidelity.fve
            if fve is not None and math.isfinite(fve):  # one NaN would be the histogram's sum for ever
                source = source_context(reading.sample.traceparent)
                labels = {semconv.ATTR_PHASE: reading.sample.phase.value}
                self._metrics.fve.record(fve, labels, context=source)
                self._metrics.unexplained.record(max(1.0 - fve, 0.0), labels, context=source)

    def queue_size(self, count: int) -> None:
        """``count`` activations wait for a worker or are in its hands."""
        with self._guard("telemetry.queue_size"):
            self._metrics.queue_size.set(count)

    def level(self, metric: str, value: float, labels: Mapping[str, str] | None = None) -> None:
        """Set one of the levels that are read from the store.

        Args:
            metric: a name of ``metrics.LEVELS``; its unit is there.
            value: as it is now.
            labels: of few values only.
        """
        with self._guard("telemetry.level"):
            self._metrics.levels[metric].set(value, {key: bounded.name(one) for key, one in (labels or {}).items()})

    def capture_duration(self, seconds: float) -> None:
        """Host time that one sampled forward pass cost."""
        with self._guard("telemetry.capture_duration"):
            self._metrics.capture_duration.record(seconds)


def _batch_attributes(samples: Sequence[ActivationSample]) -> dict[str, Any]:
    """What is common to all samples of a batch, and how many there are."""
    attributes: dict[str, Any] = {semconv.ATTR_BATCH_SIZE: len(samples)}
    for key, values in (
        (semconv.ATTR_RUN, {sample.run_id for sample in samples}),
        (semconv.ATTR_LAYER, {sample.layer for sample in samples}),
        (semconv.ATTR_PHASE, {sample.phase.value for sample in samples}),
        (semconv.ATTR_STEP, {sample.step for sample in samples}),
        (semconv.GEN_AI_CONVERSATION, {sample.agent.conversation_id if sample.agent else None for sample in samples}),
    ):
        common = values.pop() if len(values) == 1 else None
        if common is not None:
            attributes[key] = bounded.name(common) if isinstance(common, str) else common
    return attributes
