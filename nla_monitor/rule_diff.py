"""What a change of rules changes: matches and alerts gained and lost between two replays of the same readings."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from nla_monitor.records import Alert, Match
from nla_monitor.replay import Replay

EXAMPLES: Final = 5


@dataclass(frozen=True, slots=True)
class Example:
    """A reading that matches on one side only."""

    sample_id: str
    run_id: str
    step: int | None
    position: int
    quote: str
    """The words that match, on the side that has the match."""
    explanation: str


@dataclass(frozen=True, slots=True)
class RuleDiff:
    """One rule, old against new. Only matches that no control refuted count."""

    rule_id: str
    old_version: str | None
    """None: the rule is new."""
    new_version: str | None
    """None: the rule is gone."""
    kept: int
    """Readings that match on both sides."""
    gained: int
    lost: int
    gained_examples: tuple[Example, ...]
    lost_examples: tuple[Example, ...]
    alerts_kept: int
    alerts_gained: tuple[Alert, ...]
    alerts_lost: tuple[Alert, ...]

    @property
    def changed(self) -> bool:
        """Whether any match or alert came or went."""
        return bool(self.gained or self.lost or self.alerts_gained or self.alerts_lost)


def compare(old: Replay, new: Replay, *, examples: int = EXAMPLES) -> tuple[RuleDiff, ...]:
    """Rule by rule, by id.

    An alert is the same on both sides when both fire for the same rule, run and group at a common moment: its id and
    its exhibit may differ.

    Args:
        old: a replay.
        new: another one, of the same readings.
        examples: at most so many readings are shown for each rule and side, the first of each distinct explanation.
    """
    versions = [{rule.rule_id: rule.version for rule in side.rules} for side in (old, new)]
    return tuple(
        _rule(rule_id, (versions[0].get(rule_id), versions[1].get(rule_id)), old, new, examples)
        for rule_id in dict.fromkeys([*versions[0], *versions[1]])
    )


def _rule(rule_id: str, versions: tuple[str | None, str | None], old: Replay, new: Replay, examples: int) -> RuleDiff:
    before, after = _matches(rule_id, old), _matches(rule_id, new)
    gained = [match for key, match in after.items() if key not in before]
    lost = [match for key, match in before.items() if key not in after]
    alerts_before, alerts_after = _alerts(rule_id, old), _alerts(rule_id, new)
    pairs = _paired(alerts_before, alerts_after)
    old_ids, new_ids = {one for one, _ in pairs}, {other for _, other in pairs}
    return RuleDiff(
        rule_id=rule_id,
        old_version=versions[0],
        new_version=versions[1],
        kept=len(after) - len(gained),
        gained=len(gained),
        lost=len(lost),
        gained_examples=_examples(gained, new, examples),
        lost_examples=_examples(lost, old, examples),
        alerts_kept=len(new_ids),
        alerts_gained=tuple(alert for alert in alerts_after if alert.alert_id not in new_ids),
        alerts_lost=tuple(alert for alert in alerts_before if alert.alert_id not in old_ids),
    )


def _matches(rule_id: str, side: Replay) -> dict[str, Match]:
    return {match.sample_id: match for match in side.matches if match.rule_id == rule_id and side.counts(match)}


def _alerts(rule_id: str, side: Replay) -> list[Alert]:
    return [alert for alert in side.alerts if alert.rule_id == rule_id]


def _paired(old: Sequence[Alert], new: Sequence[Alert]) -> list[tuple[str, str]]:
    """Alerts of the same condition that fire at a common moment."""
    by_condition: dict[str, list[Alert]] = defaultdict(list)
    for other in new:
        by_condition[other.fingerprint].append(other)
    return [
        (one.alert_id, other.alert_id) for one in old for other in by_condition[one.fingerprint] if _overlap(one, other)
    ]


def _overlap(one: Alert, other: Alert) -> bool:
    return one.fired_at <= _end(other) and other.fired_at <= _end(one)


def _end(alert: Alert) -> float:
    return math.inf if alert.resolved_at is None else alert.resolved_at


def _examples(matches: Iterable[Match], side: Replay, limit: int) -> tuple[Example, ...]:
    by_text: dict[str, Example] = {}
    for match in matches:
        if len(by_text) >= limit:
            break
        text = side.shown[match.sample_id].explanation.text
        by_text.setdefault(text, Example(match.sample_id, match.run_id, match.step, match.position, match.quote, text))
    return tuple(by_text.values())
