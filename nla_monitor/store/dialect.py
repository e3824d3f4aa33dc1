"""The few statements that SQLite and PostgreSQL spell differently."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection, Select, text
from sqlalchemy.dialects import postgresql, sqlite

from nla_monitor.store.models import Base, table

Query = TypeVar("Query", bound="Select[*tuple[Any, ...]]")


def is_postgresql(connection: Connection) -> bool:
    """Whether the connection leads to PostgreSQL."""
    return connection.dialect.name == "postgresql"


def upsert(connection: Connection, model: type[Base]) -> sqlite.Insert | postgresql.Insert:
    """An ``INSERT`` into ``model`` that knows ``on_conflict_do_nothing`` and ``on_conflict_do_update``."""
    return postgresql.insert(model) if is_postgresql(connection) else sqlite.insert(model)


def insert_new(connection: Connection, model: type[Base], rows: Sequence[dict[str, Any]]) -> int:
    """Insert those rows whose key is not there yet; returns how many."""
    if not rows:
        return 0
    # RETURNING, because drivers disagree on what the row count of many inserts is.
    key = table(model).primary_key.columns
    statement = upsert(connection, model).on_conflict_do_nothing().returning(*key)
    return len(connection.execute(statement, list(rows)).all())


def locked(connection: Connection, query: Query, *, skip: bool = False) -> Query:
    """``query`` with its rows locked until the transaction ends (SQLite's write transaction holds the whole file).

    Args:
        connection: in the transaction.
        query: on one table.
        skip: leave out rows that somebody else holds, instead of waiting for them.
    """
    return query.with_for_update(skip_locked=skip) if is_postgresql(connection) else query


def server_time(connection: Connection) -> float:
    """Unix seconds by the database server's clock, which all workers share; SQLite's users share one machine's clock.

    A database in WAL mode cannot be used from two machines (https://sqlite.org/wal.html), so that this holds there.
    """
    if not is_postgresql(connection):
        return time.time()
    return float(connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())


def serialize(connection: Connection, names: Iterable[str]) -> None:
    """Let one transaction at a time work on each name (SQLite has one writer anyway)."""
    if is_postgresql(connection):
        for name in sorted(set(names)):  # one order for everybody: no deadlock
            connection.execute(
                text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": f"nla:{name}"}
            )
