"""Findings as feedback on runs, through the real LangSmith client against a server of ours."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from langsmith import Client

from nla_monitor.errors import ConfigError
from nla_monitor.feedback import Feedback
from nla_monitor.records import Severity
from nla_monitor.store.engine import open_engine
from tests.gate_support import Desk


@pytest.fixture
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    (tmp_path / "desk.db").write_bytes(request.getfixturevalue("_sqlite_store").read_bytes())
    engine = open_engine(f"sqlite:///{tmp_path / 'desk.db'}")
    yield Desk(engine)
    engine.dispose()


class Given:
    """Keeps what it is given; fails as often as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.calls: list[tuple[Any, str, dict[str, Any]]] = []
        self.failures = failures

    def __call__(self, run_id: Any, key: str, **rest: Any) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no network")
        self.calls.append((run_id, key, rest))


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 10.0
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_each_run_with_a_match_gets_it_once(desk: Desk) -> None:
    given = Given()
    fired = desk.found(desk.sampled(call="run-a"), desk.sampled(call="run-b"))
    desk.read(desk.sampled(call="run-c"))
    with Feedback(desk, given, interval_seconds=0.02) as feedback:
        wait_for(lambda: len(given.calls) == 2)
        desk.joined(
            fired.__class__(**{**_fields(fired), "updated_at": fired.updated_at + 1}), desk.sampled(call="run-d")
        )
        wait_for(lambda: len(given.calls) == 3)
        time.sleep(0.1)
    assert sorted(run for run, _, _ in given.calls) == ["run-a", "run-b", "run-d"]
    _, key, rest = given.calls[0]
    assert key == "nla_monitor.hack"
    assert (rest["score"], rest["value"], rest["extra"]) == (0.75, "high", {"nla_monitor_alert": fired.alert_id})
    assert fired.quote not in rest["comment"]
    assert feedback.stats.given == 3


def _fields(alert: Any) -> dict[str, Any]:
    return {name: getattr(alert, name) for name in alert.__slots__}


def test_words_leave_only_where_it_is_switched_on_and_severity_narrows(desk: Desk) -> None:
    given = Given()
    fired = desk.found(desk.sampled(call="run-a"), severity=Severity.CRITICAL)
    desk.found(desk.sampled(call="run-b"), rule="tone", severity=Severity.LOW)
    Feedback(desk, given, severity="high", content=True, interval_seconds=30.0).close()
    ((run, _, rest),) = given.calls
    assert run == "run-a"
    assert fired.quote in rest["comment"]


@pytest.mark.parametrize(("failures", "given", "failed"), [(2, 1, 0), (9, 0, 1)])
def test_what_fails_is_tried_again_and_then_counted(
    desk: Desk, failures: int, given: int, failed: int, caplog: pytest.LogCaptureFixture
) -> None:
    taker = Given(failures)
    desk.found(desk.sampled(call="run-a"))
    with Feedback(desk, taker, interval_seconds=0.02) as feedback:
        wait_for(lambda: feedback.stats.given + feedback.stats.failed)
    assert (feedback.stats.given, feedback.stats.failed) == (given, failed)
    assert sum("could not be given" in record.message for record in caplog.records) == 1


def test_a_client_that_hangs_holds_nobody_up(desk: Desk) -> None:
    release = threading.Event()
    desk.found(desk.sampled(call="run-a"))
    feedback = Feedback(desk, lambda *_, **__: release.wait(30), interval_seconds=0.01)
    time.sleep(0.1)
    started = time.monotonic()
    feedback.close(0.2)
    assert time.monotonic() - started < 2.0
    release.set()


def test_a_severity_that_is_none_is_refused(desk: Desk) -> None:
    with pytest.raises(ConfigError, match="valid are info"):
        Feedback(desk, Given(), severity="hot")


class Server(BaseHTTPRequestHandler):
    bodies: list[dict[str, Any]] = []  # noqa: RUF012 -- one server a test

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        """Silent."""


def test_langsmiths_own_client_takes_it(desk: Desk) -> None:
    Server.bodies.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = Client(api_url=f"http://127.0.0.1:{server.server_port}", api_key="none", auto_batch_tracing=False, info={})
    run = str(uuid.uuid4())
    fired = desk.found(desk.sampled(call=run))
    create = partial(client.create_feedback, session_id=uuid.uuid4(), start_time=datetime.now(UTC))
    feedback = Feedback(desk, create, interval_seconds=30.0)
    feedback.close()
    server.shutdown()
    server.server_close()
    (body,) = Server.bodies
    assert (body["run_id"], body["key"], body["value"]) == (run, "nla_monitor.hack", "high")
    assert body["score"] == 0.75
    assert fired.alert_id in body["comment"]
    assert feedback.stats.failed == 0
