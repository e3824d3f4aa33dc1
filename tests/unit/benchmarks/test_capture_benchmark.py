"""The capture benchmark, small: it runs, it compares the same bits, and what is missing is said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.benchmarks import capture
from tests.benchmarks.capture_arms import MONITOR, PEERS, SIZES, captures, unavailable
from tests.benchmarks.capture_timing import Record, digest, ratio, same


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return capture.measure(capture.Options(size="tiny", steps=4, warm_up=1))


def test_every_arm_gives_ratios_and_the_monitor_changes_no_bit(found: dict[str, Any]) -> None:
    assert set(found["monitor"]) == set(MONITOR)
    assert set(found["peers"]) == set(PEERS)
    for row in [*found["monitor"].values(), found["noise"], found["peers"]["output_hidden_states"]]:
        assert row["loss_bitwise_equal"]
        assert row["grads_bitwise_equal"]
        assert row["weights_bitwise_equal"]
        assert 0 < row["overhead_ratio"]["p50"] <= row["overhead_ratio"]["p99"]
        assert row["cpu_ratio"]["p50"] <= row["cpu_ratio_with_background"]["p99"]
    assert found["syncs"] is None
    assert (found["recompiles"], found["graph_breaks"]) == (0, 0)


def test_each_policy_reads_what_its_name_says(found: dict[str, Any]) -> None:
    size, forwards = SIZES["tiny"], 5
    samples = {name: row["samples"] / forwards for name, row in found["monitor"].items()}
    assert samples["all_tokens"] == size.batch * size.length
    assert samples["one_percent"] == max(1, round(size.batch * size.length / 100))
    assert found["peers"]["output_hidden_states"]["vectors"] == samples["default"] * forwards
    wide = SIZES["1b"]
    one = captures(wide)["one_percent"]
    assert one["sequences_per_step"] * one["tokens_per_sequence"] == pytest.approx(
        wide.batch * wide.length / 100, rel=0.1
    )


def test_a_peer_that_cannot_run_is_skipped_with_the_reason(
    found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, row in found["peers"].items():
        assert ("skipped" in row) == (unavailable(name, None) is not None)
    assert "cannot be compiled" in str(unavailable("nnsight", "inductor"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "not installed" in str(unavailable("transformer_lens", None))


def test_one_changed_bit_is_seen() -> None:
    weights = [torch.zeros(8, dtype=torch.bfloat16), torch.ones(3)]
    changed = [weights[0].clone(), weights[1].clone()]
    changed[1][2] = torch.nextafter(changed[1][2], torch.tensor(2.0))
    assert digest(weights) == digest([one.clone() for one in weights]) != digest(changed)
    left = Record(losses=[torch.tensor(1.0)], digests={("grads", 0): "a", ("weights", 0): "b"})
    right = Record(losses=[torch.tensor(1.0)], digests={("grads", 0): "a", ("weights", 0): "c"})
    equal = {"loss_bitwise_equal": True, "grads_bitwise_equal": True, "weights_bitwise_equal": False}
    assert same(left, right) == equal
    assert same(Record(), Record()) == dict.fromkeys(equal, False)


def test_ratios_are_paired_and_the_interval_holds_the_median() -> None:
    base = [1.0, 2.0, 4.0, 8.0]
    figures = ratio([value * 1.5 for value in base], base)
    assert figures == {"p50": 1.5, "p99": 1.5, "p50_ci95": [1.5, 1.5]}
    low, high = ratio([1.1, 2.0, 4.4, 8.0], base)["p50_ci95"]
    assert low < 1.05 < high
