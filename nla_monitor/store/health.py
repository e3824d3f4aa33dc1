"""How the pipeline stands, in a handful of numbers that every worker of a database reads alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Engine, and_, func, or_, select

from nla_monitor.records import AlertState, TriageState
from nla_monitor.store.engine import read
from nla_monitor.store.models import (
    AlertRow,
    CalibrationRow,
    DropRow,
    OutboxRow,
    RunRow,
    SpoolRow,
    TallyRow,
)

AFTERGLOW: Final = 3600.0
"""Seconds after a run's end for which its alerts still count as firing: what waited is read after the end."""
MISTAKES: Final = (TriageState.FALSE_POSITIVE, TriageState.BENIGN)
"""Labels that take an alert out of those that fire: a person has decided."""


@dataclass(frozen=True, slots=True)
class Health:
    """One look at the store."""

    waiting: int
    leased: int
    failed: int
    oldest: float
    """Age in seconds of the oldest sample that waits or is leased; 0 when there is none."""
    active_runs: int
    drops: Mapping[str, int]
    """Samples never stored, by reason, of all runs."""
    firing: Mapping[tuple[str, str], int]
    """Alerts that fire, were not labelled a mistake, and whose run goes on or has just ended; by rule and severity."""
    labelled: Mapping[tuple[str, str], int]
    """Alerts by rule and triage state."""
    void: Mapping[str, int]
    """Guarantees that drift has ended, in runs that go on, by rule."""
    standing: Mapping[str, int]
    outbox: Mapping[str, int]
    """Messages about alerts, ``pending`` and ``dead``."""


def look(engine: Engine, now: float) -> Health:
    """Read the numbers, in one transaction.

    Args:
        engine: from ``session.open_engine``.
        now: Unix seconds.

    Raises:
        StoreUnavailableError: the database can't be read.
    """
    with read(engine) as connection:
        queue = _grouped(connection, SpoolRow.state)
        oldest = connection.execute(select(func.min(SpoolRow.enqueued_at)).where(SpoolRow.state != "failed")).scalar()
        void, standing = _guarantees(connection)
        return Health(
            waiting=queue.get("waiting", 0),
            leased=queue.get("leased", 0),
            failed=queue.get("failed", 0),
            oldest=max(now - oldest, 0.0) if oldest is not None else 0.0,
            active_runs=connection.execute(select(func.count()).where(RunRow.ended_at.is_(None))).scalar_one(),
            drops=_drops(connection),
            firing=_firing(connection, now),
            labelled=_labelled(connection),
            void=void,
            standing=standing,
            outbox=_grouped(connection, OutboxRow.state, OutboxRow.state.in_(("pending", "dead"))),
        )


def _grouped(connection: Connection, column: Any, *where: ColumnElement[bool]) -> dict[str, int]:
    query = select(column, func.count()).where(*where).group_by(column)
    return {key: int(count) for key, count in connection.execute(query)}


def _drops(connection: Connection) -> dict[str, int]:
    query = select(DropRow.reason, func.sum(DropRow.count)).group_by(DropRow.reason)
    return {reason: int(count) for reason, count in connection.execute(query)}


def _going_on(now: float) -> ColumnElement[bool]:
    """Of an outer join with runs: the run has not ended, has just ended, or is not known."""
    return or_(RunRow.ended_at.is_(None), RunRow.ended_at > now - AFTERGLOW)


def _firing(connection: Connection, now: float) -> dict[tuple[str, str], int]:
    query = (
        select(AlertRow.rule_id, AlertRow.severity, func.count())
        .outerjoin(RunRow, RunRow.run_id == AlertRow.run_id)
        .where(
            and_(
                AlertRow.state == AlertState.FIRING.value,
                AlertRow.triage.not_in([state.value for state in MISTAKES]),
                _going_on(now),
            )
        )
        .group_by(AlertRow.rule_id, AlertRow.severity)
    )
    return {(rule_id, severity): count for rule_id, severity, count in connection.execute(query)}


def _labelled(connection: Connection) -> dict[tuple[str, str], int]:
    query = select(AlertRow.rule_id, AlertRow.triage, func.count()).group_by(AlertRow.rule_id, AlertRow.triage)
    return {(rule_id, triage): count for rule_id, triage, count in connection.execute(query)}


def _guarantees(connection: Connection) -> tuple[dict[str, int], dict[str, int]]:
    """Void and standing guarantees of runs that have not ended, by rule."""
    query = (
        select(CalibrationRow.rule_id, TallyRow.void_at.is_not(None), func.count())
        .select_from(TallyRow)
        .join(CalibrationRow, CalibrationRow.calibration_id == TallyRow.calibration_id)
        .join(RunRow, RunRow.run_id == TallyRow.run_id)
        .where(RunRow.ended_at.is_(None))
        .group_by(CalibrationRow.rule_id, TallyRow.void_at.is_not(None))
    )
    void: dict[str, int] = {}
    standing: dict[str, int] = {}
    for rule_id, ended, count in connection.execute(query):
        (void if ended else standing)[rule_id] = count
    return void, standing
