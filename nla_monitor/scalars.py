"""The run in a few numbers, for the charts that people already watch (W&B, MLflow, TensorBoard, Trackio).

The watcher's thread asks the store; a training loop reads a finished dictionary and never waits for a query.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Final

from sqlalchemy import Connection, Engine, func, select

from nla_monitor.records import Alert, AlertState
from nla_monitor.store.engine import read
from nla_monitor.store.models import MatchRow, ReadingRow
from nla_monitor.store.queries import not_refuted

PREFIX: Final = "nla/"
NEWEST: Final = 256
"""Readings that means and the lag are taken over: a mean over the whole run would hide what changes."""


class ScalarBoard:
    """Newest scalars of one run.

    ``nla/alerts_firing``: alerts that fire now. ``nla/matches/<rule>``: unrefuted matches so far. ``nla/sampled``,
    ``nla/dropped``, ``nla/faults``: activations taken, lost, and faults of ours, so far, in this process. ``nla/read``:
    activations with an explanation so far. ``nla/fve_mean``: mean FVE of the newest 256 readings.
    ``nla/lag_steps``: optimizer steps between the host and the newest of those readings. The last two are absent
    until there is a reading that has them.

    Args:
        engine: of the store.
        rules: ids whose match counts start at 0, so that a chart exists before the first match.
    """

    def __init__(self, engine: Engine, rules: Iterable[str] = ()) -> None:
        self._engine = engine
        self._rules = tuple(rules)
        self._newest = -1
        self._firing = 0
        self._stored: dict[str, float] = self._empty()
        self._step: int | None = None
        """Newest step among the readings that the means are taken over."""
        self._values: dict[str, float] = {}

    def _empty(self) -> dict[str, float]:
        return {f"{PREFIX}matches/{rule}": 0.0 for rule in self._rules}

    @property
    def values(self) -> dict[str, float]:
        """A copy of the newest scalars; empty before the first look."""
        return dict(self._values)

    def read(self, run_id: str, alerts: Iterable[Alert]) -> None:
        """Ask the store (not in the host's thread): after readings or alerts have changed. ``count`` shows the result.

        Args:
            run_id: the run.
            alerts: the run's.

        Raises:
            StoreUnavailableError: the database cannot be read.
        """
        with read(self._engine) as connection:
            self._read(connection, run_id)
        self._firing = sum(alert.state is AlertState.FIRING for alert in alerts)

    def count(self, *, step: int | None, sampled: int, dropped: Mapping[str, int], faults: Mapping[str, int]) -> None:
        """Make the scalars of what the store said last and of this process's counters; asks nothing.

        Args:
            step: optimizer step that the host is at.
            sampled: activations taken.
            dropped: activations lost, by reason.
            faults: swallowed, by place.
        """
        values = {
            f"{PREFIX}alerts_firing": float(self._firing),
            f"{PREFIX}sampled": float(sampled),
            f"{PREFIX}dropped": float(sum(dropped.values())),
            f"{PREFIX}faults": float(sum(faults.values())),
            f"{PREFIX}read": float(self._newest + 1),
            **self._stored,
        }
        if step is not None and self._step is not None:
            values[f"{PREFIX}lag_steps"] = float(max(0, step - self._step))
        self._values = values  # one assignment: a reader sees the old dictionary or the new one

    def _read(self, connection: Connection, run_id: str) -> None:
        query = select(ReadingRow.seq, ReadingRow.step, ReadingRow.fve).where(ReadingRow.run_id == run_id)
        rows = connection.execute(query.order_by(ReadingRow.seq.desc()).limit(NEWEST)).all()
        if not rows or rows[0].seq == self._newest:
            return
        # A run's readings are numbered from 0 without gaps, so that the newest number tells how many there are.
        self._newest = rows[0].seq
        self._step = max((row.step for row in rows if row.step is not None), default=None)
        counts = select(MatchRow.rule_id, func.count()).where(MatchRow.run_id == run_id, not_refuted())
        matches = connection.execute(counts.group_by(MatchRow.rule_id))
        stored = self._empty() | {f"{PREFIX}matches/{rule}": float(count) for rule, count in matches}
        fves = [row.fve for row in rows if row.fve is not None]
        if fves:
            stored[f"{PREFIX}fve_mean"] = fmean(fves)
        self._stored = stored
