"""The agent benchmark measures what it says, on the smallest sizes that run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.agent_latency import latency, ratios
from tests.benchmarks.agent_parts import attribution, events, memory


def test_the_watched_agent_says_the_same_and_is_sampled(tmp_path: Path) -> None:
    found = latency(tmp_path / "latency", 2, skip=1, width=64, blocks=3)
    assert set(found["latency_ratio"]) == {"p50", "p99"}
    assert found["latency_sessions"] == 3 * 3, "three model calls in each of three runs"
    assert found["latency_samples"] > 0
    assert found["faults"] == {}


def test_ratios_are_of_pairs_and_of_tails() -> None:
    assert ratios([2.0, 4.0, 9.0], [1.0, 4.0, 6.0]) == {"p50": 1.5, "p99": 1.5}


def test_every_sample_is_attributed(tmp_path: Path) -> None:
    found = attribution(tmp_path / "attribution", 1)
    assert found["attribution"] == 1.0
    assert found["attribution_generations_without_sample"] == 0
    assert found["attribution_samples"] > found["attribution_generations"] >= 3


def test_a_sample_out_of_place_lowers_the_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nla_monitor_langchain.outline.bisect_right", lambda ends, place: 1)
    assert attribution(tmp_path / "attribution", 1)["attribution"] < 1.0


def test_events_and_memory_come_to_an_end_with_nothing_left_but_what_was_never_ended(tmp_path: Path) -> None:
    assert events(tmp_path / "events", 5)["handler_us_per_event"] > 0
    found = memory(tmp_path / "memory", 40)
    assert found["memory_cancelled"] == 4
    assert found["memory_left_open"] == {"calls": 2, "runs": 2, "sessions": 0}
