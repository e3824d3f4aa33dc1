"""How the pipeline stands, in a handful of numbers that every worker of a database reads alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Engine, and_, func, select

from nla_monitor.records import Alert, AlertState, TriageState
from nla_monitor.store.codec import alert_of
from nla_monitor.store.engine import read
from nla_monitor.store.expiry import going_on
from nla_monitor.store.models import (
    AlertRow,
    CalibrationRow,
    DropRow,
    OutboxRow,
    RunRow,
    SpoolRow,
    TallyRow,
    table,
)

SILENCE: Final = 14_400.0
"""Seconds without a sign of life after which a run that has not ended counts as gone, unless told otherwise."""
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
    """Alerts that fire and were not labelled a mistake, by rule and severity; ``expire`` ends those of dead runs."""
    labelled: Mapping[tuple[str, str], int]
    """Alerts by rule and triage state."""
    void: Mapping[str, int]
    """Guarantees that drift has ended, in runs that go on, by rule."""
    standing: Mapping[str, int]
    outbox: Mapping[str, int]
    """Messages about alerts, ``pending`` and ``dead``."""


def look(engine: Engine, now: float, silence: float = SILENCE) -> Health:
    """Read the numbers, in one transaction.

    Args:
        engine: from ``session.open_engine``.
        now: Unix seconds.
        silence: seconds without a sign of life after which a run that has not ended counts as gone.

    Raises:
        StoreUnavailableError: the database can't be read.
    """
    with read(engine) as connection:
        queue = _grouped(connection, SpoolRow.state)
        oldest = connection.execute(select(func.min(SpoolRow.enqueued_at)).where(SpoolRow.state != "failed")).scalar()
        void, standing = _guarantees(connection, now, silence)
        return Health(
            waiting=queue.get("waiting", 0),
            leased=queue.get("leased", 0),
            failed=queue.get("failed", 0),
            oldest=max(now - oldest, 0.0) if oldest is not None else 0.0,
            active_runs=connection.execute(
                select(func.count()).select_from(RunRow).where(going_on(now, silence))
            ).scalar_one(),
            drops=_drops(connection),
            firing=_firing(connection),
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


def _firing(connection: Connection) -> dict[tuple[str, str], int]:
    query = (
        select(AlertRow.rule_id, AlertRow.severity, func.count())
        .where(
            and_(
                AlertRow.state == AlertState.FIRING.value,
                AlertRow.triage.not_in([state.value for state in MISTAKES]),
            )
        )
        .group_by(AlertRow.rule_id, AlertRow.severity)
    )
    return {(rule_id, severity): count for rule_id, severity, count in connection.execute(query)}


def _labelled(connection: Connection) -> dict[tuple[str, str], int]:
    query = select(AlertRow.rule_id, AlertRow.triage, func.count()).group_by(AlertRow.rule_id, AlertRow.triage)
    return {(rule_id, triage): count for rule_id, triage, count in connection.execute(query)}


def _guarantees(connection: Connection, now: float, silence: float) -> tuple[dict[str, int], dict[str, int]]:
    """Void and standing guarantees of runs that go on, by rule."""
    query = (
        select(CalibrationRow.rule_id, TallyRow.void_at.is_not(None), func.count())
        .select_from(TallyRow)
        .join(CalibrationRow, CalibrationRow.calibration_id == TallyRow.calibration_id)
        .join(RunRow, RunRow.run_id == TallyRow.run_id)
        .where(going_on(now, silence))
        .group_by(CalibrationRow.rule_id, TallyRow.void_at.is_not(None))
    )
    void: dict[str, int] = {}
    standing: dict[str, int] = {}
    for rule_id, ended, count in connection.execute(query):
        (void if ended else standing)[rule_id] = count
    return void, standing


def standing_alerts(engine: Engine, size: int) -> Iterator[list[Alert]]:
    """All alerts that fire and that no person has called a mistake, in pages, by id.

    Args:
        engine: from ``open_engine``.
        size: alerts in one page.

    Raises:
        StoreUnavailableError: the database can't be read.
    """
    last = ""
    while True:
        standing = (
            AlertRow.state == AlertState.FIRING.value,
            AlertRow.triage.not_in([state.value for state in MISTAKES]),
            AlertRow.alert_id > last,
        )
        query = select(*table(AlertRow).c).where(*standing).order_by(AlertRow.alert_id).limit(size)
        with read(engine) as connection:
            page = [alert_of(row) for row in connection.execute(query).mappings()]
        if page:
            yield page
        if len(page) < size:
            return
        last = page[-1].alert_id
