"""The one place where exceptions of SQLAlchemy and its drivers become ours.

SQLite names its faults by extended result code (``SQLITE_FULL``), PostgreSQL by SQLSTATE (``53100``). What is not in a
table is a plain ``StoreError``: never a driver's exception.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy import exc
from sqlalchemy.engine import URL

from nla_monitor.errors import ForeignDatabaseError, SchemaVersionError, StoreError, StoreUnavailableError

FROM_SQLITE: Final[tuple[tuple[str, type[StoreError], str], ...]] = (
    ("SQLITE_NOTADB", ForeignDatabaseError, "the file is not an SQLite database; choose another path"),
    ("SQLITE_CORRUPT", ForeignDatabaseError, "the file is damaged; restore it from a backup or move it away"),
    ("SQLITE_FULL", StoreUnavailableError, "the disk (or the database's page limit) is full; free some space"),
    ("SQLITE_READONLY", StoreUnavailableError, "it is read-only; check the permissions of the file and its folder"),
    ("SQLITE_CANTOPEN", StoreUnavailableError, "it cannot be opened; check that the folder exists and is writable"),
    ("SQLITE_BUSY", StoreUnavailableError, "another process has held its lock for too long; find it or try again"),
    ("SQLITE_LOCKED", StoreUnavailableError, "another connection has held its lock for too long; try again"),
    ("SQLITE_IOERR", StoreUnavailableError, "reading or writing the file failed; check the disk (and avoid NFS)"),
    ("SQLITE_PERM", StoreUnavailableError, "access was refused; check the permissions of the file"),
    ("SQLITE_AUTH", StoreUnavailableError, "access was refused"),
    ("SQLITE_NOMEM", StoreUnavailableError, "there is not enough memory"),
    ("SQLITE_PROTOCOL", StoreUnavailableError, "its locking protocol failed; try again (and avoid NFS)"),
    ("SQLITE_INTERRUPT", StoreUnavailableError, "the statement was interrupted; try again"),
    ("SQLITE_TOOBIG", StoreError, "a value is larger than SQLite allows"),
    ("SQLITE_CONSTRAINT", StoreError, "a row contradicts another one"),
)
"""Prefix of the result code, our error, what it means and what helps."""

FROM_POSTGRESQL: Final[tuple[tuple[str, type[StoreError], str], ...]] = (
    ("42P01", SchemaVersionError, "a table is missing; run: nla-monitor db upgrade"),
    ("42703", SchemaVersionError, "a column is missing; run: nla-monitor db upgrade"),
    ("25006", StoreUnavailableError, "it is read-only (a standby?)"),
    ("55P03", StoreUnavailableError, "a lock was not to be had; try again"),
    ("3D000", StoreUnavailableError, "this database does not exist on the server; create it first"),
    ("42501", StoreUnavailableError, "the user lacks a privilege"),
    ("08", StoreUnavailableError, "the connection failed"),
    ("28", StoreUnavailableError, "the server refused the user or password"),
    ("40", StoreUnavailableError, "the transaction collided with another one; try again"),
    ("53", StoreUnavailableError, "the server lacks disk, memory or connections"),
    ("57", StoreUnavailableError, "the server is stopping or cancelled the statement; try again"),
    ("58", StoreUnavailableError, "the server's system failed"),
    ("XX", ForeignDatabaseError, "the server says that its data is damaged"),
    ("23", StoreError, "a row contradicts another one"),
)
"""Prefix of the SQLSTATE, our error, what it means and what helps."""

FROM_SQLALCHEMY: Final[tuple[tuple[type[exc.SQLAlchemyError], type[StoreError], str], ...]] = (
    (exc.TimeoutError, StoreUnavailableError, "no connection became free in time"),
    (exc.DisconnectionError, StoreUnavailableError, "the connection was lost"),
    (exc.IntegrityError, StoreError, "a row contradicts another one"),
    (exc.OperationalError, StoreUnavailableError, "it cannot be reached or used"),
    (exc.InterfaceError, StoreUnavailableError, "the connection failed"),
    (exc.SQLAlchemyError, StoreError, "the statement failed"),
)
"""What remains, most special first."""


def shown(url: URL) -> str:
    """A URL for messages and logs: without password, and without query parameters (they may hold secrets too)."""
    return url.set(query={}).render_as_string(hide_password=True)


def translate(error: BaseException, url: URL) -> StoreError:
    """Our error for an exception of SQLAlchemy or a driver, naming the database, the cause and the remedy."""
    driver = getattr(error, "orig", None) or error
    kind, meaning = _classify(error, driver)
    return kind(f"database {shown(url)}: {meaning} ({_first_line(driver)})")


def _classify(error: BaseException, driver: BaseException) -> tuple[type[StoreError], str]:
    code = getattr(driver, "sqlite_errorname", None)
    if code is not None:
        for prefix, kind, meaning in FROM_SQLITE:
            if code.startswith(prefix):
                return kind, meaning
        if "no such table" in str(driver) or "no such column" in str(driver):
            return SchemaVersionError, "its schema is not this version's; run: nla-monitor db upgrade"
    state = getattr(driver, "sqlstate", None)
    if state is not None:
        for prefix, kind, meaning in FROM_POSTGRESQL:
            if state.startswith(prefix):
                return kind, meaning
    for source, kind, meaning in FROM_SQLALCHEMY:
        if isinstance(error, source):
            return kind, meaning
    return StoreError, "the driver failed"


def _first_line(error: BaseException) -> str:
    # The driver's words only: SQLAlchemy's own text repeats the statement.
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def mapped(url: URL) -> Iterator[None]:
    """Run a block that talks to the database; only errors of ours leave it (besides the caller's own)."""
    try:
        yield
    except (exc.SQLAlchemyError, sqlite3.Error) as error:
        raise translate(error, url) from error
