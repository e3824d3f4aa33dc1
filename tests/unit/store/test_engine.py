"""Opening databases: what works, what is refused, and in which words."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import text

from nla_monitor.errors import ConfigError, ForeignDatabaseError, MissingExtraError, StoreUnavailableError
from nla_monitor.store.engine import open_engine, read, to_json, write


def test_sqlite_runs_in_wal_with_foreign_keys_and_a_patient_lock(sqlite_url: str) -> None:
    with read(open_engine(sqlite_url)) as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")
        }
    assert found == {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 1, "busy_timeout": 30000}


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_memory_is_refused_where_processes_must_share_it(url: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be shared.*worker\.mode: thread"):
        open_engine(url)


def test_memory_in_one_process_is_one_database_for_all_threads() -> None:
    engine = open_engine("sqlite://", in_process=True)
    with write(engine) as connection:
        connection.execute(text("CREATE TABLE counted (n INTEGER)"))

    def add() -> None:
        for _ in range(20):
            with write(engine) as connection:
                connection.execute(text("INSERT INTO counted VALUES (1)"))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with read(engine) as connection:
        assert connection.execute(text("SELECT count(*) FROM counted")).scalar() == 80
    engine.dispose()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql://root@host/db", "not supported"),
        ("nonsense://host/db", "unknown"),
        ("no url at all", "cannot be parsed"),
        ("postgresql://user:secret@host:port/db", "cannot be parsed"),
    ],
)
def test_a_url_that_names_no_usable_database_says_what_would(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        open_engine(url)
    assert "postgresql" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_foreign(tmp_path: Path) -> None:
    path = tmp_path / "notes.db"
    path.write_text("Dear diary, " * 200)
    with pytest.raises(ForeignDatabaseError, match="not an SQLite database; choose another path"):
        open_engine(f"sqlite:///{path}")
    assert path.read_text().startswith("Dear diary")


def test_a_damaged_database_is_foreign(tmp_path: Path) -> None:
    path = tmp_path / "damaged.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (x TEXT)")
        connection.executemany("INSERT INTO t VALUES (?)", [("x" * 500,)] * 200)
    connection.close()
    data = bytearray(path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(ForeignDatabaseError, match="damaged"):  # noqa: PT012 -- noticed at one of these
        engine = open_engine(f"sqlite:///{path}")
        with read(engine) as connection:
            connection.execute(text("SELECT count(x) FROM t WHERE x > ''")).all()


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError, match=r"absent/nla\.db.*folder exists"):
        open_engine(f"sqlite:///{tmp_path}/absent/nla.db")


def test_read_only_never_creates_the_file(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailableError):
        open_engine(f"sqlite:///{tmp_path}/absent.db", read_only=True)
    assert not (tmp_path / "absent.db").exists()


def test_writing_through_a_read_only_engine_says_read_only(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'a name with # and %.db'}"
    with write(open_engine(url)) as connection:
        connection.execute(text("CREATE TABLE t (x)"))
    engine = open_engine(url, read_only=True)
    with read(engine) as connection:
        assert connection.execute(text("SELECT count(*) FROM t")).scalar() == 0
    with pytest.raises(StoreUnavailableError, match="read-only"), write(engine) as connection:
        connection.execute(text("INSERT INTO t VALUES (1)"))


def test_a_file_without_write_permission_says_read_only() -> None:
    """Root may write everywhere, so that root's test looks with the eyes of another user."""
    script = """
import os, sys
from sqlalchemy import text
from nla_monitor.errors import StoreUnavailableError
from nla_monitor.store.engine import open_engine, read, write
url = f"sqlite:///{sys.argv[1]}/x.db"
engine = open_engine(url)
with write(engine) as connection:
    connection.execute(text("CREATE TABLE t (x)"))
engine.dispose()
os.chmod(f"{sys.argv[1]}/x.db", 0o444)
os.chmod(sys.argv[1], 0o555)
if os.geteuid() == 0:
    os.setuid(65534)
try:
    with write(open_engine(url)) as connection:
        connection.execute(text("INSERT INTO t VALUES (1)"))
except StoreUnavailableError as error:
    print("unavailable:", error)
"""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", script, folder], capture_output=True, text=True, check=True, timeout=60
        )
    assert done.stdout.startswith("unavailable:"), done.stdout + done.stderr


def test_a_full_database_says_full_and_keeps_nothing_of_the_transaction(sqlite_url: str) -> None:
    engine = open_engine(sqlite_url)
    with write(engine) as connection:
        connection.execute(text("CREATE TABLE t (x BLOB)"))
    with pytest.raises(StoreUnavailableError, match="full"), write(engine) as connection:  # noqa: PT012 -- the commit fails
        connection.exec_driver_sql("PRAGMA max_page_count=20")
        connection.exec_driver_sql("INSERT INTO t VALUES (1)")
        connection.exec_driver_sql("INSERT INTO t VALUES (zeroblob(1000000))")
    with read(engine) as connection:
        assert connection.execute(text("SELECT count(*) FROM t")).scalar() == 0


def test_a_real_full_disk_is_unavailable_too(tmp_path: Path) -> None:
    """The kernel refuses to let the files grow (``RLIMIT_FSIZE``), as a full disk or quota does."""
    script = """
import resource, signal, sys
from sqlalchemy import text
from nla_monitor.errors import StoreUnavailableError
from nla_monitor.store.engine import open_engine, write
engine = open_engine(f"sqlite:///{sys.argv[1]}/x.db")
with write(engine) as connection:
    connection.execute(text("CREATE TABLE t (x BLOB)"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    with write(engine) as connection:
        connection.execute(text("INSERT INTO t VALUES (zeroblob(1000000))"))
except StoreUnavailableError as error:
    print("unavailable:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.startswith("unavailable:"), done.stdout + done.stderr


def test_a_lock_held_for_too_long_says_so(sqlite_url: str) -> None:
    engine = open_engine(sqlite_url)
    holder = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailableError, match="held its lock"), engine.connect() as plain:  # noqa: PT012 -- one connection
        plain.connection.cursor().execute("PRAGMA busy_timeout=50")
        plain.close()  # the pool's only connection is the impatient one now
        with write(engine):
            pass
    holder.close()
    engine.dispose()


def test_a_write_transaction_has_the_lock_from_its_start(sqlite_url: str) -> None:
    """Read, then write: two such transactions at once take turns instead of failing half-way."""
    engine = open_engine(sqlite_url)
    with write(engine) as connection:
        connection.execute(text("CREATE TABLE t (n INTEGER)"))
        connection.execute(text("INSERT INTO t VALUES (0)"))

    def add() -> None:
        for _ in range(25):
            with write(engine) as connection:
                n = connection.execute(text("SELECT n FROM t")).scalar_one()
                connection.execute(text("UPDATE t SET n = :n"), {"n": n + 1})

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with read(engine) as connection:
        assert connection.execute(text("SELECT n FROM t")).scalar() == 100


def test_a_block_that_fails_is_undone_and_its_error_goes_through(sqlite_url: str) -> None:
    engine = open_engine(sqlite_url)
    with write(engine) as connection:
        connection.execute(text("CREATE TABLE t (n INTEGER)"))
    with pytest.raises(KeyError, match="mine"), write(engine) as connection:  # noqa: PT012 -- a write, then the error
        connection.execute(text("INSERT INTO t VALUES (1)"))
        raise KeyError("mine")
    with read(engine) as connection:
        assert connection.execute(text("SELECT count(*) FROM t")).scalar() == 0


def test_a_server_that_is_not_there_is_unavailable_and_its_password_is_not_shown(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    url = "postgresql://user:hunter2@127.0.0.1:9/nla?sslpassword=hunter3"
    with pytest.raises(StoreUnavailableError, match=r"postgresql\+psycopg://user:\*\*\*@127\.0\.0\.1:9/nla") as caught:
        open_engine(url)
    for secret in ("hunter2", "hunter3"):
        assert secret not in str(caught.value)
        assert secret not in caplog.text


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"nla-monitor\[postgres\]"):
        open_engine("postgresql://user@host/nla")


def test_a_forked_child_does_not_touch_the_parents_connections(sqlite_url: str) -> None:
    engine = open_engine(sqlite_url)
    with write(engine) as connection:
        connection.execute(text("CREATE TABLE t (n INTEGER)"))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with write(engine) as connection:
                connection.execute(text("INSERT INTO t VALUES (1)"))
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with read(engine) as connection:
        assert connection.execute(text("SELECT count(*) FROM t")).scalar() == 1


def test_json_stays_json_whatever_a_metric_holds() -> None:
    assert to_json({"loss": float("nan"), "list": [float("inf"), 1.5], "text": "ü"}) == (
        '{"loss": "nan", "list": ["inf", 1.5], "text": "ü"}'
    )


@pytest.mark.services
def test_postgresql_serves_the_same_way(postgres_url: str) -> None:
    engine = open_engine(postgres_url)
    with write(engine) as connection:
        connection.execute(text("CREATE TABLE t (n INTEGER PRIMARY KEY)"))
    reader = open_engine(postgres_url, read_only=True)
    with pytest.raises(StoreUnavailableError, match="read-only"), write(reader) as connection:
        connection.execute(text("INSERT INTO t VALUES (1)"))
    reader.dispose()
    engine.dispose()


@pytest.mark.services
def test_a_database_that_does_not_exist_on_the_server_says_so(postgres_server: str) -> None:
    with pytest.raises(StoreUnavailableError, match="does not exist"):
        open_engine(postgres_server.replace("///", "///nobody_made_this"))


@pytest.mark.services
def test_a_connection_that_the_server_cut_is_unavailable_and_the_next_one_works(postgres_url: str) -> None:
    engine = open_engine(postgres_url)
    with pytest.raises(StoreUnavailableError), write(engine) as connection:  # noqa: PT012 -- cut on the way
        pid = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        other = open_engine(postgres_url)
        with write(other) as killer:
            killer.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        other.dispose()
        time.sleep(0.1)
        connection.execute(text("SELECT 1"))
    with read(engine) as connection:
        assert connection.execute(text("SELECT 1")).scalar() == 1
    engine.dispose()
