"""What a model says in so many words: rules held against the visible text instead of an explanation.

A rule's companion speaks for it: the rule ``said-<id>``, written for a model's own words ("I think this is a test")
where the rule itself is written for an explanation's ("the model believes that it is being tested"). Companions of some
packaged rules are in ``rules/said``; ``--said`` adds one's own. The rule itself is tried, too: much is said in the same
words on both sides. Judges, classifiers and probes are not asked: there is no activation, and nobody pays for a report.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from nla_monitor.errors import NLAMonitorError
from nla_monitor.records import ActivationSample, AgentContext, Explanation, Fidelity, Match, Phase, Reading
from nla_monitor.rules import RuleSet, load_rules, load_text
from nla_monitor.rules.loader import packs_folder
from nla_monitor.rules.rule import Rule

logger = logging.getLogger("nla_monitor")

COMPANION: Final = "said-"
PACKAGED: Final = packs_folder().parent / "said"
_SENTENCE: Final = re.compile(r"[^.!?\n]+[.!?]*|[.!?]+")
_NOTHING: Final = np.zeros(1, dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Quote:
    """What of a text met a rule."""

    rule_id: str
    """The rule, not its companion."""
    text: str
    start: int
    """Character at which it begins."""
    end: int


class VisibleRules:
    """The rules of a run, ready to be held against visible text.

    Args:
        sources: each rule's YAML by its id, as the store keeps it.
        companions: further companions: rule files or folders of them.

    Raises:
        RuleError: a companion is malformed, or two have one id.
    """

    def __init__(self, sources: Mapping[str, str], companions: Sequence[str] = ()) -> None:
        mine = load_rules(companions).rules if companions else ()
        # One's own stands in a packaged one's place.
        said = {rule.id: rule for rule in (*load_rules([str(PACKAGED)]).rules, *mine)}
        pairs = [(said.get(f"{COMPANION}{rule_id}"), _loaded(rule_id, text)) for rule_id, text in sources.items()]
        usable = [rule for pair in pairs for rule in pair if rule is not None and not rule.specials]
        self._rules = RuleSet(usable)
        self._covered = frozenset(rule.id.removeprefix(COMPANION) for rule in usable)

    def covers(self, rule_id: str) -> bool:
        """Whether anything can be held against visible text for a rule."""
        return rule_id in self._covered

    def quotes(self, text: str) -> list[Quote]:
        """What a text says of the rules' concepts: of each rule the first quote, in the order of the text.

        Sentence by sentence: a denial in one of them does not take back what another says.
        """
        sentences = [(found.start(), found[0]) for found in _SENTENCE.finditer(text) if found[0].strip()]
        readings = [_as_reading(str(number), sentence) for number, (_, sentence) in enumerate(sentences)]
        quotes: dict[str, Quote] = {}
        for match in self._rules.evaluate(readings):
            rule_id = match.rule_id.removeprefix(COMPANION)
            quotes.setdefault(rule_id, _quote(rule_id, match, *sentences[int(match.sample_id)]))
        return list(quotes.values())


def _loaded(rule_id: str, source: str) -> Rule | None:
    try:
        return load_text(source, rule_id)
    except NLAMonitorError as error:  # its probe's file may be gone by now: then only the companion speaks for it
        logger.info("nla_monitor: rule %s is not held against visible text: %s", rule_id, error)
        return None


def _quote(rule_id: str, match: Match, offset: int, sentence: str) -> Quote:
    words = match.quote or sentence.strip()
    start = offset + max(0, sentence.find(words))
    return Quote(rule_id, words, start, start + len(words))


def _as_reading(key: str, text: str) -> Reading:
    """A visible text in the place of an explanation: it says what it says, so its fidelity is whole."""
    sample = ActivationSample(
        sample_id=key,
        run_id="visible",
        layer=0,
        vector=_NOTHING,
        norm=0.0,
        phase=Phase.AGENT,
        sequence_id="visible",
        position=0,
        token_id=0,
        trigger="visible",
        captured_at=0.0,
        role="assistant",
        agent=AgentContext("visible", generated=True),
    )
    fidelity = Fidelity(key, 1.0, 0.0, 1.0, 1.0, "visible text", "visible")
    return Reading(sample, Explanation(key, text, truncated=False, tokens=0, av_hash="visible"), fidelity)
