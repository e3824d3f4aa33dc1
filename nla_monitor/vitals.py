"""A worker's levels for Prometheus: what the store says now, so that several workers of a database say the same.

Counters say what one worker did; whoever wants to know whether an alert fires or how long the queue is must not have to
add up the workers that were alive at the time. Levels come from the store, at most every ``EVERY`` seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from sqlalchemy import Engine

from nla_monitor import semconv
from nla_monitor.records import RuleHeader, TriageState
from nla_monitor.store.health import SILENCE, Health, look
from nla_monitor.telemetry import Telemetry

EVERY: Final = 5.0
_REASONS: Final = ("queue_full", "non_finite", "closed")
"""Why the host drops samples (``capture.staging``): series that exist before the first drop."""

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Vitals:
    """Looks at the store and sets the levels; each rule's series start at 0.

    Args:
        engine: the store.
        telemetry: where the levels go.
        headers: of the rules that the worker runs.
        silence: seconds without a sign of life after which a run counts as gone.
        clock: seconds that only grow, for the pause between looks.
    """

    def __init__(
        self,
        engine: Engine,
        telemetry: Telemetry,
        headers: Iterable[RuleHeader],
        silence: float = SILENCE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._silence = silence
        self._telemetry = telemetry
        self._clock = clock
        self._due = clock()
        self._zero = _zero(headers)

    def tick(self) -> None:
        """Look, if the last look is long enough ago.

        Raises:
            StoreUnavailableError: the database can't be read.
        """
        if self._clock() < self._due:
            return
        self._due = self._clock() + EVERY
        health = look(self._engine, time.time(), self._silence)
        self._telemetry.queue_size(health.waiting + health.leased)
        seen = _series(health)
        for (metric, labels), value in (self._zero | seen).items():
            self._telemetry.level(metric, value, dict(labels))
        # What has gone (a rule that fires no longer) must be told as 0: a gauge keeps its last value.
        self._zero |= dict.fromkeys(seen, 0.0)


def _key(metric: str, labels: Mapping[str, str]) -> tuple[str, tuple[tuple[str, str], ...]]:
    return metric, tuple(sorted(labels.items()))


def _zero(headers: Iterable[RuleHeader]) -> Series:
    found: Series = {}
    for header in headers:
        rule = {semconv.ATTR_RULE: header.rule_id}
        found[_key(semconv.METRIC_ALERTS_FIRING, rule | {semconv.ATTR_SEVERITY: header.severity.value})] = 0.0
        for label in (TriageState.OPEN, TriageState.TRUE_POSITIVE, TriageState.FALSE_POSITIVE):
            found[_key(semconv.METRIC_ALERTS_LABELLED, rule | {semconv.ATTR_TRIAGE: label.value})] = 0.0
        found[_key(semconv.METRIC_GUARANTEES_VOID, rule)] = 0.0
        found[_key(semconv.METRIC_GUARANTEES_STANDING, rule)] = 0.0
    for reason in _REASONS:
        found[_key(semconv.METRIC_STORE_DROPS, {semconv.ATTR_REASON: reason})] = 0.0
    for state in ("pending", "dead"):
        found[_key(semconv.METRIC_OUTBOX, {semconv.ATTR_STATE: state})] = 0.0
    return found


def _series(health: Health) -> Series:
    found: Series = {
        _key(semconv.METRIC_QUEUE_AGE, {}): health.oldest,
        _key(semconv.METRIC_RUNS_ACTIVE, {}): float(health.active_runs),
        _key(semconv.METRIC_STORE_FAILURES, {}): float(health.failed),
        _key(semconv.METRIC_HEARTBEAT, {}): time.time(),
    }
    for (rule_id, severity), count in health.firing.items():
        labels = {semconv.ATTR_RULE: rule_id, semconv.ATTR_SEVERITY: severity}
        found[_key(semconv.METRIC_ALERTS_FIRING, labels)] = count
    for (rule_id, label), count in health.labelled.items():
        labels = {semconv.ATTR_RULE: rule_id, semconv.ATTR_TRIAGE: label}
        found[_key(semconv.METRIC_ALERTS_LABELLED, labels)] = count
    for metric, attribute, counts in (
        (semconv.METRIC_GUARANTEES_VOID, semconv.ATTR_RULE, health.void),
        (semconv.METRIC_GUARANTEES_STANDING, semconv.ATTR_RULE, health.standing),
        (semconv.METRIC_STORE_DROPS, semconv.ATTR_REASON, health.drops),
        (semconv.METRIC_OUTBOX, semconv.ATTR_STATE, health.outbox),
    ):
        for value, count in counts.items():
            found[_key(metric, {attribute: value})] = float(count)
    return found
