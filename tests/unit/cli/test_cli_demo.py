"""Where the demo keeps its database: the same words as with every other command."""

from __future__ import annotations

from pathlib import Path

import pytest

from nla_monitor.cli.demo_command import _file
from nla_monitor.errors import ConfigError


@pytest.mark.parametrize("prefix", ["", "sqlite:///"])
def test_a_file_or_an_sqlite_url_names_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _file(f"{prefix}demo.db") == tmp_path / "demo.db"
    assert _file(f"{prefix}{tmp_path}/demo.db") == tmp_path / "demo.db"


@pytest.mark.parametrize("database", ["postgresql+psycopg://host/name", "sqlite:///", ""])
def test_what_is_no_sqlite_file_is_refused_with_the_remedy(database: str) -> None:
    with pytest.raises(ConfigError, match=r"the demo keeps an SQLite file; name one"):
        _file(database)
