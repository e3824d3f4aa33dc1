"""Counting a run: whatever the batches, the counts are those of a recount, in memory and in a database alike."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nla_monitor.calibrate import GATE, Guarantees, RunWatch
from nla_monitor.evidence.calibration import NO_MATCH, Calibration, Promise, SequenceScore, Subject, calibrate
from nla_monitor.records import Match, Reading, Support
from nla_monitor.rules import RuleSet, load_text
from nla_monitor.store.calibrations import MemoryTallies, Tallies
from nla_monitor.store.engine import open_engine, read, write
from tests.store_support import match, reading, sample

RULE = """
title: Plans to hack
id: hack
severity: high
detection: {words: [hack], condition: words}
calibration: {alpha: 0.05}
tests: {positive: [hack], negative: [fix]}
"""
RULES = RuleSet([load_text(RULE, "hack.yaml")])
VERSION = RULES.headers["hack"].version
SCORES = st.sampled_from([None, -0.5, -0.1, 0.0, 0.1, 0.3])
Token = tuple[int, float, str, float | None]
TOKENS = st.lists(
    st.tuples(
        st.integers(0, 6), st.sampled_from([0.5, 0.7, 0.9]), st.sampled_from(["none", "yes", "no", "gated"]), SCORES
    ),
    max_size=25,
)


def guarantees(threshold: float = -0.1) -> Guarantees:
    """A set of 100 sequences whose second highest score is ``threshold``."""
    scores = [threshold + 1, threshold, threshold - 0.1, *[NO_MATCH] * 97]
    found = [SequenceScore(str(n), score, refuted=False, worst_cosine=0.6 + n / 500) for n, score in enumerate(scores)]
    made = calibrate(
        Subject("hack", VERSION, "default", ("base",), "av", "ar", {}), Promise(0.05, score="swap_margin"), found
    )
    return Guarantees(RULES, {"hack": dataclasses.replace(made, calibration_id="c")})


def records(tokens: list[Token]) -> tuple[list[Reading], list[Match], dict[str, Support]]:
    """Tokens as readings; of one sequence number each, with a match that a control supports, refutes or none."""
    readings, matches, supports = [], [], {}
    for at, (number, cosine, said, score) in enumerate(tokens):
        one = sample(at, sample_id=f"sample-{at}", sequence_id=f"s{number}", step=0)
        readings.append(reading(one, cosine=cosine))
        if said == "none":
            continue
        found = match(one, rule_version=VERSION)
        failed = {"yes": (), "no": ("echo",), "gated": (GATE,)}[said]
        matches.append(found)
        supports[found.match_id] = Support(found.match_id, not failed, failed=failed, score=score)
    return readings, matches, supports


def count(store: Any, tokens: list[Token], size: int) -> dict[str, Any]:
    """The tally after all batches."""
    readings, matches, supports = records(tokens)
    ready = guarantees()
    for start in range(0, len(readings), size):
        part = readings[start : start + size]
        ids = {one.sample_id for one in part}
        mine = [one for one in matches if one.sample_id in ids]
        watch = RunWatch(ready, "run-1", store, readings=part, matches=mine, supports=supports)
        for one in part:
            watch.take(one)
        watch.save()
    found: dict[str, Any] = store.tallies("run-1").get("c", {})
    return found


def recounted(store: Any, calibration: Calibration) -> dict[str, int]:
    found: dict[str, int] = store.recount(
        "run-1", ("hack", VERSION), threshold=calibration.threshold, floor=calibration.floor
    )
    return found


@settings(deadline=None)
@given(TOKENS, st.integers(1, 9))
def test_counts_are_those_of_a_recount(tokens: list[Token], size: int) -> None:
    """Batches of any size; scores below, at and above a negative threshold, and none at all."""
    store = MemoryTallies()
    kept = count(store, tokens, size)
    if not tokens:
        assert kept == {}
        return
    calibration = guarantees().calibrations["hack"]
    assert {name: kept[name] for name in recounted(store, calibration)} == recounted(store, calibration)
    assert kept == count(MemoryTallies(), tokens, len(tokens))
    assert kept["hits"] <= kept["matching"] <= kept["sequences"] == len({number for number, *_ in tokens})


def test_the_database_counts_like_memory(store_url: str) -> None:
    """The same tokens through SQL, recount included."""
    tokens: list[Token] = [
        (n % 7, 0.5 + 0.05 * (n % 9), ("none", "yes", "no", "gated")[n % 4], (None, -0.5, -0.1, 0.0, 0.3)[n % 5])
        for n in range(60)
    ]
    engine, memory = open_engine(store_url), MemoryTallies()
    calibration = guarantees().calibrations["hack"]
    with write(engine) as connection:
        assert count(Tallies(connection), tokens, 8) == count(memory, tokens, 8)
    with read(engine) as connection:
        assert recounted(Tallies(connection), calibration) == recounted(memory, calibration)
    engine.dispose()


def test_the_gate_refutes_only_what_is_measured_and_stands() -> None:
    """Below the threshold: refuted by name. Above it, without a score, refuted already, another rule: as it was."""
    ready = guarantees(threshold=0.2)
    one = match(sample(1), rule_version=VERSION)
    below = ready.gate(one, Support(one.match_id, supported=True, score=0.2))
    assert below is not None
    assert (below.supported, below.failed) == (False, (GATE,))
    for support in (
        Support(one.match_id, supported=True, score=0.21),
        Support(one.match_id, supported=True),
        Support(one.match_id, supported=False, failed=("echo",), score=0.1),
        None,
    ):
        assert ready.gate(one, support) is support
    assert ready.gate(dataclasses.replace(one, rule_id="other"), None) is None
    assert ready.gate(dataclasses.replace(one, run_id="base"), None) is None
