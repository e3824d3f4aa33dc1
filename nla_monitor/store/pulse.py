"""Whether a run's alerts or readings have changed: one cheap question, for whoever would ask a dear one again."""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import BindParameter, Engine, bindparam, func, select

from nla_monitor.records import AlertState
from nla_monitor.store.engine import read
from nla_monitor.store.models import AlertRow, ReadingRow

Pulse = tuple[Any, ...]
"""Equal to an earlier one: nothing has changed since."""

_RUN: Final[BindParameter[str]] = bindparam("run")
_NEWEST: Final = select(func.max(ReadingRow.seq)).where(ReadingRow.run_id == _RUN).scalar_subquery()
# Built once: it is asked as long as the run lasts, in the interpreter of the host.
_QUERY: Final = select(
    _NEWEST,
    func.count(),
    func.count().filter(AlertRow.state == AlertState.FIRING),
    func.max(AlertRow.updated_at),
    func.max(AlertRow.resolved_at),
).where(AlertRow.run_id == _RUN)


def pulse(engine: Engine, run_id: str) -> Pulse:
    """What changes when a reading is stored, or an alert of the run fires, goes on or resolves.

    Raises:
        StoreError: the database cannot be read.
    """
    with read(engine) as connection:
        return tuple(connection.execute(_QUERY, {"run": run_id}).one())
