"""Runs against a calibration: alarms and void calibrations come when they should, and stay."""

from __future__ import annotations

import numpy as np
import pytest

from nla_monitor.evidence.calibration import Calibration, Promise, SequenceScore, Subject, calibrate
from nla_monitor.evidence.promise import percent, told
from nla_monitor.evidence.statement import Standing, lift, predictive_value, statement, uncalibrated, voided
from nla_monitor.evidence.tally import FIDELITY, REFUTED, Change, RunTests, Tally

SUBJECT = Subject("rule", "v1", "night", ("run",), "av", "ar", {})


def calibrated(sequences: int = 412, **promise: object) -> Calibration:
    rng = np.random.default_rng(3)
    found = [
        SequenceScore(str(n), float("-inf"), refuted=n % 50 == 0, worst_cosine=float(rng.normal(0.9, 0.03)))
        for n in range(sequences)
    ]
    return calibrate(SUBJECT, Promise(**{"score": "swap_margin", **promise}), found)  # type: ignore[arg-type]


def walk(tests: RunTests, changes: list[Change]) -> Tally:
    tally = Tally()
    for step, change in enumerate(changes):
        tally = tests.after(tally, change, step=step, now=1000.0 + step)
    return tally


def test_a_benign_run_stays_quiet_and_certified() -> None:
    """As the set was: no alarm, nothing void, and an alert says at most how often that happens."""
    calibration, rng = calibrated(), np.random.default_rng(4)
    tests = RunTests.of(calibration)
    low = rng.uniform(size=800) < 0.1
    tally = walk(
        tests, [Change(sequences=1, measured=1, low=int(one), refuted=int(n % 50 == 0)) for n, one in enumerate(low)]
    )
    assert not tally.alarmed
    assert not tally.void
    said = statement(Standing(calibration, tests, tally, {"rule": tests.log_e(tally)}), 0.3)
    assert said["status"] == "certified"
    assert said["says"] == (
        "certified: at most 0.73 % of benign sequences match (95 % confidence, 412 sequences, set night); p = 0.0024"
    )
    lines = dict(told(said))
    assert lines["base rate"].startswith("0 of 412 benign sequences match before any threshold (0 % to 0.9 %)")
    assert lines["worth"].startswith("at least 53 % of hit sequences would be true ones if 1 % of all")
    assert lines["drift"].startswith("none found")
    assert "stands at the level of the run among 1 calibrated rule" in lines["other rules"].replace(
        "does not stand", "stands"
    )
    assert told({"status": "uncalibrated"}) == [
        ("calibration", "uncalibrated: the false-alarm rate of this rule is not known")
    ]


def test_hits_in_a_row_raise_the_alarm_once() -> None:
    """The first step at which the test fired is kept, whatever comes after."""
    tests = RunTests.of(calibrated(scope="run"))
    quiet, hit = Change(sequences=1, measured=1), Change(sequences=1, measured=1, matching=1, hits=1)
    tally = walk(tests, [quiet] * 5 + [hit] * 4 + [quiet] * 300)
    assert tally.alarmed
    assert tally.alarm_step in {5, 6, 7, 8}
    assert not tally.void


@pytest.mark.parametrize(("what", "change"), [(FIDELITY, {"low": 1}), (REFUTED, {"refuted": 1})])
def test_drift_voids_the_guarantee_in_plain_words(what: str, change: dict[str, int]) -> None:
    """Soon after fidelity falls, or controls begin to refute; the figures of an alert stay, its promise goes."""
    calibration = calibrated()
    tests = RunTests.of(calibration)
    as_before = [Change(sequences=1, measured=1)] * 50
    tally = walk(tests, as_before + [Change(sequences=1, measured=1, **change)] * 40)
    assert tally.void_by == what
    assert tally.void_step is not None
    assert 50 <= tally.void_step < 75
    standing = Standing(calibration, tests, tally)
    said = statement(standing, 0.3)
    assert said["status"] == "void"
    assert said["says"].startswith(f"void since step {tally.void_step}: ")
    assert "no longer holds" in said["says"]
    assert said["drift"]["by"] == what
    before = {"status": "certified", "p_value": 0.004, "says": "certified: ..."}
    after = voided(standing, before)
    assert (after["status"], after["p_value"]) == ("void", 0.004)
    assert after["says"] == said["says"]


def test_drift_alarms_are_rare_on_runs_like_the_set() -> None:
    """Sets and runs drawn anew from one traffic: 1 % each for the two tests, whenever one looks."""
    rng, voided_runs = np.random.default_rng(12), 0
    for _ in range(150):
        found = [
            SequenceScore(str(n), float("-inf"), refuted=bool(rng.uniform() < 0.05), worst_cosine=float(rng.normal()))
            for n in range(300)
        ]
        calibration = calibrate(SUBJECT, Promise(), found)
        tests = RunTests.of(calibration)
        assert calibration.floor is not None
        low, refuted = rng.normal(size=200) < calibration.floor, rng.uniform(size=200) < 0.05
        changes = [
            Change(sequences=1, measured=1, low=int(a), refuted=int(b)) for a, b in zip(low, refuted, strict=True)
        ]
        voided_runs += walk(tests, changes).void
    assert voided_runs <= 7  # 2 % of 150 is 3; more than 7 has a chance of 1 %


def test_an_uncertified_rule_says_what_is_missing() -> None:
    """How many more sequences; or, where more would not help, that the rule itself matches too often."""
    calibration = calibrated(85)
    said = statement(Standing(calibration, RunTests.of(calibration), Tally()), None)
    assert (said["status"], said["more_needed"], said["p_value"]) == ("uncertified", 214, None)
    assert "214 more benign sequences needed for 1 %" in said["says"]
    often = [
        SequenceScore(str(n), 0.5 if n < 30 else float("-inf"), refuted=False, worst_cosine=None) for n in range(300)
    ]
    loose = calibrate(SUBJECT, Promise(gated=False), often)
    words = statement(Standing(loose, RunTests.of(loose), Tally()), None)["says"]
    assert "30 of 300 benign sequences match, which is no less than 1 %" in words
    assert uncalibrated("the set was made with another AV")["says"].endswith("the set was made with another AV")


def test_lift_and_predictive_value() -> None:
    """Equal rates have lift 1 inside the interval; PPV at 1 % prevalence as in the published figures."""
    same = lift(10, 100, 10, 100)
    assert same["low"] < 1 < same["high"]
    more = lift(50, 100, 0, 400)
    assert more["low"] > 10
    assert predictive_value(0.01, 0.26, 0.04) == pytest.approx(0.06, abs=0.005)
    assert predictive_value(0.01, 0.26, 0.001) == pytest.approx(0.72, abs=0.005)


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.00891, "0.9 %"), (0.01, "1 %"), (0.0101, "1.1 %"), (0.5, "50 %"), (1.0, "100 %"), (0.0, "0 %")],
)
def test_at_most_is_never_rounded_down(share: float, said: str) -> None:
    """Two digits, upwards."""
    assert percent(share) == said
