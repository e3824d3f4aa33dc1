"""What telemetry is told of a batch once it is stored: matches, fidelity, alerts, and guarantees that have ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from nla_monitor.alerts.lifecycle import Event
from nla_monitor.calibrate import Voided
from nla_monitor.records import Alert, Match, Reading, Support
from nla_monitor.rules import RuleSet
from nla_monitor.rules.deferred import unanswered
from nla_monitor.telemetry import Telemetry

logger = logging.getLogger("nla_monitor.worker")


class StoredBatch(Protocol):
    """What is needed of a worker's batch."""

    @property
    def readings(self) -> Sequence[Reading]:
        """That were stored."""
        ...

    @property
    def matches(self) -> Sequence[Match]:
        """Of these readings, refuted ones too."""
        ...

    @property
    def supports(self) -> Mapping[str, Support]:
        """By match id."""
        ...

    @property
    def certified(self) -> Mapping[str, Mapping[str, object]]:
        """What stands behind the matches that count, by match id: as ``Alert.calibration``."""
        ...

    @property
    def changed(self) -> Sequence[tuple[Alert, Event]]:
        """Alerts as stored, and what happened to them."""
        ...

    @property
    def shown(self) -> Mapping[str, Reading]:
        """What alerts that fired or resolved show, by alert id."""
        ...

    @property
    def voided(self) -> Sequence[Voided]:
        """Guarantees that drift has ended."""
        ...


class Telling:
    """Tells batch after batch.

    Args:
        telemetry: is told.
        rules: of the worker; how often their judges could not be asked is counted in them.
    """

    def __init__(self, telemetry: Telemetry, rules: RuleSet) -> None:
        self._telemetry = telemetry
        self._rules = rules
        self._unanswered = unanswered(rules.rules)

    def tell(self, batch: StoredBatch) -> None:
        """One batch; matches that a control refuted are no evaluation result."""
        by_id = {reading.sample_id: reading for reading in batch.readings}
        for match in batch.matches:
            certified = batch.certified.get(match.match_id)
            if certified is not None:
                support = batch.supports.get(match.match_id)
                self._telemetry.evaluation_event(match, by_id[match.sample_id], support, certified)
        for reading in batch.readings:
            self._telemetry.fidelity(reading)
        self._tell_unjudged()
        for voided in batch.voided:
            logger.warning("rule %s, run %s: guarantee %s", voided.rule_id, voided.run_id, voided.says)
            self._telemetry.guarantee_voided(voided.rule_id)
        for alert, event in batch.changed:
            self._telemetry.alert(alert, event, time.time() - alert.fired_at, batch.shown.get(alert.alert_id))

    def _tell_unjudged(self) -> None:
        for rule_id, count in (now := unanswered(self._rules.rules)).items():
            if count > self._unanswered[rule_id]:
                self._telemetry.unjudged(rule_id, count - self._unanswered[rule_id])
        self._unanswered = now
