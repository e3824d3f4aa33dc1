"""Runs the tests that each rule carries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nla_monitor.errors import NLAMonitorError
from nla_monitor.records import Match, Reading
from nla_monitor.rules.fields import Variables
from nla_monitor.rules.matchers import Text
from nla_monitor.rules.problems import Path, dotted, line_of
from nla_monitor.rules.rule import Rule, reading_of
from nla_monitor.rules.schema import TestCase, WindowCase
from nla_monitor.rules.window import judge

Kind = Literal["positive", "negative", "window"]


@dataclass(frozen=True, slots=True)
class RuleTestResult:
    """One embedded test and how it went."""

    rule_id: str
    kind: Kind
    index: int
    passed: bool
    text: str
    """The explanation tested (first one of a window test)."""
    message: str
    """What was expected and what came instead; empty when it passed."""
    quotes: tuple[str, ...]
    """Verbatim words that matched."""
    file: str
    line: int | None
    key: str


def run_rule_tests(rule: Rule) -> list[RuleTestResult]:
    """All embedded tests of a rule, in the order of the file."""
    tests = rule.spec.tests
    return [
        *(_case(rule, "positive", index, case) for index, case in enumerate(tests.positive)),
        *(_case(rule, "negative", index, case) for index, case in enumerate(tests.negative)),
        *(_window(rule, index, case) for index, case in enumerate(tests.window)),
    ]


def _case(rule: Rule, kind: Kind, index: int, case: TestCase) -> RuleTestResult:
    match, unjudged = _judged(rule, case, f"{kind}-{index}")
    wanted = kind == "positive"
    if unjudged:
        message = _undecided(unjudged)
    elif (match is not None) == wanted:
        message = ""
    elif match is None:
        message = "should match and does not"
    else:
        message = f"should not match and does: {_said(match)}"
    return _result(rule, (kind, index), text=case.text, message=message, match=match)


def _judged(rule: Rule, case: TestCase, sample_id: str) -> tuple[Match | None, Mapping[str, str]]:
    reading = reading_of(case, sample_id)
    try:
        return rule.judged(reading, Text(case.text), Variables(reading), case.given)
    except NLAMonitorError as error:  # no extra, no model: the tests that need it fail, the others are still run
        return None, {rule.specials[0].name: str(error)}


def _undecided(unjudged: Mapping[str, str]) -> str:
    """A test that hangs on what nobody could say is no test: it fails, and says what to write."""
    name, why = next(iter(unjudged.items()))
    return f"hangs on the selection {name!r}, which could not be looked at ({why}); write given: {{{name}: true}}"


def _said(match: Match) -> str:
    return (
        ", ".join(f"{hit.selection} {hit.quote!r}" if hit.quote else hit.selection for hit in match.hits)
        or "the condition alone"
    )


def _window(rule: Rule, index: int, case: WindowCase) -> RuleTestResult:
    readings = [reading_of(item, f"window-{index}-{number}") for number, item in enumerate(case.readings)]
    judged = [_judged(rule, item, f"window-{index}-{number}") for number, item in enumerate(case.readings)]
    matches = [match for match, _ in judged if match is not None]
    unjudged = next((why for _, why in judged if why), None)
    step, now = _moment(case, readings)
    verdicts = [judge(rule.spec.window, group, step=step, now=now) for group in by_group(matches)]
    fires = any(verdict.firing for verdict in verdicts)
    best = max((verdict.distinct for verdict in verdicts), default=0)
    wanted = "should fire" if case.fires else "should not fire"
    message = (
        ""
        if fires == case.fires
        else f"{wanted}: {len(matches)} matches, {best} distinct of {rule.spec.window.count} needed"
    )
    if unjudged:
        message = _undecided(unjudged)
    return _result(
        rule, ("window", index), text=case.readings[0].text, message=message, match=next(iter(matches), None)
    )


def _moment(case: WindowCase, readings: Sequence[Reading]) -> tuple[int | None, float]:
    steps = [reading.sample.step for reading in readings if reading.sample.step is not None]
    step = max(steps, default=None) if case.at.step is None else case.at.step
    seconds = max(reading.sample.captured_at for reading in readings) if case.at.seconds is None else case.at.seconds
    return step, seconds


def by_group(matches: Iterable[Match]) -> Iterator[list[Match]]:
    """Matches of one rule by run and group, in the order of first appearance."""
    groups: dict[str, list[Match]] = {}
    for match in matches:
        key = json.dumps([match.run_id, dict(match.group)], sort_keys=True)
        groups.setdefault(key, []).append(match)
    yield from groups.values()


def _result(rule: Rule, at: tuple[Kind, int], *, text: str, message: str, match: Match | None) -> RuleTestResult:
    kind, index = at
    path: Path = ("tests", kind, index)
    return RuleTestResult(
        rule_id=rule.id,
        kind=kind,
        index=index,
        passed=not message,
        text=text,
        message=message,
        quotes=tuple(hit.quote for hit in match.hits if hit.quote) if match else (),
        file=rule.file,
        line=line_of(rule.lines, path),
        key=dotted(path),
    )
