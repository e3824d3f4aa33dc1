"""E-processes and e-BH: valid under any stopping, and quick to see what is there."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import binomtest

from nla_monitor.evidence.eprocess import RateTest, e_bh, log_e_value


@pytest.mark.parametrize(("hits", "sequences", "null"), [(0, 10, 0.01), (2, 10, 0.05), (5, 200, 0.01), (9, 9, 0.3)])
def test_the_closed_form_is_the_mixture(hits: int, sequences: int, null: float) -> None:
    """Against the integral over q that defines it."""

    def density(q: float) -> float:
        return 1 / math.sqrt(q * (1 - q))

    def ratio(q: float) -> float:
        return (q / null) ** hits * ((1 - q) / (1 - null)) ** (sequences - hits) * density(q)

    top, _ = quad(ratio, null, 1, limit=200)
    whole, _ = quad(density, null, 1, limit=200)
    assert math.exp(log_e_value(hits, sequences, null)) == pytest.approx(top / whole, rel=1e-4)


@given(st.integers(0, 500), st.data(), st.floats(1e-4, 0.9))
def test_a_sequence_is_worth_one_on_average_at_the_null(sequences: int, data: st.DataObject, null: float) -> None:
    """The supermartingale's step: at the null itself the next value averages to the present one."""
    hits = data.draw(st.integers(0, sequences))
    now = log_e_value(hits, sequences, null)
    if not math.isfinite(now) or now < -500:
        return
    up, down = log_e_value(hits + 1, sequences + 1, null), log_e_value(hits, sequences + 1, null)
    average = null * math.exp(up - now) + (1 - null) * math.exp(down - now)
    assert average == pytest.approx(1.0, rel=1e-6)
    assert up >= down  # a late hit only raises the value: looking before a sequence is complete is safe


def test_false_alarms_stay_below_the_level_whenever_one_stops() -> None:
    """2,000 benign runs looked at after every sequence of 400: as many alarms as the level allows, at most."""
    rng = np.random.default_rng(5)
    for null, level in ((0.02, 0.05), (0.01, 0.01)):
        test = RateTest(null, level)
        hit = rng.uniform(size=(2_000, 400)) < null
        alarms = sum(_fires(test, row) is not None for row in hit)
        # The whole error may be spent here, because the null is true exactly; half of it belongs to the bound.
        assert binomtest(alarms, 2_000, level / 2, alternative="greater").pvalue > 1e-3, alarms


def _fires(test: RateTest, row: np.ndarray) -> int | None:
    for hits, at in enumerate(np.flatnonzero(row), 1):  # the value rises at hits only
        if test.log_e(hits, int(at) + 1) >= test.log_limit:
            return int(at) + 1
    return None


def test_the_whole_error_is_kept_when_the_rate_is_only_known_from_a_set() -> None:
    """Calibration sets drawn anew: bound and alarm together stay below the level."""
    rng = np.random.default_rng(6)
    alarms = 0
    for _ in range(1_000):
        test = RateTest.against(int(rng.binomial(100, 0.02)), 100, 0.01)
        alarms += _fires(test, rng.uniform(size=1_000) < 0.02) is not None
    assert binomtest(alarms, 1_000, 0.01, alternative="greater").pvalue > 1e-3, alarms


def test_it_is_quick_where_something_is_there() -> None:
    """Half of the sequences hit, against a certified 1 %: an alarm within a handful of sequences."""
    rng = np.random.default_rng(8)
    test = RateTest.against(0, 400, 0.01)
    delays = [_fires(test, rng.uniform(size=100) < 0.5) for _ in range(200)]
    assert None not in delays
    assert np.median([delay for delay in delays if delay is not None]) <= 8


def test_nothing_speaks_against_a_null_of_one() -> None:
    """A set without sequences certifies nothing, so that no run can contradict it."""
    test = RateTest.against(0, 0, 0.01)
    assert (test.null, test.log_e(50, 50)) == (1.0, 0.0)


@given(st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.floats(-5, 12), max_size=8))
def test_e_bh_is_the_procedure_as_published(values: dict[str, float]) -> None:
    """The largest k whose k-th largest value is at least m / (k alpha), by brute force."""
    ranked = sorted(values.items(), key=lambda item: -item[1])
    fit = [k for k in range(1, len(ranked) + 1) if math.exp(ranked[k - 1][1]) * k >= len(ranked) / 0.1 * (1 + 1e-12)]
    assert e_bh(values, 0.1) >= {name for name, _ in ranked[: max(fit, default=0)]}
    assert len(e_bh(values, 0.1)) in {0, *range(max(fit, default=0), len(ranked) + 1)}


def test_e_bh_keeps_the_false_discovery_rate_under_dependence() -> None:
    """Ten rules that share their noise, two of them true: few of the survivors are false."""
    rng, shares = np.random.default_rng(9), []
    for _ in range(400):
        common = rng.uniform(size=60) < 0.02
        hits = {f"null-{n}": int(common.sum()) for n in range(8)} | {
            f"true-{n}": int((rng.uniform(size=60) < 0.3).sum()) for n in range(2)
        }
        kept = e_bh({name: log_e_value(count, 60, 0.02) for name, count in hits.items()}, 0.1)
        shares.append(sum(name.startswith("null") for name in kept) / max(len(kept), 1))
    assert np.mean(shares) <= 0.1 + 3 * np.std(shares) / 20
