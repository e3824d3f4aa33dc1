"""``nla-monitor alerts``: what fired, one alert in full, and what a person makes of it."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from nla_monitor.cli.common import (
    DEFAULT_DATABASE,
    SEVERITY_STYLES,
    DatabaseOption,
    JsonOption,
    RunOption,
    age,
    console,
    cut,
    find_alert,
    find_run,
    opened,
    print_json,
    safe,
    short,
    since,
)
from nla_monitor.records import Alert, AlertState, Severity, TriageState

if TYPE_CHECKING:
    from rich.text import Text

app = typer.Typer(help="List, read and label alerts.", no_args_is_help=True)

AlertArgument = Annotated[str, typer.Argument(metavar="ID", help="Alert id, or the start or the end of it.")]


@app.command("list")
def list_alerts(
    database: DatabaseOption = DEFAULT_DATABASE,
    run: RunOption = None,
    state: Annotated[AlertState | None, typer.Option(help="Only in this state.")] = None,
    severity: Annotated[Severity | None, typer.Option(help="This severity or above.")] = None,
    rule: Annotated[str | None, typer.Option(metavar="ID", help="Only of this rule.")] = None,
    triage: Annotated[TriageState | None, typer.Option(help="Only with this label.")] = None,
    since_text: Annotated[
        str | None, typer.Option("--since", metavar="WHEN", help="Fired since: 2h, 7d, 2026-11-22T14:00.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """Show alerts, newest first."""
    moment = since(since_text)
    with opened(database) as repository:
        run_id = find_run(repository, run)
        alerts = repository.alerts(
            run_id, state=state, severity=severity, rule=rule, since=moment, triage=triage, limit=limit + 1
        )
    more, alerts = len(alerts) > limit, alerts[:limit]
    if as_json:
        print_json(alerts)
        return
    _print_alerts(alerts)
    if more:
        sys.stdout.write(f"There are more than {limit}; see --limit.\n")


@app.command()
def show(alert: AlertArgument, database: DatabaseOption = DEFAULT_DATABASE, as_json: JsonOption = False) -> None:
    """Show all that is known of one alert: what, how sure, where, and what to do."""
    from nla_monitor.cli.alert_page import Exhibit, print_page
    from nla_monitor.precision import precisions

    with opened(database) as repository:
        found = find_alert(repository, alert)
        run = repository.run(found.run_id)
        readings = repository.alert_readings(found.alert_id)
        labels = repository.labels(found.alert_id)
        known = precisions(repository.engine, rule_ids=[found.rule_id])
    precision = next((one for one in known if one.version == found.rule_version), None)
    if not as_json:
        print_page(console(), Exhibit(found, run.info if run else None, readings, labels, precision), database)
        return
    print_json(
        {
            "alert": found,
            "run": run.info if run else None,
            "labels": labels,
            "readings": [
                {
                    "sample_id": reading.sample_id,
                    "step": reading.sample.step,
                    "position": reading.sample.position,
                    "token_id": reading.sample.token_id,
                    "token_text": reading.sample.token_text,
                    "context": reading.sample.context,
                    "sequence_id": reading.sample.sequence_id,
                    "norm": reading.sample.norm,
                    "explanation": reading.explanation,
                    "fidelity": reading.fidelity,
                }
                for reading in readings
            ],
        }
    )


@app.command()
def label(
    alert: AlertArgument,
    verdict: Annotated[TriageState, typer.Argument(metavar="LABEL", help=", ".join(TriageState))],
    database: DatabaseOption = DEFAULT_DATABASE,
    who: Annotated[str | None, typer.Option(help="Who says so; your login name by default.")] = None,
    note: Annotated[str | None, typer.Option(help="Why.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what an alert was. Earlier labels are kept."""
    with opened(database, read_only=False) as repository:
        found = find_alert(repository, alert)
        labelled = repository.label(found.alert_id, verdict, who or _login(), note)
    if as_json:
        print_json(labelled)
        return
    sys.stdout.write(f"alert {short(labelled.alert_id)} ({labelled.rule_id}) is now labelled {labelled.triage.value}\n")


def _login() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no such user, as in some containers
        return "unknown"


def _print_alerts(alerts: Sequence[Alert]) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    if not alerts:
        out.print("No alerts.")
        return
    wide = out.width >= 90
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in ("severity", "state", "alert", *(("where", "fired") if wide else ()), "id"):
        table.add_column(name, no_wrap=name != "alert", ratio=1 if name == "alert" else None)
    for alert in alerts:
        severity = Text(alert.severity.value, style=SEVERITY_STYLES[alert.severity])
        state = Text(f"{alert.state.value}\n{alert.triage.value}", style="bold" if _needs_eyes(alert) else "dim")
        extra = (_where(alert), age(alert.fired_at)) if wide else ()
        table.add_row(severity, state, _told(alert, quote=160 if wide else 60), *extra, short(alert.alert_id))
    out.print(table)


def _needs_eyes(alert: Alert) -> bool:
    return alert.state is AlertState.FIRING and alert.triage is TriageState.OPEN


def _told(alert: Alert, quote: int) -> Text:
    from rich.text import Text

    from nla_monitor.evidence.promise import brief

    certainty = brief(alert.calibration)
    text = Text(safe(alert.rule_title, one_line=True), style="bold")
    if alert.quote:
        text.append(f"\n“{cut(alert.quote, quote)}”", style="not bold")
    text.append(f"\n{_fidelity(alert)}; {safe(certainty, one_line=True)}", style="not bold dim")
    return text


def _fidelity(alert: Alert) -> str:
    if alert.fve is None:
        return "no FVE" if alert.cosine is not None else "no fidelity"
    return f"FVE {alert.fve:.2f} ({safe(alert.denominator_name or 'unnamed denominator', one_line=True)})"


def _where(alert: Alert) -> str:
    if alert.agent is not None:
        return f"agent\nposition {alert.position}"
    return f"step {alert.first_step}\nposition {alert.position}" if alert.first_step is not None else "no step"
