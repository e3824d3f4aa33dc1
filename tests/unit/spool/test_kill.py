"""Real processes, really killed: nothing is lost and nothing is doubled."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
from tests.store_support import match, reading, sample

ROOT = str(Path(__file__).parents[3])

WORKER = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
from tests.store_support import alert, match, reading

def work(url, die, owner=f"worker-{os.getpid()}"):
    engine = open_engine(url)
    spool, repository = SqlSpool(engine, max_attempts=100), Repository(engine)
    while True:
        lease = spool.lease(owner, 3, 0.3)
        if die == "leased":
            os.kill(os.getpid(), signal.SIGKILL)
        with repository.transaction() as tx:
            owned = tx.still_owned(owner, [one.sample_id for one in lease.samples])
            mine = [one for one in lease.samples if one.sample_id in owned]
            tx.add_readings([reading(one) for one in mine])
            tx.add_matches([match(one) for one in mine])
            for one in mine:
                tx.save_alert(alert(one, fingerprint=one.sample_id), [match(one)], "fired")
            if die == "unacknowledged":
                os.kill(os.getpid(), signal.SIGKILL)
            tx.ack(owner, owned)
            if die == "uncommitted":
                os.kill(os.getpid(), signal.SIGKILL)
        print("committed", flush=True)

work(sys.argv[1], sys.argv[3])
"""

HOST = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import open_engine
from tests.store_support import sample

spool = SqlSpool(open_engine(sys.argv[1]))
for batch in range(10_000):
    samples = [sample(n) for n in range(20)]
    spool.put(samples)
    print(" ".join(one.sample_id for one in samples), flush=True)  # acknowledged to the caller
"""


def start(script: str, url: str, die: str = "never") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, url, ROOT, die], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    return process


def killed(process: subprocess.Popen[str]) -> str:
    """What it had printed before it was gone."""
    said, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    return said


@pytest.fixture
def engine(store_url: str) -> Iterator[Engine]:
    opened = open_engine(store_url)
    yield opened
    opened.dispose()


def read_the_rest(engine: Engine) -> Repository:
    """A worker that lives takes what the dead ones held, once their leases are over."""
    spool, repository = SqlSpool(engine, max_attempts=100), Repository(engine)
    deadline = time.monotonic() + 60
    while (depth := spool.depth()).waiting + depth.leased:
        assert time.monotonic() < deadline
        lease = spool.lease("heir", 50, 60)
        with repository.transaction() as tx:
            owned = tx.still_owned("heir", [one.sample_id for one in lease.samples])
            tx.add_readings([reading(one) for one in lease.samples if one.sample_id in owned])
            tx.add_matches([match(one) for one in lease.samples if one.sample_id in owned])
            tx.ack("heir", owned)
        time.sleep(0.02)
    return repository


@pytest.mark.parametrize("die", ["leased", "unacknowledged", "uncommitted"])
def test_a_worker_killed_inside_a_batch_leaves_the_batch_to_the_next(store_url: str, engine: Engine, die: str) -> None:
    SqlSpool(engine).put([sample(n) for n in range(6)])
    killed(start(WORKER, store_url, die))
    before = Repository(engine).reading_counts()
    assert (before.readings, before.alerts, before.leased, before.waiting) == (0, 0, 3, 3)
    counts = read_the_rest(engine).reading_counts()
    assert (counts.samples, counts.readings, counts.matches, counts.failed) == (6, 6, 6, 0)


def test_workers_killed_at_any_instant_lose_and_double_nothing(store_url: str, engine: Engine) -> None:
    """Two workers at a time, killed at random moments of their commits, again and again."""
    SqlSpool(engine).put([sample(n) for n in range(400)])
    random.seed(0)
    for _ in range(2):
        pair = [start(WORKER, store_url), start(WORKER, store_url)]
        for process in pair:
            assert process.stdout is not None
            for _ in range(random.randint(1, 8)):
                process.stdout.readline()
            time.sleep(random.uniform(0.0, 0.03))
            os.kill(process.pid, signal.SIGKILL)
            killed(process)
    repository = read_the_rest(engine)
    counts = repository.reading_counts()
    assert (counts.samples, counts.readings, counts.matches, counts.failed) == (400, 400, 400, 0)
    alerts = repository.alerts(limit=1000)
    assert counts.alerts == len({one.sample_id for one in alerts}) > 0
    assert all(one.matches == 1 for one in alerts)
    told = [item.alert.alert_id for item in repository.outbox_pending(1000)]
    assert sorted(told) == sorted(one.alert_id for one in alerts), "an alert without its message, or the reverse"


def test_a_host_killed_while_it_writes_keeps_every_batch_that_it_was_told_is_safe(
    store_url: str, engine: Engine
) -> None:
    process = start(HOST, store_url)
    assert process.stdout is not None
    first = process.stdout.readline()
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    told = (first + killed(process)).split()
    stored = {view.sample_id for view in Repository(engine).samples(limit=100_000)}
    assert told
    assert set(told) <= stored
    assert len(stored) % 20 == 0, "half a batch"
    assert SqlSpool(engine).depth().waiting == len(stored)
