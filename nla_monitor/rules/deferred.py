"""Selections beyond words and numbers: probes, and the dear ones (``semantic``, ``judge``) that are asked last.

A dear selection is *deferred*: the rule's outcome is worked out with it met and with it not met, and only where the two
differ is it asked. What was answered is remembered by the hash of definition and text (``Judgements``), so that a
replay asks nobody again and says the same.

Who cannot be asked (no network, no such model) does not stop a rule: the selection counts as not met, which is logged
once, counted, said with the match if one comes all the same (``Match.unjudged``), and not remembered.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final, Protocol

from nla_monitor.errors import NLAMonitorError, RuleError, StoreError
from nla_monitor.records import Hit, Judgement, Match, Reading, Support
from nla_monitor.rules.matchers import Selection, Text
from nla_monitor.rules.probe import Probe, ProbeSpec

logger = logging.getLogger(__name__)

KINDS: Final = ("probe", "semantic", "judge")
"""Keys of a selection that stand for something other than words and fields; the last two are dear."""
MAX_DEFERRED: Final = 4
"""Selections of one rule that may be asked: the outcome is worked out for each combination of answers."""
_REMEMBERED: Final = 10_000
_PAUSE_SECONDS: Final = 60.0
"""How long who could not be asked is left alone: a dead judge costs one attempt a minute, not one per reading."""


class Judgements(Protocol):
    """Where answers are kept: two calls, by key."""

    def get(self, key: str) -> Judgement | None:
        """The answer, or None."""
        ...

    def put(self, key: str, judgement: Judgement) -> None:
        """Keep an answer; the first one stays."""
        ...


class UnreachableError(NLAMonitorError):
    """Who should answer cannot be asked now; the message says why, without secrets."""


class Oracle(Protocol):
    """Who answers: a judge or a classifier with its question."""

    kind: str
    definition: Mapping[str, Any]
    """What decides the answer; part of the key and of the rule's version."""

    def ask(self, texts: Sequence[str]) -> list[Judgement]:
        """One answer for each text.

        Raises:
            UnreachableError: not now.
        """
        ...

    def check(self) -> None:
        """Whether it can be asked at all: the extra, the key, the model.

        Raises:
            NLAMonitorError: no; says what to do.
        """
        ...


class InMemory:
    """Judgements of this process only; the oldest are forgotten beyond ``size``. Safe for several threads."""

    def __init__(self, size: int = _REMEMBERED) -> None:
        self._size = size
        self._kept: OrderedDict[str, Judgement] = OrderedDict()
        self._lock = threading.Lock()  # guards the order as well as the entries

    def get(self, key: str) -> Judgement | None:
        """The answer, or None."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: str, judgement: Judgement) -> None:
        """Keep an answer; the first one stays."""
        with self._lock:
            self._kept.setdefault(key, judgement)
            if len(self._kept) > self._size:
                self._kept.popitem(last=False)


class Question:
    """An oracle with its memory."""

    def __init__(self, oracle: Oracle, clock: Callable[[], float] = time.monotonic) -> None:
        self.oracle = oracle
        self.unanswered = 0
        """Texts that nobody could be asked about."""
        self._near: Judgements = InMemory()
        self._far: Judgements | None = None
        self._clock = clock
        self._down: tuple[float, str] | None = None
        self._said: set[str] = set()

    def remember_in(self, judgements: Judgements) -> None:
        """Keep answers there, too."""
        self._far = judgements

    def key(self, text: str) -> str:
        """Under which an answer is remembered."""
        words = json.dumps([self.oracle.kind, dict(self.oracle.definition), text], sort_keys=True)
        return hashlib.sha256(words.encode()).hexdigest()

    def answer(self, text: str) -> Judgement:
        """The answer for a text, from memory or asked now.

        Raises:
            UnreachableError: nobody can be asked now.
        """
        known = self._recall(self.key(text))
        return known if known is not None else self._ask([text])[0]

    def learn(self, texts: Iterable[str]) -> None:
        """Ask about many texts together, so that later answers come from memory; who is not there is asked later."""
        new = [text for text in dict.fromkeys(texts) if self._recall(self.key(text)) is None]
        if new:
            try:
                self._ask(new)
            except UnreachableError as error:
                logger.debug("put off: %s", error)  # answer() says and counts it where it matters

    def _ask(self, texts: Sequence[str]) -> list[Judgement]:
        if self._down is not None and self._clock() < self._down[0]:
            raise UnreachableError(self._down[1])
        try:
            answers = self.oracle.ask(texts)
        except UnreachableError as error:
            self._down = (self._clock() + _PAUSE_SECONDS, str(error))
            raise
        self._down = None
        for text, answer in zip(texts, answers, strict=True):
            self._keep(self.key(text), answer)
        return answers

    def _recall(self, key: str) -> Judgement | None:
        known = self._near.get(key)
        if known is None and (known := self._stored(key)) is not None:
            self._near.put(key, known)
        return known

    def _stored(self, key: str) -> Judgement | None:
        try:
            return None if self._far is None else self._far.get(key)
        except StoreError as error:
            self.say_once("the store of judgements cannot be read, asking again", error)
            return None

    def _keep(self, key: str, answer: Judgement) -> None:
        self._near.put(key, answer)
        try:
            if self._far is not None:
                self._far.put(key, answer)
        except StoreError as error:
            self.say_once("a judgement cannot be stored; a replay will ask again", error)

    def say_once(self, what: str, error: Exception) -> None:
        """One log line per kind of trouble."""
        if what not in self._said:
            self._said.add(what)
            logger.warning("%s: %s", what, error)


@dataclass(frozen=True, slots=True)
class ProbeTest:
    """A probe and the bounds of its value."""

    probe: Probe
    spec: ProbeSpec


@dataclass(frozen=True, slots=True)
class Part:
    """One mapping of a selection: words and fields, probe, questions; all must hold."""

    plain: Selection | None
    probe: ProbeTest | None
    questions: tuple[Question, ...]
    """Cheap ones first."""


@dataclass(frozen=True, slots=True)
class Look:
    """What is known of a selection without asking anybody."""

    met: tuple[Hit, ...] | None
    waiting: tuple[tuple[Part, tuple[Hit, ...]], ...]
    """Parts that hang on an answer, with the words that they have already."""
    unknown: str | None
    """Why a part could not be looked at."""


@dataclass(frozen=True, slots=True)
class Special:
    """A named selection that holds a probe, a classifier or a judge."""

    name: str
    parts: tuple[Part, ...]

    @property
    def questions(self) -> tuple[Question, ...]:
        """All of its questions."""
        return tuple(question for part in self.parts for question in part.questions)

    def look(self, reading: Reading, text: Text) -> Look:
        """What can be said without asking."""
        met: list[Hit] = []
        waiting: list[tuple[Part, tuple[Hit, ...]]] = []
        unknown: str | None = None
        for part in self.parts:
            hits = part.plain.hits(reading, text) if part.plain is not None else ()
            if hits is None:
                continue
            value = part.probe.probe.read(reading.sample) if part.probe is not None else None
            if isinstance(value, str):
                unknown = value
            elif part.probe is not None and value is not None and not part.probe.spec.holds(value):
                continue
            elif part.questions:
                waiting.append((part, tuple(hit for hit in hits if hit.quote)))
            else:
                met += hits or (Hit(self.name, ""),)
        return Look(tuple(dict.fromkeys(met)) or None, tuple(waiting), unknown)

    def settle(self, look: Look, reading: Reading, text: Text) -> tuple[tuple[Hit, ...] | None, str | None]:
        """Asks, part by part, until one is met.

        Returns:
            The hits (None: not met), and why a part could not be judged (None: all could).
        """
        unknown = look.unknown
        for part, hits in look.waiting:
            try:
                answered = self._answered(part, reading, text)
            except UnreachableError as error:
                unknown = str(error)
                continue
            if answered is not None:
                return tuple(dict.fromkeys((*hits, *answered))), None
        return None, unknown

    def _answered(self, part: Part, reading: Reading, text: Text) -> list[Hit] | None:
        found = []
        for question in part.questions:
            answer = question.answer(asked(text))
            if answer.verdict != "yes":
                return None
            start = asked(text).find(answer.quote) if answer.quote else -1
            end = start + len(answer.quote) if start >= 0 else -1
            found.append(Hit(self.name, reading.explanation.text[start:end] if start >= 0 else "", start, end))
        return found


def asked(text: Text) -> str:
    """What is shown to whoever answers: as long as the explanation, and the same once it has been stored."""
    return text.text.replace("\0", "\ufffd")


Hits = tuple[Hit, ...]
Outcome = Callable[[Mapping[str, bool]], bool]
"""Whether the rule matches, given which of its special selections are met."""


@dataclass(slots=True)
class Resolved:
    """What became of a rule's special selections for one reading."""

    hits: dict[str, Hits | None] = field(default_factory=dict)
    unjudged: dict[str, str] = field(default_factory=dict)
    """Those that could not be looked at and on which the outcome hangs; they count as not met."""
    waiting: dict[str, Look] = field(default_factory=dict)
    """Those that were not asked, since the outcome does not hang on them."""

    def met(self) -> dict[str, bool]:
        """Selection to whether it is met; those not asked count as not met, which changes nothing."""
        return {**{name: hits is not None for name, hits in self.hits.items()}, **dict.fromkeys(self.waiting, False)}


def resolve(
    specials: Sequence[Special],
    outcome: Outcome,
    reading: Reading,
    text: Text,
    *,
    given: Mapping[str, bool] | None = None,
) -> Resolved:
    """Looks at the special selections of a rule; asks where the outcome hangs on it, cheapest first.

    Args:
        specials: the selections, probes and all.
        outcome: whether the rule matches, given which of them are met.
        reading: what to look at.
        text: its explanation.
        given: answers that are known (embedded tests); these selections are not looked at.
    """
    found, unknown = _look(specials, reading, text, given or {})
    for special in sorted(specials, key=_cost):
        if special.name not in found.waiting or not _hangs(special.name, found, unknown, outcome):
            continue
        hits, why = special.settle(found.waiting.pop(special.name), reading, text)
        found.hits[special.name] = hits
        if hits is None and why is not None:
            for question in special.questions:
                question.unanswered += 1
            unknown[special.name] = why
    found.unjudged = {name: why for name, why in unknown.items() if _hangs(name, found, unknown, outcome)}
    for name, why in found.unjudged.items():
        _say_once(name, why)
    return found


@lru_cache(maxsize=256)
def _say_once(name: str, why: str) -> None:
    logger.warning("selection %r cannot be judged for some readings and counts as not met there: %s", name, why)


def wanted(
    specials: Sequence[Special], outcome: Outcome, reading: Reading, text: Text
) -> Iterator[tuple[Question, str]]:
    """What ``resolve`` would ask first, without asking it."""
    found, unknown = _look(specials, reading, text, {})
    for special in specials:
        if special.name in found.waiting and _hangs(special.name, found, unknown, outcome):
            part, _ = found.waiting[special.name].waiting[0]
            yield part.questions[0], asked(text)


def _look(
    specials: Sequence[Special], reading: Reading, text: Text, given: Mapping[str, bool]
) -> tuple[Resolved, dict[str, str]]:
    """What is known of the selections without asking, and why some cannot be looked at."""
    found, unknown = Resolved(), dict[str, str]()
    for special in specials:
        if special.name in given:
            found.hits[special.name] = (Hit(special.name, ""),) if given[special.name] else None
            continue
        look = special.look(reading, text)
        if look.met is None and look.waiting:
            found.waiting[special.name] = look
            continue
        found.hits[special.name] = look.met
        if look.met is None and look.unknown is not None:
            unknown[special.name] = look.unknown
    return found, unknown


def _hangs(name: str, found: Resolved, unknown: Mapping[str, str], outcome: Outcome) -> bool:
    """Whether some answer of the others makes the outcome depend on this one."""
    met = found.met()
    others = [other for other in {**found.waiting, **dict.fromkeys(unknown)} if other != name]
    for answers in itertools.product((False, True), repeat=len(others)):
        world = {**met, **dict(zip(others, answers, strict=True))}
        if outcome({**world, name: True}) != outcome({**world, name: False}):
            return True
    return False


_ORDER: Final = {"semantic": 1, "judge": 2}


def _cost(special: Special) -> int:
    return max((_ORDER[question.oracle.kind] for question in special.questions), default=0)


class HasQuestions(Protocol):
    """A rule, as far as asking goes."""

    @property
    def id(self) -> str:
        """The rule's id."""
        ...

    @property
    def file(self) -> str:
        """Where it was read from."""
        ...

    @property
    def probes(self) -> tuple[ProbeTest, ...]:
        """Its probes."""
        ...

    @property
    def questions(self) -> tuple[Question, ...]:
        """All that it may ask."""
        ...

    def wanted(self, reading: Reading) -> Iterable[tuple[Question, str]]:
        """What it would ask of a reading first."""
        ...


def connect(
    rules: Iterable[HasQuestions],
    judgements: Judgements | None = None,
    *,
    d_model: int | None = None,
    layer: int | None = None,
) -> None:
    """Makes rules ready: answers are kept in ``judgements``, and what can never be looked at is refused now.

    Args:
        rules: the rules in use.
        judgements: where answers are kept beyond this process.
        d_model: width of the activations to come, if known.
        layer: K of the activations to come, if known.

    Raises:
        MissingExtraError: the extra of a judge or classifier is not installed.
        RuleError: a model that is not there, an API key that is not set, or a probe for other activations.
    """
    for rule in rules:
        for test in rule.probes:
            why = test.probe.mismatch(d_model=test.probe.d_model if d_model is None else d_model, layer=layer)
            if why is not None:
                raise RuleError(why, file=rule.file)
        for question in rule.questions:
            if judgements is not None:
                question.remember_in(judgements)
            question.oracle.check()


def ask_ahead(rules: Iterable[HasQuestions], readings: Sequence[Reading]) -> None:
    """Asks what the rules will ask of these readings, many texts together, so that answers then come from memory.

    Never raises for who cannot be asked.
    """
    wanted: dict[int, tuple[Question, list[str]]] = {}
    for rule in rules:
        if rule.questions:
            for reading in readings:
                for question, text in rule.wanted(reading):
                    wanted.setdefault(id(question), (question, []))[1].append(text)
    for question, texts in wanted.values():
        question.learn(texts)


def unanswered(rules: Iterable[HasQuestions]) -> Counter[str]:
    """How often, by rule id, a selection counted as not met since nobody could be asked, in this process."""
    return Counter({rule.id: sum(question.unanswered for question in rule.questions) for rule in rules})


def with_unjudged(matches: Iterable[Match], supports: Mapping[str, Support]) -> dict[str, Support]:
    """The supports, with what could not be judged among what was not run (``selection <name>``)."""
    found = dict(supports)
    for match in matches:
        if match.unjudged:
            support = found.get(match.match_id) or Support(match.match_id, supported=True)
            said = {f"selection {name}": why for name, why in match.unjudged.items()}
            found[match.match_id] = replace(support, not_run={**support.not_run, **said})
    return found
