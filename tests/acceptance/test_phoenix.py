"""A real Phoenix: what an agent of LangGraph thought stands on the span of the model call in which it thought it.

Opt-in: ``PHOENIX_PYTHON=/path/to/python python -m pytest -m slow tests/acceptance/test_phoenix.py -n 0``.
"""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from nla_monitor_langchain import NLACallbackHandler
from openinference.instrumentation.langchain import LangChainInstrumentor
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from sqlalchemy import update

from nla_monitor import Alert, Monitor
from nla_monitor.alerts.phoenix import PhoenixSink, annotation
from nla_monitor.alerts.sinks import DeliveryError, Drained, drain
from nla_monitor.config import TelemetryConfig, load_config
from nla_monitor.organism import load_target
from nla_monitor.outlet_config import PhoenixConfig
from nla_monitor.outlets import sinks_of
from nla_monitor.store.engine import write
from nla_monitor.store.models import OutboxRow
from nla_monitor.telemetry import Telemetry
from tests.acceptance.test_langgraph_agent import CONVERSATIONS, PLANTED, RULE, RULES
from tests.langgraph_kit import Witness, make_chat, make_graph, task_of, turn_config, turn_input
from tests.phoenix_server import Phoenix, serving
from tests.store_support import alert, sample

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE = 120.0
"""Seconds; Phoenix stores what it is sent later."""
OWN = {"nla_monitor.capture", "nla_monitor.verbalize", "nla_monitor.evaluate", "nla_monitor.alert"}


@pytest.fixture(scope="module")
def phoenix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Phoenix]:
    with serving(tmp_path_factory.mktemp("phoenix")) as server:
        yield server


@dataclass
class Episode:
    """What was found, and what the witness saw."""

    project: str
    monitor: Monitor
    witness: Witness

    @property
    def alerts(self) -> list[Alert]:
        return self.monitor.alerts()

    def send_again(self) -> None:
        """As after a worker that was killed between the post and its note of it."""
        with write(self.monitor.repository.engine) as connection:
            connection.execute(update(OutboxRow).values(state="pending", delivered=[], next_at=0.0, attempts=0))


def eventually(look: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < deadline, f"not within {PATIENCE:.0f} s: {what}"
        time.sleep(0.5)


def converse(
    phoenix: Phoenix, folder: Path, parent: Literal["link", "child"], monkeypatch: pytest.MonkeyPatch
) -> Episode:
    """Three conversations at once; spans by OTLP, from here and from the worker process, findings by the worker."""
    project, endpoint = f"agent-{parent}", f"{phoenix.url}/v1/traces"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", f"openinference.project.name={project}")
    (folder / "rules").mkdir()
    for name, words in RULES.items():
        (folder / "rules" / f"{name}.yaml").write_text(RULE.format(name=name, **words), encoding="utf-8")
    provider = TracerProvider(resource=Resource.create({"openinference.project.name": project}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    model, tokenizer = load_target("planted")
    witness = Witness(tokenizer, model)
    relation = {"parent": parent}
    monitor = Monitor(
        {"telemetry": relation},
        telemetry=Telemetry(tracer_provider=provider, config=TelemetryConfig.model_validate(relation)),
        database=str(folder / "nla.db"),
        rules=str(folder / "rules"),
        worker="process",
        capture={"tokens_per_sequence": 1, "generated_tokens": 2, "norm_sink_factor": None},
        alerts={"phoenix": {"endpoint": phoenix.url, "content": parent == "child"}},
    )
    graph = make_graph(make_chat(model, tokenizer), witness)
    instrumentor = LangChainInstrumentor()
    instrumentor.instrument(tracer_provider=provider)
    try:
        with monitor.attach(model, tokenizer):
            handler = NLACallbackHandler(monitor)

            def run(conversation: str) -> None:
                torch.set_num_threads(1)
                graph.invoke(turn_input(task_of(conversation, 0)), turn_config(conversation, [handler], uuid.uuid4()))

            with ThreadPoolExecutor(len(CONVERSATIONS)) as pool:
                list(pool.map(run, CONVERSATIONS))
        assert (dict(monitor.stats.dropped), dict(monitor.stats.faults)) == ({}, {})
    finally:
        instrumentor.uninstrument()
        provider.shutdown()
    return Episode(project, monitor, witness)


def check_findings(phoenix: Phoenix, episode: Episode, *, content: bool) -> list[dict[str, Any]]:
    """Each alert is one annotation, on the span of the call that its exhibit was captured in, and there is no other."""
    spans = {span["context"]["span_id"]: span for span in phoenix.spans(episode.project)}
    found = phoenix.annotations(episode.project, list(spans))
    assert sorted(one["identifier"] for one in found) == sorted(alert.alert_id for alert in episode.alerts)
    assert {PLANTED[call.conversation] for call in episode.witness.calls.values() if call.conversation in PLANTED} == {
        one["metadata"]["rule"] for one in found
    }
    by_id = {alert.alert_id: alert for alert in episode.alerts}
    for one in found:
        alert, span = by_id[one["identifier"]], spans[one["span_id"]]
        assert alert.agent is not None
        call = episode.witness.calls[alert.agent.agent_run_id]
        assert PLANTED[call.conversation] == alert.rule_id
        assert span["span_kind"] == "LLM"
        # What the instrumentation itself says of the call: its conversation, and the run id in the answer's id.
        assert span["attributes"]["metadata.thread_id"] == call.conversation
        assert f"lc_run--{call.run_id}" in span["attributes"]["output.value"]
        assert (one["name"], one["annotator_kind"]) == (f"nla/{alert.rule_id}", "LLM")
        assert (one["result"]["label"], one["result"]["score"]) == ("medium", 1.0)
        assert (alert.quote in one["result"]["explanation"]) is content
        assert one["metadata"]["fve"] == pytest.approx(alert.fve)
    return found


@pytest.mark.parametrize("parent", ["child", "link"])
def test_the_finding_is_on_the_span_of_the_model_call_and_stays_one(
    parent: Literal["link", "child"], phoenix: Phoenix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    episode = converse(phoenix, tmp_path, parent, monkeypatch)
    repository, sinks = episode.monitor.repository, sinks_of(episode.monitor.config)
    assert len(episode.alerts) == len(PLANTED)

    def told() -> bool:
        drain(repository, sinks)  # what a worker does; the run's own is gone by now
        return not repository.outbox_pending()

    eventually(told, "every finding is delivered")
    assert repository.outbox_dead() == 0
    first = check_findings(phoenix, episode, content=parent == "child")
    check_own_spans(phoenix, episode, parent)

    episode.send_again()
    assert drain(repository, sinks) == Drained(delivered=len(first))
    assert {one["id"] for one in check_findings(phoenix, episode, content=parent == "child")} == {
        one["id"] for one in first
    }

    phoenix.stop()
    episode.send_again()
    assert drain(repository, sinks).delayed == len(first)
    phoenix.start()
    eventually(told, "what could not be told while it was down is delivered")
    again = check_findings(phoenix, episode, content=parent == "child")
    assert {one["id"] for one in again} == {one["id"] for one in first}
    check_hostile(phoenix, episode)


def check_hostile(phoenix: Phoenix, episode: Episode) -> None:
    """Whatever a rule is called and a model says, Phoenix takes it; and gives it back as it was sent."""
    (shown, *_) = episode.alerts
    texts = ['"quoted" <b>x</b> [y](z)', "a\nb\x00\x1b[31m", "🙈\ud800", "x" * 10_000]
    hostile = [
        dataclasses.replace(shown, alert_id=f"hostile-{n}", rule_id=text, rule_title=text, quote=text, explanation=text)
        for n, text in enumerate(texts)
    ]
    sink = PhoenixSink(PhoenixConfig(endpoint=phoenix.url, content=True))
    for one in hostile:
        sink.send("fired", one)
    assert shown.traceparent is not None
    found = phoenix.annotations(episode.project, [shown.traceparent.split("-")[2]])
    given = {one["identifier"]: one for one in found if one["identifier"].startswith("hostile")}
    for one in hostile:
        sent = annotation(one, shown.traceparent.split("-")[2], content=True)
        assert {name: given[one.alert_id][name] for name in ("name", "metadata")} == {
            name: sent[name] for name in ("name", "metadata")
        }
        assert given[one.alert_id]["result"] == sent["result"]


def check_own_spans(phoenix: Phoenix, episode: Episode, parent: str) -> None:
    """Every step of ours is there: under the model calls that it is about, or as a trace of its own."""

    def named() -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for span in phoenix.spans(episode.project):
            found.setdefault(span["name"], []).append(span)
        return found

    eventually(lambda: named().keys() >= OWN, "our spans have come")
    spans = phoenix.spans(episode.project)
    calls = {span["context"]["span_id"]: span for span in spans if span["span_kind"] == "LLM"}
    assert {span["span_kind"] for span in spans if span["name"] in OWN} == {"EVALUATOR"}
    for span in (span for span in spans if span["name"] in OWN - {"nla_monitor.capture"}):
        if parent == "child":
            assert span["parent_id"] in calls, span["name"]
            assert span["context"]["trace_id"] == calls[span["parent_id"]]["context"]["trace_id"]
        else:  # this version of Phoenix keeps no links
            assert span["parent_id"] is None
            assert span["context"]["trace_id"] not in {call["context"]["trace_id"] for call in calls.values()}
    alerts = {alert.alert_id: alert for alert in episode.alerts}
    told = [span for span in spans if span["name"] == "nla_monitor.alert"]
    assert len(told) == len(alerts)


def test_a_phoenix_that_asks_for_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right key is let in and the span is missing; another one, or none, is refused, and neither is shown."""
    secret = "admin-secret-0123456789-abcdefghijklmnop"  # noqa: S105 -- of this server only
    asks = {"PHOENIX_ENABLE_AUTH": "true", "PHOENIX_SECRET": secret[::-1] + "9", "PHOENIX_ADMIN_SECRET": secret}
    with serving(tmp_path, asks) as server:
        config = load_config({"alerts": {"phoenix": {"endpoint": server.url}}}).alerts.phoenix
        assert config is not None
        monkeypatch.setenv("PHOENIX_API_KEY", secret)
        sink = PhoenixSink(config)
        assert sink.check() == server.url
        with pytest.raises(DeliveryError, match="does not have the alert's span yet") as caught:
            sink.send("fired", alert(sample(1)))
        assert caught.value.alone
        for key in ("", "wrong-key"):
            monkeypatch.setenv("PHOENIX_API_KEY", key)
            refused = PhoenixSink(config)
            for ask in (refused.check, lambda sink=refused: sink.send("fired", alert(sample(1)))):  # type: ignore[misc]
                with pytest.raises(DeliveryError, match=r"refused the keys \(401\)") as caught:
                    ask()
                assert not caught.value.alone
                assert "wrong-key" not in str(caught.value)
