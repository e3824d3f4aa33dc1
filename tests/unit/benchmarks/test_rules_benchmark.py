"""The rules benchmark, small: it runs, and its data is what it says."""

from __future__ import annotations

from tests.benchmarks.rules import measure
from tests.benchmarks.rules_data import explanations, make_rules


def test_a_small_run_gives_all_figures() -> None:
    found = measure(600, 30, 1)
    assert (found["explanations"], found["rules"], found["distinct_explanations"]) == (600, 30, 600)
    assert 0 < found["load_seconds"] < found["seconds"]
    assert found["matches"] >= found["matching_explanations"] > 0
    assert {"keywords_us", "regex_us", "cel_us", "both_us", "numeric_us", "pack_us"} == set(found["single_rule"])
    assert all(cost > 0 for cost in found["single_rule"].values())
    assert found["peak_memory_mb"] > 0


def test_its_rules_pass_their_own_tests_and_its_texts_are_the_same_every_time() -> None:
    rules = make_rules(60)
    assert len(rules) == 60
    rules.verify()
    assert list(explanations(50, rules)) == list(explanations(50, rules))
