"""What the controls ask of the store: only what stands around the sample, and the same whatever came later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nla_monitor.records import ActivationSample, Reading
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
from nla_monitor.store.surroundings import Surroundings
from tests.store_support import alert, match, new_database, reading, sample


class Store:
    """A new database, filled as asked."""

    def __init__(self, folder: Path) -> None:
        self.engine = open_engine(new_database(folder / "around.db"))
        self.repository = Repository(self.engine)

    def put(self, samples: Sequence[ActivationSample]) -> None:
        SqlSpool(self.engine).put(samples)

    def read(self, readings: Sequence[Reading]) -> None:
        with self.repository.transaction(["run-1"]) as tx:
            tx.add_readings(readings)

    def around(self, av_hash: str | None = "av-1") -> Surroundings:
        return Surroundings(self.engine, av_hash)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def token(position: int, **changes: Any) -> ActivationSample:
    """A token of one pass over one sequence."""
    same = {"sequence_id": "s", "position": position, "step": 5, "captured_at": 1000.0, "norm": float(position)}
    return sample(position, **(same | changes))


def ids(found: Sequence[Any]) -> list[str]:
    return [one.sample_id for one in found]


def test_neighbours_are_of_the_same_pass_and_within_reach(store: Store) -> None:
    own, left, right = token(20), token(14), token(28)
    far, other, again, elsewhere = token(29), token(21, sequence_id="t"), token(19, step=6), token(20, layer=4)
    everything = [own, left, right, far, other, again, elsewhere]
    store.put(everything)
    store.read([reading(one) for one in everything if one is not right])
    around = store.around()
    assert ids(around.near(own, 8)) == [left.sample_id]
    assert ids(around.unread_near(own, 8)) == [right.sample_id]
    assert ids(around.near(own, 100)) == [left.sample_id, far.sample_id]
    store.read([reading(right, av_hash="av-2")])
    assert ids(around.unread_near(own, 8)) == [right.sample_id], "another AV's reading is none of ours"
    assert ids(store.around(None).near(own, 8)) == [left.sample_id, right.sample_id]


def test_later_contexts_are_of_later_tokens_of_the_pass(store: Store) -> None:
    own = token(20, context="a b")
    store.put([own, token(19, context="a"), token(25, context="a b c d"), token(22, context="a b c"), token(23)])
    store.put([token(30, context="no", step=6), token(31, context="no", sequence_id="t")])
    assert store.around().later_contexts(own) == ["a b c", "a b c d"]


def test_an_agents_tokens_have_no_step(store: Store) -> None:
    own, beside = token(3, step=None), token(4, step=None)
    store.put([own, beside, token(5)])
    assert ids(store.around().unread_near(own, 8)) == [beside.sample_id]


def test_norms_and_readings_before_a_sample_stay_the_same_when_more_come(store: Store) -> None:
    before = [sample(number, norm=float(number), sequence_id=f"q{number}") for number in range(6)]
    own = sample(6, norm=6.0, sequence_id="q6")
    store.put([*before, own])
    store.read([reading(one) for one in before])
    around = store.around()
    norms, recent = around.usual_norms(own), ids(around.recent(own, 3))
    assert sorted(norms) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert recent == ids(before[:2:-1])
    later = [sample(number, norm=99.0) for number in range(7, 12)]
    store.put([*later, sample(2, layer=9, norm=1e6), sample(3, run_id="run-2", norm=1e6)])
    store.read([reading(one) for one in later])
    assert (around.usual_norms(own), ids(around.recent(own, 3))) == (norms, recent)


def test_other_layers_of_the_run(store: Store) -> None:
    own, deep, late = sample(5), sample(3, layer=9), sample(8, layer=9)
    store.put([own, deep, late, sample(2)])
    (found,) = store.around().other_layers(own, 4)
    np.testing.assert_array_equal(found, deep.vector)


def test_controls_measured_later_complete_the_stored_alert_and_what_sinks_will_be_told(store: Store) -> None:
    one = sample(0)
    store.put([one])
    fired = alert(one, evidence={"recurrence": {"readings": 1}, "not_run": {"agreement": "it was not measured"}})
    with store.repository.transaction(["run-1"]) as tx:
        tx.add_readings([reading(one)])
        tx.add_matches([match(one)])
        tx.save_alert(fired, [match(one)], "fired")
    told = store.repository.add_evidence(fired, {"agreement": {"exhibit": 0.8}, "not_run": {}})
    expected = {"recurrence": {"readings": 1}, "agreement": {"exhibit": 0.8}, "not_run": {}}
    assert told.evidence == expected
    stored = store.repository.alert(fired.alert_id)
    assert stored is not None
    assert stored.evidence == expected
    (waiting,) = store.repository.outbox_pending()
    assert waiting.alert.evidence == expected
