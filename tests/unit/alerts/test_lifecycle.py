"""When alerts fire, go on and resolve."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_monitor.alerts.lifecycle import Transition, advance, fingerprint
from nla_monitor.records import ActivationSample, Alert, AlertState, Match, Severity, TriageState, WindowVerdict
from tests.store_support import AGENT, header, match, reading, sample


def verdict(*samples: ActivationSample, firing: bool = True) -> WindowVerdict:
    matches = tuple(match(one) for one in samples)
    return WindowVerdict(firing, matches, len(matches), 2)


def go(what: WindowVerdict, current: Alert | None, **changes: Any) -> Transition:
    arguments: dict[str, Any] = {"step": 10, "now": 1010.0, "evidence": {}}
    rule = changes.pop("rule", header())
    exhibit = changes.pop("exhibit", None)
    return advance(rule, {"sequence": "s"}, "run-1", what, current, exhibit, **(arguments | changes))


def fired(*samples: ActivationSample) -> Alert:
    alert = go(verdict(*samples), None, exhibit=reading(samples[0])).alert
    assert alert is not None
    return alert


def test_a_window_that_holds_opens_an_alert_that_says_why() -> None:
    one = sample(3, context="def test_", agent=AGENT, traceparent="00-aa-bb-01")
    evidence = {"echo": {"overlap": 0.1}}
    rule = header(runbook="https://example.org/hack", severity=Severity.CRITICAL)
    transition = go(verdict(sample(1), one), None, exhibit=reading(one), evidence=evidence, rule=rule)
    alert = transition.alert
    assert transition.event == "fired"
    assert alert is not None
    assert (alert.state, alert.triage, alert.severity) == (AlertState.FIRING, TriageState.OPEN, Severity.CRITICAL)
    assert (alert.sample_id, alert.position, alert.context) == (one.sample_id, one.position, "def test_")
    assert (alert.quote, alert.explanation) == ("special-case the tests", "it plans to special-case the tests")
    assert (alert.cosine, alert.denominator_name) == (0.9, "held-out")
    assert (alert.first_step, alert.last_step, alert.matches) == (1, 3, 2)
    assert (alert.fired_at, alert.updated_at, alert.resolved_at) == (1010.0, 1010.0, None)
    assert (alert.agent, alert.traceparent, alert.runbook) == (AGENT, "00-aa-bb-01", "https://example.org/hack")
    assert alert.evidence == evidence
    assert alert.calibration == {"status": "uncalibrated"}
    assert alert.group == {"sequence": "s"}
    assert alert.fingerprint == fingerprint("hack", "run-1", {"sequence": "s"})


def test_without_a_reading_an_alert_claims_no_more_than_its_match() -> None:
    one = sample(3)
    alert = go(verdict(one), None).alert
    assert alert is not None
    assert (alert.sample_id, alert.quote, alert.explanation) == (one.sample_id, "special-case the tests", "")
    assert (alert.cosine, alert.fve, alert.denominator_name, alert.context) == (None, None, None, None)


def test_no_alert_without_a_window_that_holds() -> None:
    assert go(verdict(sample(1), firing=False), None) == Transition(None, None)


def test_an_alert_goes_on_with_newer_matches_and_keeps_its_exhibit() -> None:
    before = fired(sample(1), sample(2))
    late = sample(12, captured_at=1012.0)
    after = go(verdict(sample(2), late, sample(3)), before, step=12, now=1013.0)
    assert after.event == "updated"
    assert after.alert == dataclasses.replace(before, last_step=12, updated_at=1012.0, matches=3)


def test_an_alert_resolves_when_its_window_holds_no_longer() -> None:
    before = fired(sample(1), sample(2))
    after = go(verdict(firing=False), before, step=3, now=1020.0)
    assert after.event == "resolved"
    assert after.alert == dataclasses.replace(before, state=AlertState.RESOLVED, resolved_at=1020.0)


@pytest.mark.parametrize(
    ("steps", "seconds", "step", "now", "event"),
    [
        (5, 0.0, 6, 1020.0, None),
        (5, 0.0, 7, 1020.0, "resolved"),
        (0, 30.0, 90, 1039.9, None),
        (0, 30.0, 90, 1040.0, "resolved"),
        (5, 30.0, 90, 1039.9, None),
        (5, 30.0, 6, 1040.0, None),
        (5, 30.0, 7, 1040.0, "resolved"),
        (5, 0.0, None, 1020.0, "resolved"),
    ],
)
def test_keep_firing_waits_for_both_its_steps_and_its_seconds(
    steps: int, seconds: float, step: int | None, now: float, event: str | None
) -> None:
    """The last match was in step 2; the alert fired at 1010 seconds."""
    rule = header(keep_firing_steps=steps, keep_firing_seconds=seconds)
    after = go(verdict(firing=False), fired(sample(1), sample(2)), rule=rule, step=step, now=now)
    assert after.event == event
    assert after.alert is not None


def test_a_single_match_keeps_an_alert_firing_that_waits_to_resolve() -> None:
    rule = header(keep_firing_steps=5)
    before = fired(sample(1), sample(2))
    held = go(verdict(sample(6), firing=False), before, rule=rule, step=6)
    assert held.event == "updated"
    assert held.alert is not None
    assert held.alert.last_step == 6
    assert go(verdict(firing=False), held.alert, rule=rule, step=10).event is None
    assert go(verdict(firing=False), held.alert, rule=rule, step=11).event == "resolved"


def test_a_condition_that_comes_back_makes_a_new_alert_of_the_same_fingerprint() -> None:
    first = fired(sample(1), sample(2))
    second = fired(sample(7), sample(8))
    assert first.alert_id != second.alert_id
    assert first.fingerprint == second.fingerprint


def test_the_same_inputs_make_the_same_alert() -> None:
    samples = sample(1, sample_id="a"), sample(2, sample_id="b")
    assert fired(*samples) == fired(*samples)


def test_fingerprints_know_rule_run_and_group_but_not_order() -> None:
    one = fingerprint("hack", "run-1", {"a": 1, "b": None})
    assert one == fingerprint("hack", "run-1", {"b": None, "a": 1})
    others = [
        ("leak", "run-1", {"a": 1}),
        ("hack", "run-2", {"a": 1}),
        ("hack", "run-1", {"a": "1"}),
        ("hack", "run-1", {}),
    ]
    assert len({one, *(fingerprint(*other) for other in others)}) == 5


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=30), st.integers(0, 4))
def test_in_any_history_alerts_open_and_close_in_turn_and_never_run_backwards(
    history: list[tuple[int, bool]], keep: int
) -> None:
    rule = header(keep_firing_steps=keep)
    current: Alert | None = None
    matches: list[Match] = []
    for step, (count, firing) in enumerate(history):
        matches += [match(sample(step)) for _ in range(count)]
        shown = WindowVerdict(firing, tuple(matches[-4:]), min(4, len(matches)), 2)
        after = go(shown, current, rule=rule, step=step, now=1000.0 + step)
        if current is None:
            assert after.event in ("fired", None)
        elif after.event == "resolved":
            assert not firing
            assert after.alert is not None
            assert after.alert.last_step is None or step - after.alert.last_step >= keep
        if after.alert is not None and current is not None:
            assert after.alert.alert_id == current.alert_id
            assert (after.alert.last_step or 0) >= (current.last_step or 0)
            assert after.alert.updated_at >= current.updated_at
            assert after.alert.matches >= current.matches
        current = after.alert if after.alert is not None and after.alert.state is AlertState.FIRING else None
