"""``nla-monitor demo``."""

from __future__ import annotations

import sys
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer


class StoryName(StrEnum):
    """The stories, by name."""

    DEFAULT = "default"
    PLAIN = "plain"
    PLANTED_THOUGHT = "planted-thought"
    BENIGN = "benign"


def demo(
    story: Annotated[StoryName, typer.Option(help="Which story to run.")] = StoryName.DEFAULT,
    seed: Annotated[int, typer.Option(min=0, help="Decides the data; the measured steps are fixed.")] = 0,
    database: Annotated[
        str,
        typer.Option(metavar="FILE", help="SQLite file (or sqlite:/// URL) that keeps it; a new run is added to it."),
    ] = "nla-monitor-demo.db",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON at the end; the show goes to stderr.")
    ] = False,
) -> None:
    """Run the whole chain on the bundled organism: offline, on a CPU, in under three minutes.

    Spans, events and metrics of both processes go where the OTEL_* variables say.
    """
    from rich.console import Console

    from nla_monitor.errors import MissingExtraError

    for package in ("accelerate", "langchain_core"):
        if find_spec(package) is None:
            raise MissingExtraError(package.replace("_", "-"), "demo", "the demo")

    from nla_monitor.cli.demo import runner
    from nla_monitor.cli.demo.view import View
    from nla_monitor.telemetry import sdk

    view = View(Console(stderr=as_json, highlight=False))
    file = _file(database)
    with sdk.configure("nla-monitor-demo", serve=False) as handle:
        summary = runner.run(story.value, seed, file, view, handle.telemetry())
    view.summary(summary)
    if as_json:
        sys.stdout.write(runner.as_json(summary) + "\n")


def _file(database: str) -> Path:
    """The SQLite file that is meant; other commands take URLs, so does this one."""
    from nla_monitor.errors import ConfigError

    name = database.removeprefix("sqlite:///")
    if not name or "://" in name:
        raise ConfigError(
            f"--database {database!r}: the demo keeps an SQLite file; name one, such as nla-monitor-demo.db"
        )
    return Path(name).resolve()
