"""The spool in the database: leases, attempts, and what happens to samples that kill their worker."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, select, update

from nla_monitor.errors import StoreUnavailableError
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import open_engine, read, write
from nla_monitor.store.models import FailureRow, SampleRow, SpoolRow
from nla_monitor.store.repository import Repository
from nla_monitor.store.session import upgrade
from tests.store_support import AGENT, sample


class Clock:
    """Unix seconds, set by the test."""

    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def engine(store_url: str) -> Iterator[Engine]:
    opened = open_engine(store_url)
    yield opened
    opened.dispose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def spool(engine: Engine, clock: Clock) -> SqlSpool:
    return SqlSpool(engine, max_attempts=3, clock=clock)


def test_samples_come_back_oldest_first_and_equal_to_the_bit(spool: SqlSpool) -> None:
    batch = [sample(n, agent=AGENT if n % 2 else None, attributes={"loss": 0.5, "tag": "é"}) for n in range(5)]
    assert spool.put(batch) == 5
    lease = spool.lease("me", 3, 60)
    assert [one.sample_id for one in lease.samples] == [one.sample_id for one in batch[:3]]
    assert lease.owner == "me"
    assert lease.expires_at == 5060.0
    for came, went in zip(lease.samples, batch, strict=False):
        assert came.vector.tobytes() == went.vector.tobytes()
        assert (came.agent, came.attributes, came.norm, came.phase) == (
            went.agent,
            went.attributes,
            went.norm,
            went.phase,
        )


def test_a_sample_is_stored_once_however_often_it_is_put(spool: SqlSpool) -> None:
    batch = [sample(n) for n in range(3)]
    assert spool.put(batch[:2]) == 2
    assert spool.put(batch) == 1
    assert spool.put(batch) == 0
    assert spool.put([]) == 0
    assert spool.depth().waiting == 3


def test_a_sample_twice_in_one_batch_is_stored_once(spool: SqlSpool) -> None:
    one = sample(1)
    assert spool.put([one, one]) == 1
    assert spool.depth().waiting == 1


def test_an_acknowledged_sample_does_not_come_back_by_putting_it_again(spool: SqlSpool, engine: Engine) -> None:
    one = sample(1)
    spool.put([one])
    spool.lease("me", 1, 60)
    with Repository(engine).transaction() as tx:
        assert tx.ack("me", [one.sample_id]) == 1
    assert spool.put([one]) == 0
    assert spool.lease("me", 1, 60).samples == ()


def test_a_leased_sample_is_nobody_elses_until_the_lease_expires(spool: SqlSpool, clock: Clock) -> None:
    spool.put([sample(1)])
    assert spool.lease("first", 9, 60).samples
    clock.now += 59.9
    assert not spool.lease("second", 9, 60).samples
    clock.now += 0.1
    assert spool.lease("second", 9, 60).samples


def test_expired_leases_come_before_what_waits(spool: SqlSpool, clock: Clock) -> None:
    batch = [sample(n) for n in range(4)]
    spool.put(batch[:2])
    spool.lease("dead", 2, 60)
    spool.put(batch[2:])
    clock.now += 60
    again = spool.lease("me", 3, 60).samples
    assert [one.sample_id for one in again] == [one.sample_id for one in batch[:3]]


def test_a_sample_whose_workers_keep_dying_is_tried_alone_and_then_set_aside(
    spool: SqlSpool, clock: Clock, engine: Engine
) -> None:
    batch = [sample(n) for n in range(3)]
    spool.put(batch)
    sizes = []
    for _ in range(3 + 2):
        sizes.append(len(spool.lease("dies", 9, 60).samples))
        clock.now += 60
    assert sizes == [3, 3, 1, 1, 1]  # the last attempt of each is its own, so that it takes no neighbour along
    assert spool.lease("dies", 9, 60).samples == ()
    assert spool.depth().failed == 3
    with read(engine) as connection:
        errors = connection.execute(select(FailureRow.error, FailureRow.stage)).all()
    assert {stage for _, stage in errors} == {"verbalize"}
    assert all("3 leases expired" in error for error, _ in errors)


def test_innocent_neighbours_of_a_deadly_sample_are_read(spool: SqlSpool, clock: Clock, engine: Engine) -> None:
    batch = [sample(n) for n in range(4)]
    deadly = batch[1].sample_id
    spool.put(batch)
    done: list[str] = []
    for _ in range(20):
        lease = spool.lease("me", 9, 60)
        ids = [one.sample_id for one in lease.samples]
        if deadly in ids:
            clock.now += 61  # killed, nothing acknowledged
            continue
        with Repository(engine).transaction() as tx:
            tx.ack("me", ids)
        done += ids
    assert sorted(done) == sorted(one.sample_id for one in batch if one.sample_id != deadly)
    assert spool.depth().failed == 1


def test_failed_samples_can_be_tried_again(spool: SqlSpool, clock: Clock) -> None:
    spool.put([sample(1)])
    for _ in range(4):
        spool.lease("dies", 1, 60)
        clock.now += 60
    assert spool.depth().failed == 1
    assert spool.retry_failed() == 1
    assert len(spool.lease("me", 1, 60).samples) == 1


def test_a_released_sample_waits_again_without_having_lost_an_attempt(spool: SqlSpool) -> None:
    one = sample(1)
    spool.put([one])
    for _ in range(10):
        assert spool.lease("polite", 1, 60).samples
        assert spool.release("someone else", [one.sample_id]) == 0
        assert spool.release("polite", [one.sample_id]) == 1
    assert spool.depth().waiting == 1


def test_stored_bytes_that_changed_are_a_failure_of_that_sample_only(spool: SqlSpool, engine: Engine) -> None:
    batch = [sample(n) for n in range(3)]
    spool.put(batch)
    with write(engine) as connection:
        connection.execute(
            update(SampleRow).where(SampleRow.sample_id == batch[1].sample_id).values(vector=b"\x01" * 64)
        )
    lease = spool.lease("me", 9, 60)
    assert [one.sample_id for one in lease.samples] == [batch[0].sample_id, batch[2].sample_id]
    with read(engine) as connection:
        failure = connection.execute(select(*FailureRow.__table__.c)).mappings().one()
    assert failure["sample_id"] == batch[1].sample_id
    assert failure["stage"] == "store"
    assert "CRC-32" in failure["error"]
    assert spool.depth().failed == 1


def test_depth_counts_states_and_the_age_of_the_oldest(spool: SqlSpool, clock: Clock) -> None:
    assert spool.depth().oldest_seconds is None
    spool.put([sample(1)])
    clock.now += 5
    spool.put([sample(2), sample(3)])
    spool.lease("me", 1, 60)
    depth = spool.depth()
    assert (depth.waiting, depth.leased, depth.failed, depth.oldest_seconds) == (2, 1, 0, 5.0)


def test_a_batch_that_does_not_fit_leaves_nothing_behind_and_can_be_put_again(sqlite_url: str) -> None:
    engine = open_engine(sqlite_url)
    upgrade(engine)
    spool = SqlSpool(engine)
    with engine.connect() as connection:
        cursor = connection.connection.cursor()
        pages = cursor.execute("PRAGMA page_count").fetchone()[0]
        cursor.execute(f"PRAGMA max_page_count={pages + 4}")
    batch = [sample(n, context="x" * 5000) for n in range(50)]
    with pytest.raises(StoreUnavailableError, match="full"):
        spool.put(batch)
    assert spool.depth().waiting == 0
    with engine.connect() as connection:
        connection.connection.cursor().execute("PRAGMA max_page_count=100000")
    assert spool.put(batch) == 50


def test_many_workers_at_once_never_hold_the_same_sample(engine: Engine) -> None:
    spool = SqlSpool(engine)
    batch = [sample(n) for n in range(120)]
    held: Counter[str] = Counter()
    lock = threading.Lock()

    def work(name: str) -> None:
        mine = SqlSpool(engine)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            got = [one.sample_id for one in mine.lease(name, 7, 60).samples]
            if not got and finished.is_set():
                return
            with lock:
                held.update(got)
            with Repository(engine).transaction() as tx:
                assert tx.still_owned(name, got) == set(got)
                assert tx.ack(name, got) == len(got)

    finished = threading.Event()
    threads = [threading.Thread(target=work, args=(f"worker-{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for start in range(0, 120, 10):
        spool.put(batch[start : start + 10])
    finished.set()
    for thread in threads:
        thread.join()
    assert held == Counter({one.sample_id: 1 for one in batch})
    with read(engine) as connection:
        assert connection.execute(select(SpoolRow.seq)).all() == []
