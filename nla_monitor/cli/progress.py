"""How far a long command is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from nla_monitor.cli.common import console

LOG_EVERY: Final = 30.0
"""Seconds between two lines where standard error is no terminal."""


@contextmanager
def progress(what: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a function to be told how many are done and how many there are; it shows rate and time left on stderr."""
    if not sys.stderr.isatty():
        yield Pace(what, unit)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console(stderr=True), transient=True) as bar:
        task, pace = bar.add_task(what, total=None, rate=""), Pace(what, unit, quiet=True)

        def told(done: int, total: int) -> None:
            pace(done, total)
            bar.update(task, completed=done, total=total, rate=f"{pace.rate:.3g} {unit}/s" if pace.rate else "")

        yield told


class Pace:
    """Rate and time left since the first call: what an earlier, interrupted command did does not count.

    Args:
        what: is done.
        unit: of what is counted.
        quiet: write no lines.
    """

    def __init__(self, what: str, unit: str, *, quiet: bool = False) -> None:
        self._what, self._unit, self._quiet = what, unit, quiet
        self._first: tuple[float, int] | None = None
        self._told = 0.0
        self.rate = 0.0
        """Per second; 0 before anything is done."""

    def __call__(self, done: int, total: int) -> None:
        """Take note, and write a line when it is time."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._told = (now, done), now
        start, before = self._first
        self.rate = (done - before) / (now - start) if now > start else 0.0
        if self._quiet or now - self._told < LOG_EVERY:
            return
        self._told = now
        left = f", {_span((total - done) / self.rate)} left" if self.rate else ""
        sys.stderr.write(f"{self._what}: {done} of {total} {self._unit}, {self.rate:.3g}/s{left}\n")
        sys.stderr.flush()


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
