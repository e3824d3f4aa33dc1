"""What screens found unusual is leased first; what waits ages, so that nothing starves."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, text

from nla_monitor.records import ActivationSample
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import open_engine, read
from nla_monitor.store.repository import Repository
from tests.store_support import sample

HEAD_START = 100.0


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
    return SqlSpool(engine, head_start=HEAD_START, clock=clock)


def _one_by_one(spool: SqlSpool, count: int) -> list[str]:
    return [one.sample_id for _ in range(count) for one in spool.lease("me", 1, 60).samples]


def test_the_most_unusual_is_leased_first_and_equals_in_order_of_arrival(spool: SqlSpool) -> None:
    batch = [sample(n, priority=priority) for n, priority in enumerate([0.1, 0.9, 0.0, 0.9, 0.5])]
    spool.put(batch)
    assert _one_by_one(spool, 5) == [batch[n].sample_id for n in (1, 3, 4, 0, 2)]


def test_without_priorities_the_oldest_comes_first(spool: SqlSpool, clock: Clock) -> None:
    batch = [sample(n) for n in range(4)]
    spool.put(batch[:2])
    clock.now += 1
    spool.put(batch[2:])
    assert _one_by_one(spool, 4) == [one.sample_id for one in batch]


def test_what_has_waited_longer_than_the_head_start_goes_before_the_most_unusual(spool: SqlSpool, clock: Clock) -> None:
    dull, late = sample(0), sample(1, priority=1.0)
    spool.put([dull])
    clock.now += HEAD_START - 1
    early = sample(2, priority=1.0)
    spool.put([early])
    clock.now += 2
    spool.put([late])
    assert _one_by_one(spool, 3) == [early.sample_id, dull.sample_id, late.sample_id]


def test_a_stream_of_unusual_samples_starves_nobody(engine: Engine, clock: Clock) -> None:
    """Two arrive for each one that is read, all more unusual than the first."""
    head_start = 12.0
    spool = SqlSpool(engine, head_start=head_start, clock=clock)
    dull = sample(0)
    spool.put([dull])
    waited = 0.0
    for number in range(1, 100):
        clock.now += 1.0
        waited += 1.0
        spool.put([sample(2 * number, priority=1.0), sample(2 * number + 1, priority=1.0)])
        (leased,) = spool.lease("me", 1, 1e9).samples
        if leased.sample_id == dull.sample_id:
            break
    assert head_start < waited <= 2 * head_start + 2  # what came within the head start goes first: twice its number


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -3.0, 7.0])
def test_priorities_out_of_range_cannot_disturb_the_queue(spool: SqlSpool, clock: Clock, odd: float) -> None:
    spool.put([sample(0, priority=odd), sample(1, priority=0.5)])
    clock.now += 2 * HEAD_START
    late = sample(2, priority=1.0)
    spool.put([late])
    assert _one_by_one(spool, 3)[-1] == late.sample_id


def test_expired_leases_still_come_first(spool: SqlSpool, clock: Clock) -> None:
    dull = sample(0)
    spool.put([dull])
    spool.lease("dies", 1, 10)
    clock.now += 10
    spool.put([sample(1, priority=1.0)])
    assert _one_by_one(spool, 2)[0] == dull.sample_id


def test_samples_of_unread_layers_are_stored_and_given_to_no_worker(spool: SqlSpool, engine: Engine) -> None:
    batch = [sample(n, layer=layer, priority=1.0) for n, layer in enumerate([3, 7, 3])]
    assert spool.put(batch, unread={7}) == 3
    assert spool.put(batch, unread={7}) == 0
    leased = {one.sample_id for one in spool.lease("me", 9, 60).samples}
    assert leased == {batch[0].sample_id, batch[2].sample_id}
    states = {view.layer: view.state for view in Repository(engine).samples()}
    assert states == {3: "leased", 7: "stored"}


def test_what_a_sample_gained_comes_back_as_it_was(spool: SqlSpool) -> None:
    one = sample(0, model="policy", adapter="lora", priority=0.75, screens={"norm": 1.5, "odd": float("nan")})
    spool.put([one])
    (came,) = spool.lease("me", 1, 60).samples
    assert (came.model, came.adapter, came.priority, came.screens) == ("policy", "lora", 0.75, {"norm": 1.5})


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=st.lists(st.tuples(st.floats(0, 500), st.sampled_from([0.0, 0.25, 0.5, 1.0])), min_size=1, max_size=12))
def test_any_arrivals_are_leased_by_time_less_head_start_once_each(
    arrivals: list[tuple[float, float]], engine: Engine
) -> None:
    now = [0.0]
    spool = SqlSpool(engine, head_start=HEAD_START, clock=lambda: now[0])
    samples: list[tuple[float, int, ActivationSample]] = []
    for number, (at, priority) in enumerate(sorted(arrivals, key=lambda item: item[0])):
        now[0] = at
        one = sample(number, priority=priority)
        spool.put([one])
        samples.append((at - HEAD_START * priority, number, one))
    expected = [one.sample_id for _, _, one in sorted(samples, key=lambda item: item[:2])]
    leased = [one.sample_id for _ in samples for one in spool.lease("me", 1, 1e9).samples]
    with Repository(engine).transaction() as tx:
        tx.ack("me", leased)
    assert leased == expected


def test_workers_at_once_hold_each_sample_once_and_the_urgent_early(engine: Engine) -> None:
    """The path with SKIP LOCKED on PostgreSQL."""
    spool = SqlSpool(engine)
    batch = [sample(n, priority=float(n % 4 == 0)) for n in range(80)]
    spool.put(batch)
    held: list[tuple[str, float]] = []
    lock = threading.Lock()

    def work(name: str) -> None:
        mine = SqlSpool(engine)
        while leased := mine.lease(name, 5, 60).samples:
            with lock:
                held.extend((one.sample_id, one.priority) for one in leased)

    threads = [threading.Thread(target=work, args=(f"worker-{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(key for key, _ in held) == sorted(one.sample_id for one in batch)
    assert sum(priority for _, priority in held[:40]) == 20  # all urgent ones in the first half


def test_the_order_of_the_queue_is_held_by_an_index(sqlite_url: str) -> None:
    from nla_monitor.store.session import upgrade

    engine = open_engine(sqlite_url)
    upgrade(engine)
    question = "SELECT seq, attempts FROM nla_spool WHERE state = 'waiting' ORDER BY due_at, seq LIMIT 9"
    with read(engine) as connection:
        plan = " ".join(str(row) for row in connection.execute(text(f"EXPLAIN QUERY PLAN {question}")))
    engine.dispose()
    assert "ix_nla_spool_state_due_at_seq" in plan
    assert "TEMP B-TREE" not in plan
