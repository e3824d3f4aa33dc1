"""What is to be told to the world: written with the alert, delivered afterwards, at least once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, exists, func, select, update

from nla_monitor.records import Alert
from nla_monitor.store.codec import Row, alert_of, clean
from nla_monitor.store.dialect import locked, server_time
from nla_monitor.store.engine import read, write
from nla_monitor.store.models import AlertRow, OutboxRow, table


@dataclass(frozen=True, slots=True)
class OutboxItem:
    """One thing to tell."""

    outbox_id: int
    kind: str
    """``fired`` or ``resolved``."""
    alert: Alert
    """As it was at that moment."""
    attempts: int
    """Deliveries that failed so far."""
    delivered: tuple[str, ...]
    """Sinks that need it no more: ``name`` has it, ``name!`` refused it, ``name?`` has nothing to show it on."""
    created_at: float
    error: str | None
    before: tuple[tuple[str, ...], ...] = ()
    """Of each older message about the same condition that is still to be told: the sinks that have it."""


class Outbox:
    """The outbox table. Safe for any number of threads and processes.

    All methods raise ``StoreUnavailableError`` when the database can't be used.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def outbox_now(self) -> float:
        """The time by which messages are due and grow old, Unix seconds: on PostgreSQL the server's, one for all."""
        with read(self._engine) as connection:
            return self._now(connection)

    def _now(self, connection: Connection) -> float:
        return server_time(connection) if self._clock is time.time else self._clock()

    def outbox_pending(self, limit: int = 100) -> list[OutboxItem]:
        """What is not delivered yet, oldest first, whether its time has come or not. Claims nothing."""
        query = (
            select(*table(OutboxRow).c).where(OutboxRow.state == "pending").order_by(OutboxRow.outbox_id).limit(limit)
        )
        with read(self._engine) as connection:
            return [_item(row) for row in connection.execute(query).mappings()]

    def outbox_dead(self) -> int:
        """How many were given up."""
        with read(self._engine) as connection:
            return connection.execute(select(func.count()).where(OutboxRow.state == "dead")).scalar_one()

    def outbox_claim(self, limit: int, seconds: float) -> list[OutboxItem]:
        """Take what is due, for this caller alone during ``seconds``; then it is due again.

        What was tried least comes first, so that a message that a receiver always refuses holds up no other. A sink
        that lacks an older message of the same condition (``OutboxItem.before``) must not be told yet: one that hears
        ``resolved`` before ``fired`` would take it as firing.
        """
        with read(self._engine) as connection:  # without the write lock: mostly nothing is due
            now = self._now(connection)
            due = (OutboxRow.state == "pending", OutboxRow.next_at <= now)
            if not connection.execute(select(exists().where(*due))).scalar():
                return []
        with write(self._engine) as connection:
            query = select(*table(OutboxRow).c).where(*due)
            query = query.order_by(OutboxRow.attempts, OutboxRow.outbox_id).limit(limit)
            rows = connection.execute(locked(connection, query, skip=True)).mappings().all()
            taken = [row["outbox_id"] for row in rows]
            connection.execute(update(OutboxRow).where(OutboxRow.outbox_id.in_(taken)).values(next_at=now + seconds))
            return [dataclasses.replace(_item(row), before=_before(connection, row)) for row in rows]

    def outbox_renew(self, outbox_id: int, seconds: float) -> None:
        """Keep a claim for ``seconds`` from now."""
        with write(self._engine) as connection:
            _set(connection, outbox_id, next_at=self._now(connection) + seconds)

    def outbox_done(self, outbox_id: int) -> None:
        """Every sink has it."""
        with write(self._engine) as connection:
            _set(connection, outbox_id, state="done", done_at=self._clock(), error=None)

    def outbox_failed(
        self,
        outbox_id: int,
        error: str,
        retry_at: float | None,
        *,
        delivered: Sequence[str] = (),
        attempted: bool = True,
    ) -> None:
        """A sink could not take it.

        Args:
            outbox_id: the item.
            error: why.
            retry_at: when to try again, Unix seconds; None gives it up.
            delivered: names of all sinks that have it.
            attempted: False when it was only put off, which does not count as an attempt.
        """
        with write(self._engine) as connection:
            changed = {"state": "dead"} if retry_at is None else {"next_at": retry_at}
            attempts = OutboxRow.attempts + (1 if attempted else 0)
            _set(connection, outbox_id, error=clean(error), delivered=list(delivered), attempts=attempts, **changed)


def _before(connection: Connection, row: Row) -> tuple[tuple[str, ...], ...]:
    """Who has what is older and still to be told about the same condition (rule, run and group), oldest first."""
    mine = select(AlertRow.fingerprint).where(AlertRow.alert_id == row["alert_id"]).scalar_subquery()
    query = (
        select(OutboxRow.delivered)
        .join(AlertRow, AlertRow.alert_id == OutboxRow.alert_id)
        .where(OutboxRow.state == "pending", OutboxRow.outbox_id < row["outbox_id"], AlertRow.fingerprint == mine)
        .order_by(OutboxRow.outbox_id)
    )
    return tuple(tuple(delivered) for delivered in connection.execute(query).scalars())


def _set(connection: Connection, outbox_id: int, **values: object) -> None:
    # Pending only: a caller that comes back after its claim ran out must not revive what another one finished.
    connection.execute(
        update(OutboxRow).where(OutboxRow.outbox_id == outbox_id, OutboxRow.state == "pending").values(**values)
    )


def _item(row: Row) -> OutboxItem:
    return OutboxItem(
        outbox_id=row["outbox_id"],
        kind=row["kind"],
        alert=alert_of(row["payload"]),
        attempts=row["attempts"],
        delivered=tuple(row["delivered"]),
        created_at=row["created_at"],
        error=row["error"],
    )
