"""Readings in, matches out: pure.

``evaluate_rules`` looks at every rule, ``evaluate_screened`` only at those that the prefilter leaves over: same result.
"""

from __future__ import annotations

from collections.abc import Iterable

from nla_monitor.records import Match, Reading
from nla_monitor.rules.fields import Variables
from nla_monitor.rules.matchers import Text
from nla_monitor.rules.prefilter import Prefilter, Screened
from nla_monitor.rules.rule import Rule


def evaluate_rules(rules: Iterable[Rule], reading: Reading) -> list[Match]:
    """Matches of one reading, in the order of the rules."""
    text, known = Text(reading.explanation.text), Variables(reading)
    return [match for rule in rules if (match := rule.match(reading, text, known)) is not None]


def evaluate_screened(prefilter: Prefilter, reading: Reading, screened: Screened | None = None) -> list[Match]:
    """Matches of one reading, in the order of the prefilter's rules."""
    text, candidates = prefilter.look(reading.explanation.text, screened)
    if not candidates:
        return []
    known = Variables(reading)
    return [
        match
        for candidate in candidates
        if candidate.may_match(reading, known) and (match := candidate.rule.match(reading, text, known)) is not None
    ]


def evaluate_rule(rule: Rule, reading: Reading) -> Match | None:
    """The match of one rule with one reading, or None."""
    return next(iter(evaluate_rules([rule], reading)), None)
