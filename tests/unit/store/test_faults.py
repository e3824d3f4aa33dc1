"""Every driver exception becomes one of ours, with the database, the cause and a remedy."""

from __future__ import annotations

import sqlite3

import pytest
from sqlalchemy import exc
from sqlalchemy.engine import make_url

from nla_monitor.errors import ForeignDatabaseError, SchemaVersionError, StoreError, StoreUnavailableError
from nla_monitor.store.faults import mapped, shown, translate

URL = make_url("postgresql+psycopg://me:secret@host/db?password=secret2")


def _sqlite(name: str) -> exc.DBAPIError:
    error = sqlite3.OperationalError("what SQLite says")
    error.sqlite_errorname = name
    return exc.OperationalError("SELECT secret_content", {}, error)


class _ServerError(Exception):
    def __init__(self, state: str | None) -> None:
        super().__init__("what the server says\nmore of it")
        self.sqlstate = state


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("SQLITE_NOTADB", ForeignDatabaseError),
        ("SQLITE_CORRUPT_VTAB", ForeignDatabaseError),
        ("SQLITE_FULL", StoreUnavailableError),
        ("SQLITE_READONLY_DBMOVED", StoreUnavailableError),
        ("SQLITE_CANTOPEN_ISDIR", StoreUnavailableError),
        ("SQLITE_BUSY_SNAPSHOT", StoreUnavailableError),
        ("SQLITE_IOERR_FSYNC", StoreUnavailableError),
    ],
)
def test_sqlite_result_codes_become_ours(name: str, kind: type[StoreError]) -> None:
    assert type(translate(_sqlite(name), URL)) is kind


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("42P01", SchemaVersionError),
        ("53100", StoreUnavailableError),
        ("40P01", StoreUnavailableError),
        ("57P01", StoreUnavailableError),
        ("28P01", StoreUnavailableError),
        ("23505", StoreError),
        (None, StoreUnavailableError),
    ],
)
def test_sqlstates_become_ours(state: str | None, kind: type[StoreError]) -> None:
    error = exc.OperationalError("SELECT secret_content", {}, _ServerError(state))
    assert type(translate(error, URL)) is kind


def _subclasses(kind: type[BaseException]) -> set[type[BaseException]]:
    return {kind}.union(*(_subclasses(sub) for sub in kind.__subclasses__()))


def _made(kind: type[BaseException]) -> BaseException:
    if issubclass(kind, exc.DBAPIError):
        return kind("SELECT 1", {}, Exception("the driver's words"))
    if issubclass(kind, exc.StatementError):
        return kind("SQLAlchemy's words", "SELECT 1", {}, Exception("the driver's words"))
    return kind.__new__(kind)  # their constructors differ; their type is what counts


def test_no_exception_of_sqlalchemy_or_sqlite_gets_past_the_table() -> None:
    for kind in _subclasses(exc.SQLAlchemyError) | _subclasses(sqlite3.Error):
        error = _made(kind)
        with pytest.raises(StoreError), mapped(URL):
            raise error


def test_messages_name_the_database_and_the_cause_but_no_secret_and_no_statement() -> None:
    message = str(translate(exc.OperationalError("SELECT secret_content", {}, _ServerError("53100")), URL))
    assert "postgresql+psycopg://me:***@host/db" in message
    assert "what the server says" in message
    assert "secret" not in message
    assert "more of it" not in message


def test_shown_urls_hide_the_password() -> None:
    assert shown(URL) == "postgresql+psycopg://me:***@host/db"


def test_exceptions_of_the_caller_pass_unchanged() -> None:
    with pytest.raises(ZeroDivisionError), mapped(URL):
        _ = 1 / 0
