"""One tracker's calls, one after another on a thread of its own.

Trackers talk to servers and disks. Whoever tells them something waits a moment at most, however long they take; one
that raises or hangs is counted, and in the end left alone, and holds up neither the training nor the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from nla_monitor.guard import Guard
from nla_monitor.untraced import untraced

logger = logging.getLogger("nla_monitor")

LONGEST: Final = 30.0
"""Seconds in one call after which a tracker counts as hanging."""
FAILURES: Final = 10
"""Calls in a row that raise, after which a tracker is told nothing more."""
_WAITING: Final = 1000
"""Calls that wait; the oldest are given up beyond it."""


class Lane:
    """Runs what it is given in order.

    Args:
        name: of the tracker; faults are counted under ``tracker.<name>``.
        guard: takes them.
        clock: seconds that only grow.
    """

    def __init__(self, name: str, guard: Guard, clock: Callable[[], float] = time.monotonic) -> None:
        self._where = f"tracker.{name}"
        self._name = name
        self._guard = guard
        self._clock = clock
        self._turn = threading.Condition()
        self._jobs: deque[Callable[[], object]] = deque()
        self._since: float | None = None
        """When the call that runs now began."""
        self._failures = 0
        self._off: str | None = None
        """Why it is told nothing more."""
        self._closing = False
        self._thread: threading.Thread | None = None

    def put(self, job: Callable[[], object], *, patience: float = 0.0) -> None:
        """Run ``job`` when those before it are done.

        Args:
            job: a call of the tracker.
            patience: seconds that the caller may wait for it; none while the tracker is behind.
        """
        with self._turn:
            lost = self._refused()
            if lost is None:
                behind = self._since is not None or bool(self._jobs)
                if len(self._jobs) == _WAITING:
                    self._jobs.popleft()
                    lost = "is too slow: what it was to be told first is given up"
                self._jobs.append(job)
                self._begin()
                self._turn.notify_all()
                if patience and not behind:
                    self._turn.wait_for(self._idle, patience)
        if lost is not None:
            with self._guard(self._where):
                raise TimeoutError(f"{self._name} {lost}")

    def close(self, deadline: float) -> bool:
        """Wait until all is told, at most until ``deadline`` (of the clock); then nothing more is taken.

        Returns:
            Whether all is told.
        """
        with self._turn:
            done = self._off is not None or self._turn.wait_for(self._idle, max(0.0, deadline - self._clock()))
            self._closing = True
            left = len(self._jobs) + (self._since is not None)
            self._jobs.clear()
            self._turn.notify_all()
        if not done:
            with self._guard(self._where):
                raise TimeoutError(f"{self._name} was not told everything in time, {left} calls are left")
        return done

    def _idle(self) -> bool:
        return not self._jobs and self._since is None

    def _refused(self) -> str | None:
        if self._off is None and self._since is not None and self._clock() - self._since > LONGEST:
            self._cut_off(f"hangs for more than {LONGEST:.0f} s")
        return f"{self._off}, and is told nothing more" if self._off is not None else None

    def _cut_off(self, why: str) -> None:
        self._off = why
        self._jobs.clear()

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"nla-monitor-{self._name}", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            failed = True
            try:
                with self._guard(self._where), untraced():
                    job()
                    failed = False
            finally:  # also where the guard re-raises, as under test
                self._done(failed=failed)

    def _next(self) -> Callable[[], object] | None:
        with self._turn:
            self._turn.wait_for(lambda: self._jobs or self._closing)
            if not self._jobs:
                return None
            self._since = self._clock()
            return self._jobs.popleft()

    def _done(self, *, failed: bool) -> None:
        with self._turn:
            self._since = None
            self._failures = self._failures + 1 if failed else 0
            if self._failures == FAILURES:
                self._cut_off(f"failed {FAILURES} times in a row")
                logger.warning("nla_monitor: %s %s, and is told nothing more", self._name, self._off)
            self._turn.notify_all()
