"""``nla-monitor db``: the database's schema, and forgetting old samples."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from nla_monitor.cli.common import (
    DEFAULT_DATABASE,
    DatabaseOption,
    JsonOption,
    database_url,
    moment,
    opened,
    print_json,
    require_file,
    since,
)
from nla_monitor.errors import ConfigError

app = typer.Typer(help="Create, upgrade, check and prune the database.", no_args_is_help=True)


@app.command()
def upgrade(
    database: DatabaseOption = DEFAULT_DATABASE,
    revision: Annotated[str, typer.Option(help="Schema revision to go to.")] = "head",
) -> None:
    """Create the tables, or bring them to this version's schema; the data stays."""
    from nla_monitor.store import session

    engine = session.open_engine(database_url(database))
    try:
        session.upgrade(engine, revision)
        sys.stdout.write(session.check(engine).message + "\n")
    finally:
        engine.dispose()


@app.command()
def downgrade(
    revision: Annotated[str, typer.Argument(help="Revision to go back to, or 'base': drops all our tables.")],
    database: DatabaseOption = DEFAULT_DATABASE,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: data of newer columns and tables is lost.")] = False,
) -> None:
    """Go back to an older schema. What only the newer one can hold is lost."""
    from nla_monitor.store import session

    url = database_url(database)
    require_file(url)
    if not yes:
        typer.confirm(f"Go back to revision {revision!r}? What only the newer schema holds is lost.", abort=True)
    engine = session.open_engine(url)
    try:
        session.downgrade(engine, revision)
        status = session.check(engine)
        sys.stdout.write(f"now at revision {status.current or 'base'} (this version needs {status.head})\n")
    finally:
        engine.dispose()


@app.command()
def check(database: DatabaseOption = DEFAULT_DATABASE, as_json: JsonOption = False) -> None:
    """Say whether the schema fits this version; exit 1 when it does not."""
    from nla_monitor.store import session

    url = database_url(database)
    require_file(url)
    engine = session.open_engine(url, read_only=True)
    try:
        status = session.check(engine)
    finally:
        engine.dispose()
    if as_json:
        print_json(status)
    else:
        sys.stdout.write(status.message + "\n")
    if not status.ok:
        raise typer.Exit(1)


@app.command()
def prune(
    before: Annotated[
        str, typer.Option("--older-than", metavar="AGE", help="Age (30d, 12h) or date (2026-11-22) of the limit.")
    ],
    database: DatabaseOption = DEFAULT_DATABASE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete old samples with their readings; what waits for a worker or an alert rests on is kept."""
    from nla_monitor.store.retention import prune as forget

    limit = since(before)
    if limit is None or limit > time.time():
        raise ConfigError(f"--older-than {before!r} lies in the future")
    with opened(database, read_only=dry_run) as repository:
        gone = forget(repository.engine, limit, dry_run=dry_run)
    if as_json:
        print_json({"before": limit, "dry_run": dry_run, "pruned": gone})
        return
    verb = "would be deleted" if dry_run else "deleted"
    sys.stdout.write(
        f"{gone.samples} samples, {gone.readings} readings, {gone.matches} matches, {gone.messages} messages of agents "
        f"and {gone.outbox} delivered notifications from before {moment(limit)} {verb}\n"
    )
