"""Recurrence, verdicts, and what an alert says of its controls, in numbers and in words."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_monitor.evidence import Bound, collect_evidence, completed, decide, recurred, recurrence
from nla_monitor.evidence.wording import USUAL, lines, summary
from nla_monitor.records import Support, WindowVerdict
from nla_monitor.rules.evidence_schema import CONTROLS
from tests.store_support import match, reading, sample


def test_recurrence_counts_what_is_distinct() -> None:
    one, again, other = sample(0), sample(1, position=10, step=0), sample(8, step=None)
    found = [match(one), match(one), match(again), match(other)]
    assert recurrence(found) == {"readings": 3, "sequences": 2, "positions": 2, "steps": 1}
    assert recurrence([]) == {"readings": 0, "sequences": 0, "positions": 0, "steps": 0}


def test_a_firing_alert_keeps_the_widest_recurrence_of_its_window() -> None:
    one, two, three = sample(0), sample(4), sample(8)
    wide = WindowVerdict(firing=True, matches=(match(one), match(two), match(three)), distinct=3, needed=2)
    narrow = WindowVerdict(firing=True, matches=(match(three),), distinct=1, needed=2)
    first = {"norm": 1.0, "recurrence": {**recurrence([match(one)]), "needed": 2}}
    for verdicts in ((wide, narrow), (narrow, wide)):
        found = first
        for verdict in verdicts:
            found = recurred(found, verdict)
        widest = {"readings": 3, "sequences": 3, "positions": 3, "steps": 3, "needed": 2}
        assert found == {"norm": 1.0, "recurrence": widest}
    assert first["recurrence"] == {**recurrence([match(one)]), "needed": 2}


def test_what_was_not_measured_is_absent() -> None:
    one = sample(context=None)
    verdict = WindowVerdict(firing=True, matches=(match(one),), distinct=1, needed=1)
    assert set(collect_evidence(verdict, reading(one), match(one), {}, {})) == {"recurrence", "raw_norm"}


def test_an_alert_tells_its_controls_as_json() -> None:
    one, other = sample(0), sample(1)
    matches = (match(one), match(other))
    verdict = WindowVerdict(firing=True, matches=matches, distinct=2, needed=2)
    supports = {
        matches[0].match_id: Support(
            matches[0].match_id, supported=True, controls={"swap_margin": 0.25, "echo": 0.5}, not_run={"norm": "few"}
        ),
        matches[1].match_id: Support(matches[1].match_id, supported=True, controls={"swap_margin": 0.75}),
    }
    bounds = {"swap_margin": Bound(least=0.02), "agreement": Bound(least=0.5)}
    found = collect_evidence(verdict, reading(one), matches[0], supports, bounds)
    assert found["swap_margin"] == {
        "required": {"min": 0.02},
        "exhibit": 0.25,
        "passed": True,
        "median": 0.5,
        "measured": 2,
    }
    assert found["echo"] == {"exhibit": 0.5, "median": 0.5, "measured": 1}
    assert found["agreement"] == {"required": {"min": 0.5}}
    assert found["not_run"] == {"agreement": "it was not measured", "norm": "few"}
    assert found["recurrence"] == {"readings": 2, "sequences": 1, "positions": 2, "steps": 2, "needed": 2}
    assert json.loads(json.dumps(found)) == found
    others = {key: support for key, support in supports.items() if key != matches[0].match_id}
    assert "exhibit" not in collect_evidence(verdict, reading(one), matches[0], others, bounds)["swap_margin"]  # type: ignore[operator]


def test_what_is_measured_later_completes_the_alert() -> None:
    one = sample()
    verdict = WindowVerdict(firing=True, matches=(match(one),), distinct=1, needed=1)
    bounds = {"agreement": Bound(least=0.5)}
    first = collect_evidence(verdict, reading(one), match(one), {}, bounds)
    later = Support(
        match(one).match_id, supported=True, controls={"agreement": 0.8, "echo": 0.0}, not_run={"norm": "few"}
    )
    found = completed(first, later, bounds)
    assert found["agreement"] == {"required": {"min": 0.5}, "exhibit": 0.8, "passed": True}
    assert found["echo"] == {"exhibit": 0.0}
    assert found["not_run"] == {"norm": "few"}
    assert found["recurrence"] == first["recurrence"]


# -- verdicts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "holds"),
    [
        (Bound(), [-1.0, 0.0, 9.0]),
        (Bound(least=0.5), [0.5, 1.0]),
        (Bound(most=0.5), [-1.0, 0.5]),
        (Bound(0.25, 4.0), [0.25, 1.0, 4.0]),
    ],
)
def test_a_bound_holds_up_to_its_limits(bound: Bound, holds: list[float]) -> None:
    assert all(bound.holds(value) for value in holds)
    assert not bound.holds(float("nan"))
    assert all(
        not bound.holds(limit + step) for limit, step in ((bound.most, 0.1), (bound.least, -0.1)) if limit is not None
    )


def test_a_required_control_that_is_missing_counts_unless_the_rule_says_otherwise() -> None:
    results, not_run = {"echo": 0.9}, {"norm": "few"}
    keep = decide("m", results, not_run, {"norm": Bound(most=4)})
    assert (keep.supported, keep.failed, keep.not_run) == (True, (), not_run)
    refuse = decide("m", results, not_run, {"norm": Bound(most=4, refute_missing=True)})
    assert (refuse.supported, refuse.failed) == (False, ("norm",))
    echo_too = decide("m", results, not_run, {"norm": Bound(most=4), "echo": Bound(most=0.5)}, score=0.1)
    assert (echo_too.supported, echo_too.failed, echo_too.score) == (False, ("echo",), 0.1)


# -- words -------------------------------------------------------------------------------------------------------


def test_every_control_has_its_line_and_says_what_is_good_and_what_is_not() -> None:
    for name, usual in USUAL.items():
        limit = usual.least if usual.least is not None else usual.most
        assert limit is not None
        sound = limit
        unsound = limit - 0.2 if usual.least is not None else limit + 1
        (good,) = lines({name: {"exhibit": sound}})
        (bad,) = lines({name: {"exhibit": unsound}})
        assert (good.verdict, bad.verdict) == ("good", "doubtful"), name
        assert good.text != bad.text
        assert str(good).startswith("good: ")


def test_the_usual_limits_are_those_of_a_rule_that_names_none() -> None:
    assert set(USUAL) == set(CONTROLS)
    for name, section in CONTROLS.items():
        made = section()
        most = getattr(made, "max", getattr(made, "max_rank", None))
        assert Bound(getattr(made, "min", None), most) == USUAL[name], name


def test_a_line_names_the_rules_limit_and_what_the_rule_wanted_and_did_not_get() -> None:
    evidence = {
        "recurrence": {"readings": 3, "needed": 2},
        "swap_margin": {"exhibit": 0.01, "median": 0.05, "measured": 3, "required": {"min": 0.02}, "passed": False},
        "agreement": {"required": {"min": 0.5}},
        "not_run": {"agreement": "the AV cannot resample", "norm": "few"},
        "something_new": {"a": 1},
        "truncated": True,
    }
    told = {line.name: line for line in lines(evidence)}
    assert summary(told.values()) == "0 of 3 good; doubtful: swap margin, agreement, cut short"
    assert summary(lines({"echo": {"exhibit": 0.1}})) == "1 of 1 good"
    assert summary(lines({})) == ""
    assert "the rule asks for at least +0.020; median of 3 matches +0.050" in told["swap margin"].text
    assert told["swap margin"].verdict == "doubtful"
    assert told["agreement"].text == "required by the rule, but not measured: the AV cannot resample"
    assert told["not measured"].text == "norm (few)"
    assert told["something_new"].text == "a 1"
    assert told["cut short"].verdict == "doubtful"


def test_a_question_that_nobody_answered_is_no_control_but_a_doubt_and_like_reasons_are_said_once() -> None:
    not_run = {"selection is_it_said": "the judge cannot be reached", "norm": "few", "echo": "few", "ablation": "none"}
    told = {line.name: line for line in lines({"not_run": not_run})}
    assert told["selection is_it_said"].verdict == "doubtful"
    assert told["selection is_it_said"].text == (
        "nobody could be asked, so it counts as not met: the judge cannot be reached"
    )
    assert told["not measured"].text == "norm, echo (few); ablation (none)"


@given(
    st.dictionaries(
        st.sampled_from([*USUAL, "recurrence", "raw_norm", "not_run", "other"]),
        st.none()
        | st.text(max_size=5)
        | st.floats()
        | st.dictionaries(
            st.sampled_from(["exhibit", "median", "required", "measured", "x"]),
            st.none() | st.floats() | st.text(max_size=3) | st.just({"min": 0.1}),
        ),
    )
)
def test_any_stored_evidence_can_be_shown(evidence: dict[str, object]) -> None:
    """Rows of other versions, or damaged ones, must not keep a person from the alert."""
    assert all(isinstance(str(line), str) for line in lines(evidence))
