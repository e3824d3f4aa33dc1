"""What the demo shows: lines as things happen, a progress bar in a terminal, and a summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from nla_monitor.cli.demo.stories import Story
from nla_monitor.records import Alert, AlertState, Severity

Curve = Sequence[tuple[int, float]]
"""(step, rate) pairs; rates from 0 to 1."""

_STYLES = {
    Severity.INFO: "blue",
    Severity.LOW: "cyan",
    Severity.MEDIUM: "yellow",
    Severity.HIGH: "red",
    Severity.CRITICAL: "bold white on red",
}


_PLACES = {"train": "training data", "eval": "ordinary prompts", "agent": "agent"}


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of a finished demo."""

    story: Story
    visible: Curve
    activations: Curve
    alerts: Sequence[Alert]
    agent_alerts: Sequence[Alert]
    samples: int
    dropped: int
    seconds: float
    database: str
    run_id: str


class View:
    """Writes the demo to a console; safe to call from the watcher's thread (rich locks its console)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: TaskID | None = None

    def opening(self, story: Story, database: str) -> None:
        """What is going to happen."""
        body = Group(
            Text(story.plot),
            Text(""),
            Text("harness: hack rate in the outputs of an evaluation harness", style="dim"),
            Text(
                "activations: share of activations on ordinary prompts that the AV reads as reward hacking, "
                "before the model has written any action",
                style="dim",
            ),
            Text(f"database: {database}", style="dim"),
        )
        self._console.print(Panel(body, title=f"nla_monitor demo · {story.title}", title_align="left"))

    def note(self, text: str) -> None:
        """One plain line."""
        self._console.print(Text(text, style="dim"))

    def begin(self, what: str, total: int) -> None:
        """Show a progress bar for the next piece of work."""
        self.end()
        self._progress.start()
        self._task = self._progress.add_task(what, total=total)

    def advance(self, done: int) -> None:
        """Move the progress bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=done)

    def end(self) -> None:
        """Take the progress bar away."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
        self._progress.stop()

    def look(self, step: int, rate: float) -> None:
        """The harness was run."""
        self._console.print(f"step {step:>3}  harness      {_bar(rate, 'blue')}")

    def read(self, step: int, rate: float) -> None:
        """The activations of a look have been read."""
        self._console.print(f"step {step:>3}  activations  {_bar(rate, 'red')}")

    def alert(self, alert: Alert) -> None:
        """An alert fired or resolved."""
        if alert.state is AlertState.RESOLVED:
            self._console.print(Text(f"resolved: {alert.rule_title}", style="dim"))
            return
        head = Text.assemble(
            (f" {alert.severity.value.upper()} ", _STYLES[alert.severity]), (f" {alert.rule_title}", "bold")
        )
        self._console.print(Panel(Group(*_alert_lines(alert)), title=head, title_align="left"))

    def agent(self, role: str, text: str) -> None:
        """One line of the agent's conversation."""
        self._console.print(Text.assemble((f"{role:>10}  ", "bold"), text))

    def summary(self, summary: Summary) -> None:
        """The end: both curves as measured, what fired, and where to go from here."""
        self.end()
        self._console.rule(summary.story.title)
        self._console.print(_curves(summary.visible, summary.activations))
        self._console.print(_alert_table(summary.alerts, summary.agent_alerts))
        self._console.print(Text(_half_way(summary)))
        self._console.print(Text(summary.story.moral))
        self._console.print(
            Text(
                f"{summary.samples} activations read, {summary.dropped} dropped, {summary.seconds:.0f} s. "
                "One small organism with planted thoughts: this shows the plumbing and the gates, not how well NLAs "
                "work on large models.",
                style="dim",
            )
        )
        self._console.print("What to try next:", style="bold")
        option = f"--database {summary.database}"
        for command in (
            f"nla-monitor alerts list {option}",
            f"nla-monitor alerts show {_newest(summary)} {option}",
            f"nla-monitor report --run {summary.run_id} --format html --output report.html {option}",
            "nla-monitor demo --story benign",
        ):
            self._console.print(Text(f"  {command}"), soft_wrap=True)


def _bar(rate: float, colour: str, width: int = 24) -> str:
    filled = round(rate * width)
    return f"[{colour}]{'█' * filled}[/]{'░' * (width - filled)} {rate:>6.1%}"


def _alert_lines(alert: Alert) -> list[Text]:
    where = f"since step {alert.first_step}" if alert.agent is None else f"agent run {alert.agent.agent_run_id}"
    fidelity = "fidelity unknown"
    if alert.fve is not None:
        fidelity = f"FVE {alert.fve:.2f} (denominator: {alert.denominator_name})"
    explanation = Text(alert.explanation)
    if alert.quote:
        explanation.highlight_words([alert.quote], style="bold underline")
    status = str(alert.calibration.get("status", "uncalibrated"))
    lines = [
        explanation,
        Text(f"{where}, position {alert.position} · {fidelity} · {alert.matches} matches · {status}", style="dim"),
    ]
    if alert.context:
        lines.append(Text(f"the model had read: …{alert.context[-90:]!r}", style="dim"))
    return lines


def _curves(visible: Curve, activations: Curve) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("step", justify="right")
    table.add_column("harness (visible output)")
    table.add_column("activations (ordinary prompts)")
    read = dict(activations)
    for step, rate in visible:
        seen = _bar(read[step], "red", 20) if step in read else "not read"
        table.add_row(str(step), _bar(rate, "blue", 20), seen)
    return table


def _newest(summary: Summary) -> str:
    alerts = [*summary.alerts, *summary.agent_alerts]
    return alerts[-1].alert_id if alerts else "ID"


def _half_way(summary: Summary) -> str:
    """When each curve first stood at one half or more, in words."""
    found = []
    for name, curve in (("harness", summary.visible), ("activations", summary.activations)):
        step = next((step for step, rate in curve if rate >= 0.5), None)
        found.append(f"{name}: never" if step is None else f"{name}: step {step}")
    return f"First look at one half or more: {'; '.join(found)}."


def _alert_table(alerts: Sequence[Alert], agent_alerts: Sequence[Alert]) -> Table | Text:
    if not alerts and not agent_alerts:
        return Text("No alert fired.", style="green")
    table = Table(box=None, pad_edge=False)
    for name in ("alert", "severity", "where", "fired at", "FVE", "id"):
        table.add_column(name, overflow="fold")
    for alert in (*alerts, *agent_alerts):
        table.add_row(
            escape(alert.rule_title),
            alert.severity.value,
            _PLACES.get(str(alert.group.get("phase")), "training"),
            "-" if alert.first_step is None or alert.agent is not None else f"step {alert.first_step}",
            "-" if alert.fve is None else f"{alert.fve:.2f}",
            alert.alert_id,
        )
    return table
