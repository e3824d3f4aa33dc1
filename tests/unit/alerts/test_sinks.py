"""Alerts reach the log and a webhook, later if they can't now, and content stays home unless asked for."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nla_monitor.alerts.sinks import (
    FIRST_DELAY,
    LEAST_ATTEMPTS,
    LONGEST_DELAY,
    LONGEST_WAIT,
    DeliveryError,
    Drained,
    LogSink,
    WebhookSink,
    drain,
)
from nla_monitor.errors import ConfigError
from nla_monitor.records import Alert, AlertState, Severity
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
from nla_monitor.store.session import upgrade
from tests.store_support import alert, sample

SECRETS = ("special-case", "def test_")
"""Words of the quote, the explanation and the context of ``store_support.alert``."""


@dataclass
class Receiver:
    """A real HTTP server that answers as told."""

    url: str = ""
    status: int = 200
    silence: float = 0.0
    location: str = ""
    got: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    calls: int = 0


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    state = Receiver()
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.calls += 1
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if state.silence:
                over.wait(state.silence)
                return
            state.headers.append(dict(self.headers))
            if state.status == 200:
                state.got.append(json.loads(body))
            self.send_response(state.status)
            if state.location:
                self.send_header("Location", state.location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_GET(self) -> None:
            state.calls += 100
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- its name in the standard library
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/hook/secret-token"
    yield state
    over.set()
    server.shutdown()
    server.server_close()
    thread.join()


class Clock:
    """Unix seconds, set by the test."""

    def __init__(self) -> None:
        self.now = time.time() + 60

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def repository(clock: Clock) -> Iterator[Repository]:
    engine = open_engine("sqlite://", in_process=True)
    upgrade(engine)
    yield Repository(engine, clock)
    engine.dispose()


def fire(repository: Repository, *numbers: int) -> None:
    with repository.transaction() as tx:
        for number in numbers:
            tx.save_alert(alert(sample(number), fingerprint=str(number)), [], "fired")


class Fails:
    """A sink that fails so many times."""

    name = "fails"

    def __init__(self, times: int = 10**6, *, permanent: bool = False) -> None:
        self.times, self.permanent, self.calls = times, permanent, 0

    def send(self, kind: str, alert: Alert) -> None:
        self.calls += 1
        if self.calls <= self.times:
            raise DeliveryError("the cable is cut", permanent=self.permanent)


class Keeps:
    """A sink that keeps what it gets."""

    def __init__(self, name: str = "keeps") -> None:
        self.name = name
        self.got: list[tuple[str, str]] = []

    def send(self, kind: str, alert: Alert) -> None:
        self.got.append((kind, alert.fingerprint))


def test_a_webhook_gets_alertmanagers_shape(receiver: Receiver) -> None:
    one = alert(sample(3), fired_at=1_700_000_000.25)
    WebhookSink(receiver.url, external_url="https://monitor.example.org").send("fired", one)
    (body,) = receiver.got
    (item,) = body["alerts"]
    assert set(body) == {
        "version", "groupKey", "truncatedAlerts", "status", "receiver", "groupLabels", "commonLabels",
        "commonAnnotations", "externalURL", "alerts",
    }  # fmt: skip
    assert set(item) == {"status", "labels", "annotations", "startsAt", "endsAt", "generatorURL", "fingerprint"}
    assert (body["version"], body["status"], item["status"]) == ("4", "firing", "firing")
    assert (item["startsAt"], item["endsAt"]) == ("2023-11-14T22:13:20.250Z", "0001-01-01T00:00:00Z")
    assert item["labels"] == {
        "alertname": "NlaMonitorRuleFired",
        "rule": "hack",
        "severity": "high",
        "run": "run-1",
        "source": "agent",
    }
    assert item["annotations"]["fve"] == "0.75"
    assert item["annotations"]["fve_denominator"] == "held-out"
    assert item["annotations"]["calibration"] == "uncalibrated"
    assert item["annotations"]["runbook_url"] == "https://example.org/runbook"
    assert receiver.headers[0]["Content-Type"] == "application/json"


def test_a_resolved_alert_has_its_end(receiver: Receiver) -> None:
    one = alert(sample(3), state=AlertState.RESOLVED, resolved_at=1_700_000_060.0, agent=None)
    WebhookSink(receiver.url).send("resolved", one)
    (item,) = receiver.got[0]["alerts"]
    assert (item["status"], item["endsAt"], item["labels"]["source"]) == (
        "resolved",
        "2023-11-14T22:14:20.000Z",
        "train",
    )


def test_content_leaves_only_when_asked_for(receiver: Receiver) -> None:
    WebhookSink(receiver.url).send("fired", alert(sample(1)))
    assert not any(secret in json.dumps(receiver.got) for secret in SECRETS)
    WebhookSink(receiver.url, content=True).send("fired", alert(sample(1)))
    annotations = receiver.got[1]["commonAnnotations"]
    assert (annotations["quote"], annotations["context"]) == ("special-case the tests", "def test_")


@pytest.mark.parametrize(
    ("status", "permanent"),
    [(500, False), (429, False), (401, False), (404, False), (302, False), (400, True), (422, True)],
)
def test_refusals_say_whether_trying_again_helps(receiver: Receiver, status: int, permanent: bool) -> None:
    receiver.status, receiver.location = status, "/elsewhere" if status == 302 else ""
    with pytest.raises(DeliveryError, match=str(status)) as caught:
        WebhookSink(receiver.url).send("fired", alert(sample(1)))
    assert caught.value.permanent is permanent
    assert "secret-token" not in str(caught.value)
    assert receiver.calls == 1  # a redirect is not followed


def test_a_receiver_that_hangs_is_left_after_the_timeout(receiver: Receiver) -> None:
    receiver.silence = 30.0
    started = time.monotonic()
    with pytest.raises(DeliveryError, match="timed out"):
        WebhookSink(receiver.url, timeout=0.2).send("fired", alert(sample(1)))
    assert time.monotonic() - started < 5.0


def test_a_receiver_that_is_not_there_is_named_without_its_token() -> None:
    with pytest.raises(DeliveryError, match=r"http://127\.0\.0\.1:9: .*refused") as caught:
        WebhookSink("http://127.0.0.1:9/secret-token").send("fired", alert(sample(1)))
    assert not caught.value.permanent
    assert "secret" not in str(caught.value)


def test_a_password_in_the_url_becomes_a_header(receiver: Receiver) -> None:
    WebhookSink(receiver.url.replace("http://", "http://me:pass@")).send("fired", alert(sample(1)))
    assert receiver.headers[0]["Authorization"] == "Basic bWU6cGFzcw=="


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "example.org/hook", "http://", "http://[bad/x", "http://h:port/"]
)
def test_a_url_that_is_no_webhook_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"alerts\.webhook"):
        WebhookSink(url)


def test_the_log_says_what_fired_and_how_sure_but_not_the_quote(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nla_monitor.alerts")
    LogSink().send("fired", alert(sample(3)))
    LogSink(content=True).send("resolved", alert(sample(3)))
    first, second = caplog.records
    assert (first.levelno, second.levelno) == (logging.WARNING, logging.INFO)
    for words in (
        "fired",
        "[high]",
        "hack",
        "step 3",
        "position 13",
        "fve 0.750 (denominator held-out)",
        "uncalibrated",
    ):
        assert words in first.getMessage()
    assert not any(secret in first.getMessage() for secret in SECRETS)
    assert "quote 'special-case the tests'" in second.getMessage()


def test_quiet_severities_do_not_shout(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nla_monitor.alerts")
    LogSink().send("fired", alert(sample(3), severity=Severity.LOW, fve=None))
    assert caplog.records[0].levelno == logging.INFO
    assert "cosine 0.900" in caplog.records[0].getMessage()


def test_what_is_in_the_outbox_is_delivered_once_and_in_order(repository: Repository) -> None:
    fire(repository, 1, 2, 3)
    keeps = Keeps()
    assert drain(repository, [keeps]) == Drained(delivered=3)
    assert drain(repository, [keeps]) == Drained()
    assert keeps.got == [("fired", "1"), ("fired", "2"), ("fired", "3")]


def test_a_dead_receiver_costs_one_try_and_holds_up_nobody_else(repository: Repository, clock: Clock) -> None:
    fire(repository, 1, 2, 3)
    dead, keeps = Fails(), Keeps()
    assert drain(repository, [dead, keeps], clock=clock) == Drained(delayed=3)
    assert (dead.calls, len(keeps.got)) == (1, 3)
    assert drain(repository, [dead, keeps], clock=clock) == Drained()  # not before its time
    clock.now += FIRST_DELAY
    drain(repository, [dead, keeps], clock=clock)
    assert (dead.calls, len(keeps.got)) == (2, 3)
    assert repository.outbox_pending()[0].error == "fails: the cable is cut"


def test_a_sink_that_recovers_gets_everything_and_the_others_nothing_twice(
    repository: Repository, clock: Clock
) -> None:
    fire(repository, 1, 2)
    flaky, keeps = Fails(times=3), Keeps()
    for _ in range(10):
        drain(repository, [flaky, keeps], clock=clock)
        clock.now += LONGEST_DELAY
    assert repository.outbox_pending() == []
    assert flaky.calls == 3 + 2
    assert len(keeps.got) == 2


def test_retries_grow_slower_and_end(repository: Repository, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    fire(repository, 1)
    dead = Fails()
    waits: list[float] = []
    last = clock.now
    while repository.outbox_pending():
        before = dead.calls
        drain(repository, [dead], clock=clock)
        if dead.calls > before:
            waits.append(clock.now - last)
            last = clock.now
        clock.now += FIRST_DELAY if len(waits) < 10 else LONGEST_DELAY  # the longest is no multiple of a power of two
    assert waits[1:10] == [FIRST_DELAY * 2**n for n in range(9)]
    assert set(waits[10:]) <= {LONGEST_DELAY, 2 * LONGEST_DELAY}
    assert LONGEST_WAIT <= sum(waits) < LONGEST_WAIT + 2 * LONGEST_DELAY, "a day, as the runbooks say"
    assert repository.outbox_dead() == 1
    assert "is given up: fails: the cable is cut" in caplog.text


def test_a_refusal_for_good_is_given_up_at_once(repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
    fire(repository, 1)
    keeps = Keeps()
    assert drain(repository, [Fails(permanent=True), keeps]) == Drained(given_up=1)
    assert len(keeps.got) == 1
    assert "given up" in caplog.text


def test_a_refusal_for_good_is_remembered_while_another_sink_is_away(
    repository: Repository, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    fire(repository, 1)
    refuses, away = Fails(permanent=True), Fails(times=3)
    away.name = "away"
    told: list[tuple[str, str]] = []
    for _ in range(5):
        drain(repository, [refuses, away], clock=clock, tell=lambda *said: told.append(said))
        clock.now += LONGEST_DELAY
    assert (refuses.calls, away.calls) == (1, 4)
    assert told.count(("fails", "refused")) == 1
    assert (repository.outbox_pending(), repository.outbox_dead()) == ([], 1)
    assert "is given up: fails: refused for good" in caplog.text


def test_a_message_after_one_that_was_refused_is_told(repository: Repository, clock: Clock) -> None:
    """What a sink refused holds up nothing there, also while another sink still lacks it."""
    one = alert(sample(1), fingerprint="1")
    with repository.transaction() as tx:
        one = tx.save_alert(one, [], "fired")
    refuses, away = Fails(times=1, permanent=True), Fails()
    away.name = "away"
    drain(repository, [refuses, away], clock=clock)
    with repository.transaction() as tx:
        tx.save_alert(dataclasses.replace(one, state=AlertState.RESOLVED, resolved_at=1.0), [], "resolved")
    drain(repository, [refuses, away], clock=clock)
    assert refuses.calls == 2


def test_a_worker_whose_clock_is_hours_ahead_gives_up_nothing_that_is_new(repository: Repository, clock: Clock) -> None:
    fire(repository, 1)
    dead = Fails()
    clock.now += LONGEST_WAIT + 3600
    for _ in range(LEAST_ATTEMPTS - 1):
        assert drain(repository, [dead], clock=clock) == Drained(delayed=1)
        clock.now += LONGEST_DELAY
    assert dead.calls == LEAST_ATTEMPTS - 1


def test_sinks_that_are_slow_together_keep_the_message_from_other_workers(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nla_monitor.alerts.sinks.CLAIM_SECONDS", 1.0)
    engine = open_engine(store_url)
    repository = Repository(engine)
    fire(repository, 1)
    other = Keeps("other")

    class Slow:
        def __init__(self, name: str) -> None:
            self.name = name

        def send(self, kind: str, alert: Alert) -> None:
            time.sleep(0.6)
            drain(repository, [other])

    assert drain(repository, [Slow("one"), Slow("two")]) == Drained(delivered=1)
    assert other.got == []
    engine.dispose()


def test_without_sinks_the_outbox_empties(repository: Repository) -> None:
    fire(repository, 1)
    assert drain(repository, []) == Drained(delivered=1)


def test_one_pass_is_bounded(repository: Repository) -> None:
    fire(repository, *range(5))
    assert drain(repository, [Keeps()], limit=2) == Drained(delivered=2)
    assert len(repository.outbox_pending()) == 3


def test_the_whole_way_from_the_outbox_to_a_receiver_that_was_down(
    repository: Repository, clock: Clock, receiver: Receiver
) -> None:
    fire(repository, 1, 2)
    receiver.status = 500
    sinks = [LogSink(), WebhookSink(receiver.url)]
    assert drain(repository, sinks, clock=clock) == Drained(delayed=2)
    receiver.status = 200
    clock.now += FIRST_DELAY
    assert drain(repository, sinks, clock=clock) == Drained(delivered=2)
    assert {body["alerts"][0]["fingerprint"] for body in receiver.got} == {"1", "2"}
