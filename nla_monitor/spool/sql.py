"""The spool inside the store's database: one transaction writes a sample and its place in the queue.

At least once: a lease that expires is given out again, and every lease counts as an attempt. A sample whose leases keep
expiring (it may be what kills the worker) is given out alone for its last attempt, so that it takes no neighbour along,
and then set aside as failed.

What screens found unusual is read first, and nothing starves: a sample of priority p is due as if it had arrived
``p * head_start`` seconds earlier than it did, so that whatever waits gets ahead of all that comes later than that. The
order is fixed on arrival: an index holds it, and ageing costs nothing.

Safe for any number of threads and processes; holds no state besides the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Select, and_, exists, func, insert, or_, select, update

from nla_monitor.breathing import breathe
from nla_monitor.errors import ActivationError
from nla_monitor.records import ActivationSample
from nla_monitor.spool.base import Depth, Lease
from nla_monitor.store.codec import sample_of, sample_row
from nla_monitor.store.dialect import insert_new, locked, upsert
from nla_monitor.store.engine import read, write
from nla_monitor.store.models import FailureRow, SampleRow, SpoolRow, table

_SAMPLES = table(SampleRow)
_PIECE = 16
"""Rows of one statement: a driver takes them in without handing the interpreter to anybody."""


class SqlSpool:
    """``Spool`` on the store's database.

    Args:
        engine: from ``store.session.open_engine``, its schema prepared.
        max_attempts: leases after which a sample that was never acknowledged is set aside.
        head_start: seconds by which a sample of priority 1 goes before those of priority 0.
        clock: Unix seconds; workers on several hosts need clocks that agree within a fraction of the lease.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_attempts: int = 3,
        head_start: float = 3600.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._max_attempts = max_attempts
        self._head_start = head_start
        self._clock = clock

    def put(self, samples: Sequence[ActivationSample], *, unread: Collection[int] = ()) -> int:
        """Store samples durably; a known ``sample_id`` is ignored. Returns how many were new.

        Samples of the layers in ``unread`` are stored only: no worker is given them.

        Raises:
            StoreUnavailableError: read-only, full or locked; nothing of the batch was kept, try again.
        """
        if not samples:
            return 0
        rows = []
        for sample in samples:
            rows.append(sample_row(sample))
            breathe()
        now = self._clock()
        fresh: set[str] = set()
        with write(self._engine) as connection:
            for start in range(0, len(rows), _PIECE):
                fresh |= _insert_samples(connection, rows[start : start + _PIECE])
                breathe()
            queued = [one for one in samples if one.sample_id in fresh and one.layer not in unread]
            for start in range(0, len(queued), _PIECE):
                insert_new(connection, SpoolRow, [self._waiting(one, now) for one in queued[start : start + _PIECE]])
                breathe()
        return len(fresh)

    def _waiting(self, sample: ActivationSample, now: float) -> dict[str, Any]:
        priority = min(1.0, sample.priority) if sample.priority > 0 else 0.0  # also where it is no number
        return {
            "sample_id": sample.sample_id,
            "state": "waiting",
            "attempts": 0,
            "enqueued_at": now,
            "due_at": now - priority * self._head_start,
        }

    def lease(self, owner: str, limit: int, seconds: float) -> Lease:
        """Take up to ``limit`` samples that are due, in order of arrival; the lease may be empty.

        Which ones: expired leases first, then what waits, by time of arrival less the head start of its priority.
        Stored bytes that fail their checksum become a ``StageFailure`` row of stage ``store`` and leave the queue.

        Raises:
            StoreUnavailableError: read-only, full, locked or unreachable.
        """
        now = self._clock()
        until = now + seconds
        # A look without the write lock: idle workers must not stand in the host's way.
        with read(self._engine) as connection:
            if not connection.execute(select(exists().where(_due(now)))).scalar():
                return Lease(owner, (), until)
        with write(self._engine) as connection:
            self._give_up(connection, now)
            taken = self._candidates(connection, limit, now)
            connection.execute(
                update(SpoolRow)
                .where(SpoolRow.seq.in_(taken))
                .values(state="leased", lease_owner=owner, lease_until=until, attempts=SpoolRow.attempts + 1)
            )
            return Lease(owner, tuple(self._rebuilt(connection, taken, now)), until)

    def release(self, owner: str, sample_ids: Iterable[str]) -> int:
        """Give leased samples back unworked (a worker that stops in good order); it does not count as an attempt."""
        with write(self._engine) as connection:
            return connection.execute(
                update(SpoolRow)
                .where(SpoolRow.sample_id.in_(list(sample_ids)), SpoolRow.lease_owner == owner)
                .where(SpoolRow.state == "leased")
                .values(state="waiting", lease_owner=None, lease_until=None, attempts=SpoolRow.attempts - 1)
            ).rowcount

    def retry_failed(self) -> int:
        """Put samples that were given up back into the queue, their attempts forgotten; returns how many."""
        with write(self._engine) as connection:
            return connection.execute(
                update(SpoolRow).where(SpoolRow.state == "failed").values(state="waiting", attempts=0)
            ).rowcount

    def depth(self) -> Depth:
        """Current fill."""
        query = select(SpoolRow.state, func.count(), func.min(SpoolRow.enqueued_at)).group_by(SpoolRow.state)
        with read(self._engine) as connection:
            found = {state: (count, oldest) for state, count, oldest in connection.execute(query)}
        counts = {state: found.get(state, (0, None))[0] for state in ("waiting", "leased", "failed")}
        open_since = [found[state][1] for state in ("waiting", "leased") if state in found]
        oldest = max(0.0, self._clock() - min(open_since)) if open_since else None
        return Depth(**counts, oldest_seconds=oldest)

    def _give_up(self, connection: Connection, now: float) -> None:
        """Set aside what has had all its attempts and was never acknowledged."""
        query = select(SpoolRow.seq, SpoolRow.sample_id, SpoolRow.attempts).where(
            _expired(now), SpoolRow.attempts >= self._max_attempts
        )
        lost = connection.execute(locked(connection, query, skip=True)).all()
        reasons = {
            sample_id: f"{attempts} leases expired without a result: the worker died on it, or the lease is too short"
            for _, sample_id, attempts in lost
        }
        _fail(connection, reasons, "verbalize", now)

    def _candidates(self, connection: Connection, limit: int, now: float) -> list[int]:
        expired = connection.execute(_first(connection, _expired(now), limit)).all()
        suspect = next((seq for seq, attempts in expired if attempts >= self._max_attempts - 1), None)
        if suspect is not None:
            return [suspect]
        room = limit - len(expired)
        waiting = connection.execute(_first(connection, SpoolRow.state == "waiting", room)).all() if room > 0 else []
        return [seq for seq, _ in (*expired, *waiting)]

    def _rebuilt(self, connection: Connection, taken: Sequence[int], now: float) -> list[ActivationSample]:
        query = (
            select(*_SAMPLES.c)
            .join(SpoolRow, SpoolRow.sample_id == SampleRow.sample_id)
            .where(SpoolRow.seq.in_(taken))
            .order_by(SpoolRow.seq)
        )
        samples: list[ActivationSample] = []
        damaged: dict[str, str] = {}
        for row in connection.execute(query).mappings():
            try:
                samples.append(sample_of(row))
            except ActivationError as error:
                damaged[row["sample_id"]] = str(error)
        _fail(connection, damaged, "store", now)
        return samples


def _insert_samples(connection: Connection, rows: Sequence[dict[str, Any]]) -> set[str]:
    """Insert what is new; returns its ids."""
    statement = upsert(connection, SampleRow).on_conflict_do_nothing().returning(SampleRow.sample_id)
    return set(connection.execute(statement, list(rows)).scalars())


def _expired(now: float) -> ColumnElement[bool]:
    return and_(SpoolRow.state == "leased", SpoolRow.lease_until <= now)


def _due(now: float) -> ColumnElement[bool]:
    return or_(SpoolRow.state == "waiting", _expired(now))


def _first(connection: Connection, condition: ColumnElement[bool], limit: int) -> Select[int, int]:
    query = select(SpoolRow.seq, SpoolRow.attempts).where(condition).order_by(SpoolRow.due_at, SpoolRow.seq)
    return locked(connection, query.limit(limit), skip=True)


def _fail(connection: Connection, reasons: dict[str, str], stage: str, now: float) -> None:
    if not reasons:
        return
    connection.execute(
        update(SpoolRow)
        .where(SpoolRow.sample_id.in_(list(reasons)))
        .values(state="failed", lease_owner=None, lease_until=None)
    )
    connection.execute(
        insert(FailureRow),
        [
            {"sample_id": key, "stage": stage, "error": text, "retryable": False, "created_at": now}
            for key, text in reasons.items()
        ],
    )
