"""The report of a conversation as text, Markdown, HTML or JSON: the transcript with its findings in place."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, Final

from nla_monitor.conversations import Awareness, Conversation, Finding, SaidAndThought, Share, Utterance
from nla_monitor.report import Format, clean, escaped, page
from nla_monitor.store.findings import Decided

__all__ = ["Segment", "render", "segments"]

CAUTION: Final = (
    "A finding is a hypothesis until a person has looked at it: one reading of one activation. Only sampled tokens are "
    "read: nothing found is no proof that nothing is there. Shares compare what was sampled and read alike; they are "
    "no rate of the model at large. Neighbouring turns depend on each other: intervals over turns are too narrow."
)
NOT_STORED: Final = (
    "No message of this conversation is stored: set capture.store_transcript: true before the agent runs. Without it "
    "nothing can be compared with what was thought."
)
UNJUDGED: Final = "not judged"


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a message in which the same findings hold throughout."""

    text: str
    notes: tuple[int, ...]
    """Numbers of the findings on its tokens."""
    said: tuple[str, ...]
    """Ids of the rules whose concept these words say."""

    @property
    def lines(self) -> list[str]:
        """Its text by lines."""
        return self.text.split("\n")


@dataclass(frozen=True, slots=True)
class Note:
    """A rule's findings in one message, as the reader gets them."""

    number: int
    findings: tuple[Finding, ...]

    @property
    def best(self) -> Finding:
        """The one with the highest fidelity."""
        return max(self.findings, key=lambda one: -1.0 if one.cosine is None else one.cosine)

    @property
    def alerts(self) -> tuple[str, ...]:
        """Ids of the alerts that rest on any of them."""
        return tuple(dict.fromkeys(alert for one in self.findings for alert in one.alerts))


def segments(utterance: Utterance) -> list[Segment]:
    """A message cut where findings and said words begin and end; the pieces together are its text."""
    text, spans = utterance.text, [(one.start, one.end, one.number) for one in utterance.findings]
    placed = [(start, end, number) for start, end, number in spans if start is not None and end is not None]
    edges = {0, len(text), *(edge for start, end, _ in placed for edge in (start, end))}
    edges |= {edge for quote in utterance.said for edge in (quote.start, quote.end)}
    cuts = sorted(edge for edge in edges if 0 <= edge <= len(text))
    made: list[Segment] = []
    for start, end in pairwise(cuts):
        notes = tuple(sorted({number for begin, stop, number in placed if begin <= start and end <= stop}))
        said = tuple(quote.rule_id for quote in utterance.said if quote.start <= start and end <= quote.end)
        last = made[-1] if made else None
        if last is not None and (last.notes, last.said) == (notes, said):
            made[-1] = Segment(last.text + text[start:end], notes, said)
        else:
            made.append(Segment(text[start:end], notes, said))
    return made


def notes(findings: Sequence[Finding]) -> list[Note]:
    """Findings by their numbers."""
    ordered = sorted(findings, key=lambda one: one.number)
    return [Note(number, tuple(group)) for number, group in groupby(ordered, key=lambda one: one.number)]


def render(report: Conversation | SaidAndThought, how: Format) -> str:
    """The report as text that ends in a newline."""
    if how is Format.JSON:
        return json.dumps(dataclasses.asdict(report), ensure_ascii=False, indent=2, allow_nan=False, default=str) + "\n"
    if how is Format.HTML:
        return _html(report)
    lines = _text(report) if how is Format.TEXT else _markdown(report)
    return "\n".join(lines) + "\n"


# -- what all forms say -------------------------------------------------------------------------------------------


def head(report: Conversation | SaidAndThought) -> list[tuple[str, str]]:
    """The head of the report."""
    run = ("run", f"{clean(report.run.name)} ({report.run.run_id}), model {clean(report.run.model)}")
    if isinstance(report, SaidAndThought):
        told = f"{report.conversations} compared"
        return [
            run,
            ("conversations", f"{told}, {report.skipped} without messages or readings" if report.skipped else told),
        ]
    lines = [
        ("conversation", clean(report.conversation)),
        run,
        ("turns", f"{report.turns} model calls, {len(report.utterances)} messages"),
        ("activations", f"{report.samples} sampled, {report.read} read"),
    ]
    if report.others:
        lines.append(("also in", ", ".join(report.others)))
    return lines


def told(share: Share) -> str:
    """A share with its interval."""
    if not share.of:
        return "-"
    return f"{share.count} of {share.of} ({share.low:.0%} to {share.high:.0%})"


def said_told(one: Awareness) -> str:
    """How often it was said."""
    return told(one.said) if one.judged else UNJUDGED


def order(one: Awareness) -> str:
    """Which came first, in turns."""
    if one.first_thought is None and one.first_said is None:
        return ""
    thought = "never read" if one.first_thought is None else f"first read in turn {one.first_thought}"
    if not one.judged:
        return thought
    return f"{thought}, {'never said' if one.first_said is None else f'first said in turn {one.first_said}'}"


def fidelity(finding: Finding) -> str:
    """FVE with the name of its denominator."""
    if finding.cosine is None:
        return "no fidelity"
    if finding.fve is None:
        return f"cosine {finding.cosine:.2f}"
    return f"FVE {finding.fve:.2f} (denominator: {clean(finding.denominator_name or 'unnamed')})"


def tokens(note: Note) -> str:
    """At how many tokens."""
    count, times = len(note.findings), sum(one.times for one in note.findings)
    where = "1 token" if count == 1 else f"{count} tokens"
    around = sum(one.start is None for one in note.findings)
    if around:
        where += ", in the template around it" if around == count else f", {around} of them in the template around it"
    return where + (f", read {times} times" if times > count else "")


def backing(note: Note) -> str:
    """Whether an alert rests on it."""
    return f"alert {', '.join(note.alerts)}" if note.alerts else "no alert: its rule asks for more"


def decided(one: Decided) -> str:
    """A decision in one line."""
    where = f" before tool {clean(one.tool)}" if one.tool else ""
    why = {"undecided": "not all was read in time", "fault": "findings could not be looked up, or the callback failed"}
    reason = why.get(one.decided_by) or ", ".join(one.rules) or "nothing found"
    note = f" ({clean(one.note)})" if one.note else ""
    who = {"person": "a person", "callback": "the callback", "findings": "the gate"}.get(one.decided_by, "the gate")
    return f"{who}{note} said {one.verdict}{where}: {reason}; waited {one.seconds:.2f} s"


def speaker(utterance: Utterance) -> str:
    """Who says it."""
    name = utterance.name or utterance.node if utterance.written else utterance.name
    return f"{utterance.role} {clean(name)}" if name else utterance.role


def calls(utterance: Utterance) -> list[str]:
    """The tools that a message calls."""
    return [
        f"calls {call.get('name')}({json.dumps(call.get('args'), ensure_ascii=False, default=str)})"
        for call in utterance.tool_calls
    ]


Event = Utterance | Decided


def by_turn(report: Conversation) -> list[tuple[int, list[Event]]]:
    """Messages by turn; a decision stands behind the message that it followed."""
    timed = [(one.at, 0, place, one.turn, one) for place, one in enumerate(report.utterances)]
    events: list[tuple[int, Event]] = [(turn, one) for *_, turn, one in timed]
    for decision in report.decisions:
        before = [place for place, (_, one) in enumerate(events) if _at(one) <= decision.created_at]
        place = before[-1] + 1 if before else 0
        events.insert(place, (events[place - 1][0] if place else 1, decision))
    return [(turn, [one for _, one in group]) for turn, group in groupby(events, key=lambda pair: pair[0])]


def _at(one: Event) -> float:
    return one.at if isinstance(one, Utterance) else one.created_at


# -- text -----------------------------------------------------------------------------------------------------------


def _text(report: Conversation | SaidAndThought) -> Iterator[str]:
    yield from (f"{name:<13} {value}" for name, value in head(report))
    yield f"\nWhat it said against what it thought ({_unit(report)}; 95 % intervals)"
    yield from _figures_text(report.awareness)
    if isinstance(report, Conversation):
        yield from _transcript_text(report)
    yield f"\n{CAUTION}"


def _unit(report: Conversation | SaidAndThought) -> str:
    return "share of turns" if isinstance(report, Conversation) else "share of conversations"


def _figures_text(awareness: Sequence[Awareness]) -> Iterator[str]:
    if not awareness:
        yield "  nothing was said or read that a rule looks for"
        return
    width = max(len(one.rule_id) for one in awareness) + 2
    yield f"  {'':<{width}}{'said':<24}{'thought':<24}{'thought, not said':<24}said, not read"
    for one in awareness:
        only = told(one.thought_only) if one.judged else UNJUDGED
        silent = told(one.said_only) if one.judged else UNJUDGED
        yield f"  {one.rule_id:<{width}}{said_told(one):<24}{told(one.thought):<24}{only:<24}{silent}"
        if order(one):
            yield f"  {'':<{width}}{order(one)}"


def _transcript_text(report: Conversation) -> Iterator[str]:
    yield "\nTranscript   ⟨words⟩[1]: finding 1 on these tokens   «words»: said in the text"
    if not report.stored:
        yield f"  {NOT_STORED}"
    for turn, events in by_turn(report):
        yield f"\n--- turn {turn}"
        for event in events:
            if isinstance(event, Decided):
                yield f"  ! {decided(event)}"
            else:
                yield from _utterance_text(event)
    if report.unplaced:
        yield "\n--- findings whose message is not stored, or not recognised"
        yield from _notes_text(report.unplaced, with_turn=True)


def _utterance_text(utterance: Utterance) -> Iterator[str]:
    marked = _marked(segments(utterance))
    first, *rest = [clean(line) for line in marked.split("\n")] or [""]
    yield f"{speaker(utterance)}: {first}".rstrip()
    yield from (f"    {line}".rstrip() for line in rest)
    yield from (f"    → {clean(call)}" for call in calls(utterance))
    yield from (f"    « says: {quote.rule_id}" for quote in utterance.said)
    yield from _notes_text(utterance.findings)


def _marked(pieces: Sequence[Segment]) -> str:
    parts: list[str] = []
    said: tuple[str, ...] = ()
    for piece in pieces:
        parts += ["»"] * (bool(said) and not piece.said) + ["«"] * (bool(piece.said) and not said)
        parts.append(f"⟨{piece.text}⟩[{','.join(map(str, piece.notes))}]" if piece.notes else piece.text)
        said = piece.said
    return "".join([*parts, "»" if said else ""])


def _notes_text(findings: Sequence[Finding], *, with_turn: bool = False) -> Iterator[str]:
    for note in notes(findings):
        best = note.best
        turn = f"turn {best.turn}, " if with_turn else ""
        yield f"    [{note.number}] {best.severity.value} {best.rule_id}: “{clean(best.quote)}”"
        yield f"        {turn}{tokens(note)}; {fidelity(best)}; {backing(note)}"


# -- Markdown ---------------------------------------------------------------------------------------------------------


def _markdown(report: Conversation | SaidAndThought) -> Iterator[str]:
    title = report.conversation if isinstance(report, Conversation) else "all conversations"
    yield f"# nla_monitor: {escaped(title)}\n"
    yield "| | |\n|---|---|"
    yield from (f"| {name} | {escaped(value)} |" for name, value in head(report))
    yield f"\n## What it said against what it thought\n\n{_unit(report).capitalize()}; 95 % intervals.\n"
    yield "| rule | said | thought | thought, not said | said, not read | order |\n|---|---|---|---|---|---|"
    for one in report.awareness:
        only = told(one.thought_only) if one.judged else UNJUDGED
        silent = told(one.said_only) if one.judged else UNJUDGED
        cells = (escaped(one.rule_id), said_told(one), told(one.thought), only, silent, order(one))
        yield f"| {' | '.join(cells)} |"
    if isinstance(report, Conversation):
        yield from _transcript_markdown(report)
    yield f"\n*{CAUTION}*"


def _transcript_markdown(report: Conversation) -> Iterator[str]:
    yield "\n## Transcript\n"
    if not report.stored:
        yield NOT_STORED
    for turn, events in by_turn(report):
        yield f"\n### Turn {turn}\n"
        for event in events:
            if isinstance(event, Decided):
                yield f"> **{escaped(decided(event))}**\n"
                continue
            marked = "".join(_bold(segment) for segment in segments(event))
            yield f"**{escaped(speaker(event))}:** {marked}\n"
            yield from (f"- {escaped(call)}" for call in calls(event))
            yield from (f"- says: {escaped(quote.rule_id)}" for quote in event.said)
            yield from _notes_markdown(event.findings)
    if report.unplaced:
        yield "\n### Findings whose message is not stored, or not recognised\n"
        yield from _notes_markdown(report.unplaced)


def _bold(segment: Segment) -> str:
    text = escaped(segment.text)
    if segment.notes and text:
        text = f"**{text}** <sup>{','.join(map(str, segment.notes))}</sup>"
    blank = " " if segment.text[:1].isspace() else ""
    after = " " if segment.text[-1:].isspace() else ""
    return f"{blank}{f'«{text}»' if segment.said else text}{after}"


def _notes_markdown(findings: Sequence[Finding]) -> Iterator[str]:
    for note in notes(findings):
        best = note.best
        what = f"{best.severity.value} {escaped(best.rule_id)}: “{escaped(best.quote)}”"
        yield f"- <sup>{note.number}</sup> {what} {escaped(f'{tokens(note)}; {fidelity(best)}; {backing(note)}')}"


# -- HTML -------------------------------------------------------------------------------------------------------------

BAR_WIDTH: Final = 360
BAR_HEIGHT: Final = 16


@dataclass(frozen=True, slots=True)
class Bar:
    """One share as a bar with its interval, in SVG units from the left."""

    label: str
    kind: str
    text: str
    length: float
    low: float
    high: float


def bars(one: Awareness) -> list[Bar]:
    """Said, thought, and thought without being said."""
    shares = [("thought", one.thought)]
    if one.judged:
        shares = [("said", one.said), *shares, ("thought, not said", one.thought_only)]
    return [_bar(label, share) for label, share in shares if share.of]


def _bar(label: str, share: Share) -> Bar:
    value = share.value or 0.0
    kind = label.partition(",")[0] if "," not in label else "only"
    return Bar(label, kind, told(share), BAR_WIDTH * value, BAR_WIDTH * share.low, BAR_WIDTH * share.high)


def _html(report: Conversation | SaidAndThought) -> str:
    filters: dict[str, Callable[..., Any]] = {
        "backing": backing,
        "bars": bars,
        "calls": calls,
        "decided": decided,
        "fidelity": fidelity,
        "notes": notes,
        "order": order,
        "segments": segments,
        "speaker": speaker,
        "tokens": tokens,
    }
    whole = isinstance(report, Conversation)
    return page("conversation.html.j2", filters).render(
        report=report,
        whole=whole,
        title=report.conversation if isinstance(report, Conversation) else "all conversations",
        head=head(report),
        unit=_unit(report),
        turns=by_turn(report) if isinstance(report, Conversation) else [],
        caution=CAUTION,
        not_stored=NOT_STORED,
        bar_width=BAR_WIDTH,
        bar_height=BAR_HEIGHT,
    )
