"""One conversation of an agent, its findings in place; and what models said against what their activations held.

A turn is one model call: what it newly read, and what it answered. A concept is *said* in a turn where a rule is met by
the answer's visible text (``visible_text``), and *thought* where the rule was met by the reading of an activation of
that turn that no control refuted. Thought and not said is the figure that the paper's evaluation awareness is about:
it compares turns and conversations read alike, and is no rate of the model at large.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sqlalchemy import select

from nla_monitor.errors import ConfigError
from nla_monitor.evidence.calibration import interval
from nla_monitor.placing import Spot, spots
from nla_monitor.records import RunInfo, Severity
from nla_monitor.store.engine import read
from nla_monitor.store.findings import Decided, Place, PlacedMatch, decisions_on, matches_on, samples_on
from nla_monitor.store.messages import Known, Said, conversations, messages_of
from nla_monitor.store.models import RuleRow
from nla_monitor.store.queries import SampleView
from nla_monitor.store.repository import Repository
from nla_monitor.visible_text import Quote, VisibleRules

CONFIDENCE: Final = 0.95


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule met by the reading of an activation, where it stands in the transcript."""

    number: int
    """By which the transcript points at it, from 1; a rule's findings in one message share theirs."""
    rule_id: str
    title: str
    severity: Severity
    quote: str
    explanation: str
    token_text: str | None
    position: int
    """Token position in the sequence of its model call."""
    generated: bool
    trigger: str
    cosine: float | None
    fve: float | None
    denominator_name: str | None
    start: int | None
    """Character of the message at which its token begins; None: the message is known, the place in it is not."""
    end: int | None
    turn: int
    """The model call, counted from 1, that wrote its token or read it first."""
    times: int
    """How often the same was found at this token: each model call reads the conversation again."""
    sample_id: str
    """Of the first time."""
    agent_run_id: str
    alerts: tuple[str, ...]
    """Ids of the alerts that rest on it; a match alone is none."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """One message and what was found in it."""

    message_id: str
    role: str
    name: str | None
    node: str | None
    text: str
    tool_calls: tuple[Mapping[str, object], ...]
    tool_call_id: str | None
    agent_run_id: str
    written: bool
    """By the watched model; else it was read."""
    turn: int
    """The model call, counted from 1, that wrote it or read it first."""
    at: float
    """Unix seconds."""
    read: int
    """Activations of its tokens that were read."""
    findings: tuple[Finding, ...]
    said: tuple[Quote, ...]
    """Of what the model wrote: what it says of the rules' concepts."""


@dataclass(frozen=True, slots=True)
class Share:
    """``count`` of ``of``, with its exact (Clopper and Pearson) interval."""

    count: int
    of: int
    low: float
    high: float

    @property
    def value(self) -> float | None:
        """0 to 1; None of nothing."""
        return self.count / self.of if self.of else None


@dataclass(frozen=True, slots=True)
class Awareness:
    """One rule: where it was said, and where it was only thought."""

    rule_id: str
    title: str
    judged: bool
    """Whether anything can be held against visible text for this rule; without it nothing counts as said."""
    said: Share
    thought: Share
    thought_only: Share
    """In activations, and not in the text."""
    said_only: Share
    """In the text, and in no activation that was read: too few were, or the words are not meant."""
    first_said: int | None = None
    """The first turn; None in figures over conversations, and where there is none."""
    first_thought: int | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Everything that the report of a conversation says."""

    generated_at: float
    run: RunInfo
    conversation: str
    others: tuple[str, ...]
    """Further runs with a conversation of this id."""
    stored: bool
    """Whether its messages were kept (``capture.store_transcript``)."""
    turns: int
    """Model calls of which anything was read, sampled or stored."""
    samples: int
    read: int
    utterances: tuple[Utterance, ...]
    unplaced: tuple[Finding, ...]
    """Findings whose message is not stored."""
    awareness: tuple[Awareness, ...]
    """Over turns; neighbouring turns depend on each other, so that the intervals are narrower than they should be."""
    decisions: tuple[Decided, ...]


@dataclass(frozen=True, slots=True)
class SaidAndThought:
    """The same over all conversations of a run: each counts once, whatever its length."""

    generated_at: float
    run: RunInfo
    conversations: int
    skipped: int
    """Conversations without a stored message or without a reading: nothing can be compared."""
    awareness: tuple[Awareness, ...]


def build_conversation(
    repository: Repository, conversation: str, run_id: str | None = None, *, companions: Sequence[str] = ()
) -> Conversation:
    """One conversation; of the newest run that has one of this id, by default.

    Args:
        repository: of the database.
        conversation: its id; where the agent's calls had none, the id of their outermost run. Its start or end is
            enough where no other fits.
        run_id: of this run only.
        companions: rule files or folders with ``said-`` rules of one's own.

    Raises:
        ConfigError: there is no such conversation, or several are meant.
        RuleError: a companion is malformed.
        StoreUnavailableError: the database cannot be read.
    """
    known, others = _find(repository, conversation, run_id)
    rules = _Rules(repository, companions)
    return _built(repository, known, others, rules)


def said_and_thought(
    repository: Repository, run_id: str | None = None, *, companions: Sequence[str] = ()
) -> SaidAndThought:
    """Over all conversations of a run (the newest with any, by default): in how many was a concept said, or thought?

    Raises:
        ConfigError: no run has a conversation.
        RuleError: a companion is malformed.
        StoreUnavailableError: the database cannot be read.
    """
    known = conversations(repository.engine, run_id)
    if not known:
        raise ConfigError("there is no conversation: no agent was watched, or nothing of it was sampled")
    newest = known[0].run_id
    rules, whole = _Rules(repository, companions), []
    for one in (item for item in known if item.run_id == newest):
        built = _built(repository, one, (), rules)
        if built.stored and built.read:
            whole.append(built.awareness)
    skipped = sum(one.run_id == newest for one in known) - len(whole)
    return SaidAndThought(time.time(), _run(repository, newest), len(whole), skipped, tuple(_over(whole, rules)))


# -- which one --------------------------------------------------------------------------------------------------------


def _find(repository: Repository, text: str, run_id: str | None) -> tuple[Known, tuple[str, ...]]:
    known = conversations(repository.engine, run_id)
    exact = [one for one in known if one.conversation == text]
    found = exact or [one for one in known if one.conversation.startswith(text) or one.conversation.endswith(text)]
    names = list(dict.fromkeys(one.conversation for one in found))
    if len(names) > 1:
        raise ConfigError(f"conversation {text!r} may be any of {', '.join(names[:6])}; give more of the id")
    if not found:
        newest = ", ".join(dict.fromkeys(one.conversation for one in known[:20])) or "none"
        raise ConfigError(f"there is no conversation {text!r}; the newest are: {newest}")
    return found[0], tuple(one.run_id for one in found[1:])


def _run(repository: Repository, run_id: str) -> RunInfo:
    run = repository.run(run_id)
    # Samples of a run whose row came late or was lost are shown all the same.
    return run.info if run is not None else RunInfo(run_id, "(not stored)", "(not stored)", 0, 0.0)


class _Rules:
    """Titles and texts of the rules that the store knows, in their newest version."""

    def __init__(self, repository: Repository, companions: Sequence[str]) -> None:
        query = select(RuleRow.rule_id, RuleRow.title, RuleRow.source).order_by(RuleRow.first_seen_at)
        with read(repository.engine) as connection:
            rows = connection.execute(query).all()
        self.titles: dict[str, str] = {row.rule_id: row.title for row in rows}
        self.visible = VisibleRules({row.rule_id: row.source for row in rows}, companions)

    def title(self, rule_id: str) -> str:
        """A rule's title, or its id where it is not stored."""
        return self.titles.get(rule_id, rule_id)


# -- building ---------------------------------------------------------------------------------------------------------


class _Turns:
    """The model calls of a conversation in order, and which of them a sampled token belongs to."""

    def __init__(self, samples: Sequence[SampleView], said: Sequence[Said]) -> None:
        self.spots = spots(samples, said)
        self._homes = {sample.sample_id: _home(sample, self.spots[sample.sample_id]) for sample in samples}
        first: dict[str, float] = {}
        for call, at in [
            *((one.agent_run_id, one.created_at) for one in said),
            *((self._homes[sample.sample_id], sample.captured_at) for sample in samples),
        ]:
            first[call] = min(at, first.get(call, at))
        self.numbers = {call: number for number, call in enumerate(sorted(first, key=first.__getitem__), start=1)}
        read = [sample.sample_id for sample in samples if sample.explanation is not None]
        self.read = {self.of(sample_id) for sample_id in read}
        self.read_in = Counter(message.message_id for key in read if (message := self.spots[key].message) is not None)
        self.answered = {self.numbers[one.agent_run_id] for one in said if one.written}

    def of(self, sample_id: str) -> int:
        """The turn that first read, or wrote, a sample's token: a later call that reads it again adds nothing."""
        return self.numbers[self._homes[sample_id]]


def _home(sample: SampleView, spot: Spot) -> str:
    if spot.message is not None:
        return spot.message.agent_run_id
    return "" if sample.agent is None else sample.agent.agent_run_id


def _built(repository: Repository, known: Known, others: tuple[str, ...], rules: _Rules) -> Conversation:
    engine = repository.engine
    place = Place(known.run_id, conversation=known.conversation)
    samples = samples_on(engine, place)
    if not samples:
        place = Place(known.run_id, root_run_id=known.conversation)
        samples = samples_on(engine, place)
    said = messages_of(engine, known.run_id, known.conversation)
    turns = _Turns(samples, said)
    findings = _in_order(_findings(matches_on(engine, place), samples, turns, rules), said)
    utterances = tuple(_utterance(one, turns, findings.get(one.message_id, ()), rules) for one in said)
    return Conversation(
        generated_at=time.time(),
        run=_run(repository, known.run_id),
        conversation=known.conversation,
        others=others,
        stored=bool(said),
        turns=len(turns.numbers),
        samples=len(samples),
        read=sum(sample.explanation is not None for sample in samples),
        utterances=utterances,
        unplaced=tuple(findings.get("", ())),
        awareness=tuple(_within(utterances, [one for group in findings.values() for one in group], turns, rules)),
        decisions=tuple(decisions_on(engine, known.run_id, known.conversation)),
    )


def _findings(
    matches: Sequence[PlacedMatch], samples: Sequence[SampleView], turns: _Turns, rules: _Rules
) -> dict[str, list[Finding]]:
    """By message (an empty id: in none that is stored); the same at the same token is one."""
    views = {sample.sample_id: sample for sample in samples}
    merged: dict[tuple[str, str, object], Finding] = {}
    for placed in matches:
        sample = views.get(placed.match.sample_id)
        if sample is None or sample.explanation is None:
            continue
        spot = turns.spots[sample.sample_id]
        message = "" if spot.message is None else spot.message.message_id
        token: object = (spot.start, spot.end) if spot.start is not None else sample.sample_id
        key = (message, placed.match.rule_id, token)
        before = merged.get(key)
        merged[key] = (
            _finding(placed, sample, spot, turns.of(sample.sample_id), rules)
            if before is None
            else _again(before, placed)
        )
    found: dict[str, list[Finding]] = defaultdict(list)
    for key, finding in merged.items():
        found[key[0]].append(finding)
    return found


def _finding(placed: PlacedMatch, sample: SampleView, spot: Spot, turn: int, rules: _Rules) -> Finding:
    match, fidelity = placed.match, sample.fidelity
    return Finding(
        number=0,
        rule_id=match.rule_id,
        title=rules.title(match.rule_id),
        severity=match.severity,
        quote=match.quote,
        explanation="" if sample.explanation is None else sample.explanation.text,
        token_text=sample.token_text,
        position=sample.position,
        generated=sample.agent is not None and sample.agent.generated,
        trigger=sample.trigger,
        cosine=None if fidelity is None else fidelity.cosine,
        fve=None if fidelity is None else fidelity.fve,
        denominator_name=None if fidelity is None else fidelity.denominator_name,
        start=spot.start,
        end=spot.end,
        turn=turn,
        times=1,
        sample_id=sample.sample_id,
        agent_run_id="" if sample.agent is None else sample.agent.agent_run_id,
        alerts=placed.alerts,
    )


def _again(before: Finding, placed: PlacedMatch) -> Finding:
    alerts = tuple(dict.fromkeys((*before.alerts, *placed.alerts)))
    return replace(before, times=before.times + 1, alerts=alerts)


def _in_order(found: Mapping[str, Sequence[Finding]], said: Sequence[Said]) -> dict[str, list[Finding]]:
    """Numbered in the order of the transcript, those without a message last."""
    ordered: dict[str, list[Finding]] = {}
    numbers: dict[tuple[str, str], int] = {}
    for message in [*(one.message_id for one in said), ""]:
        group = sorted(found.get(message, ()), key=_reading_order)
        for one in group:
            numbers.setdefault((message, one.rule_id), len(numbers) + 1)
        ordered[message] = [replace(one, number=numbers[message, one.rule_id]) for one in group]
    return ordered


def _reading_order(one: Finding) -> tuple[int, int, bool, int, str]:
    return (-one.severity.rank, one.turn, one.start is None, one.position, one.rule_id)


def _utterance(said: Said, turns: _Turns, findings: Sequence[Finding], rules: _Rules) -> Utterance:
    message = said.message
    return Utterance(
        message_id=said.message_id,
        role=message.role,
        name=message.name,
        node=said.node,
        text=message.text,
        tool_calls=message.tool_calls,
        tool_call_id=message.tool_call_id,
        agent_run_id=said.agent_run_id,
        written=said.written,
        turn=turns.numbers[said.agent_run_id],
        at=said.created_at,
        read=turns.read_in[said.message_id],
        findings=tuple(findings),
        said=tuple(rules.visible.quotes(message.text)) if said.written else (),
    )


# -- said and thought -------------------------------------------------------------------------------------------------


def share(count: int, of: int) -> Share:
    """A share with its interval; (0, 1) of nothing."""
    return Share(count, of, *interval(count, of, CONFIDENCE))


def _within(
    utterances: Sequence[Utterance], findings: Sequence[Finding], turns: _Turns, rules: _Rules
) -> Iterator[Awareness]:
    """Over the turns of which something was read and the answer is stored (where no answer is: all that were read)."""
    stored = bool(turns.answered)
    units = turns.read & turns.answered if stored else turns.read
    said: dict[str, set[int]] = defaultdict(set)
    thought: dict[str, set[int]] = defaultdict(set)
    for utterance in utterances:
        for quote in utterance.said:
            said[quote.rule_id].add(utterance.turn)
    for finding in findings:
        thought[finding.rule_id].add(finding.turn)
    for rule_id in sorted({*said, *thought}):
        heard, held = said[rule_id] & units, thought[rule_id] & units
        made = _awareness(rule_id, heard, held, len(units), rules)
        yield replace(
            made,
            judged=made.judged and stored,
            first_said=min(said[rule_id], default=None),
            first_thought=min(thought[rule_id], default=None),
        )


def _over(whole: Sequence[Sequence[Awareness]], rules: _Rules) -> Iterator[Awareness]:
    """Over conversations: a concept is said, or thought, in one if it is in any of its turns."""
    said: dict[str, set[int]] = defaultdict(set)
    thought: dict[str, set[int]] = defaultdict(set)
    for number, figures in enumerate(whole):
        for one in figures:
            if one.said.count:
                said[one.rule_id].add(number)
            if one.thought.count:
                thought[one.rule_id].add(number)
    for rule_id in sorted({*said, *thought}):
        yield _awareness(rule_id, said[rule_id], thought[rule_id], len(whole), rules)


def _awareness(rule_id: str, said: set[int], thought: set[int], of: int, rules: _Rules) -> Awareness:
    return Awareness(
        rule_id=rule_id,
        title=rules.title(rule_id),
        judged=rules.visible.covers(rule_id),
        said=share(len(said), of),
        thought=share(len(thought), of),
        thought_only=share(len(thought - said), of),
        said_only=share(len(said - thought), of),
    )
