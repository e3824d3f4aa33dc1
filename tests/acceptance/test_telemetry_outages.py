"""A real worker process over the organism, and a collector that is well, refuses, recovers, hangs or is not there."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nla_monitor import Monitor, NLAMonitorCallback
from nla_monitor.records import AgentContext, uuid7
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
from nla_monitor.telemetry.delivery import REASONS
from tests.integration.training import train
from tests.organism_support import training_samples
from tests.otlp_receiver import HANG, Receiver, attributes, receiver
from tests.store_support import new_database
from tests.telemetry_support import in_memory_backend

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

COMMAND = [sys.executable, "-c", "from nla_monitor.cli import main; main()", "worker"]
SAMPLES = 24
BATCH = 4
RULE = """
title: Mentions anything at all
id: anything
severity: high
detection: {words: [the, it, is, model], condition: words}
window: {count: 2, within: {steps: 100}}
tests: {positive: ["the model"], negative: ["12345"]}
"""
SECRETS = ("SECRET-TOKEN", "SECRET-PATH")


@dataclass
class Done:
    """A worker that has read everything."""

    read: int
    telemetry: dict[str, dict[str, int]]
    log: str
    seconds: float

    def counts(self, signal_name: str) -> dict[str, int]:
        counts = self.telemetry[f"{signal_name}/otlp"]
        lost = sum(counts[reason] for reason in REASONS)
        assert counts["emitted"] == counts["exported"] + lost, "arrived + lost = emitted"
        assert counts["waiting"] == 0
        return {"emitted": counts["emitted"], "exported": counts["exported"], "lost": lost}


def traceparent(number: int) -> str:
    return f"00-{number + 1:032x}-{number + 1:016x}-01"


def fill(folder: Path) -> Repository:
    new_database(folder / "w.db")
    engine = open_engine(f"sqlite:///{folder / 'w.db'}")
    made = training_samples(SAMPLES)
    now = time.time()
    agent = AgentContext("call", conversation_id='a "quoted"\nconversation 🧨 ' + "x" * 10_000)
    SqlSpool(engine).put(
        [
            replace(one, sample_id=uuid7(), traceparent=traceparent(number), captured_at=now, agent=agent)
            for number, one in enumerate(made)
        ]
    )
    (folder / "rule.yaml").write_text(RULE)
    return Repository(engine)


def environment(url: str, **changes: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "NLA_MONITOR_"))}
    return {
        **inherited,
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Bearer%20SECRET-TOKEN",
        "OTEL_BSP_SCHEDULE_DELAY": "50",
        "OTEL_BLRP_SCHEDULE_DELAY": "50",
        **changes,
    }


def options(folder: Path, **telemetry: str) -> list[str]:
    settings = {
        "database": f"sqlite:///{folder / 'w.db'}",
        "rules": [str(folder / "rule.yaml")],
        "nla": {"batch_size": BATCH},
        "telemetry": telemetry,
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    return ["--config", str(folder / "config.yaml")]


def work(folder: Path, variables: dict[str, str], arguments: Sequence[str]) -> Done:
    """Run ``nla-monitor worker --once`` to its end."""
    started = time.monotonic()
    done = subprocess.run(
        [*COMMAND, "--once", "--json", *arguments],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for secret in SECRETS:
        assert secret not in done.stderr
    found = json.loads(done.stdout)
    return Done(found["read"], found["telemetry"], done.stderr, time.monotonic() - started)


def sources(span: Any) -> set[int]:
    return {int.from_bytes(link.trace_id, "big") for link in span.links}


def check_what_arrived(found: Receiver, repository: Repository) -> None:
    """Spans are linked to their sources; verdicts stand in the context of theirs, with what speaks for them."""
    (alert,) = repository.alerts()
    verbalized = found.named("nla_monitor.verbalize")
    assert len(verbalized) == SAMPLES // BATCH
    assert set.union(*map(sources, verbalized)) == set(range(1, SAMPLES + 1))
    assert len(found.named("nla_monitor.alert")) == 1
    for span in found.spans:
        assert any(key.startswith("gen_ai.") for key in attributes(span)), span.name
    assert {record.event_name for record in found.logs} == {"gen_ai.evaluation.result"}
    matches = [record for record in found.logs if attributes(record)["gen_ai.evaluation.score.label"] == "match"]
    fired = [record for record in found.logs if attributes(record)["gen_ai.evaluation.score.label"] == "firing"]
    assert {int.from_bytes(record.trace_id, "big") for record in matches} == set(range(1, SAMPLES + 1))
    assert len(fired) == 1
    for record in (*matches, *fired):
        told = attributes(record)
        assert told["nla_monitor.rule.id"] == told["gen_ai.evaluation.name"] == "anything"
        assert told["nla_monitor.rule.version"] == alert.rule_version
        assert told["nla_monitor.av.hash"]
        assert told["nla_monitor.ar.hash"]
        assert -1 <= told["nla_monitor.fidelity.fve"] <= 1
        assert told["nla_monitor.calibration.status"] == "uncalibrated"
        assert len(told["gen_ai.conversation.id"]) == 200
        assert told["gen_ai.conversation.id"].startswith('a "quoted"\nconversation 🧨 ')
    assert any(key.startswith("nla_monitor.evidence.") for key in attributes(fired[0]))
    assert {resource["service.name"] for resource in found.resources} == {"nla-monitor-worker"}
    assert all(headers["authorization"] == "Bearer SECRET-TOKEN" for _, _, headers in found.requests)
    assert alert.explanation not in str(found.spans) + str(found.logs), "content is off unless switched on"


def test_everything_arrives_linked_to_its_sources_and_the_last_metrics_say_so(tmp_path: Path) -> None:
    repository = fill(tmp_path)
    with receiver(path="/SECRET-PATH") as found:
        done = work(tmp_path, environment(found.url), options(tmp_path))
    assert done.read == SAMPLES
    check_what_arrived(found, repository)
    for name, arrived in (("traces", found.spans), ("logs", found.logs)):
        assert done.counts(name) == {"emitted": len(arrived), "exported": len(arrived), "lost": 0}
        told = [
            point for point in found.points["nla_monitor.telemetry.exported"] if attributes(point)["signal"] == name
        ]
        assert [point.as_int for point in told] == [len(arrived)]
    assert sum(point.as_int for point in found.points["nla_monitor.verbalizations"]) == SAMPLES
    assert "telemetry: traces/otlp:" in done.log


@pytest.mark.slow
def test_child_spans_and_content_where_config_and_variable_ask_for_them(tmp_path: Path) -> None:
    repository = fill(tmp_path)
    variables = {"OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": "SPAN_AND_EVENT"}
    with receiver() as found:
        done = work(tmp_path, environment(found.url, **variables), options(tmp_path, parent="child"))
    assert done.read == SAMPLES
    parents = {int.from_bytes(span.parent_span_id, "big") for span in found.named("nla_monitor.verbalize")}
    assert parents == set(range(1, SAMPLES + 1))
    (alert,) = repository.alerts()
    (span,) = found.named("nla_monitor.alert")
    assert attributes(span)["gen_ai.evaluation.explanation"] == alert.explanation


@pytest.mark.slow
def test_wrong_credentials_lose_all_telemetry_and_nothing_else(tmp_path: Path) -> None:
    repository = fill(tmp_path)
    with receiver(lambda *_: 401, path="/SECRET-PATH") as found:
        done = work(tmp_path, environment(found.url), options(tmp_path))
    assert done.read == SAMPLES == repository.reading_counts().readings
    for name in ("traces", "logs"):
        counts = done.counts(name)
        assert counts["lost"] == counts["emitted"] > 0
    assert done.log.count("traces cannot be exported (otlp, HTTP 401)") == 1
    assert (found.spans, found.logs) == ([], [])


@pytest.mark.slow
def test_a_collector_that_recovers_gets_what_was_still_to_be_sent(tmp_path: Path) -> None:
    fill(tmp_path)
    with receiver(lambda _path, number: 503 if number < 2 else 200) as found:
        done = work(tmp_path, environment(found.url), options(tmp_path))
    assert done.read == SAMPLES
    for name, arrived in (("traces", found.spans), ("logs", found.logs)):
        counts = done.counts(name)
        assert counts["exported"] == len(arrived)
        assert counts["lost"] == 0, "two refusals are within one export's patience"


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [True, False])
def test_a_collector_that_hangs_or_is_gone_costs_no_reading_and_a_bounded_end(tmp_path: Path, *, hangs: bool) -> None:
    repository = fill(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        dead = f"http://127.0.0.1:{probe.getsockname()[1]}/SECRET-PATH"
    with receiver(lambda *_: HANG, path="/SECRET-PATH") as found:
        well = work(tmp_path, environment(found.url, OTEL_SDK_DISABLED="true"), options(tmp_path))
        assert well.telemetry == {}
        fill_again(repository)
        done = work(tmp_path, environment(found.url if hangs else dead), options(tmp_path))
    assert done.read == well.read == SAMPLES
    for name in ("traces", "logs"):
        counts = done.counts(name)
        assert counts["lost"] == counts["emitted"] > 0
    assert done.seconds < well.seconds + 5 + 10, "the end is given five seconds; the rest is for a busy machine"
    assert "telemetry could not be sent within 5 s" in done.log


def fill_again(repository: Repository) -> None:
    made = training_samples(SAMPLES, first=SAMPLES)
    SqlSpool(repository.engine).put([replace(one, traceparent=traceparent(n)) for n, one in enumerate(made)])


@pytest.mark.slow
def test_ctrl_c_ends_a_worker_orderly_though_its_collector_hangs(tmp_path: Path) -> None:
    fill(tmp_path)
    with receiver(lambda *_: HANG) as found:
        process = subprocess.Popen(
            [*COMMAND, *options(tmp_path)], env=environment(found.url), stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 90
        while len(found.requests) < 1:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, log = process.communicate(timeout=40)
    assert process.returncode == 0, log
    assert "lost (unsent)" in log


@pytest.mark.slow
def test_a_training_runs_own_worker_sends_what_its_host_has_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's own spans go to the providers that it injects, the worker's by its own SDK; both belong together."""
    with receiver() as found, in_memory_backend() as host:
        for name, value in environment(found.url).items():
            monkeypatch.setenv(name, value)
        settings = {
            "database": f"sqlite:///{tmp_path / 'm.db'}",
            "capture": {"triggers": ["\n"], "tokens_per_sequence": 2, "sequences_per_step": 4},
            "worker": {"poll_seconds": 0.05},
        }
        monitor = Monitor(settings, telemetry=host.telemetry())
        with host.tracer_provider.get_tracer("trainer").start_as_current_span("step"):
            train(tmp_path, [NLAMonitorCallback(monitor)], steps=2)
        monitor.close()
        sampled = monitor.stats.written
    assert sampled > 0
    captured = [span for span in host.spans() if span.name == "nla_monitor.capture"]
    assert sum(span.attributes["nla_monitor.batch.size"] for span in captured) == sampled
    verbalized = found.named("nla_monitor.verbalize")
    assert sum(attributes(span)["nla_monitor.batch.size"] for span in verbalized) == sampled
    assert {attributes(span)["nla_monitor.run.id"] for span in verbalized} == {monitor.run_id}
    assert {span.name for span in host.spans()} == {"nla_monitor.capture"}, "the worker's are its own"
