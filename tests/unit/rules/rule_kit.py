"""Readings and matches for the tests of rules."""

from __future__ import annotations

from typing import Any

from nla_monitor.records import Match, Reading, Severity
from nla_monitor.rules import Rule, RuleSet, load_text
from nla_monitor.rules.rule import reading_of
from nla_monitor.rules.schema import TestCase

RULE = """\
title: A rule
id: a-rule
severity: low
detection:
{detection}
window: {window}
tests: {{positive: [x], negative: [y]}}
"""


def reading(text: str = "words", sample_id: str = "sample", **values: Any) -> Reading:
    """A reading; the keys are those of a rule's embedded tests."""
    return reading_of(TestCase.model_validate({"text": text, **values}), sample_id)


def rule(detection: str, window: str = "{}") -> Rule:
    """A rule from the YAML of its detection."""
    return load_text(RULE.format(detection="\n".join(f"  {line}" for line in detection.splitlines()), window=window))


def matches(detection: str, *readings: Reading) -> list[Match]:
    """What a rule finds in readings."""
    return RuleSet([rule(detection)]).evaluate(readings)


def hit(selection: str, text: str, **values: Any) -> bool:
    """Whether a selection (YAML, one line) is met by a text."""
    return bool(matches(f"one: {selection}\ncondition: one", reading(text, **values)))


def match(
    number: int = 0, *, step: int | None = 0, seconds: float = 0.0, sequence: str = "s", position: int = 0
) -> Match:
    """A match at a place in time."""
    return Match(
        match_id=f"m{number}",
        sample_id=f"x{number}",
        run_id="run",
        rule_id="a-rule",
        rule_version="v",
        severity=Severity.LOW,
        group={"run_id": "run"},
        hits=(),
        step=step,
        position=position,
        sequence_id=sequence,
        captured_at=seconds,
    )
