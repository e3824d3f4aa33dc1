"""``nla-monitor report``: one run, one conversation, or what all of a run's conversations said and thought."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from nla_monitor.cli.common import DEFAULT_DATABASE, DatabaseOption, RunOption, find_run, opened
from nla_monitor.errors import ConfigError

if TYPE_CHECKING:
    from nla_monitor.report import Format
    from nla_monitor.store.repository import Repository

_SUFFIXES: Final = {".html": "html", ".htm": "html", ".md": "markdown", ".json": "json", ".txt": "text"}


def report(
    database: DatabaseOption = DEFAULT_DATABASE,
    run: RunOption = None,
    conversation: Annotated[
        str | None,
        typer.Option("--conversation", metavar="ID", help="This conversation: its transcript with findings in place."),
    ] = None,
    conversations: Annotated[
        bool,
        typer.Option("--conversations", help="All conversations of the run: what they said, and what they thought."),
    ] = False,
    said: Annotated[
        list[str] | None,
        typer.Option("--said", metavar="RULES", help="Rules 'said-ID' of your own, for visible text: file or folder."),
    ] = None,
    how: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="text, markdown, html or json; by default as FILE is named."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", dir_okay=False, metavar="FILE", help="Write it there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Same as --format json.")] = False,
) -> None:
    """Sum up a run (the newest by default): samples, drops, fidelity, match rates by step, alerts.

    With --conversation: the transcript of one, with its findings in place.
    """
    from nla_monitor.report import Format

    named = how or ("json" if as_json else _SUFFIXES.get(output.suffix.lower()) if output else None) or "text"
    if named not in set(Format):
        raise ConfigError(f"--format {named!r}: valid are {', '.join(Format)}")
    if conversation is not None and conversations:
        raise ConfigError("--conversation and --conversations are both given; use one of them")
    with opened(database) as repository:
        chosen = find_run(repository, run)
        if conversation is not None or conversations:
            text = _conversations(repository, chosen, conversation, said or [], Format(named))
        elif said:
            raise ConfigError("--said is for --conversation and --conversations")
        else:
            text = _run(repository, chosen, Format(named))
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {output}: {error.strerror or error}") from error
    sys.stderr.write(f"report written to {output}\n")


def _run(repository: Repository, run: str | None, how: Format) -> str:
    from nla_monitor.report import build_report, render

    return render(build_report(repository, run), how)


def _conversations(repository: Repository, run: str | None, name: str | None, said: list[str], how: Format) -> str:
    from nla_monitor.conversation_page import render
    from nla_monitor.conversations import build_conversation, said_and_thought

    if name is None:
        return render(said_and_thought(repository, run, companions=said), how)
    return render(build_conversation(repository, name, run, companions=said), how)
