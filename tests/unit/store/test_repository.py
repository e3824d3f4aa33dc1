"""What the store answers to the CLI, the report and the demo; labels, drops, the outbox and forgetting."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator

import pytest

from nla_monitor.errors import SchemaVersionError, StoreError
from nla_monitor.records import AlertState, Match, Phase, Severity, TriageState
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
from nla_monitor.store.retention import Pruned, prune
from tests.store_support import AGENT, alert, header, match, reading, run_info, sample


class Clock:
    """Unix seconds, set by the test."""

    now = 5000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def repository(store_url: str, clock: Clock) -> Iterator[Repository]:
    engine = open_engine(store_url)
    yield Repository(engine, clock)
    engine.dispose()


@pytest.fixture
def filled(repository: Repository) -> Repository:
    """Eight samples of steps 0 to 3: read, all but the last; those of steps 2 and 3 matched; one alert on them."""
    repository.start_run(run_info())
    samples = [
        sample(
            n,
            sample_id=f"s{n}",
            step=n // 2,
            phase=Phase.AGENT if n == 5 else Phase.TRAIN,
            agent=AGENT if n == 5 else None,
            attributes={"reward": n / 2, "kind": "odd" if n % 2 else "even", "hard": n % 2 == 1, "n": n},
            trigger="random" if n < 6 else "turn_end",
        )
        for n in range(8)
    ]
    spool = SqlSpool(repository.engine)
    spool.put(samples)
    spool.lease("me", 7, 60)
    with repository.transaction() as tx:
        tx.add_readings([reading(one, f"Reads {one.sample_id} 100%") for one in samples[:7]])
        tx.add_matches([match(one) for one in samples[4:7]])
        tx.save_alert(alert(samples[4], alert_id="aabb01"), [match(one) for one in samples[4:6]], "fired")
        tx.ack("me", [one.sample_id for one in samples[:7]])
    return repository


def linked(repository: Repository, alert_id: str) -> list[Match]:
    return repository.alert_matches(alert_id)


def test_a_run_is_started_once_and_ended(repository: Repository, clock: Clock) -> None:
    repository.start_run(run_info())
    repository.start_run(run_info(started_at=2000.0, av_hash="av-1"))
    repository.end_run("run-1")
    summary = repository.run("run-1")
    assert summary is not None
    assert summary.info == run_info(av_hash="av-1")
    assert summary.ended_at == clock.now
    repository.start_run(run_info())  # resumed
    again = repository.run("run-1")
    assert again is not None
    assert (again.ended_at, again.info.av_hash) == (None, "av-1")
    assert repository.run("run-2") is None


def test_runs_come_newest_first_with_what_they_came_to(filled: Repository) -> None:
    filled.start_run(run_info("run-2", started_at=3000.0))
    filled.add_drops("run-1", {"queue_full": 3})
    newest, oldest = filled.runs()
    assert newest.info.run_id == "run-2"
    assert (oldest.samples, oldest.readings, oldest.alerts, oldest.dropped) == (8, 7, 1, 3)


def test_drops_add_up_by_reason(repository: Repository) -> None:
    repository.add_drops("run-1", {"queue_full": 2, "closed": 0})
    repository.add_drops("run-1", {"queue_full": 3, "non_finite": 1})
    repository.add_drops("run-2", {"queue_full": 10})
    assert repository.drops("run-1") == {"queue_full": 5, "non_finite": 1}
    assert repository.drops() == {"queue_full": 15, "non_finite": 1}


def test_alerts_are_found_by_what_they_are(repository: Repository) -> None:
    one, two, three = (
        alert(sample(n), fingerprint=f"f{n}", severity=severity, rule_id=rule, run_id=run)
        for n, severity, rule, run in [
            (1, Severity.LOW, "hack", "run-1"),
            (2, Severity.HIGH, "leak", "run-1"),
            (3, Severity.CRITICAL, "hack", "run-2"),
        ]
    )
    resolved = dataclasses.replace(two, state=AlertState.RESOLVED, resolved_at=9.0)
    with repository.transaction() as tx:
        for item in (one, resolved, three):
            tx.save_alert(item, [], "fired")
    repository.label(three.alert_id, TriageState.TRUE_POSITIVE, "kim")

    def found(**wanted: object) -> list[float]:
        return [item.fired_at - 1000 for item in repository.alerts(**wanted)]

    assert found() == [3, 2, 1]
    assert found(run_id="run-1") == [2, 1]
    assert found(state=AlertState.RESOLVED) == [2]
    assert found(severity=Severity.HIGH) == [3, 2]
    assert found(rule="hack") == [3, 1]
    assert found(since=1002.0) == [3, 2]
    assert found(triage=TriageState.TRUE_POSITIVE) == [3]
    assert found(limit=1) == [3]


def test_an_alert_is_found_by_a_prefix_that_only_it_has(repository: Repository) -> None:
    with repository.transaction() as tx:
        for alert_id in ("aabb01", "aabb02", "aabb", "a%"):
            tx.save_alert(alert(sample(1), alert_id=alert_id, fingerprint=alert_id), [], "fired")

    def found(prefix: str) -> str | None:
        one = repository.alert(prefix)
        return one.alert_id if one else None

    assert found("aabb02") == "aabb02"
    assert found("aabb") == "aabb"  # whole ids win over prefixes
    assert found("a%") == "a%"
    assert found("c") is None
    with pytest.raises(StoreError, match="aabb01, aabb02"):
        repository.alert("aabb0")


def test_an_alert_comes_with_the_readings_and_matches_that_speak_for_it(filled: Repository) -> None:
    assert [one.sample_id for one in filled.alert_readings("aabb01")] == ["s4", "s5"]
    assert [one.sample_id for one in linked(filled, "aabb01")] == ["s4", "s5"]
    assert filled.alert_readings("aabb01")[1].sample.agent == AGENT


def test_labels_are_the_history_of_an_alerts_triage(filled: Repository, clock: Clock) -> None:
    assert filled.label("aabb", TriageState.ACKNOWLEDGED, "kim").triage is TriageState.ACKNOWLEDGED
    clock.now += 1
    filled.label("aabb01", TriageState.FALSE_POSITIVE, "ana", "it quotes the task")
    shown = filled.alert("aabb01")
    assert shown is not None
    assert shown.triage is TriageState.FALSE_POSITIVE
    assert [(one.who, one.triage, one.note, one.created_at) for one in filled.labels("aabb01")] == [
        ("kim", TriageState.ACKNOWLEDGED, None, 5000.0),
        ("ana", TriageState.FALSE_POSITIVE, "it quotes the task", 5001.0),
    ]


def test_labelling_an_alert_that_is_not_there_says_where_to_look(repository: Repository) -> None:
    with pytest.raises(StoreError, match="alerts list"):
        repository.label("nope", TriageState.BENIGN, "kim")


def test_samples_show_what_was_read_and_what_waits(filled: Repository) -> None:
    views = {view.sample_id: view for view in filled.samples()}
    assert len(views) == 8
    assert (views["s7"].state, views["s7"].explanation, views["s7"].fidelity) == ("waiting", None, None)
    was = views["s5"]
    assert was.state == "read"
    assert was.explanation is not None
    assert was.explanation.text == "Reads s5 100%"
    assert was.fidelity is not None
    assert was.fidelity.denominator_name == "held-out"
    assert (was.agent, was.attributes["kind"], was.d_model, was.phase) == (AGENT, "odd", 16, Phase.AGENT)


def test_samples_are_found_by_what_they_are(filled: Repository) -> None:
    def found(**wanted: object) -> list[str]:
        return [view.sample_id for view in filled.samples(newest_first=False, **wanted)]

    assert found(limit=2) == ["s0", "s1"]
    assert found(run_id="run-2") == []
    assert found(step=2) == ["s4", "s5"]
    assert found(phase=Phase.AGENT) == ["s5"]
    assert found(since=1006.0) == ["s6", "s7"]
    assert found(sequence_id="sequence-0") == ["s0", "s1", "s2", "s3"]
    assert found(agent_run_id="root-1") == found(agent_run_id="call-1") == ["s5"]
    assert found(contains="reads S3 100%") == ["s3"]
    assert found(contains="_") == []
    assert found(matched_by="hack") == ["s4", "s5", "s6"]
    assert found(read_only=True)[-1] == "s6"
    assert [view.sample_id for view in filled.samples(limit=1)] == ["s7"]


def test_counts_say_where_samples_stand(filled: Repository) -> None:
    counts = filled.reading_counts("run-1")
    assert dataclasses.astuple(counts) == (8, 1, 0, 0, 7, 3, 1)
    assert filled.reading_counts() == counts
    assert dataclasses.astuple(filled.reading_counts("run-2")) == (0,) * 7


def test_the_match_rate_counts_samples_that_were_read(filled: Repository) -> None:
    def rate(**wanted: object) -> list[tuple[int | None, int, int]]:
        return filled.match_rate("run-1", "hack", **wanted)

    assert rate() == [(0, 0, 2), (1, 0, 2), (2, 2, 2), (3, 1, 1)]
    assert rate(by_step=False) == [(None, 3, 7)]
    assert rate(phase=Phase.AGENT) == [(2, 1, 1)]
    assert rate(trigger="turn_end") == [(3, 1, 1)]
    assert rate(attributes={"kind": "even"}, by_step=False) == [(None, 2, 4)]
    assert rate(attributes={"hard": True}, by_step=False) == [(None, 1, 3)]
    assert rate(attributes={"reward": 2.5}, by_step=False) == [(None, 1, 1)]
    assert rate(attributes={"n": 4, "kind": "even"}, by_step=False) == [(None, 1, 1)]
    assert rate(attributes={"n": None}, by_step=False) == [(None, 0, 0)]
    assert rate(attributes={"absent": None}, by_step=False) == [(None, 3, 7)]
    assert filled.match_rate("run-1", "other", by_step=False) == [(None, 0, 7)]


def test_the_match_rate_counts_a_sample_once_whatever_matched_it(filled: Repository) -> None:
    one = sample(4, sample_id="s4")
    with filled.transaction() as tx:
        tx.add_matches([match(one, match_id="another", rule_version="v2")])
        tx.add_readings([reading(one, av_hash="av-2")])
    assert filled.match_rate("run-1", "hack", by_step=False) == [(None, 3, 7)]


def test_rules_are_kept_by_version(repository: Repository) -> None:
    repository.save_rules([(header(), "id: hack"), (header("leak"), "id: leak")])
    repository.save_rules([(header(version="v2"), "id: hack\n"), (header(), "id: hack")])
    assert repository.rule_source("hack", "v1") == "id: hack"
    assert repository.rule_source("hack", "v2") == "id: hack\n"
    assert repository.rule_source("hack", "v3") is None


def test_workers_show_signs_of_life(repository: Repository, clock: Clock) -> None:
    repository.heartbeat("w1", 4000.0, {"batch": 1})
    clock.now += 60
    repository.heartbeat("w2", 4000.0)
    repository.heartbeat("w1", 4000.0, {"batch": 2})
    clock.now += 1
    assert {(one.worker_id, one.seen_at, one.info.get("batch")) for one in repository.workers()} == {
        ("w1", 5060.0, 2),
        ("w2", 5060.0, None),
    }
    assert repository.workers(since=5061.0) == []


def test_the_outbox_gives_an_item_to_one_caller_at_a_time(repository: Repository, clock: Clock) -> None:
    with repository.transaction() as tx:
        tx.save_alert(alert(sample(1)), [], "fired")
    clock.now = 2e9
    (item,) = repository.outbox_claim(9, 60.0)
    assert item.alert == dataclasses.replace(
        alert(sample(1)), alert_id=item.alert.alert_id, sample_id=item.alert.sample_id, matches=0
    )
    assert repository.outbox_claim(9, 60.0) == []
    assert len(repository.outbox_pending()) == 1
    clock.now += 60
    (again,) = repository.outbox_claim(9, 60.0)
    repository.outbox_failed(again.outbox_id, "down", clock.now + 5, delivered=["log"])
    assert repository.outbox_claim(9, 60.0) == []
    clock.now += 5
    (third,) = repository.outbox_claim(9, 60.0)
    assert (third.attempts, third.delivered, third.error) == (1, ("log",), "down")
    repository.outbox_done(third.outbox_id)
    repository.outbox_failed(third.outbox_id, "late news of an old claim", None)
    clock.now += 1000
    assert repository.outbox_claim(9, 60.0) == repository.outbox_pending() == []
    assert repository.outbox_dead() == 0


def test_two_drains_at_once_share_the_outbox(repository: Repository, clock: Clock) -> None:
    clock.now = 2e9
    with repository.transaction() as tx:
        for n in range(20):
            tx.save_alert(alert(sample(n), fingerprint=str(n)), [], "fired")
    got: list[int] = []

    def take() -> None:
        while items := repository.outbox_claim(1, 60.0):
            got.extend(item.outbox_id for item in items)

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == len(set(got)) == 20


def test_forgetting_spares_what_waits_and_what_an_alert_rests_on(filled: Repository) -> None:
    expected = Pruned(samples=5, readings=5, matches=1, outbox=0)
    assert prune(filled.engine, 9999.0, dry_run=True) == expected
    assert len(filled.samples()) == 8
    assert prune(filled.engine, 9999.0) == expected
    assert {view.sample_id for view in filled.samples()} == {"s4", "s5", "s7"}
    assert [one.sample_id for one in filled.alert_readings("aabb01")] == ["s4", "s5"]
    assert prune(filled.engine, 9999.0) == Pruned()


def test_forgetting_goes_by_age_and_takes_delivered_news_along(filled: Repository, clock: Clock) -> None:
    clock.now = 2e9
    (item,) = filled.outbox_claim(1, 60.0)
    filled.outbox_done(item.outbox_id)
    assert prune(filled.engine, 1002.0) == Pruned(samples=2, readings=2)
    assert prune(filled.engine, 3e9).outbox == 1


def test_a_database_without_our_tables_says_what_to_run(sqlite_url: str) -> None:
    with pytest.raises(SchemaVersionError, match="nla-monitor db upgrade"):
        Repository(open_engine(sqlite_url)).runs()
