"""``nla-monitor report``: one run, summed up."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from nla_monitor.cli.common import DEFAULT_DATABASE, DatabaseOption, RunOption, find_run, opened
from nla_monitor.errors import ConfigError

_SUFFIXES: Final = {".html": "html", ".htm": "html", ".md": "markdown", ".json": "json", ".txt": "text"}


def report(
    database: DatabaseOption = DEFAULT_DATABASE,
    run: RunOption = None,
    how: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="text, markdown, html or json; by default as FILE is named."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, metavar="FILE", help="Write it there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Same as --format json.")] = False,
) -> None:
    """Sum up a run (the newest by default): samples, drops, fidelity, match rates by step, alerts."""
    from nla_monitor.report import Format, build_report, render

    named = how or ("json" if as_json else _SUFFIXES.get(output.suffix.lower()) if output else None) or "text"
    if named not in set(Format):
        raise ConfigError(f"--format {named!r}: valid are {', '.join(Format)}")
    with opened(database) as repository:
        text = render(build_report(repository, find_run(repository, run)), Format(named))
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {output}: {error.strerror or error}") from error
    sys.stderr.write(f"report written to {output}\n")
