"""The telemetry benchmark measures what it says, on the smallest sizes that run."""

from __future__ import annotations

from pathlib import Path

from tests.benchmarks.telemetry import BARS, verdict
from tests.benchmarks.telemetry_cost import cost
from tests.benchmarks.telemetry_memory import memory
from tests.benchmarks.telemetry_series import series


def test_the_cost_has_all_parts_and_everything_arrived(tmp_path: Path) -> None:
    found = cost(tmp_path, pairs=1, samples=64, batch=32)
    assert {
        *("capture_span", "verbalize_span", "evaluate_span", "sampled", "dropped", "verbalized", "fidelity"),
        *("evaluation_event", "alert", "vitals", "export_traces", "export_logs", "export_metrics", "scrape"),
    } <= set(found["parts_us"])
    assert abs(found["cost_per_sample_us"] - sum(found["parts_us"].values())) < 1.0
    assert found["share_of_pipeline"] > 0
    assert found["matches_per_1000"] > 0
    for name in ("verbalization_duration_seconds", "fidelity_fve", "fidelity_unexplained", "detection_delay_seconds"):
        shares = found["buckets"][f"nla_monitor_{name}"]
        assert (shares["overflow"], shares["first"] < 1.0) == (0.0, True), name
    for counts in found["delivery"].values():
        assert counts["emitted"] == counts["exported"] > 0


def test_series_are_counted_where_prometheus_would(tmp_path: Path) -> None:
    found = series(tmp_path / "series", 10)
    assert found["series_by_metric"]["nla_monitor_alerts_firing"] == 10
    assert found["series_by_metric"]["nla_monitor_detection_delay_seconds"] == 5 * 17, "by severity, not by rule"
    assert sum(found["series_by_metric"].values()) < found["series"] < 500


def test_every_span_into_the_void_is_accounted_for() -> None:
    found = memory(3_000)["memory"]
    assert found["adds_up"]
    assert found["counts"]["exported"] == 0
    assert found["shutdown_seconds"] < 5


def test_a_missed_bar_fails_the_whole() -> None:
    fine = {
        "share_of_pipeline": 0.01,
        "series": 1000,
        "memory": {"slope_bytes_per_span": 0.1, "adds_up": True},
    }
    assert verdict(fine)["passed"]
    for change in (
        {"share_of_pipeline": BARS["share_of_pipeline"] * 1.01},
        {"series": BARS["series"] + 1},
        {"memory": {"slope_bytes_per_span": 2000.0, "adds_up": True}},
        {"memory": {"slope_bytes_per_span": 0.0, "adds_up": False}},
    ):
        assert not verdict(fine | change)["passed"]
