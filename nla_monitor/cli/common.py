"""What commands share: the database option, opening the store, output for people and for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TextIO, cast

import typer

from nla_monitor.errors import ConfigError, StoreUnavailableError
from nla_monitor.records import Alert, Severity

if TYPE_CHECKING:
    from rich.console import Console

    from nla_monitor.store.repository import Repository

DATABASE_VARIABLE: Final = "NLA_MONITOR_DATABASE"
DEFAULT_DATABASE: Final = "sqlite:///nla-monitor.db"

DatabaseOption = Annotated[
    str,
    typer.Option(
        "--database",
        envvar=DATABASE_VARIABLE,
        metavar="URL",
        help="Database: an SQLite file or a SQLAlchemy URL.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, nothing else.")]
RunOption = Annotated[str | None, typer.Option("--run", metavar="ID", help="Only this run (id or the start of it).")]

SEVERITY_STYLES: Final = {
    Severity.INFO: "blue",
    Severity.LOW: "cyan",
    Severity.MEDIUM: "yellow",
    Severity.HIGH: "red",
    Severity.CRITICAL: "bold white on red",
}

_SPANS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_UNIQUE_TAIL: Final = 12
# Control characters could move the cursor or recolour the terminal; bidirectional ones could reorder what is read.
_UNSAFE: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_TRAILING: Final = re.compile(r"[ \t]+(?=\n)")
_PIPED_WIDTH: Final = 120


# -- the store ----------------------------------------------------------------------------------------------------


def database_url(text: str) -> str:
    """A URL from what the user gave: a URL, or the path of an SQLite file."""
    return text if "://" in text else f"sqlite:///{text}"


@contextmanager
def opened(database: str, *, read_only: bool = True) -> Iterator[Repository]:
    """The repository of an existing database whose schema fits; nothing is created.

    Raises:
        StoreUnavailableError: there is no such file, or it cannot be opened.
        SchemaVersionError: its schema is older or newer than this package.
    """
    from nla_monitor.store.repository import Repository
    from nla_monitor.store.session import open_engine, require

    url = database_url(database)
    require_file(url)
    engine = open_engine(url, read_only=read_only)
    try:
        require(engine)
        yield Repository(engine)
    finally:
        engine.dispose()


def sqlite_file(url: str) -> Path | None:
    """The file behind an SQLite URL; None for other databases."""
    path = url.partition("?")[0].removeprefix("sqlite:///")
    return Path(path) if url.startswith("sqlite:///") else None


def require_file(url: str) -> None:
    """Refuse a database file that is not there, instead of making an empty one."""
    file = sqlite_file(url)
    if file is not None and not file.exists():
        raise StoreUnavailableError(
            f"there is no database {str(file)!r}. A monitored run creates it (or: nla-monitor demo, nla-monitor db "
            f"upgrade); name another one with --database or {DATABASE_VARIABLE}"
        )


def find_run(repository: Repository, text: str | None) -> str | None:
    """The full id of the run meant by ``text``: its id, the start or the end of it, or its name.

    Raises:
        ConfigError: no run, or several, are meant.
    """
    if text is None:
        return None
    if repository.run(text) is not None:
        return text
    runs = [run.info for run in repository.runs(limit=100_000)]
    found = [info.run_id for info in runs if info.run_id.startswith(text) or info.run_id.endswith(text)]
    found = found or [info.run_id for info in runs if info.name == text]
    known = ", ".join(f"{info.run_id} ({info.name})" for info in runs[:5]) or "none"
    return _only(found, f"run {text!r}", f"the newest runs: {safe(known, one_line=True)}")


def find_alert(repository: Repository, text: str) -> Alert:
    """The alert meant by ``text``: its id, or the start or the end of it.

    Raises:
        ConfigError: no alert, or several, are meant.
    """
    alerts = {alert.alert_id: alert for alert in repository.alerts(limit=100_000)}
    found = [key for key in alerts if key == text or key.startswith(text) or key.endswith(text)] if text else []
    return alerts[_only(found, f"alert {text!r}", "see: nla-monitor alerts list")]


def _only(found: list[str], what: str, remedy: str) -> str:
    if not found:
        raise ConfigError(f"there is no {what}; {remedy}")
    if len(found) > 1:
        raise ConfigError(f"{what} may be any of {', '.join(found[:6])}; give more of the id")
    return found[0]


def short(identifier: str) -> str:
    """The end of an id: the start of a UUIDv7 is the time, which neighbours share."""
    return identifier[-_UNIQUE_TAIL:]


# -- output -------------------------------------------------------------------------------------------------------


def console(*, stderr: bool = False) -> Console:
    """A console that colours only a terminal, and gives a pipe room instead of 80 columns."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    plain: dict[str, Any] = {"highlight": False, "emoji": False, "markup": False}
    if stream.isatty():
        return Console(stderr=stderr, **plain)
    width = None if os.environ.get("COLUMNS") else _PIPED_WIDTH
    return Console(file=cast("TextIO", _Trimmed(stream)), width=width, **plain)


class _Trimmed:
    """A stream without the blanks with which tables fill their lines: they would be noise in a file or a mail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write without blanks at line ends."""
        self._stream.write(_TRAILING.sub("", text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_json(value: object) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(jsonable(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def jsonable(value: Any) -> Any:
    """Records, mappings and sequences as plain JSON values; a number that JSON has no word for becomes null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: jsonable(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return str(value)


def safe(text: str, *, one_line: bool = False) -> str:
    """Text of a model or a user without characters that could act on the terminal; they are shown as escapes."""
    text = _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
    return " ".join(text.split()) if one_line else text


def cut(text: str, length: int) -> str:
    """At most ``length`` characters on one line."""
    text = safe(text, one_line=True)
    return text if len(text) <= length else text[: length - 1] + "…"


def moment(seconds: float) -> str:
    """Unix seconds as local time with its offset."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


def age(seconds: float) -> str:
    """How long ago, in one unit."""
    passed = max(0.0, time.time() - seconds)
    unit = next((unit for unit in ("w", "d", "h", "m") if passed >= 2 * _SPANS[unit]), "s")
    return f"{passed / _SPANS[unit]:.0f}{unit} ago"


def since(text: str | None) -> float | None:
    """Unix seconds of ``2h`` (ago), ``2026-11-22`` or ``2026-11-22T14:00``.

    Raises:
        ConfigError: none of these.
    """
    if text is None:
        return None
    span = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if span:
        return time.time() - float(span[1]) * _SPANS[span[2]]
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except ValueError as error:
        raise ConfigError(f"--since {text!r}: give a span (90s, 30m, 2h, 7d) or a date (2026-11-22T14:00)") from error


def fidelity_text(cosine: float | None, fve: float | None, denominator: str | None) -> str:
    """Fidelity as it must always be told: FVE with the name of its denominator."""
    if cosine is None:
        return "no fidelity (no AR configured)"
    if fve is None:
        return f"cosine {cosine:.2f}, no FVE (no denominator known)"
    return f"FVE {fve:.2f} (denominator: {safe(denominator or 'unnamed', one_line=True)}), cosine {cosine:.2f}"
