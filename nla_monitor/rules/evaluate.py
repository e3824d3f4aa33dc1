"""Readings in, matches out: pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from nla_monitor.records import Match, Reading
from nla_monitor.rules.fields import variables
from nla_monitor.rules.matchers import Text
from nla_monitor.rules.rule import Rule


def evaluate_rules(rules: Iterable[Rule], reading: Reading) -> list[Match]:
    """Matches of one reading, in the order of the rules."""
    text = Text(reading.explanation.text)

    @cache
    def known() -> Mapping[str, Any]:
        return variables(reading)

    return [match for rule in rules if (match := rule.match(reading, text, known)) is not None]


def evaluate_rule(rule: Rule, reading: Reading) -> Match | None:
    """The match of one rule with one reading, or None."""
    return next(iter(evaluate_rules([rule], reading)), None)
