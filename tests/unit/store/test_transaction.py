"""One batch as one transaction: readings, matches, alerts, outbox and acknowledgement together, or nothing."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator

import pytest
from sqlalchemy import select, update

from nla_monitor.errors import StoreError
from nla_monitor.records import ActivationSample, AlertState, StageFailure, TriageState
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import open_engine, read, write
from nla_monitor.store.models import FailureRow, SpoolRow
from nla_monitor.store.repository import Repository
from tests.store_support import alert, match, reading, sample


@pytest.fixture
def repository(store_url: str) -> Iterator[Repository]:
    engine = open_engine(store_url)
    yield Repository(engine)
    engine.dispose()


def leased(repository: Repository, *samples: ActivationSample, owner: str = "me") -> list[ActivationSample]:
    """Samples that ``owner`` holds."""
    spool = SqlSpool(repository.engine)
    spool.put(samples)
    return list(spool.lease(owner, len(samples), 60).samples)


def test_a_batch_becomes_visible_as_a_whole_and_is_acknowledged_with_it(repository: Repository) -> None:
    one, two = leased(repository, sample(1), sample(2))
    with repository.transaction("run-1") as tx:
        owned = tx.still_owned("me", [one.sample_id, two.sample_id])
        assert tx.add_readings([reading(one), reading(two)]) == 2
        assert tx.add_matches([match(one)]) == 1
        tx.save_alert(alert(one), [match(one)], "fired")
        assert tx.ack("me", owned) == 2
    counts = repository.reading_counts("run-1")
    assert (counts.readings, counts.matches, counts.alerts, counts.leased, counts.waiting) == (2, 1, 1, 0, 0)
    assert [item.kind for item in repository.outbox_pending()] == ["fired"]


def test_a_batch_that_fails_half_way_leaves_nothing(repository: Repository) -> None:
    (one,) = leased(repository, sample(1))
    with pytest.raises(RuntimeError, match="mine"), repository.transaction() as tx:  # noqa: PT012 -- writes, then the error
        tx.add_readings([reading(one)])
        tx.add_matches([match(one)])
        tx.save_alert(alert(one), [match(one)], "fired")
        tx.ack("me", [one.sample_id])
        raise RuntimeError("mine")
    counts = repository.reading_counts()
    assert (counts.readings, counts.matches, counts.alerts, counts.leased) == (0, 0, 0, 1)
    assert repository.outbox_pending() == []


def test_a_lease_that_went_to_another_worker_is_no_longer_owned(repository: Repository) -> None:
    one, two = leased(repository, sample(1), sample(2), owner="slow")
    with write(repository.engine) as connection:
        connection.execute(update(SpoolRow).where(SpoolRow.sample_id == one.sample_id).values(lease_owner="fast"))
    with repository.transaction() as tx:
        assert tx.still_owned("slow", [one.sample_id, two.sample_id]) == {two.sample_id}
        assert tx.ack("slow", [one.sample_id, two.sample_id]) == 1


def test_readings_and_matches_are_stored_once(repository: Repository) -> None:
    (one,) = leased(repository, sample(1))
    for expected in (1, 0):
        with repository.transaction() as tx:
            assert tx.add_readings([reading(one)]) == expected
            assert tx.add_matches([match(one)]) == expected
    with repository.transaction() as tx:
        assert tx.add_readings([reading(one, av_hash="av-2")]) == 1  # another AV has a reading of its own


def test_failures_are_tried_again_until_the_attempts_are_used_up(repository: Repository) -> None:
    spool = SqlSpool(repository.engine, max_attempts=2)
    one, broken = sample(1), sample(2)
    spool.put([one, broken])
    for retrying in ({one.sample_id}, set()):
        got = {item.sample_id for item in spool.lease("me", 2, 60).samples}
        with repository.transaction() as tx:
            failures = [StageFailure(key, "verbalize", "out of memory", key == one.sample_id) for key in sorted(got)]
            assert tx.add_failures(failures, 2) == retrying
            tx.ack("me", sorted(got - retrying))  # what failed for good stays for inspection
    assert spool.depth().failed == 2
    with read(repository.engine) as connection:
        assert len(connection.execute(select(FailureRow.error)).all()) == 3
    assert {view.error for view in repository.samples()} == {"out of memory"}
    assert {view.state for view in repository.samples()} == {"failed"}


def test_a_window_holds_one_rule_version_run_and_group(repository: Repository) -> None:
    samples = leased(repository, *(sample(n) for n in range(6)))
    mine = {"sequence": "a", "rank": 1}
    with repository.transaction() as tx:
        tx.add_matches(
            [
                match(samples[3], group=mine, match_id="b"),
                match(samples[5], group=mine, match_id="c"),
                match(samples[1], group={"rank": 1, "sequence": "a"}, match_id="d"),
                match(samples[0], group={"sequence": "b", "rank": 1}),
                match(samples[2], group=mine, rule_version="v2"),
                match(samples[4], group=mine, run_id="run-2"),
                match(samples[5], "other", group=mine),
            ]
        )
        found = tx.window_matches("hack", "v1", "run-1", mine)
        assert found == [
            match(samples[1], group=mine, match_id="d"),
            match(samples[3], group=mine, match_id="b"),
            match(samples[5], group=mine, match_id="c"),
        ]
        assert tx.window_matches("hack", "v1", "run-1", mine, since_step=2) == found[1:]
        assert tx.window_matches("hack", "v1", "run-1", mine, since_time=1003.0) == found[1:]


def test_progress_is_that_of_the_runs_readings(repository: Repository) -> None:
    one, two, three = leased(repository, sample(1), sample(7), sample(3, step=None, captured_at=2000.0))
    with repository.transaction() as tx:
        assert tx.progress("run-1") == (None, 0.0)
        tx.add_readings([reading(two), reading(one), reading(three)])
        assert tx.progress("run-1") == (7, 2000.0)
        assert tx.progress("run-2") == (None, 0.0)


def test_a_reading_comes_back_whole(repository: Repository) -> None:
    (one,) = leased(repository, sample(1))
    with repository.transaction() as tx:
        assert tx.reading(one.sample_id) is None
        tx.add_readings([reading(one)])
        found = tx.reading(one.sample_id)
    assert found is not None
    assert (found.explanation, found.fidelity) == (reading(one).explanation, reading(one).fidelity)
    assert found.sample.vector.tobytes() == one.vector.tobytes()


def test_an_alert_fires_goes_on_and_resolves(repository: Repository) -> None:
    samples = leased(repository, *(sample(n) for n in range(3)))
    fired = alert(samples[0])
    with repository.transaction() as tx:
        tx.add_matches([match(one) for one in samples])
        assert tx.current_alert("condition-1") is None
        assert tx.save_alert(fired, [match(samples[0]), match(samples[1])], "fired").matches == 2
        assert tx.current_alert("condition-1") == dataclasses.replace(fired, matches=2)
    with repository.transaction() as tx:
        # The window slid: it shows one old match and a new one. Each counts once.
        going_on = dataclasses.replace(fired, last_step=2)
        assert tx.save_alert(going_on, [match(samples[1]), match(samples[2])], "updated").matches == 3
        assert [item.alert_id for item in tx.firing_alerts("run-1")] == [fired.alert_id]
        assert tx.firing_alerts("run-2") == []
    with repository.transaction() as tx:
        tx.save_alert(dataclasses.replace(fired, state=AlertState.RESOLVED, resolved_at=9.0), [], "resolved")
        assert tx.current_alert("condition-1") is None
        assert tx.firing_alerts("run-1") == []
    assert [item.kind for item in repository.outbox_pending()] == ["fired", "resolved"]
    assert repository.alert_matches(fired.alert_id) == [match(one) for one in samples]


def test_what_a_person_said_survives_the_workers_updates(repository: Repository) -> None:
    (one,) = leased(repository, sample(1))
    fired = alert(one)
    with repository.transaction() as tx:
        tx.save_alert(fired, [], "fired")
    repository.label(fired.alert_id, TriageState.BENIGN, "kim", "a drill")
    with repository.transaction() as tx:
        stored = tx.save_alert(dataclasses.replace(fired, last_step=9), [], "updated")
    assert (stored.triage, stored.last_step) == (TriageState.BENIGN, 9)


def test_a_second_alert_for_a_firing_condition_is_refused(repository: Repository) -> None:
    one, two = leased(repository, sample(1), sample(2))
    with repository.transaction() as tx:
        tx.save_alert(alert(one), [], "fired")
    with pytest.raises(StoreError, match="firing for this condition already"), repository.transaction() as tx:
        tx.save_alert(alert(two), [], "fired")
    assert len(repository.alerts()) == 1


def test_batches_of_one_run_are_evaluated_one_after_the_other(repository: Repository) -> None:
    """Two workers that both count a window and then write cannot both believe that they were first."""
    samples = [sample(n) for n in range(8)]
    SqlSpool(repository.engine).put(samples)
    fired: list[int] = []

    def work(one: ActivationSample) -> None:
        owner = one.sample_id
        lease = SqlSpool(repository.engine).lease(owner, 1, 60)
        with repository.transaction() as tx:
            tx.still_owned(owner, [item.sample_id for item in lease.samples])
            tx.add_matches([match(item) for item in lease.samples])
            seen = len(tx.window_matches("hack", "v1", "run-1", {}))
            time.sleep(0.01)
            if seen >= 4 and tx.current_alert("condition-1") is None:
                fired.append(seen)
                tx.save_alert(alert(one), [], "fired")

    threads = [threading.Thread(target=work, args=(one,)) for one in samples]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fired == [4]
