"""Bringing a database to this package's schema: check, upgrade, downgrade, and what happens at first use.

One transaction under one lock does a whole upgrade, so that eight processes may ask for it at once and a failure leaves
the database as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine, inspect, text

from nla_monitor.errors import ForeignDatabaseError, SchemaVersionError, StoreError
from nla_monitor.store.engine import is_sqlite, open_engine, read, write
from nla_monitor.store.faults import shown
from nla_monitor.store.models import OURS, PREFIX, VERSION_TABLE

__all__ = ["SchemaStatus", "check", "downgrade", "open_engine", "prepare", "read", "require", "upgrade", "write"]

_LOCK: Final = 0x6E6C61_6D6F6E  # "nlamon": PostgreSQL's advisory lock of a schema change
_UPGRADE: Final = "run: nla-monitor db upgrade"


@dataclass(frozen=True, slots=True)
class SchemaStatus:
    """What ``check`` found."""

    current: str | None
    """The database's revision; None when it has no tables of ours."""
    head: str
    """The revision that this package needs."""
    ok: bool
    message: str
    """What is the case and, if not ok, what helps."""
    newer: bool = False
    """The database was written by a newer version of this package."""
    strangers: tuple[str, ...] = ()
    """Tables that are not ours."""


def check(engine: Engine) -> SchemaStatus:
    """Compare the database's schema with this package's, without changing anything.

    Raises:
        ForeignDatabaseError: the file is no database, damaged, or its ``nla_`` tables are somebody else's.
        StoreUnavailableError: it can't be read.
    """
    with read(engine) as connection:
        return _status(connection)


def require(engine: Engine) -> None:
    """Go on only with a schema that fits.

    Raises:
        SchemaVersionError: it is missing, older or newer; the message says what to do.
    """
    status = check(engine)
    if not status.ok:
        raise SchemaVersionError(f"database {shown(engine.url)}: {status.message}")


def prepare(engine: Engine) -> None:
    """First use: an SQLite file is created or upgraded; a server's database is only checked.

    Raises:
        SchemaVersionError: the schema is newer, or a server's database needs ``nla-monitor db upgrade``.
        ForeignDatabaseError: the SQLite file belongs to something else (``db upgrade`` adds our tables).
        StoreUnavailableError: it can't be read or written.
    """
    status = check(engine)
    if status.ok:
        return
    if not is_sqlite(engine.url) or status.newer:
        raise SchemaVersionError(f"database {shown(engine.url)}: {status.message}")
    if status.current is None and status.strangers:
        raise ForeignDatabaseError(
            f"database {shown(engine.url)} holds tables of something else ({', '.join(status.strangers[:5])}); choose "
            "another file, or, if both shall share it, run: nla-monitor db upgrade"
        )
    upgrade(engine)


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the schema to ``revision``; nothing happens when it is there already.

    Raises:
        SchemaVersionError: the database is newer than this package, or there is no such revision.
        ForeignDatabaseError: its ``nla_`` tables are somebody else's.
        StoreUnavailableError: read-only, full, locked or unreachable; the schema is as it was.
    """
    with _schema_change(engine) as connection:
        status = _status(connection)
        if status.newer:
            raise SchemaVersionError(f"database {shown(engine.url)}: {status.message}")
        if not (status.ok and revision == "head"):
            command.upgrade(_config(connection), revision)


def downgrade(engine: Engine, revision: str) -> None:
    """Take the schema back to ``revision`` (``base``: no tables of ours, and none of their data).

    Raises:
        SchemaVersionError: the database is newer than this package, or there is no such revision.
        StoreUnavailableError: read-only, full, locked or unreachable; the schema is as it was.
    """
    with _schema_change(engine) as connection:
        status = _status(connection)
        if status.newer:
            raise SchemaVersionError(f"database {shown(engine.url)}: {status.message}")
        command.downgrade(_config(connection), revision)


@contextmanager
def _schema_change(engine: Engine) -> Iterator[Connection]:
    """A write transaction that no other schema change runs beside.

    Foreign keys are off meanwhile: SQLite changes a table by rebuilding it, and dropping the old copy would delete
    whatever refers to it. References are verified before the commit instead.
    """
    try:
        with write(engine, foreign_keys=False) as connection:
            if not is_sqlite(engine.url):
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            yield connection
            _verify_references(connection)
    except CommandError as error:
        raise SchemaVersionError(f"database {shown(engine.url)}: {error}") from error


def _verify_references(connection: Connection) -> None:
    if not is_sqlite(connection.engine.url):
        return
    broken = [row for row in connection.exec_driver_sql("PRAGMA foreign_key_check").all() if row[0] in OURS]
    if broken:
        raise StoreError(
            f"the migration left {len(broken)} rows without what they refer to (first: {broken[0]}); it was undone"
        )


def _status(connection: Connection) -> SchemaStatus:
    names = set(inspect(connection).get_table_names())
    strangers = tuple(sorted(names - OURS))
    head = _script().get_current_head() or "base"
    current = _current(connection) if VERSION_TABLE in names else None
    if current is None:
        foreign = sorted(name for name in names - {VERSION_TABLE} if name.startswith(PREFIX))
        if foreign:
            raise ForeignDatabaseError(
                f"database {shown(connection.engine.url)} has tables {', '.join(foreign[:5])} but no revision in "
                f"{VERSION_TABLE}: they are not ours, or an upgrade was made by hand; choose another database"
            )
        return SchemaStatus(
            None, head, ok=False, message=f"it has no tables of ours yet; {_UPGRADE}", strangers=strangers
        )
    if current == head:
        return SchemaStatus(current, head, ok=True, message=f"up to date (revision {head})", strangers=strangers)
    if current not in _known_revisions():
        message = (
            f"its schema (revision {current}) is newer than this package's ({head}); upgrade the package nla-monitor"
        )
        return SchemaStatus(current, head, ok=False, message=message, newer=True, strangers=strangers)
    message = f"its schema (revision {current}) is older than this package's ({head}); {_UPGRADE}"
    return SchemaStatus(current, head, ok=False, message=message, strangers=strangers)


def _current(connection: Connection) -> str | None:
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    return context.get_current_revision()


def migrations_folder() -> Path:
    """Where the migrations lie: inside the installed package, or in the repository of an editable install.

    Raises:
        StoreError: they are in neither place (a broken installation).
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_migrations", package.parent / "migrations"):
        if (folder / "env.py").is_file():
            return folder
    raise StoreError(f"the migrations are missing beside {package}; install nla-monitor again")


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    return config


def _script() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _known_revisions() -> frozenset[str]:
    return frozenset(script.revision for script in _script().walk_revisions())
