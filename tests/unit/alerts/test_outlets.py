"""Alertmanager by its API, and services by Apprise: what is posted, when again, and that no secret comes out."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_monitor.alerts.alertmanager import RESEND, AlertmanagerSink
from nla_monitor.alerts.notify import AppriseSink
from nla_monitor.alerts.sinks import DeliveryError, Drained, drain
from nla_monitor.config import load_config
from nla_monitor.errors import ConfigError, MissingExtraError
from nla_monitor.monitor import Monitor
from nla_monitor.outlets import Reminder, sinks_of
from nla_monitor.records import Alert, TriageState
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
from nla_monitor.store.session import upgrade
from tests.store_support import alert, sample

NOW = 1_700_000_000.0
HOSTILE = st.text(min_size=1, max_size=20).map(lambda text: text * 600) | st.sampled_from(
    ['"quoted"', "a\nb", "🙈", "x" * 10_000]
)


@dataclass
class Server:
    """A real HTTP server that keeps what it gets, and answers as told."""

    url: str = ""
    status: int = 200
    got: list[tuple[str, Any]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.got.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.send_response(state.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- its name in the standard library
            """Quiet."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{listening.server_port}"
    yield state
    listening.shutdown()
    listening.server_close()
    thread.join()


@pytest.fixture
def repository() -> Iterator[Repository]:
    engine = open_engine("sqlite://", in_process=True)
    upgrade(engine)
    yield Repository(engine)
    engine.dispose()


def fire(repository: Repository, *numbers: int) -> list[Alert]:
    with repository.transaction() as tx:
        return [tx.save_alert(alert(sample(number), fingerprint=str(number)), [], "fired") for number in numbers]


@settings(max_examples=30, deadline=None)
@given(run=HOSTILE, title=HOSTILE)
def test_whatever_stands_in_an_alert_is_posted_in_bounds(run: str, title: str) -> None:
    sink = AlertmanagerSink("http://localhost:1", clock=lambda: NOW)
    posted = sink._posted(alert(sample(1), run_id=run, rule_title=title), NOW)
    assert all(0 < len(value) <= 256 for value in posted["labels"].values())
    assert all(0 < len(value) <= 4096 for value in posted["annotations"].values())
    assert json.loads(json.dumps(posted)) == posted


def test_what_fires_is_posted_again_from_the_store_until_a_person_has_decided(
    repository: Repository, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    fire(repository, 1, 2)
    now = [0.0]
    reminder = Reminder(repository, [AlertmanagerSink(server.url)], clock=lambda: now[0])
    reminder.tick()
    reminder.tick()
    assert [len(body) for _, body in server.got] == [2]
    mistaken = repository.alerts()[0]
    repository.label(mistaken.alert_id, TriageState.FALSE_POSITIVE, "me")
    now[0] += RESEND
    reminder.tick()
    assert [len(body) for _, body in server.got] == [2, 1]
    server.status = 503
    for _ in range(3):
        now[0] += RESEND
        reminder.tick()
    assert len([record for record in caplog.records if "not reminded" in record.message]) == 1
    assert Reminder(repository, []).tick() is None


def test_all_that_fires_is_posted_again_however_many_a_person_has_decided(
    repository: Repository, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nla_monitor.outlets._MANY", 3)
    for number in range(10):
        fire(repository, number)
    mistaken = repository.alerts(limit=4)
    for one in mistaken:
        repository.label(one.alert_id, TriageState.BENIGN, "me")
    Reminder(repository, [AlertmanagerSink(server.url)]).tick()
    assert [len(body) for _, body in server.got] == [3, 3]
    posted = {one["labels"]["fingerprint"] for _, body in server.got for one in body}
    assert posted == {str(number) for number in range(10)} - {one.fingerprint for one in mistaken}
    server.got.clear()
    server.status = 503
    Reminder(repository, [AlertmanagerSink(server.url)]).tick()
    assert len(server.got) <= 1, "one that is away is not asked for the rest"


@pytest.mark.parametrize(
    ("status", "given_up", "delayed"), [(400, 1, 0), (413, 1, 0), (401, 0, 1), (404, 0, 1), (500, 0, 1)]
)
def test_a_refusal_is_given_up_or_tried_again(
    repository: Repository, server: Server, status: int, given_up: int, delayed: int
) -> None:
    fire(repository, 1)
    server.status = status
    assert drain(repository, [AlertmanagerSink(server.url)]) == Drained(given_up=given_up, delayed=delayed)


def test_a_rule_that_names_no_webhook_leaves_the_machine_by_none_of_them(
    repository: Repository, server: Server
) -> None:
    fire(repository, 1)
    sinks = sinks_of(load_config({"alerts": {"webhook": server.url, "alertmanager": [server.url]}}))
    assert drain(repository, sinks, responses={"hack": ["log"]}) == Drained(delivered=1)
    assert server.got == []


def test_a_service_gets_the_facts_and_no_content(server: Server) -> None:
    pytest.importorskip("apprise")
    sink = AppriseSink(server.url.replace("http://", "json://") + "/token-abc")
    sink.send("fired", alert(sample(3)))
    AppriseSink(server.url.replace("http://", "json://"), content=True).send("fired", alert(sample(3)))
    (path, first), (_, second) = server.got
    assert path == "/token-abc"
    assert (first["title"], first["type"]) == ("[high] Plans to hack [conditio]", "failure")
    assert first["message"].startswith("fired: rule hack, run run-1\n")
    assert "calibration: uncalibrated" in first["message"]
    assert "special-case" not in json.dumps(first)
    assert "special-case" in second["message"]


def test_a_service_that_refuses_or_is_away_is_told_without_its_url(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("apprise")
    caplog.set_level(logging.DEBUG)
    server.status = 500
    for url in (
        server.url.replace("http://", "json://me:secret-pw@") + "/secret-token",
        "json://127.0.0.1:9/secret-token",
    ):
        with pytest.raises(DeliveryError) as caught:
            AppriseSink(url).send("fired", alert(sample(3)))
        assert "secret" not in str(caught.value)
        assert not caught.value.permanent
    assert "secret" not in caplog.text
    logging.getLogger("apprise").warning("of somebody else")
    assert "of somebody else" in caplog.text


def test_a_url_of_no_service_is_refused_without_being_repeated(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("apprise")
    for url in ("nosuchservice://secret-token", "slack://secret-token", "secret-token"):
        with pytest.raises(ConfigError, match=r"alerts\.notify\[0\]") as caught:
            sinks_of(load_config({"alerts": {"notify": [url]}}))
        assert "secret" not in str(caught.value)
    assert "secret" not in caplog.text


def test_without_apprise_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "apprise", None)
    with pytest.raises(MissingExtraError, match=r"nla-monitor\[notify\]"):
        AppriseSink("json://localhost")


def test_the_urls_are_not_stored_with_the_run(tmp_path: Path, server: Server) -> None:
    pytest.importorskip("apprise")
    from nla_monitor.organism import load_target

    alerts = {
        "webhook": server.url + "/secret-1",
        "alertmanager": [server.url + "/secret-2"],
        "notify": [server.url.replace("http://", "json://") + "/secret-3"],
    }
    model, tokenizer = load_target("planted")
    config = {"database": str(tmp_path / "m.db"), "worker": {"mode": "external"}, "alerts": alerts}
    with Monitor(config).attach(model, tokenizer) as monitor:
        run = monitor.repository.run(monitor.run_id)
    assert run is not None
    assert run.info.config
    for file in tmp_path.iterdir():
        assert b"secret-" not in file.read_bytes()
