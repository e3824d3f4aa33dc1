"""Tells the world of alerts, beside the reading: outbox, reminders of Alertmanagers, the end of dead runs' alerts.

While a worker runs this has a thread of its own, so that a receiver that hangs holds up messages and never a reading.
Where no worker runs (``nla-monitor worker --once``) the same is done in between, by the caller.

What is promised: each ``fired`` and ``resolved`` reaches every sink at least once, those of one condition in order, as
long as a worker runs on the database and the sink takes it within a day (``sinks.LONGEST_WAIT``). It comes
twice where a worker dies between the post and its note of it; receivers know that by the alert's fingerprint, its start
and its status.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final

from nla_monitor.alerts.sinks import Sink, drain
from nla_monitor.errors import NLAMonitorError
from nla_monitor.outlets import Reminder
from nla_monitor.records import RuleHeader
from nla_monitor.store.expiry import expire
from nla_monitor.store.repository import Repository
from nla_monitor.telemetry import Telemetry

logger = logging.getLogger("nla_monitor.alerts")

_PAUSE: Final = 1.0
"""Seconds between two looks at the outbox, unless somebody knows that there is something in it."""
_LONGEST_PAUSE: Final = 30.0
_BETWEEN_EXPIRIES: Final = 60.0
LAST_WORD: Final = 7.0
"""Seconds that a worker whose host is gone, and that has read all, goes on trying to tell: three attempts."""


class Courier:
    """Delivers what a worker finds.

    Args:
        repository: the store.
        sinks: whom to tell.
        headers: of the rules, by id; what their alerts may set off, see ``drain``.
        telemetry: counts each post by sink and outcome.
        silence: seconds without a sign of life after which the alerts of a run that has not ended are over.
    """

    def __init__(
        self,
        repository: Repository,
        sinks: Sequence[Sink],
        headers: Mapping[str, RuleHeader],
        *,
        telemetry: Telemetry,
        silence: float,
    ) -> None:
        self._repository = repository
        self._sinks = sinks
        self._responses = {key: header.responses for key, header in headers.items()}
        self._silence = silence
        self._tell = telemetry.delivery
        telemetry.expect_sinks(sink.name for sink in sinks)
        self._reminder = Reminder(repository, sinks, responses=self._responses, tell=self._tell)
        self._expiry_due = 0.0
        self._wake, self._over = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """A thread that delivers during the block; at its end what is due is tried once more, ``LAST_WORD`` at most."""
        self._over.clear()
        self._thread = threading.Thread(target=self._work, name="nla-monitor-courier", daemon=True)
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._wake.set()
            self._thread.join(LAST_WORD)
            self._thread = None

    def nudge(self) -> None:
        """Something may be in the outbox. Returns at once inside ``at_work``; else everything due is tried now.

        Raises:
            StoreUnavailableError: outside ``at_work``, the store can't be used.
        """
        if self._thread is None:
            self._deliver()
        else:
            self._wake.set()

    def finish(self) -> None:
        """Wait until everything is told, ``LAST_WORD`` at most; what is not is said, and left to the next worker."""
        deadline = time.monotonic() + LAST_WORD
        while left := self._left():
            if time.monotonic() > deadline:
                logger.warning("%s message(s) about alerts wait; the next worker on this database sends them", left)
                return
            self._wake.set()
            self._over.wait(0.1)

    def left(self) -> str:
        """Outside ``at_work``: try what is due once more; how many messages wait then, empty for none.

        Raises:
            StoreUnavailableError: the store can't be used.
        """
        self.nudge()
        return self._left()

    def _left(self) -> str:
        """How many messages wait, roughly; empty for none, or where the store cannot say."""
        try:
            count = len(self._repository.outbox_pending(limit=100))
        except NLAMonitorError:
            return ""
        return f"{count}{'+' if count == 100 else ''}" if count else ""

    def _work(self) -> None:
        pause = _PAUSE
        while True:
            self._wake.clear()  # before the look at ``_over``: whoever sets it wakes us after that
            over = self._over.is_set()
            try:
                self._deliver()
                pause = _PAUSE
            except NLAMonitorError as error:  # the worker's own loop says so too, and ends if it is for good
                pause = min(2 * pause, _LONGEST_PAUSE)
                # At the end nobody else says it, and nobody tries on.
                level = logging.WARNING if over else logging.INFO
                logger.log(level, "messages about alerts wait for the store: %s", error)
            except Exception:
                pause = min(2 * pause, _LONGEST_PAUSE)
                logger.exception("a fault while messages about alerts were delivered; trying on")
            if over:
                return
            self._wake.wait(pause)

    def _deliver(self) -> None:
        if time.monotonic() >= self._expiry_due:
            self._expiry_due = time.monotonic() + _BETWEEN_EXPIRIES
            for alert in expire(self._repository.engine, None, self._silence):
                logger.info("alert %s (%s) is over: its run shows no more life", alert.alert_id, alert.rule_id)
        drain(self._repository, self._sinks, responses=self._responses, tell=self._tell)
        self._reminder.tick()
