"""A run's pulse changes with whatever a watcher would want to see, and with nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from nla_monitor.errors import StoreError
from nla_monitor.records import AlertState
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import open_engine
from nla_monitor.store.pulse import pulse
from nla_monitor.store.repository import Repository
from tests.store_support import alert, match, reading, run_info, sample


@pytest.fixture
def repository(store_url: str) -> Iterator[Repository]:
    engine = open_engine(store_url)
    yield Repository(engine)
    engine.dispose()


def test_readings_and_alerts_change_it_and_nothing_else_does(repository: Repository) -> None:
    repository.start_run(run_info())
    beats = [pulse(repository.engine, "run-1")]
    one, other = sample(0, sample_id="s0"), sample(1, sample_id="s1")
    spool = SqlSpool(repository.engine)
    spool.put([one, other])
    spool.lease("me", 2, 60)
    repository.add_drops("run-1", {"queue_full": 3})
    assert pulse(repository.engine, "run-1") == beats[0]
    with repository.transaction() as tx:
        tx.add_readings([reading(one)])
        tx.add_matches([match(one)])
    beats.append(pulse(repository.engine, "run-1"))
    fired = alert(one, alert_id="aabb01")
    steps = [
        (fired, "fired"),
        (dataclasses.replace(fired, updated_at=fired.updated_at + 1), "updated"),
        (dataclasses.replace(fired, state=AlertState.RESOLVED, resolved_at=fired.updated_at + 2), "resolved"),
        (alert(one, alert_id="aabb02"), "fired"),
    ]
    for state, event in steps:
        with repository.transaction() as tx:
            tx.save_alert(state, [match(one)], event)
        beats.append(pulse(repository.engine, "run-1"))
    assert len(set(beats)) == len(beats) == 6
    assert pulse(repository.engine, "another") == pulse(repository.engine, "a third")


def test_a_store_that_cannot_be_read_is_our_error(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path / 'empty.db'}")  # no table of ours in it
    with pytest.raises(StoreError):
        pulse(engine, "run-1")
    engine.dispose()
