"""Runs that have gone silent, and the end of their alerts.

An alert resolves by its run's own clock, which stands still when the run ends or its host is killed: without an end by
the wall clock it would fire until a person labels it. Life is what workers see of a run, by their own clock and not by
the host's, which may be wrong: something of it was read lately, or waits to be read, or it has just begun. Both that
and the present are told by ``dialect.server_time``: on PostgreSQL one clock for all workers, so that one whose own is
hours ahead ends nothing; workers on SQLite share a machine, and a clock that is set ahead there ends what it passes.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from sqlalchemy import ColumnElement, Connection, Engine, and_, exists, func, or_, select

from nla_monitor.records import ENDED, Alert, AlertState
from nla_monitor.store.dialect import server_time
from nla_monitor.store.engine import read, write
from nla_monitor.store.models import AlertRow, ReadingRow, RunRow, SampleRow, SpoolRow
from nla_monitor.store.transaction import WorkerTransaction

AFTERGLOW: Final = 3600.0
"""Seconds after a run's end, or after the last reading of an ended run, for which its alerts go on firing."""


def going_on(now: float, silence: float) -> ColumnElement[bool]:
    """Of ``RunRow``: it has begun, has not ended, and shows life.

    Args:
        now: Unix seconds.
        silence: seconds without a sign of life after which a run counts as gone.
    """
    return and_(
        RunRow.ended_at.is_(None),
        or_(RunRow.started_at > now - silence, _last_read(RunRow.run_id) > now - silence),
    )


def expire(engine: Engine, now: float | None, silence: float) -> list[Alert]:
    """Resolve the alerts of runs that ended an hour ago, or of which nothing was seen for longer than ``silence``.

    Their evidence says why (``ENDED``), and sinks are told as of any resolve. Labels stay open: nobody has decided. If
    the run comes back and its rule's window holds, that is a new alert.

    Args:
        engine: from ``open_engine``.
        now: Unix seconds; None for ``dialect.server_time``.
        silence: seconds.

    Returns:
        The alerts that have ended now.

    Raises:
        StoreUnavailableError: the database can't be used.
    """
    with read(engine) as connection:
        now = server_time(connection) if now is None else now
        firing = connection.execute(select(AlertRow.run_id).where(AlertRow.state == AlertState.FIRING.value).distinct())
        over = [run_id for run_id in firing.scalars() if _end(connection, run_id, now, silence)]
    done: list[Alert] = []
    for run_id in over:
        with write(engine) as connection:
            transaction = WorkerTransaction(connection, [run_id])  # from here on no other worker judges the run
            if (why := _end(connection, run_id, now, silence)) is None:
                continue
            for alert in transaction.firing_alerts(run_id):
                evidence = {**alert.evidence, ENDED: why}
                over_now = dataclasses.replace(alert, state=AlertState.RESOLVED, resolved_at=now, evidence=evidence)
                done.append(transaction.save_alert(over_now, [], "resolved"))
    return done


def _end(connection: Connection, run_id: str, now: float, silence: float) -> str | None:
    """Why the alerts of a run are over; None: they are not."""
    seen = connection.execute(select(_last_read(run_id))).scalar() or 0.0
    run = connection.execute(select(RunRow.started_at, RunRow.ended_at).where(RunRow.run_id == run_id)).one_or_none()
    started, ended = run or (None, None)
    if not seen:  # its readings were pruned
        fired = select(func.max(AlertRow.fired_at)).where(AlertRow.run_id == run_id)
        seen = connection.execute(fired).scalar() or 0.0
    quiet = now - max(seen, started or 0.0, ended or 0.0)
    # What waits is asked last: in a long queue nothing but a look at all of it can tell.
    if quiet < (silence if ended is None else min(AFTERGLOW, silence)) or _waits(connection, run_id):
        return None
    if ended is not None:
        return f"its run has ended, and nothing more of it was read for {quiet / 60:.0f} minutes"
    return f"stale: nothing of its run was read for {quiet / 3600:.1f} hours; its host may have been killed"


def _last_read(run_id: Any) -> ColumnElement[float]:
    last = select(ReadingRow.created_at).where(ReadingRow.run_id == run_id).order_by(ReadingRow.seq.desc()).limit(1)
    return last.scalar_subquery()


def _waits(connection: Connection, run_id: str) -> bool:
    waiting = (SpoolRow.sample_id == SampleRow.sample_id, SpoolRow.state != "failed", SampleRow.run_id == run_id)
    return bool(connection.execute(select(exists().where(*waiting))).scalar())
