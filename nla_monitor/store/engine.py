"""Opening a database, and the two ways to talk to it: ``read`` and ``write``.

SQLite: WAL, ``synchronous=NORMAL`` (a power cut may lose the last commits, a killed process none), foreign keys on, a
lock is awaited for 30 seconds, and a write transaction takes its lock at the start (``BEGIN IMMEDIATE``), so that
reading and then writing can't collide half-way.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sqlite3
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from sqlalchemy import Connection, Engine, QueuePool, create_engine, event, exc, text
from sqlalchemy.engine import URL, make_url

from nla_monitor.errors import ConfigError, MissingExtraError, StoreUnavailableError
from nla_monitor.store.faults import mapped, shown
from nla_monitor.untraced import untraced

logger = logging.getLogger("nla_monitor.store")

BUSY_SECONDS: Final = 30.0
_WRITE: Final = "nla_write"
_DRIVERS: Final = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}


def open_engine(url: str | URL, *, read_only: bool = False, in_process: bool = False) -> Engine:
    """An engine on ``url``, with one connection made to see that it works.

    Args:
        url: SQLAlchemy URL; ``sqlite:///file.db`` or ``postgresql://user@host/database`` (psycopg).
        read_only: never write, and never create the file.
        in_process: every user of the database is a thread of this process, so that ``sqlite://`` (in memory) works.

    Raises:
        ConfigError: the URL is malformed, names an unknown kind of database, or memory that processes cannot share.
        MissingExtraError: the driver is not installed.
        ForeignDatabaseError: the file is no database, or damaged.
        StoreUnavailableError: the database can't be opened or reached.
    """
    parsed = _parse(url)
    engine = _sqlite(parsed, read_only, in_process) if is_sqlite(parsed) else _server(parsed, read_only)
    _ENGINES.add(engine)
    try:
        with untraced(), mapped(parsed), engine.connect() as connection:
            # Reads a page: a file that is no database is only noticed then.
            connection.execute(text("SELECT 1 FROM sqlite_master" if is_sqlite(parsed) else "SELECT 1")).all()
    except BaseException:
        engine.dispose()
        raise
    return engine


def is_sqlite(url: URL) -> bool:
    """Whether the URL names an SQLite database."""
    return url.get_backend_name() == "sqlite"


def in_memory(url: URL) -> bool:
    """Whether the URL names a database that lives in this process only."""
    return is_sqlite(url) and (url.database in (None, "", ":memory:") or url.query.get("mode") == "memory")


@contextmanager
def read(engine: Engine) -> Iterator[Connection]:
    """A connection for reading, in one consistent transaction; driver exceptions become ours."""
    with untraced(), mapped(engine.url), engine.connect() as connection, connection.begin():
        yield connection


@contextmanager
def write(engine: Engine, *, foreign_keys: bool = True) -> Iterator[Connection]:
    """A write transaction: committed at the end, rolled back on any exception; driver exceptions become ours.

    Args:
        engine: from ``open_engine``.
        foreign_keys: False lets SQLite rebuild tables in this transaction; for schema changes only.
    """
    with untraced(), mapped(engine.url), engine.connect() as plain, _foreign_keys(plain, foreign_keys):
        connection = plain.execution_options(**{_WRITE: True})
        with connection.begin():
            yield connection


@contextmanager
def _foreign_keys(connection: Connection, enabled: bool) -> Iterator[None]:
    if enabled or not is_sqlite(connection.engine.url):
        yield
        return
    # SQLite ignores this switch inside a transaction, so that it is thrown on the bare connection.
    raw = connection.connection.cursor()
    raw.execute("PRAGMA foreign_keys=OFF")
    try:
        yield
    finally:
        raw.execute("PRAGMA foreign_keys=ON")
        raw.close()


def _parse(url: str | URL) -> URL:
    try:
        parsed = make_url(url)
        backend = parsed.drivername
        parsed = parsed.set(drivername=_DRIVERS.get(backend, backend))
        parsed.get_dialect()
    except exc.NoSuchModuleError as error:
        raise ConfigError(
            f"database kind {parsed.drivername!r} is unknown; use sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        ) from error
    except (exc.ArgumentError, ValueError) as error:
        # The text may hold a password: it is not repeated.
        raise ConfigError(
            "the database URL cannot be parsed; use sqlite:///FILE or postgresql://USER@HOST/DATABASE"
        ) from error
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(f"database kind {parsed.drivername!r} is not supported; use sqlite or postgresql")
    return parsed


def _sqlite(url: URL, read_only: bool, in_process: bool) -> Engine:
    arguments: dict[str, Any] = {"timeout": BUSY_SECONDS}
    if url.database and Path(url.database).is_dir():
        raise StoreUnavailableError(f"database {shown(url)} is a folder; name a file")
    if in_memory(url):
        if not in_process:
            raise ConfigError(
                "an in-memory SQLite database cannot be shared with the worker's process; "
                "name a file (sqlite:///nla-monitor.db) or run the worker as a thread (worker.mode: thread)"
            )
        # One connection, lent to one thread at a time: it *is* the database, and transactions must not mix.
        arguments["check_same_thread"] = False
        engine = _create(url, arguments, poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=BUSY_SECONDS)
    elif read_only:
        query = {**url.query, "mode": "ro", "uri": "true"} | _unchanging(Path(url.database or ""))
        engine = _create(url.set(database=f"file:{quote(url.database or '')}", query=query), arguments)
    else:
        engine = _create(url, arguments)
    _listen(engine, read_only)
    return engine


def _unchanging(file: Path) -> dict[str, str]:
    """What lets a database on a read-only medium be read: in WAL mode SQLite would want to write beside it."""
    wal = file.with_name(f"{file.name}-wal")
    return {} if os.access(file.parent, os.W_OK) or wal.exists() else {"immutable": "1"}


def _server(url: URL, read_only: bool) -> Engine:
    options = {"postgresql_readonly": True} if read_only else {}
    return _create(url, {"connect_timeout": 10}, pool_pre_ping=True, execution_options=options)


def _create(url: URL, arguments: dict[str, Any], **options: Any) -> Engine:
    try:
        return create_engine(url, connect_args=arguments, hide_parameters=True, json_serializer=to_json, **options)
    except ImportError as error:
        raise MissingExtraError(error.name or "psycopg", "postgres", f"the database {shown(url)}") from error


def to_json(value: object) -> str:
    """Strict JSON: NaN and infinities, which no database takes, become their names."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False, default=str)
    except ValueError:
        return json.dumps(_named(value), allow_nan=False, ensure_ascii=False, default=str)


def _named(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _named(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_named(item) for item in value]
    return value


def _listen(engine: Engine, read_only: bool) -> None:
    @event.listens_for(engine, "connect")
    def _connected(connection: sqlite3.Connection, _record: object) -> None:
        # The driver's own transaction handling is off; ``_begin`` says which BEGIN is meant.
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA synchronous=NORMAL")
        if not read_only:
            _enter_wal(connection, shown(engine.url))

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        immediate = connection.get_execution_options().get(_WRITE, False) and not read_only
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")


def _enter_wal(connection: sqlite3.Connection, name: str) -> None:
    """Switch to WAL once per file. SQLite does not wait for the lock here, so that several first users must retry."""
    deadline = time.monotonic() + BUSY_SECONDS
    while connection.execute("PRAGMA journal_mode").fetchone()[0] not in ("wal", "memory"):
        try:
            mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
            if not busy or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
            continue
        if mode != "wal":
            logger.warning("database %s stays in journal mode %s: WAL is not possible there", name, mode)
            return


_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


def _forget_connections() -> None:
    """After a fork the child must not use (nor close) the parent's connections."""
    for engine in list(_ENGINES):
        engine.dispose(close=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_connections)
