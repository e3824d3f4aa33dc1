"""The instruments, each with bucket boundaries that fit what it measures.

Boundaries are given explicitly: the default ones (0, 5, 10, 25 ...) are useless for seconds. Attributes are of few
values only (rule, severity, reason, outcome, phase): never a run, step, token or text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from nla_monitor import semconv

# Host time per sampled forward pass: microseconds to a tenth of a second.
CAPTURE_SECONDS: Final = (1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1)
# One leased batch: a small model on a CPU to a 7B AV with a full batch.
VERBALIZE_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
# From capture to alert: sub-second to a worker that was away over night.
DELAY_SECONDS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 43200.0)
# FVE is 1 for a perfect reconstruction, 0 for the mean vector, negative for worse.
FVE: Final = (-1.0, -0.5, -0.25, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
# 1 - FVE: 0 is perfect, 1 the mean vector.
UNEXPLAINED: Final = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0)

LEVELS: Final = (
    (semconv.METRIC_QUEUE_AGE, "s", "Age of the oldest activation that no worker has finished"),
    (semconv.METRIC_RUNS_ACTIVE, "{run}", "Runs that have begun and not ended"),
    (semconv.METRIC_STORE_DROPS, "{activation}", "Sampled activations that were not stored, by reason, of all runs"),
    (semconv.METRIC_STORE_FAILURES, "{activation}", "Activations that the workers have given up"),
    (semconv.METRIC_ALERTS_FIRING, "{alert}", "Alerts that fire and were not labelled a mistake, by rule and severity"),
    (semconv.METRIC_ALERTS_LABELLED, "{alert}", "Alerts by rule and by what a person said of them"),
    (semconv.METRIC_GUARANTEES_VOID, "{guarantee}", "Guarantees that drift has ended, in runs that go on, by rule"),
    (semconv.METRIC_GUARANTEES_STANDING, "{guarantee}", "Guarantees that stand, in runs that go on, by rule"),
    (semconv.METRIC_OUTBOX, "{message}", "Messages about alerts that are not delivered, by state"),
    (semconv.METRIC_HEARTBEAT, "s", "Unix time at which this worker last looked at the store"),
)
"""What a worker reads from the store now and then: name, unit, description."""


class Instruments:
    """All instruments of one meter.

    Args:
        meter: makes them.
        faults: of telemetry itself, by place; read whenever metrics are collected.
    """

    def __init__(self, meter: Meter, faults: Callable[[], Mapping[str, int]]) -> None:
        def swallowed(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(count, {semconv.ATTR_PLACE: place}) for place, count in faults().items()]

        meter.create_observable_counter(
            semconv.METRIC_TELEMETRY_FAULTS, [swallowed], "{fault}", "Faults of telemetry itself, by place"
        )
        self.sampled = meter.create_counter(
            semconv.METRIC_SAMPLED, "{activation}", "Activations sampled in the host process"
        )
        self.dropped = meter.create_counter(
            semconv.METRIC_DROPPED, "{activation}", "Sampled activations that were not stored, by reason"
        )
        self.faults = meter.create_counter(
            semconv.METRIC_FAULTS, "{fault}", "Faults of the monitor that the host did not see, by place"
        )
        self.verbalizations = meter.create_counter(
            semconv.METRIC_VERBALIZATIONS, "{verbalization}", "Activations put into words, by outcome"
        )
        self.verbalize_duration = meter.create_histogram(
            semconv.METRIC_VERBALIZE_DURATION,
            "s",
            "Time to put one leased batch into words and score it",
            explicit_bucket_boundaries_advisory=VERBALIZE_SECONDS,
        )
        self.detection_delay = meter.create_histogram(
            semconv.METRIC_DETECTION_DELAY,
            "s",
            "Time from capture to alert, by severity",
            explicit_bucket_boundaries_advisory=DELAY_SECONDS,
        )
        self.skewed = meter.create_counter(
            semconv.METRIC_CLOCK_SKEWED, "{alert}", "Alerts captured later than they fired: the hosts' clocks disagree"
        )
        self.queue_size = meter.create_gauge(
            semconv.METRIC_QUEUE_SIZE, "{activation}", "Activations waiting for a worker or in its hands"
        )
        self.matches = meter.create_counter(semconv.METRIC_MATCHES, "{match}", "Readings that met a rule, by rule")
        self.alerts = meter.create_counter(semconv.METRIC_ALERTS, "{alert}", "Alerts fired, by rule and severity")
        self.unjudged = meter.create_counter(
            semconv.METRIC_UNJUDGED, "{reading}", "Readings that a rule could not ask its judge or model about, by rule"
        )
        self.deliveries = meter.create_counter(
            semconv.METRIC_DELIVERIES, "{delivery}", "Posts about alerts, by sink and outcome; each retry counts"
        )
        self.voided = meter.create_counter(
            semconv.METRIC_VOIDED, "{guarantee}", "Guarantees of a run that drift has ended, by rule"
        )
        self.fve = meter.create_histogram(
            semconv.METRIC_FVE,
            "1",
            "Fidelity of explanations: fraction of variance explained (denominator as in the sidecar)",
            explicit_bucket_boundaries_advisory=FVE,
        )
        # An FVE may be negative, and of a histogram with negative bounds Prometheus gets no sum and count, as of this.
        self.unexplained = meter.create_histogram(
            semconv.METRIC_UNEXPLAINED,
            "1",
            "What explanations leave out: 1 - FVE (denominator as in the sidecar)",
            explicit_bucket_boundaries_advisory=UNEXPLAINED,
        )
        self.capture_duration = meter.create_histogram(
            semconv.METRIC_CAPTURE_DURATION,
            "s",
            "Host time per sampled forward pass",
            explicit_bucket_boundaries_advisory=CAPTURE_SECONDS,
        )
        self.levels = {name: meter.create_gauge(name, unit, said) for name, unit, said in LEVELS}
