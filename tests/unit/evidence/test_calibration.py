"""Thresholds, p-values and bounds: exact where they can be computed otherwise, kept where they promise something."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from nla_monitor.evidence.calibration import (
    NO_MATCH,
    UNSCORED,
    Calibration,
    Promise,
    SequenceScore,
    Subject,
    calibrate,
    interval,
    more_needed,
    pooled,
    rank_for,
    upper_bound,
)

SUBJECT = Subject("rule", "v1", "default", ("run",), "av", "ar", {})
SCORES = st.sampled_from([NO_MATCH, NO_MATCH, 0.1, 0.2, 0.2, 0.3, 0.5, UNSCORED])


def made(statistics: list[float], **promise: object) -> Calibration:
    found = [SequenceScore(str(n), one, refuted=False, worst_cosine=0.9) for n, one in enumerate(statistics)]
    return calibrate(SUBJECT, Promise(**{"score": "swap_margin", **promise}), found)  # type: ignore[arg-type]


def test_the_numbers_that_everybody_knows() -> None:
    """299 sequences without a hit certify 1 %, 2,995 certify 0.1 %, at 95 % confidence; one less does not."""
    assert more_needed(0, 0, 0.01, 0.95) == 299
    assert more_needed(0, 0, 0.001, 0.95) == 2_995
    assert more_needed(0, 85, 0.01, 0.95) == 214
    assert more_needed(0, 299, 0.01, 0.95) == 0
    assert (rank_for(298, 0.01, 0.95), rank_for(299, 0.01, 0.95), rank_for(473, 0.01, 0.95)) == (None, 0, 1)


@given(st.integers(1, 400), st.data())
def test_bounds_are_those_of_clopper_and_pearson(total: int, data: st.DataObject) -> None:
    """Against scipy's exact binomial test, in both directions."""
    count = data.draw(st.integers(0, total))
    exact = binomtest(count, total).proportion_ci(0.95, method="exact")
    assert interval(count, total) == pytest.approx((exact.low, exact.high), abs=1e-9)
    assert upper_bound(count, total, 0.975) == pytest.approx(exact.high, abs=1e-9)


@given(st.lists(SCORES, min_size=1, max_size=60), SCORES)
def test_p_values_count_ties_against_the_sequence(statistics: list[float], score: float) -> None:
    """Counted as (1 + #{calibration >= s}) / (n + 1), as written."""
    calibration = made(statistics)
    if math.isfinite(score):
        expected = Fraction(1 + sum(one >= score for one in statistics), len(statistics) + 1)
        assert calibration.p_value(score) == pytest.approx(float(expected))
    assert calibration.p_value(None) is None


@settings(deadline=None)
@given(st.lists(SCORES, min_size=1, max_size=500), st.sampled_from([0.01, 0.05, 0.2]))
def test_a_threshold_lets_through_no_more_than_was_agreed(statistics: list[float], alpha: float) -> None:
    """Exceedances never go beyond the count that the bound is for; the order of the sequences changes nothing."""
    calibration = made(statistics, alpha=alpha)
    assert calibration.exceedances == sum(one > calibration.threshold for one in statistics)
    assert calibration.exceedances <= calibration.bounded
    assert calibration.certified == (upper_bound(calibration.bounded, len(statistics), 0.95) <= alpha)
    assert made(statistics[::-1], alpha=alpha) == calibration
    if calibration.certified:
        assert calibration.more_needed == 0
        for score in {one for one in statistics if math.isfinite(one) and calibration.hits(one)}:
            p_value = calibration.p_value(score)
            assert p_value is not None
            assert p_value <= alpha  # certified is the stronger promise


@pytest.mark.parametrize("discrete", [False, True])
def test_certificates_keep_their_confidence(discrete: bool) -> None:
    """Simulated, where the truth is known: the bound lies below the true false-alarm rate in 5 % of sets at most.

    Shares of matching sequences run from where no threshold is needed to where it always is, which is where the two
    cases of the bound meet.
    """
    rng = np.random.default_rng(7)
    for matching in (0.004, 0.012, 0.02, 0.3):
        wrong = 0
        for _ in range(400):
            raw = rng.uniform(size=330)
            raw = np.round(raw, 1) if discrete else raw
            statistics = np.where(rng.uniform(size=330) < matching, raw, NO_MATCH)
            calibration = made(statistics.tolist())
            if math.isinf(calibration.threshold):
                truth = matching
            elif discrete:
                above = [value for value in np.arange(0, 1.05, 0.1).round(1) if value > calibration.threshold]
                truth = matching * sum(0.05 if value in {0.0, 1.0} else 0.1 for value in above)
            else:
                truth = matching * (1 - calibration.threshold)
            wrong += truth > calibration.fpr_upper()
        assert binomtest(wrong, 400, 0.05, alternative="greater").pvalue > 1e-3, (matching, wrong)


def test_p_values_are_valid_for_new_sequences() -> None:
    """P(p <= alpha) <= alpha over calibration sets and new sequences, with many ties."""
    rng = np.random.default_rng(11)
    p_values = []
    for _ in range(3_000):
        drawn = np.where(rng.uniform(size=100) < 0.4, rng.integers(1, 6, size=100) / 10, NO_MATCH).tolist()
        calibration = made(drawn[:-1])
        p_values.append(1.0 if math.isinf(drawn[-1]) else calibration.p_value(drawn[-1]))
    for alpha in (0.01, 0.05, 0.2):
        assert binomtest(sum(p <= alpha for p in p_values), 3_000, alpha, alternative="greater").pvalue > 1e-3


def test_what_was_not_measured_is_never_silenced() -> None:
    """A match without a score passes, and counts as the highest one in the set, so that the bound covers it."""
    calibration = made([NO_MATCH] * 330 + [0.2] * 10 + [UNSCORED] * 20)
    assert calibration.hits(None)
    assert not calibration.hits(0.2)
    assert (calibration.exceedances, calibration.bounded) == (20, 20)
    assert calibration.fpr_upper() == pytest.approx(upper_bound(20, 360, 0.95))
    assert not calibration.certified
    assert pooled([0.1, None, 0.4]) == UNSCORED
    assert pooled([]) == NO_MATCH


def test_ties_at_the_threshold_do_not_tighten_the_bound() -> None:
    """The bound is for the rank that was fixed beforehand, not for what happens to exceed a tied threshold."""
    calibration = made([NO_MATCH] * 470 + [0.5, 0.5, 0.5])
    assert (calibration.threshold, calibration.exceedances, calibration.bounded) == (0.5, 0, 1)
    assert calibration.fpr_upper() == pytest.approx(upper_bound(1, 473, 0.95))


def test_a_rule_that_asks_for_nothing_is_measured_as_it_stands() -> None:
    """No threshold: all its matches are hits, and the bound is that of its own rate."""
    calibration = made([NO_MATCH] * 295 + [0.5] * 5, gated=False)
    assert math.isinf(calibration.threshold)
    assert (calibration.exceedances, calibration.matching) == (5, 5)
    assert calibration.fpr_upper() == pytest.approx(upper_bound(5, 300, 0.95))
    assert calibration.p_value(None) == pytest.approx(6 / 301)


def test_a_score_without_steps_can_leave_a_rule_mute() -> None:
    """Matches that all score 1 and come too often on benign traffic cannot be told apart: the set says so."""
    assert made([NO_MATCH] * 280 + [1.0] * 20, score="matches").mute
    assert not made([NO_MATCH] * 299 + [1.0] * 0, score="matches").mute
