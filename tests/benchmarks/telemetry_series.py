"""How many series a worker serves once it has told everything that it can tell, of many rules and several runs."""

from __future__ import annotations

import multiprocessing
import os
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families

from nla_monitor.config import load_config
from nla_monitor.records import Phase, TriageState, uuid7
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.telemetry import Telemetry, sdk
from nla_monitor.testing import FakeReconstructor, FakeVerbalizer
from nla_monitor.worker import Worker
from tests.cli_support import sample

RUNS: Final = 3
SEVERITIES: Final = ("info", "low", "medium", "high", "critical")

RULE: Final = """\
title: Rule {number}, which any explanation meets
id: {rule_id}
severity: {severity}
detection:
  words: [the model]
  condition: words
window: {{count: 1, within: 20 steps}}
tests:
  positive: ["the model"]
  negative: ["12345"]
"""


def series(folder: Path, rules: int) -> dict[str, Any]:
    """Series on ``/metrics`` of a process with the product's worker, after ``rules`` rules have fired in three runs.

    AV and AR are the shipped fakes: what explanations say makes no series. The process is a fresh one.

    Raises:
        RuntimeError: a rule has not fired in each run.
    """
    folder.mkdir(parents=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        text: str = pool.apply(serve, (folder, rules))
    names = {family.name: len(family.samples) for family in text_string_to_metric_families(text)}
    return {
        "series": sum(names.values()),
        "series_of_ours": sum(count for name, count in names.items() if name.startswith("nla_monitor")),
        "series_by_metric": dict(sorted(names.items(), key=lambda item: -item[1])[:12]),
        "metrics_bytes": len(text),
        "rules_fired": rules,
        "runs": RUNS,
    }


def serve(folder: Path, rules: int) -> str:
    """What ``/metrics`` says at the end."""
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"  # down: what is lost is counted in series, too
    (folder / "rules").mkdir()
    for number in range(rules):
        rule_id = f"rule-{number}-".ljust(100, "x")  # the longest that there may be
        text = RULE.format(number=number, rule_id=rule_id, severity=SEVERITIES[number % len(SEVERITIES)])
        (folder / "rules" / f"{number}.yaml").write_text(text, encoding="utf-8")
    config = load_config({"database": f"sqlite:///{folder / 'm.db'}", "rules": [str(folder / "rules")]})
    handle = sdk.configure("benchmark", metrics_port=0)
    worker = Worker(
        config,
        verbalizer=FakeVerbalizer(["It is what the model plans."]),
        reconstructor=FakeReconstructor(),
        telemetry=(telemetry := handle.telemetry()),
        sinks=[],
    )
    made = [sample(2 * run + part, 1, run_id=f"run-{run}") for run in range(RUNS) for part in range(2)]
    made = [replace(one, sample_id=uuid7(), captured_at=time.time(), phase=phase) for one in made for phase in Phase]
    SqlSpool(worker.repository.engine).put(made)
    while worker.run_once():
        pass
    alerts = worker.repository.alerts(limit=RUNS * rules + 1)
    if len(alerts) != RUNS * rules:
        raise RuntimeError(f"{len(alerts)} of {RUNS * rules} alerts have fired")
    for number, alert in enumerate(alerts):
        worker.repository.label(alert.alert_id, list(TriageState)[number % len(TriageState)], "benchmark")
    host_side(telemetry)
    worker._vitals._due = 0.0
    worker.run_once()
    with urllib.request.urlopen(f"http://localhost:{handle.metrics_port}/metrics", timeout=10) as response:
        text = response.read().decode()
    worker.close()
    handle.shutdown(timeout=1.0)
    return text


def host_side(telemetry: Telemetry) -> None:
    """What a host in the same process would tell (``worker.mode: thread``)."""
    for phase in Phase:
        telemetry.sampled(1, phase)
    for reason in ("queue_full", "non_finite", "closed"):
        telemetry.dropped(reason, 1)
    for place in ("capture.hook", "watch", "spool"):
        telemetry.fault(place, RuntimeError("benchmark"))
    telemetry.capture_duration(1e-4)
    telemetry.verbalized(1, "error", 0.0)
