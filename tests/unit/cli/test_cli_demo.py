"""Where the demo keeps its database, and where its telemetry goes: as with every other command."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from typer.testing import CliRunner

from nla_monitor.cli.app import app
from nla_monitor.cli.demo import runner
from nla_monitor.cli.demo_command import _file
from nla_monitor.errors import ConfigError
from tests.otlp_receiver import receiver


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


def test_its_telemetry_goes_where_the_environment_says_also_when_it_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the port for Prometheus is left to its worker, and nothing becomes global."""
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    before = trace.get_tracer_provider()

    def failing(*arguments: Any) -> None:
        with arguments[-1].capture_span([]):
            raise ConfigError("as bad as it gets")

    monkeypatch.setattr(runner, "run", failing)
    with receiver() as found, socket.create_server(("localhost", 0)) as taken:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        monkeypatch.setenv("OTEL_METRICS_EXPORTER", "prometheus")
        monkeypatch.setenv("OTEL_EXPORTER_PROMETHEUS_PORT", str(taken.getsockname()[1]))
        done = CliRunner().invoke(app, ["demo", "--database", str(tmp_path / "d.db")])
    assert done.exit_code == 2
    assert "as bad as it gets" in done.output
    assert [span.name for span in found.spans] == ["nla_monitor.capture"]
    assert [resource["service.name"] for resource in found.resources] == ["nla-monitor-demo"]
    assert trace.get_tracer_provider() is before
