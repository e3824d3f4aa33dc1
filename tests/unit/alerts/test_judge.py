"""A batch does to alerts what its readings would do one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nla_monitor.alerts.judge import Change, Clock, Judge
from nla_monitor.evidence import recurred
from nla_monitor.records import ActivationSample, Alert, AlertState, Match, Scalar, WindowVerdict
from nla_monitor.rules import RuleSet
from nla_monitor.rules.loader import load_text
from tests.store_support import reading, sample

RULE = """
title: Plans to hack
id: {id}
severity: high
detection: {{words: [hack], condition: words}}
window: {window}
tests: {{positive: [hack], negative: [fix]}}
"""


class Store:
    """The transaction's part of the contract, in memory."""

    def __init__(self) -> None:
        self.matches: dict[str, Match] = {}
        self.alerts: dict[str, Alert] = {}
        self.links: dict[str, set[str]] = {}
        self.told: list[tuple[str, str]] = []

    def firing_alerts(self, run_id: str) -> list[Alert]:
        return [one for one in self.alerts.values() if one.state is AlertState.FIRING]

    def window_matches(
        self,
        rule_id: str,
        rule_version: str,
        run_id: str,
        group: Mapping[str, Scalar],
        *,
        since_step: int | None = None,
        since_time: float | None = None,
    ) -> list[Match]:
        def needed(one: Match) -> bool:
            return (
                (since_step is None and since_time is None)
                or (since_step is not None and one.step is not None and one.step >= since_step)
                or (
                    since_time is not None
                    and one.captured_at >= since_time
                    and (since_step is None or one.step is None)
                )
            )

        mine = (one for one in self.matches.values() if one.rule_id == rule_id and dict(one.group) == dict(group))
        return [one for one in mine if needed(one)]

    def save_alert(self, alert: Alert, matches: Sequence[Match], event: str) -> Alert:
        self.links.setdefault(alert.alert_id, set()).update(one.match_id for one in matches)
        stored = dataclasses.replace(alert, matches=len(self.links[alert.alert_id]))
        self.alerts[alert.alert_id] = stored
        if event != "updated":
            self.told.append((event, alert.alert_id))
        return stored


def rules_of(*windows: str) -> RuleSet:
    return RuleSet([load_text(RULE.format(id=f"rule-{n}", window=window)) for n, window in enumerate(windows)])


def work(rules: RuleSet, samples: Sequence[tuple[ActivationSample, bool]], sizes: Sequence[int]) -> Store:
    """Judge the samples in batches of these sizes (the last one repeated)."""
    store, at, clock = Store(), 0, Clock(None, 0.0)
    for number in range(len(samples)):
        if at >= len(samples):
            break
        part = samples[at : at + sizes[min(number, len(sizes) - 1)]]
        at += len(part)
        readings = [reading(one, "hack" if hit else "fix") for one, hit in part]
        matches = rules.evaluate(readings)
        store.matches |= {one.match_id: one for one in matches}
        judge(store, rules, clock, readings, matches)
        for one, _ in part:
            clock = clock.after(one)
    return store


def judge(store: Store, rules: RuleSet, clock: Clock, readings: Any, matches: Any) -> list[Change]:
    def exhibition(verdict: WindowVerdict) -> tuple[Any, Mapping[str, object]]:
        return None, {"count": len(verdict.matches)}

    return Judge("run-1", clock, rules, store, exhibition=exhibition, refresh=recurred).run(readings, matches)


def said(store: Store) -> Any:
    return store.told, store.alerts, store.links


WINDOWS = st.sampled_from(
    [
        "{count: 1}",
        "{count: 3, within: 4 steps}",
        "{count: 2, within: 3 steps, keep_firing_for: 5 steps}",
        "{count: 2, within: 10 seconds, keep_firing_for: 4 seconds}",
        "{count: 2, within: {steps: 3, seconds: 6}, keep_firing_for: {steps: 2, seconds: 3}, group_by: [phase]}",
        "{count: 2, distinct: sequence_id, within: 5 steps, for: 2 steps}",
        "{count: 1, group_by: [role], within: 2 steps}",
    ]
)
MOMENTS = st.lists(
    st.tuples(st.integers(-1, 30), st.integers(0, 3), st.booleans(), st.sampled_from(["user", None])), max_size=25
)


@settings(max_examples=150, deadline=None)
@given(st.lists(WINDOWS, min_size=1, max_size=3), MOMENTS, st.lists(st.integers(1, 9), min_size=1, max_size=6))
@example(["{count: 1}"], [(-1, 0, True, "user")] * 2 + [(4, 0, True, "user")] * 2 + [(-1, 0, True, "user")], [3])
def test_the_size_of_batches_changes_nothing(
    windows: list[str], moments: list[tuple[int, int, bool, str | None]], sizes: list[int]
) -> None:
    """In order and out of it, with steps and without: same alerts, same fields, same links, same messages."""
    rules = rules_of(*windows)
    samples = [
        (
            sample(number, sample_id=f"s{number}", step=None if step < 0 else step, role=role)
            if step < 0
            else sample(number, sample_id=f"s{number}", step=step, role=role, captured_at=1000.0 + step + jitter / 4),
            hit,
        )
        for number, (step, jitter, hit, role) in enumerate(moments)
    ]
    one_by_one = said(work(rules, samples, [1]))
    assert said(work(rules, samples, sizes)) == one_by_one
    assert said(work(rules, samples, [len(samples) or 1])) == one_by_one


def test_a_pause_inside_a_batch_resolves_the_first_alert_and_opens_a_second() -> None:
    rules = rules_of("{count: 2, within: 3 steps, keep_firing_for: 4 steps}")
    hits = {1, 2, 40, 41}
    samples = [(sample(step), step in hits) for step in range(45)]
    store = work(rules, samples, [64])
    first, second = store.alerts.values()
    assert (first.state, first.first_step, first.last_step, first.matches) == (AlertState.RESOLVED, 1, 2, 2)
    assert first.resolved_at == 1006.0
    assert (second.state, second.first_step, second.last_step, second.matches) == (AlertState.FIRING, 40, 41, 2)
    assert [event for event, _ in store.told] == ["fired", "resolved", "fired"]


def test_a_burst_that_is_over_at_the_end_of_the_batch_is_seen() -> None:
    rules = rules_of("{count: 3, within: 5 steps}")
    store = work(rules, [(sample(step), 10 <= step <= 12) for step in range(60)], [60])
    assert [event for event, _ in store.told] == ["fired", "resolved"]


def test_matches_that_come_late_count_at_their_own_moment() -> None:
    """Another worker's batch of earlier steps, committed after later ones."""
    rules = rules_of("{count: 3, within: 5 steps, keep_firing_for: 100 steps}")
    early = [(sample(step), True) for step in (1, 2, 3)]
    store = work(rules, [(sample(50), False), *early], [1])
    (alert,) = store.alerts.values()
    assert (alert.state, alert.first_step, alert.last_step) == (AlertState.FIRING, 1, 3)


def test_a_rule_that_was_taken_away_leaves_its_alert_alone() -> None:
    rules = rules_of("{count: 1}")
    store = work(rules, [(sample(1), True)], [1])
    before = dict(store.alerts)
    assert judge(store, RuleSet([]), Clock(1, 1001.0), [reading(sample(99), "fix")], []) == []
    assert store.alerts == before


@pytest.mark.parametrize("hits", [200, 0])
def test_a_firing_window_is_judged_per_moment_not_per_match(hits: int) -> None:
    """A busy rule must not make a batch quadratic: one verdict to fire, then two for each moment."""
    rules = rules_of("{count: 1, within: 100 steps}")
    calls = []
    window = RuleSet.window

    class Counting(RuleSet):
        def window(self, *arguments: Any, **keywords: Any) -> WindowVerdict:
            calls.append(arguments)
            return window(self, *arguments, **keywords)

    counting = Counting(rules.rules)
    samples = [
        (sample(number, step=number // 50, captured_at=1000.0 + number // 50), number < hits) for number in range(200)
    ]
    work(counting, samples, [200])
    assert len(calls) == (8 if hits else 0)
