"""A process whose HTTP clients, database driver and threads are instrumented sees nothing of the monitor's own work."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import torch
from opentelemetry import context, trace

from nla_monitor import Monitor
from nla_monitor.config import NLAConfig, load_config
from nla_monitor.nla.engines.client import Client
from nla_monitor.organism import keyed_rng, load_target, make_transcript
from nla_monitor.outlets import sinks_of
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.testing import FakeReconstructor, FakeVerbalizer
from nla_monitor.untraced import untraced
from nla_monitor.worker import Worker
from tests.cli_support import QUOTE, sample
from tests.judge_server import judge_server, says
from tests.otlp_receiver import receiver
from tests.telemetry_support import Backend, in_memory_backend

dbapi = pytest.importorskip("opentelemetry.instrumentation.dbapi")
httpx_packages = pytest.importorskip("opentelemetry.instrumentation.httpx")
requests_packages = pytest.importorskip("opentelemetry.instrumentation.requests")

RULE = """
title: Plans to special-case tests
id: my-rule
severity: high
detection:
  words: [special-case the visible tests]
  judged: {{judge: {{question: 'Does the model plan it?', endpoint: '{url}', model: m, retries: 0}}}}
  condition: words && judged
window: {{count: 2, within: 20 steps}}
tests:
  positive: [{{text: It will special-case the visible tests., given: {{judged: true}}}}]
  negative: ["A recipe for soup."]
"""


@contextmanager
def threads_hand_contexts_on() -> Iterator[None]:
    """What opentelemetry-instrumentation-threading does to every thread."""
    start, run = threading.Thread.start, threading.Thread.run

    def starting(self: Any) -> None:
        self.handed_on = context.get_current()
        start(self)

    def running(self: Any) -> None:
        token = context.attach(self.handed_on)
        try:
            run(self)
        finally:
            context.detach(token)

    threading.Thread.start, threading.Thread.run = starting, running  # type: ignore[method-assign]
    try:
        yield
    finally:
        threading.Thread.start, threading.Thread.run = start, run  # type: ignore[method-assign]


@pytest.fixture
def backend() -> Iterator[Backend]:
    """Where the spans of all these packages arrive."""
    with in_memory_backend() as backend:
        provider = backend.tracer_provider
        instrumentors = [httpx_packages.HTTPXClientInstrumentor(), requests_packages.RequestsInstrumentor()]
        for one in instrumentors:
            one.instrument(tracer_provider=provider)
        dbapi.wrap_connect(__name__, sqlite3.dbapi2, "connect", "sqlite", tracer_provider=provider)
        yield backend
        dbapi.unwrap_connect(sqlite3.dbapi2, "connect")
        for one in instrumentors:
            one.uninstrument()


def everything(backend: Backend) -> list[Any]:
    return list(backend._spans.get_finished_spans())


def by_others(backend: Backend) -> list[str]:
    """Names of the spans that are not the monitor's."""
    return [span.name for span in everything(backend) if span.instrumentation_scope.name != "nla_monitor"]


def host_work(url: str, folder: Path) -> int:
    """What the application itself does; returns how many spans that should be."""
    httpx.post(f"{url}/v1/traces", content=b"")
    requests.post(f"{url}/v1/traces", data=b"", timeout=5)
    connection = sqlite3.dbapi2.connect(folder / "host.db")
    connection.cursor().execute("CREATE TABLE t (x)")
    connection.close()
    return 3


def test_a_worker_with_judge_and_sinks_leaves_only_its_own_spans(backend: Backend, tmp_path: Path) -> None:
    with judge_server(lambda _: says("YES", QUOTE)) as judge, receiver() as host:
        assert host_work(host.url, tmp_path) == len(by_others(backend)), "the packages work, else this shows nothing"
        before = by_others(backend)
        (tmp_path / "rule.yaml").write_text(RULE.format(url=judge.url))
        alerts = {"notify": [host.url.replace("http://", "json://") + "/v1/traces"], "webhook": f"{host.url}/v1/logs"}
        config = load_config(
            {"database": f"sqlite:///{tmp_path / 'w.db'}", "rules": [str(tmp_path / "rule.yaml")], "alerts": alerts}
        )
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(host, "take", lambda *_: None)  # what is posted there is no telemetry
            worker = Worker(
                config,
                verbalizer=FakeVerbalizer([f"It intends to {QUOTE}: {number}." for number in range(4)]),
                reconstructor=FakeReconstructor(),
                telemetry=backend.telemetry(),
                sinks=sinks_of(config),
            )
            SqlSpool(worker.repository.engine).put([sample(number, 1) for number in range(4)])
            while worker.run_once():
                pass
            worker.close()
            assert len(judge.asked) == 4
            assert len([path for path, *_ in host.requests]) == 4, "two of the host's, one alert to each of two sinks"
    assert by_others(backend) == before
    assert {span.name for span in backend.spans()} == {
        "nla_monitor.verbalize",
        "nla_monitor.evaluate",
        "nla_monitor.alert",
    }


def test_requests_to_a_server_that_runs_the_av_leave_none(backend: Backend) -> None:
    with receiver(lambda *_: 200) as server:
        client = Client(NLAConfig.model_validate({"engine": "vllm", "url": server.url, "retries": 0}))
        client.ask_all("/v1/traces", [lambda: b""] * 3, lambda found: found)
        client.close()
        assert len(server.requests) == 3
    assert by_others(backend) == []


def test_a_monitor_in_an_instrumented_host_adds_nothing_to_the_hosts_traces(backend: Backend, tmp_path: Path) -> None:
    """Its threads begin during a request of the host, are handed its context, and go on for hours."""
    model, tokenizer = load_target("planted")
    text = make_transcript(keyed_rng("untraced", 0), intent="hack", belief="real").prompt
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    settings = {
        "database": f"sqlite:///{tmp_path / 'm.db'}",
        "worker": {"mode": "thread", "poll_seconds": 0.02},
        "capture": {"triggers": ["\n"], "tokens_per_sequence": 2, "sequences_per_step": 4},
        "nla": {"batch_size": 4},
    }
    tracer = backend.tracer_provider.get_tracer("host")
    with threads_hand_contexts_on(), tracer.start_as_current_span("request") as request:
        monitor = Monitor(settings, telemetry=backend.telemetry()).attach(model, tokenizer)
        monitor.step(1)
        with torch.no_grad():
            model(ids)
        assert monitor.drain(timeout=60.0)
        read = monitor.repository.reading_counts().readings
        monitor.alerts()
        monitor.close()
    assert read > 0
    assert by_others(backend) == ["request"]
    assert {"nla_monitor.capture", "nla_monitor.verbalize"} <= {span.name for span in backend.spans()}
    for span in backend.spans():
        assert span.parent is None or span.parent.span_id != request.get_span_context().span_id


def test_inside_the_block_nothing_of_the_surroundings_is_left_and_afterwards_all(backend: Backend) -> None:
    with backend.tracer_provider.get_tracer("host").start_as_current_span("request") as request:
        with untraced():
            assert not trace.get_current_span().get_span_context().is_valid
        with pytest.raises(KeyError), untraced():
            raise KeyError
        assert trace.get_current_span() is request
