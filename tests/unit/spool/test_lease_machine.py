"""Any interleaving of putting, leasing, expiring, acknowledging, failing and dying loses and doubles nothing."""

from __future__ import annotations

import atexit
import contextlib
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from nla_monitor.records import ActivationSample, StageFailure
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
from tests.store_support import new_database, reading, sample


@cache
def _template() -> str:
    """A file with the schema in it, made once: hypothesis starts many machines."""
    folder = tempfile.mkdtemp(prefix="nla-template")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    new_database(Path(folder) / "template.db")
    return f"{folder}/template.db"


OWNERS = st.sampled_from(["a", "b", "c"])
ATTEMPTS = 3
LEASE = 10.0


class Leases(RuleBasedStateMachine):
    """The spool beside a model of it in plain Python: who holds what until when."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.engine = open_engine(f"sqlite:///{shutil.copy(_template(), self.folder.name)}")
        self.now = 0.0
        self.spool = SqlSpool(self.engine, max_attempts=ATTEMPTS, clock=lambda: self.now)
        self.repository = Repository(self.engine)
        self.put_ids: set[str] = set()
        self.acked: list[str] = []
        self.holder: dict[str, tuple[str, float]] = {}
        self.samples: list[ActivationSample] = []

    def teardown(self) -> None:
        self.engine.dispose()
        self.folder.cleanup()

    @rule(count=st.integers(1, 4))
    def put(self, count: int) -> None:
        new = [sample(len(self.samples) + n) for n in range(count)]
        assert self.spool.put(new) == count
        self.samples += new
        self.put_ids |= {one.sample_id for one in new}

    @rule()
    def put_again(self) -> None:
        assert self.spool.put(self.samples) == 0

    @rule(target=held, owner=OWNERS, limit=st.integers(1, 5))
    def lease(self, owner: str, limit: int) -> Any:
        lease = self.spool.lease(owner, limit, LEASE)
        assert len(lease.samples) <= limit
        for one in lease.samples:
            assert one.sample_id not in self.acked
            if one.sample_id in self.holder:
                assert self.holder[one.sample_id][1] <= self.now, "taken from somebody whose lease still ran"
            self.holder[one.sample_id] = (owner, lease.expires_at)
        return (owner, lease.samples) if lease.samples else multiple()

    @rule(seconds=st.sampled_from([1.0, 6.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(batch=held)
    def finish(self, batch: tuple[str, tuple[ActivationSample, ...]]) -> None:
        """A worker commits, maybe long after its lease expired, maybe for the second time."""
        owner, samples = batch
        with self.repository.transaction() as tx:
            owned = tx.still_owned(owner, [one.sample_id for one in samples])
            assert owned <= {key for key, (who, _) in self.holder.items() if who == owner}
            assert tx.add_readings([reading(one) for one in samples if one.sample_id in owned]) == len(owned)
            assert tx.ack(owner, owned) == len(owned)
        self.acked += owned
        for key in owned:
            del self.holder[key]

    @rule(batch=consumes(held), retryable=st.booleans())
    def fail(self, batch: tuple[str, tuple[ActivationSample, ...]], retryable: bool) -> None:
        owner, samples = batch
        with self.repository.transaction() as tx:
            owned = tx.still_owned(owner, [one.sample_id for one in samples])
            retrying = tx.add_failures([StageFailure(key, "verbalize", "no", retryable) for key in owned], ATTEMPTS)
            assert retrying <= owned
            assert retryable or not retrying
        for key in owned:
            del self.holder[key]

    @rule(batch=consumes(held))
    def release(self, batch: tuple[str, tuple[ActivationSample, ...]]) -> None:
        owner, samples = batch
        self.spool.release(owner, [one.sample_id for one in samples])
        for one in samples:
            if self.holder.get(one.sample_id, ("", 0))[0] == owner:
                del self.holder[one.sample_id]

    @rule(batch=held)
    def die_in_the_transaction(self, batch: tuple[str, tuple[ActivationSample, ...]]) -> None:
        owner, samples = batch
        with contextlib.suppress(ZeroDivisionError), self.repository.transaction() as tx:
            owned = tx.still_owned(owner, [one.sample_id for one in samples])
            tx.add_readings([reading(one) for one in samples if one.sample_id in owned])
            tx.ack(owner, owned)
            _ = 1 / 0

    @rule()
    def try_failed_again(self) -> None:
        self.spool.retry_failed()

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        depth = self.spool.depth()
        assert len(self.acked) == len(set(self.acked)), "acknowledged twice"
        assert depth.waiting + depth.leased + depth.failed + len(self.acked) == len(self.put_ids), "lost"
        assert self.repository.reading_counts().readings == len(self.acked)


Leases.TestCase.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
TestLeases = Leases.TestCase
