"""When does a training loop stop for an alert: all ranks at the same step, whichever of them saw it."""

from __future__ import annotations

import logging

from nla_monitor import ranks
from nla_monitor.monitor import Monitor

logger = logging.getLogger("nla_monitor")


class StopAgreement:
    """Asked once at the end of every optimizer step.

    Args:
        monitor: whose alerts may ask to stop.
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._announced = False

    def due(self, step: int) -> bool:
        """Whether the training stops at the end of ``step``; the same answer on every rank."""
        if not self._monitor.may_stop:
            return False
        alert = self._monitor.stop_alert
        if alert is not None and not self._announced:
            self._announced = True
            ranks.announce_stop(step)
            logger.warning("nla_monitor: stopping at step %d: alert %s (%s)", step, alert.alert_id, alert.rule_id)
        if ranks.alone():
            return alert is not None
        stop_at = ranks.stop_step()
        return stop_at is not None and step >= stop_at
