"""Figures of the run, and notes of its alerts, into the trackers that the training has open.

For hosts whose own logging cannot be joined. transformers' ``Trainer`` is one: its trackers are callbacks that stand
before the user's, so that what a callback adds to ``logs`` comes too late for them. In a loop of one's own::

    trackers = Trackers(monitor.guard)
    trackers.watch(monitor)
    ...
    trackers.log(monitor.scalars(), step)  # every so many steps
    ...
    monitor.close()
    trackers.close()
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, Protocol

from nla_monitor.config import MonitorConfig
from nla_monitor.guard import Guard
from nla_monitor.records import Alert
from nla_monitor.tracker_lanes import Lane
from nla_monitor.tracker_runs import Note, OpenRun, TensorboardRun, open_runs

STEP_KEY: Final = "nla/step"
PATIENCE: Final = 0.25
"""Seconds that a training waits for a tracker that does not answer, once; most take a millisecond."""
CLOSE_SECONDS: Final = 10.0
_EARLY: Final = 100
"""Notes that are kept until a run is open, the newest."""


class _Watched(Protocol):
    """What is needed of a ``Monitor``."""

    @property
    def config(self) -> MonitorConfig: ...
    def on_alert(self, listener: Callable[[Alert], None]) -> None: ...


class Trackers:
    """Tells whichever trackers have a run open.

    Each tracker has a thread of its own. One that hangs costs the training ``PATIENCE`` once, and is told nothing more
    after a while; what it missed is counted under ``tracker.<name>`` in ``monitor.stats.faults``.

    Args:
        guard: takes what a tracker raises: one that is broken harms neither the host nor the others.
        step_key: the name under which the step is logged beside the values, for trackers that count steps themselves.
        tensorboard: folder of the host's TensorBoard run; what is ours goes to ``nla`` inside it, a run beside the
            host's.
        runs: open runs that nobody could find; given any, none are looked for.
    """

    def __init__(
        self,
        guard: Guard,
        *,
        step_key: str = STEP_KEY,
        tensorboard: Path | None = None,
        runs: Iterable[OpenRun] | None = None,
    ) -> None:
        self._guard = guard
        self._step_key = step_key
        self._runs: Mapping[str, OpenRun] = {run.name: run for run in runs or ()}
        self._looks = runs is None
        self._own = None if tensorboard is None else TensorboardRun(tensorboard / "nla")
        if self._own is not None:
            self._runs = {**self._runs, self._own.name: self._own}
        self._lanes: dict[str, Lane] = {}
        self._early: deque[Note] = deque(maxlen=_EARLY)
        self._closed = False
        self.look()

    def look(self) -> None:
        """See which runs are open; call it in the thread that trains."""
        if self._looks:
            with self._guard("tracker.look"):
                self._see({run.name: run for run in open_runs(self._step_key)})
        while self._runs and self._early:
            self._tell(self._early.popleft())

    def _see(self, found: Mapping[str, OpenRun]) -> None:
        kept = {name: run for name, run in self._runs.items() if run.outlives or name in found}
        new = {name: run for name, run in found.items() if name not in kept or kept[name].key != run.key}
        self._runs = kept | new  # one assignment: a note comes in another thread

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log ``values`` at ``step``; call it in the thread that runs the training."""
        self.look()
        if not values or self._closed:
            return
        for run in list(self._runs.values()):
            self._lane(run).put(lambda run=run: run.log(values, step), patience=PATIENCE)  # type: ignore[misc]

    def watch(self, monitor: _Watched) -> None:
        """Leave a note for each alert of a monitor, as its config says (``alerts.trackers``)."""
        wanted = monitor.config.alerts.trackers
        if wanted.notes:
            monitor.on_alert(lambda alert: self.note(alert, content=wanted.content))

    def note(self, alert: Alert, *, content: bool = False) -> None:
        """Leave a note; from any thread, and without waiting for anything.

        Args:
            alert: that has fired or resolved.
            content: also write quote and explanation.
        """
        if self._closed:
            return
        note = Note(alert, content)
        if self._runs:
            self._tell(note)
        else:
            self._early.append(note)

    def _tell(self, note: Note) -> None:
        for run in list(self._runs.values()):
            self._lane(run).put(lambda run=run: run.note(note))  # type: ignore[misc]

    def _lane(self, run: OpenRun) -> Lane:
        return self._lanes.setdefault(run.name, Lane(run.name, self._guard))

    def close(self, timeout: float = CLOSE_SECONDS) -> bool:
        """Wait until the trackers have what they were told; the host's own runs stay open.

        Args:
            timeout: seconds, for all of them together.

        Returns:
            Whether they have it.
        """
        self.look()
        self._closed = True
        if self._own is not None:
            self._lane(self._own).put(self._own.close)
        deadline = time.monotonic() + timeout
        told = [lane.close(deadline) for lane in self._lanes.values()]
        return all(told)
