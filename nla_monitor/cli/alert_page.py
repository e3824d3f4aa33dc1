"""One alert in full, for the person who was woken by it: what, how sure, where, and what to do."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from nla_monitor.cli.common import (
    DEFAULT_DATABASE,
    SEVERITY_STYLES,
    age,
    cut,
    fidelity_text,
    moment,
    safe,
    short,
)
from nla_monitor.evidence.promise import told
from nla_monitor.evidence.wording import lines, summary
from nla_monitor.records import AgentContext, Alert, AlertState, Reading, RunInfo, TriageState

if TYPE_CHECKING:
    from nla_monitor.precision import Precision
    from nla_monitor.store.queries import Label

_MORE_READINGS: Final = 5
_CONTEXT: Final = 400
_STYLES: Final = {"good": "", "doubtful": "bold", "plain": ""}
_LATER: Final = "An alert is a hypothesis until a person labels it. Fidelity says how much of the activation the words "
_CAUTION: Final = _LATER + "hold, not whether they are true."


@dataclass(frozen=True, slots=True)
class Exhibit:
    """What the page is made of."""

    alert: Alert
    run: RunInfo | None
    readings: Sequence[Reading]
    labels: Sequence[Label]
    precision: Precision | None = None
    """Of the rule in this version, by the labels of its alerts so far."""

    @property
    def shown(self) -> Reading | None:
        """The reading that the alert quotes, if it is still stored."""
        return next((reading for reading in self.readings if reading.sample_id == self.alert.sample_id), None)


def print_page(out: Console, exhibit: Exhibit, database: str) -> None:
    """Write the page."""
    alert = exhibit.alert
    head = Text.assemble(
        (f" {alert.severity.value.upper()} ", SEVERITY_STYLES[alert.severity]),
        " ",
        (safe(alert.rule_title, one_line=True), "bold"),
    )
    out.print(head)
    out.print(
        Text(f"{alert.state.value}, {alert.triage.value} · fired {moment(alert.fired_at)} ({age(alert.fired_at)})")
    )
    for title, body in (
        ("What the activation reads", _what(alert)),
        ("How sure", _how_sure(exhibit)),
        ("Where", _where(exhibit)),
        (f"More matching readings ({len(_others(exhibit))})", _more(exhibit)),
        ("Labels so far", _labels(exhibit)),
    ):
        if body is not None:
            _print_title(out, title)
            out.print(Padding(body, (0, 0, 0, 2)))
    _print_title(out, "What to do")
    _print_what_to_do(out, exhibit, database)


def _print_title(out: Console, title: str) -> None:
    out.print()
    out.print(Text(title, style="bold underline"))


def marked(explanation: str, quote: str) -> Text:
    """The explanation with the quote in it marked, visibly also without colours."""
    text, wanted = safe(explanation), safe(quote)
    before, found, after = text.partition(wanted) if wanted else (text, "", "")
    if not found:
        return Text(text)
    return Text.assemble(before, (f"»{found}«", "bold reverse"), after)


def _what(alert: Alert) -> Text:
    return marked(alert.explanation, alert.quote)


def _how_sure(exhibit: Exhibit) -> Table:
    alert = exhibit.alert
    rows = _rows()
    rows.add_row("fidelity", fidelity_text(alert.cosine, alert.fve, alert.denominator_name))
    for name, text in told(alert.calibration):
        rows.add_row(name, Text(safe(text, one_line=True), style="bold" if text.startswith("void") else ""))
    controls = list(lines(alert.evidence))
    if verdict := summary(controls):
        rows.add_row("controls", Text(safe(verdict, one_line=True), style="bold"))
    for line in controls:
        rows.add_row(safe(line.name), Text(safe(str(line), one_line=True), style=_STYLES[line.verdict]))
    rows.add_row("matches", f"{alert.matches} so far")
    rows.add_row("rule so far", precision_text(exhibit.precision))
    rows.add_row("caution", Text(_CAUTION, style="italic"))
    return rows


def precision_text(precision: Precision | None) -> str:
    """How often this version of the rule was right, in one line."""
    if precision is None or precision.value is None:
        waiting = f" ({precision.unlabelled} unlabelled)" if precision is not None else ""
        return f"no alert of this version of the rule has been labelled yet{waiting}"
    low, high = precision.bounds()
    share = f"{precision.true_positive} of {precision.labelled} labelled alerts were true"
    return f"{share}: {precision.value:.0%} (95 % interval {low:.0%} to {high:.0%}); {precision.unlabelled} unlabelled"


def _where(exhibit: Exhibit) -> Table:
    alert, shown, run = exhibit.alert, exhibit.shown, exhibit.run
    rows = _rows()
    name = f"{safe(run.name, one_line=True)}, model {safe(run.model, one_line=True)}" if run else "(not stored)"
    rows.add_row("run", f"{name}\n{alert.run_id}")
    rows.add_row("step", _steps(alert))
    token = ""
    if shown is not None:
        text = repr(safe(shown.sample.token_text)) if shown.sample.token_text is not None else "text not stored"
        token = f", token {text} (id {shown.sample.token_id}), after block {shown.sample.layer}"
    rows.add_row("position", f"{alert.position}{token}")
    if shown is not None:
        for key, value in origin_of(shown.sample.model, shown.sample.adapter, shown.sample.screens):
            rows.add_row(key, value)
    for key, value in _agent(alert):
        rows.add_row(key, value)
    for key, item in alert.group.items():
        if key != "run_id" and item is not None:
            rows.add_row(safe(key), safe(str(item), one_line=True))
    rows.add_row("context", _context(alert, shown))
    if alert.traceparent:
        rows.add_row("trace", alert.traceparent.split("-")[1] if "-" in alert.traceparent else alert.traceparent)
    rows.add_row("rule", f"{alert.rule_id}, version {alert.rule_version}")
    rows.add_row("alert", alert.alert_id)
    if alert.resolved_at is not None:
        rows.add_row("resolved", f"{moment(alert.resolved_at)} ({age(alert.resolved_at)})")
    return rows


def origin_of(model: str | None, adapter: str | None, screens: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """What is known of a sample beside its place, for people: only what there is."""
    if model is not None:
        yield "watched as", safe(model, one_line=True)
    if adapter is not None:
        yield "adapter", safe(adapter, one_line=True)
    if screens:
        yield "screens", ", ".join(f"{safe(name)} {value:.3g}" for name, value in screens.items())


def _steps(alert: Alert) -> str:
    if alert.first_step is None:
        return "none (no training step)"
    last = alert.last_step if alert.last_step is not None else alert.first_step
    return str(last) if last == alert.first_step else f"{alert.first_step} to {last}"


def _agent(alert: Alert) -> Iterator[tuple[str, str]]:
    agent = alert.agent
    if agent is None:
        return
    yield "agent run", agent.agent_run_id + (f" in {agent.root_run_id}" if agent.root_run_id else "")
    call = {"tool": agent.tool, "tool call": agent.tool_call_id, "message": message_of(agent)}
    told = {**call, "node": agent.node, "conversation": agent.conversation_id}
    for name, value in told.items():
        if value:
            yield name, safe(value, one_line=True)
    yield "written by", f"the model, token {agent.token_index}" if agent.generated else "the prompt"


def message_of(agent: AgentContext) -> str | None:
    """Whose message the token stands in, and which tokens are that message's; None where it is not known."""
    if agent.message_role is None or agent.span_start is None:
        return None
    end = "on" if agent.span_end is None else f"to {agent.span_end - 1}"
    return f"{agent.message_role}, tokens {agent.span_start} {end}"


def _context(alert: Alert, shown: Reading | None) -> Text:
    """The text up to the token, with the token marked, visibly also without colours."""
    if not alert.context:
        return Text("not stored (capture.store_text is off, or there was no tokenizer)", style="dim")
    text = safe(alert.context)
    token = safe(shown.sample.token_text) if shown is not None and shown.sample.token_text else ""
    before, after = (text[: -len(token)], token) if token and text.endswith(token) else (text, "")
    start = "…" if len(before) > _CONTEXT else ""
    quoted = Text(f"{start}{before[-_CONTEXT:]}")
    quoted.append(f"[{_visible(after)}]" if after else "[here]", style="bold reverse")
    return quoted


def _visible(token: str) -> str:
    return token.replace("\n", "\\n").replace("\t", "\\t") if token.strip() == "" else token


def _others(exhibit: Exhibit) -> list[Reading]:
    return [reading for reading in exhibit.readings if reading.sample_id != exhibit.alert.sample_id]


def _more(exhibit: Exhibit) -> Group | None:
    others = _others(exhibit)
    if not others:
        return None
    lines = [_other(exhibit.alert, reading) for reading in others[:_MORE_READINGS]]
    if len(others) > _MORE_READINGS:
        lines.append(Text(f"and {len(others) - _MORE_READINGS} more (see --json)"))
    return Group(*lines)


def _other(alert: Alert, reading: Reading) -> Text:
    sample, fidelity = reading.sample, reading.fidelity
    fve = f", FVE {fidelity.fve:.2f}" if fidelity is not None and fidelity.fve is not None else ""
    step = f"step {sample.step}, " if sample.step is not None else "agent, "
    same = reading.explanation.text == alert.explanation
    said = "the same words" if same else cut(reading.explanation.text, 240)
    return Text.assemble((f"{step}position {sample.position}{fve}: ", "dim"), said)


def _print_what_to_do(out: Console, exhibit: Exhibit, database: str) -> None:
    alert, shown = exhibit.alert, exhibit.shown
    option = "" if database == DEFAULT_DATABASE else f" --database {shlex.quote(database)}"
    at = shown.sample.step if shown is not None else alert.first_step
    step = f" --step {at}" if at is not None else ""
    told = "Say what it was; that is how the rule's precision becomes known"
    if alert.triage is not TriageState.OPEN:
        told = f"It is labelled {alert.triage.value}; to change that"
    out.print(Text("  1. Runbook:" if alert.runbook else "  1. Runbook: this rule has none"))
    if alert.runbook:
        out.print(Padding(Text(safe(alert.runbook.strip())), (0, 0, 0, 5)))
    for text, command in (
        ("2. Read the context above: does the text itself say what the explanation says (an echo)?", None),
        (
            "3. Look at what else was read there:",
            f"nla-monitor samples --run {alert.run_id}{step} --explanations{option}",
        ),
        (
            f"4. {told} (true_positive, false_positive, benign, acknowledged, open):",
            f"nla-monitor alerts label {short(alert.alert_id)} true_positive --note WHY{option}",
        ),
    ):
        out.print(Padding(Text(text), (0, 0, 0, 2)))
        if command is not None:
            # Not wrapped: a command that was broken over two lines cannot be copied.
            out.print(Text(f"     {command}", style="bold"), soft_wrap=True)
    if alert.state is AlertState.FIRING:
        resolve = "It still fires, and resolves by itself: when the rule's window no longer holds, or its run is over."
        out.print(Padding(Text(resolve), (0, 0, 0, 2)))


def _labels(exhibit: Exhibit) -> Text | None:
    if not exhibit.labels:
        return None
    lines = [
        f"{moment(label.created_at)}  {label.triage.value} by {safe(label.who, one_line=True)}"
        + (f": {safe(label.note, one_line=True)}" if label.note else "")
        for label in exhibit.labels
    ]
    return Text("\n".join(lines))


def _rows() -> Table:
    rows = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold", ratio=1)
    return rows
