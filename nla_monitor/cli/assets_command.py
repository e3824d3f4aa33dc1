"""``nla-monitor assets``: rules, dashboards, examples and runbooks for the tools around the monitor."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from nla_monitor.cli.common import JsonOption, print_json

app = typer.Typer(help="Write what Prometheus, Alertmanager, Grafana and a container stack need.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """What is written for other tools, and its pages to read."""


@app.command()
def write(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; made if it is missing.")],
    force: Annotated[bool, typer.Option("--force", help="Also overwrite files that were changed since.")] = False,
    runbooks: Annotated[
        str | None,
        typer.Option("--runbooks-url", metavar="URL", help="Where you serve the runbooks, for the links in alerts."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write rules and their tests, examples, dashboards, a compose file and runbooks; again changes nothing."""
    from nla_monitor import assets

    done = assets.write(folder, force=force, runbooks=runbooks)
    if as_json:
        print_json({"folder": str(folder), "files": done})
        return
    for one in done:
        if one.outcome != "unchanged":
            sys.stdout.write(f"{one.outcome:9}  {folder / one.path}\n")
    counts = Counter(one.outcome for one in done)
    sys.stdout.write(", ".join(f"{counts[word]} {word}" for word in ("written", "updated", "unchanged")) + "\n")
    if runbooks is None:
        sys.stderr.write(
            f"alerts name their runbook as a path below {folder}/prometheus, which no chat or pager can open: serve "
            "that folder and give --runbooks-url URL, or let people read it with nla-monitor assets runbook ALERT\n"
        )


@app.command()
def runbook(alert: Annotated[str, typer.Argument(metavar="ALERT", help="Its name, such as NlaMonitorLag.")]) -> None:
    """Print the page about an alert: what it means, how sure, what to check, how to silence, how to label."""
    from nla_monitor import assets

    sys.stdout.write(assets.runbook(alert))
