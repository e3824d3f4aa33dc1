"""A real Phoenix server, for the opt-in tier: PHOENIX_PYTHON names the interpreter of an environment with one.

``python -m venv phoenix && phoenix/bin/pip install arize-phoenix==20.26.1`` makes such an environment.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

VARIABLE = "PHOENIX_PYTHON"
START_SECONDS = 120.0


def interpreter() -> str:
    """The interpreter; without one the test is skipped."""
    found = os.environ.get(VARIABLE)
    if not found:
        pytest.skip(f"{VARIABLE} names no interpreter of an environment with Phoenix")
    return found


class Phoenix:
    """One server and its database, which outlives it.

    Args:
        folder: for its database and log.
        settings: further variables of its environment.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._settings = dict(settings or {})
        self._ports = _free(2)
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{self._ports[0]}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "PYTHON"))}
        environment |= {
            "PHOENIX_WORKING_DIR": str(self._folder),
            "PHOENIX_HOST": "127.0.0.1",
            "PHOENIX_PORT": str(self._ports[0]),
            "PHOENIX_GRPC_PORT": str(self._ports[1]),
            "PHOENIX_TELEMETRY_ENABLED": "false",
            **self._settings,
        }
        log = self._folder / "log"
        with log.open("ab") as output:
            command = [interpreter(), "-m", "phoenix.server.main", "serve"]
            self._process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                if httpx.get(f"{self.url}/v1/projects", timeout=2.0).status_code in (200, 401):
                    return
            except httpx.HTTPError:
                time.sleep(0.3)
        pytest.fail(f"Phoenix did not start: {log.read_text(errors='replace')[-3000:]}")

    def stop(self) -> None:
        """End it, with all its processes."""
        process, self._process = self._process, None
        if process is None:
            return
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)

    def spans(self, project: str) -> list[dict[str, Any]]:
        """All spans of a project."""
        return self._all(f"/v1/projects/{project}/spans", {"limit": 1000})

    def annotations(self, project: str, span_ids: list[str]) -> list[dict[str, Any]]:
        """Annotations on these spans."""
        return self._all(f"/v1/projects/{project}/span_annotations", {"limit": 1000, "span_ids": span_ids})

    def _all(self, path: str, query: dict[str, Any]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        cursor: str | None = None
        while True:
            answer = httpx.get(self.url + path, params=query | ({"cursor": cursor} if cursor else {}), timeout=30.0)
            if answer.status_code == 404:  # no span of the project has come yet
                return []
            page = answer.raise_for_status().json()
            found += page["data"]
            cursor = page.get("next_cursor")
            if cursor is None:
                return found


@contextmanager
def serving(folder: Path, settings: Mapping[str, str] | None = None) -> Iterator[Phoenix]:
    """A server that runs; ended at the end."""
    interpreter()
    server = Phoenix(folder, settings)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _free(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
