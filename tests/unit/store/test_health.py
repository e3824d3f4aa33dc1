"""What workers tell of the store: the same numbers on both databases, and levels that go back to 0."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
from sqlalchemy import update

from nla_monitor.records import AlertState, RuleHeader, RunInfo, Severity, TriageState
from nla_monitor.store.engine import open_engine, write
from nla_monitor.store.health import look
from nla_monitor.store.models import RunRow, SpoolRow
from nla_monitor.store.repository import Repository
from nla_monitor.vitals import EVERY, Vitals
from tests.cli_support import RULE, STARTED, fill_store, sample
from tests.telemetry_support import in_memory_backend

ENDED = STARTED + 500


@pytest.fixture
def repository(store_url: str) -> Iterator[Repository]:
    fill_store(store_url)
    found = Repository(open_engine(store_url))
    yield found
    found.dispose()


def test_it_counts_what_waits_is_lost_fires_and_was_labelled(repository: Repository) -> None:
    health = look(repository.engine, ENDED + 60)
    assert (health.waiting, health.leased, health.failed, health.active_runs) == (1, 0, 1, 0)
    assert health.oldest >= 0
    assert health.drops == {"queue_full": 3, "non_finite": 1}
    assert health.firing == {(RULE, "high"): 1, (RULE, "critical"): 1, (RULE, "medium"): 1}
    assert health.labelled == {(RULE, "open"): 4}
    assert health.outbox == {"pending": 5}
    assert (health.void, health.standing) == ({}, {})


def test_the_age_of_the_queue_is_that_of_its_oldest_sample(repository: Repository) -> None:
    with write(repository.engine) as connection:
        connection.execute(update(SpoolRow).where(SpoolRow.state == "waiting").values(enqueued_at=ENDED))
    assert look(repository.engine, ENDED + 90).oldest == pytest.approx(90)
    assert look(repository.engine, ENDED - 90).oldest == 0, "a clock that lags behind is no age"


def test_a_mistake_fires_no_longer(repository: Repository) -> None:
    firing = [alert for alert in repository.alerts() if alert.state is AlertState.FIRING]
    for alert, label in zip(
        firing, (TriageState.FALSE_POSITIVE, TriageState.BENIGN, TriageState.TRUE_POSITIVE), strict=True
    ):
        repository.label(alert.alert_id, label, "me")
    assert sum(look(repository.engine, ENDED).firing.values()) == 1


def test_a_run_whose_host_was_killed_goes_on_for_a_while_only(repository: Repository) -> None:
    repository.start_run(RunInfo("killed", "n", "m", 2, STARTED))
    assert look(repository.engine, STARTED + 100, silence=3600).active_runs == 1
    assert look(repository.engine, STARTED + 4000, silence=3600).active_runs == 0


def test_levels_start_at_zero_for_each_rule_and_go_back_to_zero(repository: Repository) -> None:
    with write(repository.engine) as connection:
        connection.execute(update(RunRow).values(ended_at=None))
    repository.start_run(RunInfo("another", "n", "m", 2, STARTED))
    now = [0.0]
    headers = [RuleHeader("quiet", "Title", "v", Severity.LOW)]
    with in_memory_backend() as backend:
        vitals = Vitals(repository.engine, backend.telemetry(), headers, math.inf, clock=lambda: now[0])
        vitals.tick()

        def level(metric: str, **labels: str) -> dict[tuple[str, ...], float]:
            points = backend.points()[f"nla_monitor.{metric}"]
            return {tuple(str(value) for _, value in sorted(point.attributes.items())): point.value for point in points}

        assert level("alerts.firing") == {
            ("quiet", "low"): 0, (RULE, "high"): 1, (RULE, "critical"): 1, (RULE, "medium"): 1,
        }  # fmt: skip
        assert level("store.drops") == {("queue_full",): 3, ("non_finite",): 1, ("closed",): 0}
        assert level("outbox.size") == {("pending",): 5, ("dead",): 0}
        assert level("runs.active") == {(): 2}
        assert level("queue.size") == {(): 1}
        for alert in repository.alerts():
            repository.label(alert.alert_id, TriageState.BENIGN, "me")
        vitals.tick()
        assert sum(level("alerts.firing").values()) == 3, "not before its time"
        now[0] += EVERY
        vitals.tick()
        assert sum(level("alerts.firing").values()) == 0
        assert level("alerts.labelled")["benign", RULE] == 4
        text = str(backend.points())
    assert sample(0, 0).run_id not in text, "no run in a label: each would be a new time series"
    assert dataclasses.asdict(look(repository.engine, ENDED))["firing"] == {}
