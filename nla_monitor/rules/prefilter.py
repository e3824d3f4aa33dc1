"""One look at a text for all rules: which keywords and patterns can be in it at all, hence which rules can match.

Exact: a rule is passed over only where evaluating it would give no match. Two linear scans per text:

- An Aho-Corasick automaton over one literal of each keyword phrase (``ahocorasick_rs``: its DFA was the fastest of the
  automata tried, 1.8 µs for 430 characters and 500 words, and it is immutable, so that threads may share it).
- RE2's ``Filter`` over all regular expressions: the literals that RE2 derives from a pattern as necessary, then the
  pattern itself where they are all there.

What they say is then put into each rule's condition: where it is false with the impossible selections unmet, whatever
all else is, the rule cannot match.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any, Final, NamedTuple, TypeAlias

import re2  # type: ignore[import-untyped]  # google-re2 ships no type information
from ahocorasick_rs import AhoCorasick, Implementation

from nla_monitor.records import Reading
from nla_monitor.rules.fields import Variables
from nla_monitor.rules.matchers import Block, Selection, Text, TextTest
from nla_monitor.rules.patterns import TextPattern, re2_options, readable
from nla_monitor.rules.rule import Rule

logger = logging.getLogger(__name__)

_MEMO: Final = 4_096
_SENTINEL: Final = "\x01nla-monitor sentinel\x01"


class Prefilter:
    """The screens of a fixed set of rules. Immutable but for bounded memos; may be shared between threads.

    Args:
        rules: in the order in which their matches are wanted.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._plans = [_Plan.of(rule) for rule in rules]
        self._screen = _Screen(test for rule in rules for test in _tests_of(rule))
        self._memo: dict[frozenset[int], tuple[Candidate, ...]] = {}
        self._texts: dict[str, tuple[Text, tuple[Candidate, ...]]] = {}

    @property
    def regexes(self) -> tuple[str, ...]:
        """The regular expressions, in the order of the indices in ``Screened``."""
        return self._screen.sources

    def look(self, explanation: str, screened: Screened | None = None) -> tuple[Text, tuple[Candidate, ...]]:
        """The text, told which of its tests cannot hold, and the rules that can match it; equal texts share both.

        Args:
            explanation: the text.
            screened: what ``screen`` says of it, where another process has done that already.
        """
        if (known := self._texts.get(explanation)) is not None:
            return known
        text = Text(explanation)
        possible = self._screen.possible(text.text, screened)
        text.tell(self._screen.tests, possible)
        found = (text, self._candidates(possible))
        if len(self._texts) >= _MEMO:
            self._texts.clear()
        self._texts[explanation] = found
        return found

    def _candidates(self, possible: frozenset[int]) -> tuple[Candidate, ...]:
        if (known := self._memo.get(possible)) is not None:
            return known
        found = tuple(one for plan in self._plans if (one := plan.candidate(possible)) is not None)
        if len(self._memo) >= _MEMO:
            self._memo.clear()
        self._memo[possible] = found
        return found


_Test: TypeAlias = Callable[[Reading], bool]


class Candidate(NamedTuple):
    """A rule that some reading of a text may match."""

    rule: Rule
    plan: _Plan
    absent: frozenset[str]
    """Selections that the text cannot meet."""
    whole: bool
    """Whether all other selections only compare values: the condition can then be decided without the text."""
    memo: dict[tuple[bool, ...], bool | dict[str, bool]]
    """Whether it may match, by the outcomes of ``plan.values``; what is met, where fields of the reading decide."""

    def may_match(self, reading: Reading, known: Variables) -> bool:
        """Whether the reading's values leave the rule possible, too."""
        if not self.plan.values:
            return True
        outcome = tuple([holds(reading) for _, holds in self.plan.values])
        if (verdict := self.memo.get(outcome)) is None:
            verdict = self._judged({name: met for (name, _), met in zip(self.plan.values, outcome, strict=True)})
            if len(self.memo) < _MEMO:
                self.memo[outcome] = verdict
        return verdict if isinstance(verdict, bool) else self.rule.condition.holds(verdict, known)

    def _judged(self, met: dict[str, bool]) -> bool | dict[str, bool]:
        if self.whole:
            everything = {**met, **dict.fromkeys(self.absent, False)}
            decided = self.rule.condition.decided(everything)
            return everything if decided is None else decided
        unmet = [name for name, holds in met.items() if not holds]
        return not unmet or not self.plan.refuted(self.absent.union(unmet))


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a rule's condition needs of a text, and of a reading's values."""

    rule: Rule
    texts: Mapping[str, tuple[frozenset[int], ...]]
    """Selections that no reading meets unless its text holds something: per block, the tests that must all hold."""
    values: tuple[tuple[str, _Test], ...]
    """Selections that only compare values."""
    memo: dict[frozenset[str], bool] = field(default_factory=dict)
    candidates: dict[frozenset[str], Candidate] = field(default_factory=dict)
    """By what is absent."""

    @classmethod
    def of(cls, rule: Rule) -> _Plan:
        known = [selection for selection in rule.selections if isinstance(selection, Selection)]
        texts = {
            selection.name: tuple(frozenset(map(id, block.texts)) for block in selection.blocks)
            for selection in known
            if all(block.texts for block in selection.blocks)
        }
        values = tuple(
            (selection.name, _test_of(selection.blocks))
            for selection in known
            if all(block == Block(block.comparisons, ()) for block in selection.blocks)
        )
        return cls(rule, texts, values)

    def candidate(self, possible: frozenset[int]) -> Candidate | None:
        """The rule, unless no reading whose text can hold only these tests meets its condition."""
        absent = frozenset(
            name for name, blocks in self.texts.items() if not any(block <= possible for block in blocks)
        )
        if self.refuted(absent):
            return None
        if (known := self.candidates.get(absent)) is None:
            named = len(self.rule.selections) + len(self.rule.specials)
            known = Candidate(self.rule, self, absent, len(absent) + len(self.values) == named, {})
            if len(self.candidates) < _MEMO:
                self.candidates[absent] = known
        return known

    def refuted(self, absent: frozenset[str]) -> bool:
        """Whether the condition is false with these selections unmet, whatever all else is."""
        if not absent:
            return False
        if (known := self.memo.get(absent)) is None:
            known = self.memo[absent] = self.rule.condition.refuted_without(absent)
        return known


def _test_of(blocks: tuple[Block, ...]) -> _Test:
    """Whether a reading meets any of the blocks, by their comparisons."""
    if len(blocks) == 1 and len(blocks[0].comparisons) == 1:
        return blocks[0].comparisons[0].holds
    return lambda reading: any(all(one.holds(reading) for one in block.comparisons) for block in blocks)


def _tests_of(rule: Rule) -> Iterator[TextTest]:
    for selection in (*rule.selections, *rule.exceptions):
        if isinstance(selection, Selection):
            for block in selection.blocks:
                yield from block.texts


class _Screen:
    """Which text tests can hold in a text, by their ``id``."""

    def __init__(self, tests: Iterable[TextTest]) -> None:
        self._kept = tuple(tests)  # their ids are in use
        self.tests = frozenset(map(id, self._kept))
        patterns = list({id(pattern): pattern for test in self._kept for pattern in test.patterns}.values())
        self._keywords = _Keywords([pattern for pattern in patterns if pattern.literals is not None])
        self._regexes = _Regexes([pattern for pattern in patterns if pattern.literals is None])
        users: dict[int, list[int]] = {}
        for test in self._kept:
            for pattern in test.patterns:
                users.setdefault(id(pattern), []).append(id(test))
        self.sources = self._regexes.sources
        self._users = {key: tuple(found) for key, found in users.items()}
        every = [test for test in self._kept if test.every and len(test.patterns) > 1]
        self._every = {id(test): frozenset(map(id, test.patterns)) for test in every}

    def possible(self, text: str, screened: Screened | None) -> frozenset[int]:
        """Tests that may hold; all others do not."""
        patterns = self._keywords.possible(text) | self._regexes.possible(text, screened)
        found = {test for pattern in patterns for test in self._users[pattern]}
        if found and self._every:
            found = {test for test in found if self._every.get(test, patterns) <= patterns}
        return frozenset(found)


class _Keywords:
    """Keyword patterns by one literal of each of their phrases."""

    def __init__(self, patterns: Sequence[TextPattern]) -> None:
        users: dict[str, set[int]] = {}
        always = set()
        for pattern in patterns:
            for literal in pattern.literals or ():
                if literal:
                    users.setdefault(literal, set()).add(id(pattern))
                else:
                    always.add(id(pattern))
        self._always = frozenset(always)
        words = sorted(users)
        self._users = [tuple(users[word]) for word in words]
        self._automaton = AhoCorasick(words, implementation=Implementation.DFA) if words else None

    def possible(self, text: str) -> set[int]:
        found = set(self._always)
        if self._automaton is not None:
            for hit in self._automaton.find_matches_as_indexes(folded(text), overlapping=True):
                found.update(self._users[hit[0]])
        return found


def folded(text: str) -> str:
    """Lower case as far as ASCII letters go, and the two others that RE2 takes for such: long s and the Kelvin sign."""
    lower = text.lower()  # makes the Kelvin sign a k
    return lower if lower.isascii() else lower.replace("\u017f", "s")


class _Regexes:
    """Regular expressions by the literals that RE2 derives from them."""

    def __init__(self, patterns: Sequence[TextPattern]) -> None:
        self._ids = [id(pattern) for pattern in patterns]
        self.sources = tuple(pattern.source for pattern in patterns)
        self._filter = regex_filter(self.sources)

    def possible(self, text: str, screened: Screened | None) -> set[int]:
        found = screen(self._filter, text) if screened is None else screened
        return set(self._ids) if found is ... else {self._ids[index] for index in found}


Screened: TypeAlias = "tuple[int, ...] | EllipsisType"
"""Indices of the regular expressions that match a text; the ellipsis: nobody looked, any may."""


def regex_filter(sources: Sequence[str]) -> Any:
    """RE2's filter over patterns that are valid one by one; None where it cannot be made (every pattern is then run).

    The last pattern is a sentinel: a filter that ran out of memory finds nothing, and says so only in a log.
    """
    if not sources:
        return None
    found = re2.Filter()
    try:
        for source in sources:
            found.Add(readable(source), re2_options())
        sentinel = found.Add(re2.escape(_SENTINEL), re2_options())
        found.Compile()
    except re2.error as error:
        logger.info("the regular expressions of these rules cannot be screened together: %s", error)
        return None
    return found if sentinel in (found.Match(_SENTINEL) or ()) else None


def screen(found: Any, text: str) -> Screened:
    """Which patterns of ``regex_filter`` match a text (made ``readable``)."""
    if found is None:
        return ...
    return tuple(found.Match(text) or ())
