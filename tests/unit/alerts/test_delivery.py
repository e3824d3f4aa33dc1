"""Receivers that refuse, drip, hang, have another clock or are told twice: in order, bounded, and no secret is said."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_monitor.alerts import notify, webhook
from nla_monitor.alerts.alertmanager import AlertmanagerSink
from nla_monitor.alerts.notify import AppriseSink
from nla_monitor.alerts.sinks import (
    CLAIM_SECONDS,
    HELD_DELAY,
    LAST_RESORT,
    LEAST_ATTEMPTS,
    LONGEST_DELAY,
    DeliveryError,
    Drained,
    LogSink,
    WebhookSink,
    drain,
)
from nla_monitor.alerts.webhook import rfc3339
from nla_monitor.config import load_config
from nla_monitor.errors import ConfigError
from nla_monitor.outlets import Reminder
from nla_monitor.records import Alert, AlertState
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
from tests.receiver_support import Receiver, receiver
from tests.store_support import alert, sample

NOW = 1_700_000_000.0
SECRET = "s3cr3t"  # noqa: S105 -- stands for one
WEIRD = st.sampled_from(
    ['a "quoted" one', "two\nlines\r\n", "🙈" * 50, "x" * 10_000, "\x00\x07", "{{ $labels }}", "' OR 1=1--"]
)


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
def repository(clock: Clock, store_url: str) -> Iterator[Repository]:
    engine = open_engine(store_url)
    yield Repository(engine, clock)
    engine.dispose()


@pytest.fixture
def server() -> Iterator[Receiver]:
    with receiver() as state:
        yield state


def fire(repository: Repository, *numbers: int) -> list[Alert]:
    with repository.transaction() as tx:
        return [tx.save_alert(alert(sample(number), fingerprint=str(number)), [], "fired") for number in numbers]


def resolve(repository: Repository, one: Alert) -> None:
    with repository.transaction() as tx:
        tx.save_alert(dataclasses.replace(one, state=AlertState.RESOLVED, resolved_at=NOW), [], "resolved")


def statuses(server: Receiver) -> list[str]:
    return [body["status"] for _, body in server.got]


# -- order and bounds ---------------------------------------------------------------------------------------------


def test_a_receiver_that_was_away_hears_fired_before_resolved(
    repository: Repository, clock: Clock, server: Receiver
) -> None:
    """Else it would show an alert that nobody ever ends."""
    (one,) = fire(repository, 1)
    server.answer = lambda _body: 503
    sink = WebhookSink(server.url)
    drain(repository, [sink], clock=clock)
    server.answer = lambda _body: 200
    server.got.clear()
    resolve(repository, one)
    assert drain(repository, [sink], clock=clock) == Drained(delayed=1), "the first is not due yet"
    assert server.got == []
    again = alert(sample(2), fingerprint="1")
    with repository.transaction() as tx:
        tx.save_alert(again, [], "fired")  # the same condition once more
    for _ in range(3):
        clock.now += HELD_DELAY
        drain(repository, [sink], clock=clock)
    assert repository.outbox_pending() == []
    assert statuses(server) == ["firing", "resolved", "firing"]


def test_a_sink_that_is_away_holds_up_no_other(repository: Repository, clock: Clock) -> None:
    """The pager hears of the end at once, however long the dashboard is down; and the dashboard hears it in order."""

    class Own:
        def __init__(self, name: str) -> None:
            self.name, self.away, self.heard = name, False, list[str]()

        def send(self, kind: str, alert: Alert) -> None:
            if self.away:
                raise DeliveryError("away")
            self.heard.append(kind)

    pager, dashboard = Own("pager"), Own("dashboard")
    dashboard.away = True
    (one,) = fire(repository, 1)
    drain(repository, [dashboard, pager], clock=clock)
    resolve(repository, one)
    drain(repository, [dashboard, pager], clock=clock)
    assert (pager.heard, dashboard.heard) == (["fired", "resolved"], [])
    dashboard.away = False
    for _ in range(3):
        clock.now += HELD_DELAY
        drain(repository, [dashboard, pager], clock=clock)
    assert pager.heard == dashboard.heard == ["fired", "resolved"]
    assert repository.outbox_pending() == []


def test_a_message_that_is_always_refused_holds_up_no_other(
    repository: Repository, clock: Clock, server: Receiver
) -> None:
    fire(repository, 1, 2, 3)
    server.answer = lambda body: 500 if body["alerts"][0]["fingerprint"] == "1" else 200
    sinks = [WebhookSink(server.url)]
    drain(repository, sinks, clock=clock)
    clock.now += LONGEST_DELAY
    drain(repository, sinks, clock=clock)
    assert {item.alert.fingerprint for item in repository.outbox_pending()} == {"1"}


def test_what_waits_for_days_is_given_up_so_that_the_outbox_is_bounded(
    repository: Repository, clock: Clock, server: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    server.answer = lambda _body: 500
    began, sinks = clock.now, [WebhookSink(server.url)]
    fire(repository, *range(4))
    while clock.now < began + LAST_RESORT + 8 * LONGEST_DELAY:
        drain(repository, sinks, clock=clock)
        clock.now += 6 * LONGEST_DELAY  # too few passes for a day's attempts of all
    assert repository.outbox_pending() == []
    assert repository.outbox_dead() == 4
    assert len(server.got) <= 4 * LEAST_ATTEMPTS + 8
    assert "given up" in caplog.text


def test_a_sink_of_somebodys_own_that_raises_is_a_failed_delivery(
    repository: Repository, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        name = "own"

        def send(self, kind: str, alert: Alert) -> None:
            raise RuntimeError(f"https://hooks.example/{SECRET}")

    fire(repository, 1)
    told: list[tuple[str, str]] = []
    assert drain(repository, [Broken(), LogSink()], clock=clock, tell=lambda *said: told.append(said)).delayed == 1
    assert told == [("own", "failed"), ("log", "delivered")]
    assert repository.outbox_pending()[0].error == "own: fault of the sink (RuntimeError)"
    assert SECRET not in caplog.text
    assert "not delivered yet, trying on: own: fault of the sink" in caplog.text


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_what_a_person_can_mend_is_tried_again(
    repository: Repository, clock: Clock, server: Receiver, status: int
) -> None:
    fire(repository, 1)
    server.answer = lambda _body: status
    assert drain(repository, [WebhookSink(server.url)], clock=clock).delayed == 1
    server.answer = lambda _body: 200
    clock.now += LONGEST_DELAY
    assert drain(repository, [WebhookSink(server.url)], clock=clock).delivered == 1


# -- at least once ------------------------------------------------------------------------------------------------

_DRAINS = """
import sys
from nla_monitor.alerts.sinks import WebhookSink, drain
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
drain(Repository(open_engine(sys.argv[1]), lambda: float(sys.argv[3])), [WebhookSink(sys.argv[2])])
"""


def test_killed_between_the_post_and_its_note_it_comes_twice_with_the_same_identity(
    repository: Repository, clock: Clock, server: Receiver, store_url: str
) -> None:
    fire(repository, 1)
    server.hangs = True  # it has the message; the sender waits for the answer, and has noted nothing
    command = [sys.executable, "-c", _DRAINS, store_url, server.url, str(clock.now)]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        while not server.got:
            assert time.monotonic() < deadline, "it posts"
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    server.hangs = False
    sink = WebhookSink(server.url)
    assert drain(repository, [sink], clock=clock) == Drained(), "claimed still by the one that died"
    clock.now += CLAIM_SECONDS + 1
    assert drain(repository, [sink], clock=clock) == Drained(delivered=1)
    (_, first), (_, second) = server.got
    assert first == second, "fingerprint, startsAt, status and all the rest: receivers know it again"
    assert drain(repository, [sink], clock=clock) == Drained()


# -- clocks -------------------------------------------------------------------------------------------------------


def test_a_firing_alert_has_no_end_by_our_clock(server: Receiver) -> None:
    server.date = formatdate(NOW, usegmt=True)
    AlertmanagerSink(server.url + "/", clock=lambda: NOW).send("fired", alert(sample(3), fired_at=NOW - 5))
    ((path, (posted,)),) = server.got
    assert path == "/api/v2/alerts"
    assert posted["labels"] == {
        "alertname": "NlaMonitorRuleFired",
        "rule": "hack",
        "severity": "high",
        "run": "run-1",
        "source": "agent",
        "fingerprint": alert(sample(3)).fingerprint,
    }
    assert posted["startsAt"] == rfc3339(NOW - 5)
    assert "endsAt" not in posted, "Alertmanager adds its resolve_timeout to its own time"
    assert "special-case" not in json.dumps(posted)


def test_a_resolved_alert_has_an_end_that_is_over_and_not_before_its_start(server: Receiver) -> None:
    server.date = formatdate(NOW, usegmt=True)
    sink = AlertmanagerSink(server.url, clock=lambda: NOW)
    for fired, resolved in ((NOW - 60, NOW - 10), (NOW - 60, NOW + 3600), (NOW + 50, NOW + 60)):
        sink.send("resolved", alert(sample(3), state=AlertState.RESOLVED, fired_at=fired, resolved_at=resolved))
    times = [(posted["startsAt"], posted["endsAt"]) for _, (posted,) in server.got]
    # The host's clock is an hour ahead, or even its start is: Alertmanager refuses an end before the start.
    assert times == [
        (rfc3339(NOW - 60), rfc3339(NOW - 10)),
        (rfc3339(NOW - 60), rfc3339(NOW)),
        (rfc3339(NOW), rfc3339(NOW)),
    ]


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_a_receiver_whose_clock_differs_is_told_by_its_own_clock(server: Receiver, skew: float, refused: bool) -> None:
    server.date = formatdate(NOW - skew, usegmt=True)
    server.answer = lambda _body: 400 if refused and len(server.got) == 1 else 200
    sink = AlertmanagerSink(server.url, clock=lambda: NOW)
    sink.send("resolved", alert(sample(1), state=AlertState.RESOLVED, fired_at=NOW - 9000, resolved_at=NOW - 10))
    ends = [posted["endsAt"] for _, (posted,) in server.got]
    assert ends == [rfc3339(NOW - 10), rfc3339(min(NOW - 10, NOW - skew))]
    sink.send("fired", alert(sample(1), fired_at=NOW + 9999))
    (posted,) = server.got[-1][1]
    assert posted["startsAt"] == rfc3339(NOW - skew)
    assert len(server.got) == 3, "it knows the clock now"


# -- time ---------------------------------------------------------------------------------------------------------


def test_a_receiver_that_drips_is_left(server: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes within the timeout, so that the timeout never ends it."""
    server.drips = True
    monkeypatch.setattr(webhook, "_LONGEST_ANSWER", 0.4)
    started = time.monotonic()
    with pytest.raises(DeliveryError):
        WebhookSink(server.url, timeout=1.0).send("fired", alert(sample(1)))
    assert time.monotonic() - started < 3


def test_a_receiver_has_as_long_to_answer_as_its_timeout_says(
    server: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(_body: Any) -> int:
        time.sleep(0.6)
        return 200

    server.answer = slowly
    monkeypatch.setattr(webhook, "_LONGEST_ANSWER", 0.1)
    WebhookSink(server.url, timeout=10.0).send("fired", alert(sample(1)))
    assert len(server.got) == 1


def test_a_service_that_drips_is_left_and_not_asked_again_meanwhile(
    server: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("apprise")
    server.drips = True
    monkeypatch.setattr(notify, "_PATIENCE", 0.5)
    sink = AppriseSink(server.url.replace("http://", "json://"))
    with pytest.raises(DeliveryError, match="did not take it in time"):
        sink.send("fired", alert(sample(1)))
    with pytest.raises(DeliveryError, match="has not answered the message before"):
        sink.send("fired", alert(sample(2)))
    assert len(server.got) == 1


# -- secrets ------------------------------------------------------------------------------------------------------


def said_by(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    "alerts",
    [
        {"alertmanager": [f"no-url/{SECRET}"]},
        {"alertmanager": {"x": f"http://me:{SECRET}@host"}},
        {"webhook": [f"http://me:{SECRET}@host"]},
        {"notify": [{"url": f"slack://{SECRET}"}]},
        {"notify": f"slack://{SECRET}"},
        {"webhok": f"http://host/{SECRET}"},
        {"phoenix": {"endpoint": [f"http://me:{SECRET}@host"]}},
        {"phoenix": {"endpoint": {"url": f"http://me:{SECRET}@host"}}},
        {"phoenix": {"endpoint": "http://host", "content": f"http://me:{SECRET}@host"}},
        {"phoenix": f"http://me:{SECRET}@host"},
        {"langfuse": {"host": [f"http://me:{SECRET}@host"]}},
        {"langfuse": {"timeout_seconds": SECRET}},
        {"trackers": {"notes": [SECRET]}},
        {"webhook": f"http://{'a' * 70}.example/{SECRET}"},
        {"webhook": f"http://[{SECRET}/"},
        f"http://host/{SECRET}",
    ],
    ids=str,
)
def test_a_wrong_config_is_refused_without_what_may_be_secret(alerts: Any) -> None:
    """Also in the traceback that a host's own log shows."""
    from nla_monitor.outlets import sinks_of

    pytest.importorskip("apprise")
    with pytest.raises(ConfigError) as caught:
        sinks_of(load_config({"alerts": alerts}))
    assert "alerts" in str(caught.value)
    assert SECRET not in said_by(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"database": [f"postgresql://me:{SECRET}@host/db"]},
        {"database": {"url": f"postgresql://me:{SECRET}@host/db"}},
        {"nla": {"url": [f"http://me:{SECRET}@host"]}},
        {"nla": {"batch_size": {"token": SECRET}}},
        {"source": {"url": [f"http://me:{SECRET}@host"]}},
    ],
    ids=str,
)
def test_a_list_or_mapping_in_the_wrong_place_is_not_repeated(config: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(config)
    assert SECRET not in said_by(caught.value)


def test_a_wrong_number_is_still_repeated() -> None:
    with pytest.raises(ConfigError, match=r"nla\.batch_size = -1: "):
        load_config({"nla": {"batch_size": -1}})


@pytest.mark.parametrize("path", [f"/a b/{SECRET}", f"/é/{SECRET}", f"/{SECRET}?q=🙈", f"/{SECRET}\x7f"])
def test_a_path_of_any_letters_is_posted_to_and_never_said(
    server: Receiver, path: str, repository: Repository, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    WebhookSink(server.url + path).send("fired", alert(sample(1)))
    assert SECRET in server.got[0][0]
    fire(repository, 1)
    server.answer = lambda _body: 500
    drain(repository, [WebhookSink(server.url + path)], clock=clock)
    with pytest.raises(DeliveryError) as caught:
        WebhookSink(f"http://127.0.0.1:9{path}").send("fired", alert(sample(1)))
    assert SECRET not in said_by(caught.value) + caplog.text + str(repository.outbox_pending())


def test_a_header_that_http_cannot_send_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="'Authorization' holds what HTTP cannot send") as caught:
        WebhookSink("http://127.0.0.1:9", headers={"Authorization": f"Bearer {SECRET}\n"})
    assert SECRET not in said_by(caught.value)


def test_doctor_says_nothing_of_the_addresses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nla_monitor.cli.app import run

    file = tmp_path / "monitor.yaml"
    alerts = {
        "webhook": f"http://me:{SECRET}@127.0.0.1:9/{SECRET}",
        "alertmanager": [f"http://127.0.0.1:9/{SECRET}"],
        "notify": [f"json://127.0.0.1:9/{SECRET}"],
    }
    file.write_text(json.dumps({"alerts": alerts, "database": str(tmp_path / "m.db")}), encoding="utf-8")
    for option in ((), ("--json",)):
        run(["doctor", "--config", str(file), "--no-self-test", *option])
    file.write_text(json.dumps({"alerts": alerts | {"webhook": [SECRET]}}), encoding="utf-8")
    assert run(["doctor", "--config", str(file), "--no-self-test"]) == 1
    out = capsys.readouterr()
    assert "alerts.webhook" in out.out
    assert SECRET not in out.out + out.err


# -- whatever stands in an alert ----------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(rule=WEIRD, run=WEIRD, title=WEIRD)
def test_weird_names_reach_a_webhook_and_a_service_as_they_are(rule: str, run: str, title: str) -> None:
    pytest.importorskip("apprise")
    weird = alert(sample(1), rule_id=rule, run_id=run, rule_title=title)
    with receiver() as server:
        WebhookSink(server.url).send("fired", weird)
        AppriseSink(server.url.replace("http://", "json://")).send("fired", weird)
    (_, body), (_, told) = server.got
    labels = body["alerts"][0]["labels"]
    assert (labels["rule"], labels["run"]) == (rule, run)
    assert "\n" not in told["title"]
    assert len(told["title"]) < 250


# -- Alertmanager's reminders -------------------------------------------------------------------------------------


def test_a_rule_that_names_no_webhook_is_not_posted_by_a_reminder_either(
    repository: Repository, server: Receiver
) -> None:
    fire(repository, 1)
    told: list[tuple[str, str]] = []
    sinks = [AlertmanagerSink(server.url)]
    Reminder(repository, sinks, responses={"hack": ["log"]}, tell=lambda *said: told.append(said)).tick()
    assert (server.got, told) == ([], [])
    Reminder(repository, sinks, responses={"hack": ["webhook"]}, tell=lambda *said: told.append(said)).tick()
    assert (len(server.got), told) == (1, [("alertmanager:0", "delivered")])
