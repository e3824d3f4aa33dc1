"""The guarantee benchmark, small: it runs, and says what the issue asks for."""

from __future__ import annotations

from tests.benchmarks.guarantee import ALPHAS, Sizes, measure


def test_a_small_run_of_the_guarantee_benchmark() -> None:
    """False alarms with intervals by alpha, per run and per sequence; delays on runs that hold the thought."""
    found = measure(Sizes(runs=3, sequences=5, blocks=1, calibration=110, planted=2), ["planted"])
    for level, total in (("run_level", 3), ("per_sequence", 15)):
        assert set(found[level]) == {str(alpha) for alpha in ALPHAS}
        for alpha in ALPHAS:
            figures = found[level][str(alpha)]
            assert figures["total"] == total
            assert figures["false_alarm_low"] <= figures["false_alarm"] <= figures["false_alarm_high"]
            assert figures["false_alarm_low"] <= alpha
    delays = found["run_level"]["0.05"]["detection_delay"]
    assert set(delays) == {"planted/reward-hack", "planted/eval-awareness"}
    assert found["pairs"]["planted"]["0.05"]["reward-hack"]["certified_sets"] == 1
