"""A worker's batch as a backend, a sink and the command line see it, with the shipped fakes in place of an NLA."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nla_monitor.cli.app import app
from nla_monitor.config import load_config
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.testing import FakeReconstructor, FakeVerbalizer, MemorySink
from nla_monitor.worker import Worker
from tests.cli_support import QUOTE, sample
from tests.telemetry_support import in_memory_backend

RULE = """
title: Plans to special-case tests
id: my-rule
severity: high
detection:
  intent: [special-case the visible tests]
  condition: intent
window: {count: 2, within: 20 steps}
tests:
  positive: ["It will special-case the visible tests."]
  negative: ["A recipe for soup."]
"""


def traceparent(number: int) -> str:
    return f"00-{number:032x}-{number:016x}-01"


def test_one_batch_leaves_linked_spans_events_in_the_sources_metrics_and_an_alert(tmp_path: Path) -> None:
    (tmp_path / "rule.yaml").write_text(RULE)
    database = f"sqlite:///{tmp_path / 'w.db'}"
    config = load_config({"database": database, "rules": [str(tmp_path / "rule.yaml")]})
    verbalizer = FakeVerbalizer([f"It intends to {QUOTE}.", "A story about rain."])
    sink = MemorySink()
    with in_memory_backend() as backend:
        worker = Worker(
            config,
            verbalizer=verbalizer,
            reconstructor=FakeReconstructor(0.9),
            telemetry=backend.telemetry(),
            sinks=[sink],
        )
        samples = [sample(number, 1, traceparent=traceparent(number + 1)) for number in range(4)]
        SqlSpool(worker.repository.engine).put(samples)
        assert worker.run_once() == 4
        worker.run_once()
        worker.close()
        spans = {span.name: span for span in backend.spans()}
        points = backend.points()
        events = backend.events()
    assert set(spans) == {"nla_monitor.verbalize", "nla_monitor.evaluate", "nla_monitor.alert"}
    assert [link.context.span_id for link in spans["nla_monitor.verbalize"].links] == [1, 2, 3, 4]
    matched = [event for event in events if event.attributes["gen_ai.evaluation.score.label"] == "match"]
    assert [(event.trace_id, event.span_id) for event in matched] == [(1, 1), (3, 3)]
    (fired,) = [event for event in events if event.attributes["gen_ai.evaluation.score.label"] == "firing"]
    assert fired.span_id in (1, 3)
    assert points["nla_monitor.verbalizations"][0].value == 4
    assert points["nla_monitor.matches"][0].value == 2
    assert points["nla_monitor.alerts"][0].value == 1
    assert points["nla_monitor.fidelity.fve"][0].count == 4
    assert points["nla_monitor.queue.size"][0].value == 0
    assert [(kind, alert.rule_id) for kind, alert in sink.sent] == [("fired", "my-rule")]
    listed = CliRunner().invoke(app, ["alerts", "list", "--json", "--database", database])
    (alert,) = json.loads(listed.stdout)
    assert (alert["quote"], alert["matches"], alert["denominator_name"]) == (QUOTE, 2, "fake")
    assert alert["calibration"]["status"] == "uncalibrated"
    page = CliRunner().invoke(app, ["alerts", "show", alert["alert_id"], "--database", database]).stdout
    assert f"»{QUOTE}«" in page
    assert f"trace        {1:032x}" in page or f"{fired.trace_id:032x}" in page


def test_a_host_whose_clock_is_ahead_makes_no_negative_delay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "rule.yaml").write_text(RULE)
    config = load_config({"database": f"sqlite:///{tmp_path / 'w.db'}", "rules": [str(tmp_path / "rule.yaml")]})
    with in_memory_backend() as backend:
        worker = Worker(
            config,
            verbalizer=FakeVerbalizer([f"It intends to {QUOTE}."]),
            reconstructor=FakeReconstructor(0.9),
            telemetry=backend.telemetry(),
            sinks=[],
        )
        ahead = time.time() + 3600
        SqlSpool(worker.repository.engine).put([sample(number, 1, captured_at=ahead) for number in range(3)])
        worker.run_once()
        points = backend.points()
        worker.close()
    assert [point.value for point in points["nla_monitor.clock.skewed"]] == [1]
    (delay,) = points["nla_monitor.detection.delay"]
    assert (delay.sum, dict(delay.attributes)) == (0.0, {"nla_monitor.severity": "high"})
    assert points["nla_monitor.queue.age"][0].value >= 0
    assert "let both keep time (NTP)" in caplog.text
