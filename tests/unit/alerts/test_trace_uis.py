"""Findings to Phoenix and Langfuse: what is posted where, by whose keys, how often, and what is kept back."""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_monitor.alerts.finding import Place, place_of, told
from nla_monitor.alerts.langfuse import LangfuseSink, score
from nla_monitor.alerts.notify import _body
from nla_monitor.alerts.phoenix import PhoenixSink, annotation
from nla_monitor.alerts.responses import describe
from nla_monitor.alerts.sinks import (
    FIRST_DELAY,
    LAST_RESORT,
    LONE_ATTEMPTS,
    LONGEST_DELAY,
    DeliveryError,
    Drained,
    LogSink,
    Sink,
    drain,
)
from nla_monitor.alerts.webhook import annotations_of, payload
from nla_monitor.cli.doctor_command import _outlets
from nla_monitor.config import load_config
from nla_monitor.errors import ConfigError
from nla_monitor.monitor import Monitor
from nla_monitor.outlets import sinks_of
from nla_monitor.records import PROXY, Alert, AlertState
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
from nla_monitor.store.session import upgrade
from tests.store_support import alert, sample

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PUBLIC, SECRET = "pk-lf-public", "sk-lf-secret"
CONTENT = ("special-case the tests", "def test_")
UIS = ("phoenix", "langfuse")
HOSTILE = st.text(min_size=1, max_size=20).map(lambda text: text * 600) | st.sampled_from(
    ['"quoted"', "a\nb", "\x00\x1b[31m", "\ud800", "🙈", "x" * 10_000]
)


@dataclass
class Server:
    """A real HTTP server that keeps what it gets, and answers as told."""

    url: str = ""
    status: int = 200
    kind: str = "application/json"
    missing: set[str] = field(default_factory=set)
    """Spans that it does not have yet."""
    hang: threading.Event | None = None
    got: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)

    @property
    def bodies(self) -> list[Any]:
        return [body for _, _, body in self.got]


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.got.append((self.path, dict(self.headers), body))
            if state.hang is not None:
                state.hang.wait(10)
            absent = "data" in body and body["data"][0]["span_id"] in state.missing
            self.answer(404 if absent else state.status)

        def do_GET(self) -> None:
            state.got.append((self.path, dict(self.headers), None))
            self.answer(state.status)

        def answer(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Type", state.kind)
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


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LANGFUSE_BASE_URL", "LANGFUSE_HOST", "PHOENIX_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LANGFUSE_PUBLIC_KEY", PUBLIC)
    monkeypatch.setenv("LANGFUSE_SECRET_KEY", SECRET)


@pytest.fixture
def repository() -> Iterator[Repository]:
    engine = open_engine("sqlite://", in_process=True)
    upgrade(engine)
    yield Repository(engine)
    engine.dispose()


def sink_to(ui: str, url: str, **settings: Any) -> Any:
    """The sink that a config makes."""
    place = {"phoenix": "endpoint", "langfuse": "host"}[ui]
    (sink,) = (sink for sink in sinks_of(load_config({"alerts": {ui: {place: url} | settings}})) if sink.name == ui)
    return sink


def fire(repository: Repository, *numbers: int, **changes: Any) -> list[Alert]:
    with repository.transaction() as tx:
        return [
            tx.save_alert(alert(sample(number), fingerprint=str(number), **changes), [], "fired") for number in numbers
        ]


class Soon:
    """An outbox whose items are due again at once."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def __getattr__(self, name: str) -> Any:
        return getattr(self._repository, name)

    def outbox_failed(self, outbox_id: int, error: str, retry_at: float | None, **rest: Any) -> None:
        self._repository.outbox_failed(outbox_id, error, None if retry_at is None else 0.0, **rest)


# -- what is posted -----------------------------------------------------------------------------------------------


def test_phoenix_gets_an_annotation_on_the_span_of_the_exhibit(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHOENIX_API_KEY", "  key-abc\n")
    one = alert(sample(3))
    sink_to("phoenix", server.url + "/").send("fired", one)
    ((path, headers, body),) = server.got
    assert path == "/v1/span_annotations?sync=true"
    assert headers["Authorization"] == "Bearer key-abc"
    (posted,) = body["data"]
    assert (posted["span_id"], posted["name"], posted["annotator_kind"]) == (SPAN, "nla/hack", "LLM")
    assert posted["identifier"] == one.alert_id
    assert (posted["result"]["label"], posted["result"]["score"]) == ("high", 1.0)
    assert (
        posted["metadata"].items()
        >= {
            "rule": "hack",
            "rule_version": "v1",
            "severity": "high",
            "fve": 0.75,
            "fve_denominator": "held-out",
            "cosine": 0.9,
            "calibration": "uncalibrated",
            "position": 13,
            "run_id": "run-1",
        }.items()
    )
    assert "FVE 0.75 (held-out), uncalibrated" in posted["result"]["explanation"]


def test_langfuse_gets_a_score_that_comes_again_as_the_same(server: Server) -> None:
    sink, one = sink_to("langfuse", server.url), alert(sample(3), fired_at=1_700_000_000.0)
    for _ in range(2):
        sink.send("fired", one)
    (path, headers, body), (_, _, again) = server.got
    assert path == "/api/public/scores"
    assert base64.b64decode(headers["Authorization"].removeprefix("Basic ")).decode() == f"{PUBLIC}:{SECRET}"
    assert (body["traceId"], body["observationId"], body["name"]) == (TRACE, SPAN, "nla/hack")
    assert (body["dataType"], body["value"]) == ("BOOLEAN", 1)
    assert (body["id"], body["timestamp"]) == (f"nla-{one.alert_id}", "2023-11-14T22:13:20.000Z")
    assert body["metadata"]["rule_version"] == "v1"
    assert again == body


def test_a_score_is_what_langfuses_own_client_would_send(server: Server) -> None:
    """Read into its request model and sent by its client, with its keys: the same comes out on the wire."""
    api = pytest.importorskip("langfuse.api", reason="langfuse is not installed")
    from langfuse.api.core import ApiError, parse_obj_as

    body = score(alert(sample(3)), Place(TRACE, SPAN), content=True)
    model = parse_obj_as(api.CreateScoreRequest, body)
    assert not model.model_extra, "fields that it does not know"
    assert model.data_type is api.ScoreDataType.BOOLEAN
    client = api.LangfuseAPI(base_url=server.url, username=PUBLIC, password=SECRET, x_langfuse_public_key=PUBLIC)
    with pytest.raises(ApiError, match="200"):  # our server has nothing to say
        client.scores.create(request=[model])
    sink_to("langfuse", server.url).send("fired", alert(sample(3)))
    (their_path, theirs, (sent,)), (our_path, ours, _) = server.got
    assert (our_path, ours["Authorization"]) == (their_path, theirs["Authorization"])
    moments = [datetime.fromisoformat(one.pop("timestamp")) for one in (sent, body)]
    assert moments[0] == moments[1]
    assert sent == body


@pytest.mark.parametrize("ui", UIS)
def test_content_goes_only_when_it_is_asked_for(ui: str, server: Server) -> None:
    sink_to(ui, server.url).send("fired", alert(sample(3)))
    sink_to(ui, server.url, content=True).send("fired", alert(sample(3)))
    first, second = (json.dumps(body) for body in server.bodies)
    assert not any(text in first for text in CONTENT)
    assert "special-case the tests" in second


@pytest.mark.parametrize("ui", UIS)
def test_what_has_ended_is_still_a_finding_and_is_not_told_again(
    ui: str, server: Server, repository: Repository
) -> None:
    with repository.transaction() as tx:
        ended = alert(sample(1), state=AlertState.RESOLVED, resolved_at=2000.0)
        tx.save_alert(ended, [], "resolved")
    assert drain(repository, [sink_to(ui, server.url)]) == Drained(delivered=1)
    assert server.got == []


@settings(max_examples=40, deadline=None)
@given(title=HOSTILE, rule=HOSTILE, quote=HOSTILE)
def test_whatever_stands_in_an_alert_is_posted_in_bounds(title: str, rule: str, quote: str) -> None:
    one = alert(sample(1), rule_title=title, rule_id=rule, quote=quote, explanation=quote, fve=float("nan"))
    for body in (annotation(one, SPAN, content=True), score(one, Place(TRACE, SPAN), content=True)):
        data = json.dumps(body, allow_nan=False).encode()
        assert len(data) < 80_000
        assert json.loads(data) == body
        assert "\x00" not in body["name"]
        assert 0 < len(body["name"]) <= 200
        body["name"].encode()
    assert "\x1b" not in told(one, content=True)


# -- spans that are not there -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "traceparent",
    [None, "", "nonsense", f"00-{TRACE}-{SPAN}-00", f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01"],
)
@pytest.mark.parametrize("ui", UIS)
def test_without_a_span_there_is_nothing_to_annotate_and_nothing_is_retried(
    ui: str, traceparent: str | None, server: Server, repository: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fire(repository, *range(12), traceparent=traceparent)
    sink = sink_to(ui, server.url)
    assert drain(repository, [sink]) == Drained(delivered=12)
    assert list(sink.passed_over.values()) == [12]
    assert server.got == []
    assert len([record for record in caplog.records if "nothing to show" in record.message]) == 2  # the 1st, the 10th


def test_a_traceparent_names_trace_and_span() -> None:
    assert place_of(alert(sample(1), traceparent=f"00-{TRACE}-{SPAN}-01")) == Place(TRACE, SPAN)


def test_a_span_that_is_late_holds_up_nobody_and_is_annotated_once_it_is_there(
    server: Server, repository: Repository
) -> None:
    """Phoenix answers 404 until it has the span; other alerts go on meanwhile."""
    late, there = "a" * 16, "b" * 16
    fire(repository, 1, traceparent=f"00-{TRACE}-{late}-01")
    fire(repository, 2, traceparent=f"00-{TRACE}-{there}-01")
    server.missing = {late}
    sinks = [sink_to("phoenix", server.url)]
    assert drain(repository, sinks) == Drained(delivered=1, delayed=1)
    (waiting,) = repository.outbox_pending()
    assert waiting.error is not None
    assert "does not have the alert's span yet" in waiting.error
    server.missing.clear()
    deadline = time.monotonic() + 10
    while drain(repository, sinks).delivered == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [body["data"][0]["span_id"] for body in server.bodies] == [late, there, late]
    assert repository.outbox_pending() == []


def test_a_span_that_never_comes_is_no_message_that_somebody_missed(
    server: Server, repository: Repository, caplog: pytest.LogCaptureFixture
) -> None:
    """Spans are sampled, and lost on their way: nobody is to be woken for that."""
    caplog.set_level(logging.INFO)
    fire(repository, 1)
    server.missing = {SPAN}
    sinks: list[Sink] = [LogSink(), sink_to("phoenix", server.url)]
    told: list[tuple[str, str]] = []
    drained = drain(Soon(repository), sinks, limit=1000, tell=lambda *said: told.append(said))
    assert (drained.delivered, drained.delayed, drained.given_up) == (1, LONE_ATTEMPTS - 1, 0)
    assert len(server.got) == LONE_ATTEMPTS
    assert (repository.outbox_pending(), repository.outbox_dead()) == ([], 0)
    assert told == [("log", "delivered"), *[("phoenix", "failed")] * (LONE_ATTEMPTS - 1), ("phoenix", "no_span")]
    (said,) = [record for record in caplog.records if "is not shown by phoenix" in record.message]
    assert said.levelno == logging.INFO
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_span_is_awaited_for_four_minutes_which_is_less_than_an_alarm_takes() -> None:
    waits = [min(FIRST_DELAY * 2**n, LONGEST_DELAY) for n in range(LONE_ATTEMPTS - 1)]
    assert 200 < sum(waits) < 300


def test_a_missing_span_is_not_asked_for_while_another_sink_is_away(server: Server, repository: Repository) -> None:
    class Away:
        name = "away"

        def send(self, kind: str, alert: Alert) -> None:
            raise DeliveryError("away")

    fire(repository, 1)
    server.missing = {SPAN}
    for _ in range(3 * LONE_ATTEMPTS):
        drain(Soon(repository), [sink_to("phoenix", server.url), Away()], limit=1)
    assert len(server.got) == LONE_ATTEMPTS
    (item,) = repository.outbox_pending()
    assert item.delivered == ("phoenix?",)


# -- receivers that refuse or are away ----------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "permanent"), [(429, False), (500, False), (503, False), (400, True), (422, True)])
@pytest.mark.parametrize("ui", UIS)
def test_a_refusal_is_given_up_or_tried_again(ui: str, status: int, permanent: bool, server: Server) -> None:
    server.status = status
    with pytest.raises(DeliveryError, match=str(status)) as caught:
        sink_to(ui, server.url).send("fired", alert(sample(1)))
    assert caught.value.permanent is permanent
    assert not caught.value.alone


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("ui", UIS)
def test_refused_keys_are_told_of_by_their_place_and_never_shown(  # noqa: PLR0917 -- fixtures
    ui: str,
    status: int,
    server: Server,
    repository: Repository,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("PHOENIX_API_KEY", SECRET)
    fire(repository, 1)
    server.status = status
    sink = sink_to(ui, server.url)
    assert drain(Soon(repository), [sink], limit=1) == Drained(delayed=1)
    late = time.time() + LAST_RESORT
    assert drain(Soon(repository), [sink], limit=1, clock=lambda: late) == Drained(given_up=1)
    assert f"refused the keys ({status}); see alerts.{ui}" in caplog.text
    assert SECRET not in caplog.text
    assert PUBLIC not in caplog.text
    assert "special-case" not in caplog.text


@pytest.mark.parametrize("ui", UIS)
def test_a_receiver_that_hangs_or_is_down_costs_its_timeout_and_is_tried_again(
    ui: str, server: Server, repository: Repository
) -> None:
    fire(repository, 1, 2, 3)
    server.hang = threading.Event()
    began = time.monotonic()
    hanging = sink_to(ui, server.url, timeout_seconds=0.3)
    assert drain(repository, [hanging]) == Drained(delayed=3)  # it is not asked again for the other two
    assert time.monotonic() - began < 2
    server.hang.set()
    with pytest.raises(DeliveryError) as caught:
        sink_to(ui, "http://127.0.0.1:9").send("fired", alert(sample(1)))
    assert not caught.value.permanent


def test_a_rule_that_names_no_webhook_is_told_to_neither(server: Server, repository: Repository) -> None:
    fire(repository, 1)
    sinks = [sink_to(ui, server.url) for ui in UIS]
    assert drain(repository, sinks, responses={"hack": ["log"]}) == Drained(delivered=1)
    assert server.got == []


# -- config and doctor --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alerts", "says"),
    [
        ({"phoenix": {"endpoint": "localhost:6006"}}, r"alerts\.phoenix\.endpoint.*http:// or https://"),
        ({"phoenix": {"endpoint": "http://me:secret-pw@host"}}, r"endpoint: must hold no user, password or query"),
        ({"phoenix": {"endpoint": "me:secret-pw@host"}}, r"endpoint: must hold no user, password or query"),
        ({"phoenix": {"endpoint": "http://host:6006/v1/traces"}}, "without /v1/traces"),
        ({"phoenix": {"endpoint": "http://host", "api_key": "secret-pw"}}, r"unknown key.*api_key_env"),
        ({"phoenix": {"endpoint": "http://host", "api_key_env": "sk-secret-pw"}}, "name of an environment variable"),
        ({"phoenix": {"api_key": "secret-pw"}}, r"alerts\.phoenix\.endpoint: is required"),
        ({"phoenix": {}}, r"alerts\.phoenix\.endpoint.*[Rr]equired"),
        ({"phoenix": "http://me:secret-pw@host"}, r"alerts\.phoenix: must be a mapping"),
        ({"phoenix": {"endpoint": "http://host", "timeout_seconds": 0}}, "timeout_seconds"),
        ({"langfuse": {"host": "ftp://host"}}, r"alerts\.langfuse\.host.*http:// or https://"),
        ({"phoenix": {"endpoint": "http://host", "apikey_env": "X"}}, r"unknown key.*did you mean 'api_key_env'"),
        ({"langfuse": {"hots": "http://host"}}, "did you mean 'host'"),
        ({"langfuse": {"host": "http://host", "secret_key_env": "sk-secret-pw"}}, "name of an environment variable"),
        ({"trackers": {"note": False}}, "did you mean 'notes'"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused_without_its_secrets(alerts: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load_config({"alerts": alerts})
    assert "secret-pw" not in str(caught.value)


@pytest.mark.parametrize(
    ("alerts", "variables", "says"),
    [
        ({"phoenix": {"endpoint": "http://h", "api_key_env": "MY_KEY"}}, {}, "MY_KEY, which is not set"),
        ({"phoenix": {"endpoint": "http://h"}}, {"PHOENIX_API_KEY": "a secret-pw\x07"}, "holds no API key"),
        ({"langfuse": {"host": "http://h"}}, {"LANGFUSE_SECRET_KEY": ""}, r"LANGFUSE_SECRET_KEY \(secret_key_env\)"),
        ({"langfuse": {"host": "http://h", "public_key_env": "OTHER"}}, {}, r"OTHER \(public_key_env\)"),
        ({"langfuse": {}}, {}, "LANGFUSE_BASE_URL"),
        ({"langfuse": {}}, {"LANGFUSE_HOST": "http://me:secret-pw@h"}, "LANGFUSE_HOST must be"),
    ],
)
def test_a_key_that_is_not_there_is_told_by_the_name_of_its_variable(
    alerts: dict[str, Any], variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=says) as caught:
        sinks_of(load_config({"alerts": alerts}))
    assert "secret-pw" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_langfuses_own_variables_are_enough(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANGFUSE_HOST", server.url + "/")
    LangfuseSink(load_config({"alerts": {"langfuse": {}}}).alerts.langfuse).send("fired", alert(sample(1)))  # type: ignore[arg-type]
    assert [path for path, _, _ in server.got] == ["/api/public/scores"]


def test_a_host_without_the_keys_may_watch_where_the_worker_is_elsewhere(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LANGFUSE_SECRET_KEY")
    config = {"database": str(tmp_path / "m.db"), "alerts": {"langfuse": {"host": "http://h"}}}
    Monitor(config | {"worker": {"mode": "external"}}).close()
    with pytest.raises(ConfigError, match="LANGFUSE_SECRET_KEY"):
        Monitor(config | {"worker": {"mode": "thread"}})


@pytest.mark.parametrize(
    ("status", "kind", "verdict", "says"),
    [
        (200, "application/json", "ok", "answers and takes the keys"),
        (401, "application/json", "problem", "refused the keys (401)"),
        (404, "application/json", "problem", "answered 404"),
        (200, "text/html", "problem", "something else"),
    ],
)
@pytest.mark.parametrize("ui", UIS)
def test_doctor_asks_the_trace_uis(  # noqa: PLR0917 -- four of them are one row
    ui: str, status: int, kind: str, verdict: str, says: str, server: Server
) -> None:
    server.status, server.kind = status, kind
    place = {"phoenix": "endpoint", "langfuse": "host"}[ui]
    all_of_them, result = _outlets(load_config({"alerts": {ui: {place: server.url}}}))
    assert (all_of_them.verdict, all_of_them.detail) == ("ok", f"go to log, {ui}")
    assert (result.about, result.verdict) == (f"alerts.{ui}", verdict)
    assert says in result.detail


def test_doctor_says_which_key_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LANGFUSE_PUBLIC_KEY")
    (result,) = _outlets(load_config({"alerts": {"langfuse": {"host": "http://h"}}}))
    assert result.verdict == "problem"
    assert "LANGFUSE_PUBLIC_KEY" in result.detail


def test_the_sinks_are_made_as_configured() -> None:
    config = load_config({"alerts": {"phoenix": {"endpoint": "http://h:6006/"}, "langfuse": {"host": "http://h"}}})
    kinds = [type(sink) for sink in sinks_of(config)]
    assert kinds == [LogSink, PhoenixSink, LangfuseSink]


# -- every way out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["calibrated", "void"])
def test_every_way_out_says_what_model_was_read_and_what_stands_behind_it(
    status: str, caplog: pytest.LogCaptureFixture
) -> None:
    says = f"{status}: at most 1 % of benign sequences score as high as this one, {'with 95 % confidence, ' * 20}so far"
    known = {"calibration": {"status": status, "says": says}}
    found = alert(sample(1), traceparent=f"00-{TRACE}-{SPAN}-01", evidence={PROXY: "another model"}, **known)
    plain = alert(sample(1), **known)

    for facts in (annotation(found, SPAN, content=False), score(found, Place(TRACE, SPAN), content=False)):
        assert (facts["metadata"]["proxy"], facts["metadata"]["guarantee"]) == (True, says)
    (posted,) = payload(found)["alerts"]
    for told_of in (posted["annotations"], payload(found)["commonAnnotations"], annotations_of(found)):
        assert (told_of["proxy"], told_of["guarantee"], told_of["calibration"]) == ("true", says, status)
    assert "proxy" not in annotations_of(plain)

    caplog.set_level(logging.INFO, logger="nla_monitor.alerts")
    LogSink().send("fired", found)
    LogSink().send("fired", plain)
    said, unsaid = (record.getMessage() for record in caplog.records)
    for text in (said, _body("fired", found, content=False)):
        assert says in text
        assert "read in a proxy of the model that answered" in text
    for text in (unsaid, _body("fired", plain, content=False)):
        assert says in text
        assert "proxy" not in text
    assert "proxy" in describe(found)
    assert "proxy" in told(found, content=False)


def test_what_receivers_know_annotations_by_stays() -> None:
    found = annotations_of(alert(sample(1), traceparent=f"00-{TRACE}-{SPAN}-01"), content=True)
    assert set(found) >= {
        *("summary", "alert_id", "rule_version", "matches", "first_step", "last_step", "position", "cosine", "fve"),
        *("fve_denominator", "calibration", "traceparent", "quote", "explanation", "context"),
    }
