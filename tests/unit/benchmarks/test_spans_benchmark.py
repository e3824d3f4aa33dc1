"""The spans benchmark measures what it says; its figures here are those of a few spans."""

from __future__ import annotations

from tests.benchmarks.spans import measure


def test_its_figures() -> None:
    result = measure(100)
    assert result["faults"] == {}
    assert 0 < result["span_us"]["without"] < result["span_us"]["with"]
    assert result["forward_us"]["without"] < result["forward_us"]["inside_a_call"]
