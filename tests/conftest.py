"""What every test gets: strict guards, a clean environment, one torch thread; and databases for those that ask."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REQUIRE_SERVICES = "NLA_MONITOR_REQUIRE_SERVICES"

# Two cores are shared by everything; also inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure(config: pytest.Config) -> None:
    """Before anything of ours is imported: no setting of the caller's shell, and guards that re-raise."""
    for name in [name for name in os.environ if name.startswith("NLA_MONITOR_") and name != REQUIRE_SERVICES]:
        del os.environ[name]
    os.environ["NLA_MONITOR_STRICT"] = "1"


@pytest.fixture(autouse=True)
def _strict_and_modest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("NLA_MONITOR_STRICT", "1")
    torch = sys.modules.get("torch")  # only where a test has imported it
    if torch is not None and hasattr(torch, "set_num_threads"):
        torch.set_num_threads(1)
    yield
    # Connections that a test left open would be reported in whichever test runs when they are collected.
    engine = sys.modules.get("nla_monitor.store.engine")
    for opened in list(engine._ENGINES) if engine is not None else ():
        opened.dispose()


def missing_service(reason: str) -> None:
    """Skip a test whose server is not installed; fail it where services are required (CI)."""
    if os.environ.get(REQUIRE_SERVICES, "") not in ("", "0"):
        pytest.fail(f"{reason}, and {REQUIRE_SERVICES} is set")
    pytest.skip(reason)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """URL of an SQLite file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'nla.db'}"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL (without database) of a PostgreSQL server of this test session, on a Unix socket, from Debian's binaries."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not folders:
        missing_service("PostgreSQL is not installed (apt-get install postgresql)")
    server = _PostgresServer(folders[-1])
    try:
        server.start()
        yield server.url
    finally:
        server.stop()


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """URL of a fresh, empty PostgreSQL database."""
    with _database(postgres_server) as url:
        yield url


@pytest.fixture(scope="session")
def _postgres_store(postgres_server: str) -> Iterator[str]:
    """A PostgreSQL database with our tables, shared by the session's tests."""
    with _database(postgres_server) as url:
        _upgrade(url)
        yield url


@pytest.fixture(scope="session")
def _sqlite_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with our tables, to be copied."""
    path = tmp_path_factory.mktemp("store") / "template.db"
    _upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def empty_url(request: pytest.FixtureRequest) -> str:
    """URL of a database without any table, once on SQLite and once on PostgreSQL."""
    url: str = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    return url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database with our tables, all empty, once on SQLite and once on PostgreSQL."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("_sqlite_store"), tmp_path / "nla.db")
        return f"sqlite:///{tmp_path / 'nla.db'}"
    url: str = request.getfixturevalue("_postgres_store")
    _truncate(url)
    return url


@contextmanager
def _database(server: str) -> Iterator[str]:
    psycopg = pytest.importorskip("psycopg")
    name = f"nla_{os.getpid()}_{os.urandom(4).hex()}"
    maintenance = server.replace("+psycopg", "").replace("///", "///postgres")
    with psycopg.connect(maintenance, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
        yield server.replace("///", f"///{name}")
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


def _upgrade(url: str) -> None:
    from nla_monitor.store.session import open_engine, upgrade

    engine = open_engine(url)
    upgrade(engine)
    engine.dispose()


def _truncate(url: str) -> None:
    from nla_monitor.store.engine import open_engine, write
    from nla_monitor.store.models import Base

    engine = open_engine(url)
    with write(engine) as connection:
        connection.exec_driver_sql(f"TRUNCATE {', '.join(Base.metadata.tables)} RESTART IDENTITY")
    engine.dispose()


class _PostgresServer:
    """A throwaway cluster. PostgreSQL refuses to run as root, so that root hands it to the user ``postgres``."""

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        # Not under pytest's folder: socket paths are limited to about 100 characters, and postgres must be let in.
        self._folder = Path(tempfile.mkdtemp(prefix="nlapg"))
        self._prefix: list[str] = []
        if os.geteuid() == 0:
            shutil.chown(self._folder, "postgres", "postgres")
            self._prefix = ["runuser", "-u", "postgres", "--"]
        self.url = f"postgresql+psycopg:///?host={self._folder}&user=nla"

    def start(self) -> None:
        data = self._folder / "data"
        self._run("initdb", "-D", str(data), "-U", "nla", "-A", "trust", "-E", "UTF8", "--no-sync", "--locale=C.UTF-8")
        options = f"-k {self._folder} -c listen_addresses='' -c fsync=off -c max_connections=50"
        self._run("pg_ctl", "-D", str(data), "-l", str(self._folder / "log"), "-o", options, "-w", "start")

    def stop(self) -> None:
        if (self._folder / "data" / "postmaster.pid").exists():
            self._run("pg_ctl", "-D", str(self._folder / "data"), "-m", "immediate", "-w", "stop")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, binary: str, *arguments: str) -> None:
        command = [*self._prefix, str(self._binaries / binary), *arguments]
        done = subprocess.run(
            command, cwd="/", check=False, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if done.returncode:
            raise RuntimeError(f"{binary} failed: {done.stdout.decode(errors='replace')}")
