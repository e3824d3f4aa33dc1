"""Brings the alerts of a run back from the database to the process that is watched: what its watcher looks at."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from nla_monitor import ranks
from nla_monitor.alerts.responses import Responses, describe
from nla_monitor.closer_look import CloserLook
from nla_monitor.config import CaptureConfig
from nla_monitor.errors import StoreError
from nla_monitor.guard import Guard
from nla_monitor.records import Alert, AlertState
from nla_monitor.scalars import ScalarBoard
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.pulse import Pulse, pulse
from nla_monitor.store.repository import Repository
from nla_monitor.watched import Watched

logger = logging.getLogger("nla_monitor")

MANY = 10_000
"""Alerts of a run that are looked at."""


class Counters(Protocol):
    """What the watch tells the run's tracker and the database of ``MonitorStats``."""

    @property
    def sampled(self) -> int:
        """Samples built."""
        ...

    @property
    def dropped(self) -> Mapping[str, int]:
        """Samples lost, by reason."""
        ...

    @property
    def faults(self) -> Mapping[str, int]:
        """Swallowed faults of ours, by place."""
        ...


class AlertWatch:
    """What has changed in the store since the last look, and what follows from it in this process.

    Args:
        repository: of the run's database.
        spool: how many samples wait to be read.
        capture: whether an alert makes sampling denser, and what backlog makes it thinner.
        responses: what each rule's alerts may do here.
        board: the run in a few numbers.
        watched: what is sampled.
        guard: takes the faults of listeners.
    """

    def __init__(
        self,
        repository: Repository,
        spool: SqlSpool,
        capture: CaptureConfig,
        *,
        responses: Responses,
        board: ScalarBoard,
        watched: Watched,
        guard: Guard,
    ) -> None:
        self._repository, self._spool, self._capture = repository, spool, capture
        self._responses, self._board, self._watched, self._guard = responses, board, watched, guard
        self.listeners: list[Callable[[Alert], None]] = []
        """Called with every alert that fires or resolves."""
        self.stop_alert: Alert | None = None
        """The first alert that asked to stop."""
        self._states: dict[str, AlertState] = {}
        self._beat: Pulse | None = None
        self._closer = CloserLook(repository.engine)
        self._reported_drops: dict[str, int] = {}
        self._store_down = False

    def look(self, run_id: str, step: int | None, counters: Counters) -> None:
        """Alerts of the run, as the store has them; and our drops, for the store."""
        try:
            first = ranks.rank() == 0
            if first or self._capture.burst is not None:
                beat = pulse(self._repository.engine, run_id)
                if beat != self._beat:
                    self._look_at_alerts(run_id, first=first)
                    self._beat = beat  # only now: a look that failed is done again
                if first:
                    self._count(step, counters)
            self._store_drops(run_id, counters)
            if self._capture.burst is not None:
                self._watched.look_closer(self._closer.roots(run_id), self._capture.burst.steps)
            if self._capture.max_backlog is not None:
                self._watched.backlog(self._spool.depth().waiting)
            self._store_down = False
        except StoreError as error:
            if not self._store_down:
                logger.warning("nla_monitor: the store cannot be used now, trying on: %s", error)
            self._store_down = True

    def _look_at_alerts(self, run_id: str, *, first: bool) -> None:
        alerts = self._repository.alerts(run_id=run_id, limit=MANY)
        for alert in alerts:
            if self._states.get(alert.alert_id) is not alert.state:
                self._states[alert.alert_id] = alert.state
                self._notice(alert, first=first)
        if first:
            self._board.read(run_id, alerts)

    def _count(self, step: int | None, counters: Counters) -> None:
        self._board.count(step=step, sampled=counters.sampled, dropped=counters.dropped, faults=counters.faults)

    def _store_drops(self, run_id: str, counters: Counters) -> None:
        dropped = dict(counters.dropped)
        new = {reason: count - self._reported_drops.get(reason, 0) for reason, count in dropped.items()}
        new = {reason: count for reason, count in new.items() if count}
        if new:
            self._repository.add_drops(run_id, new)
            self._reported_drops = dropped

    def _notice(self, alert: Alert, *, first: bool) -> None:
        firing = alert.state is AlertState.FIRING
        if firing:
            self._watched.burst()
        if not first:
            return  # every rank looks more closely; one speaks
        if self._responses.logs(alert):
            logger.warning("%s", describe(alert))
        if firing:
            self._responses.tag(alert)
            if self.stop_alert is None and self._responses.stops(alert):
                self.stop_alert = alert
        for listener in self.listeners:
            with self._guard("on_alert"):
                listener(alert)
