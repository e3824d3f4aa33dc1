"""What the alerting rules and dashboards read is what ``/metrics`` serves, under these very names."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from nla_monitor.alerts.sinks import LogSink
from nla_monitor.config import load_config
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.telemetry import sdk
from nla_monitor.testing import FakeReconstructor, FakeVerbalizer
from nla_monitor.worker import Worker
from tests.cli_support import QUOTE, sample

INTEGRATIONS = Path(__file__).parents[3] / "integrations"
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


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Values by name and labels of what a worker serves that has read a few samples and fired an alert."""
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "rule.yaml").write_text(RULE, encoding="utf-8")
    config = load_config({"database": f"sqlite:///{folder / 'w.db'}", "rules": [str(folder / "rule.yaml")]})
    handle = sdk.configure("test", metrics_port=0)
    verbalizer = FakeVerbalizer([f"It intends to {QUOTE}."])
    worker = Worker(
        config,
        verbalizer=verbalizer,
        reconstructor=FakeReconstructor(0.9),
        telemetry=handle.telemetry(),
        sinks=[LogSink()],
    )
    SqlSpool(worker.repository.engine).put([sample(number, 1) for number in range(4)])
    worker.run_once()
    with urllib.request.urlopen(f"http://localhost:{handle.metrics_port}/metrics", timeout=5) as response:
        text = response.read().decode()
    worker.close()
    handle.shutdown()
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        if parts := re.match(r"(nla_monitor\w+)\{(.*)\} (\S+)$", line):
            labels = ",".join(pair for pair in parts[2].split(",") if pair and not pair.startswith("otel_scope"))
            found.setdefault(parts[1], {})[labels] = float(parts[3])
    return found


def names(texts: list[str]) -> set[str]:
    """Names of our raw metrics in expressions (those with a colon are recorded by the rules)."""
    return {
        name
        for text in texts
        for name in re.findall(r"(?<![\w:])nla_monitor_(?!rule_id|phase|severity)\w+(?!:)\b", text)
    }


def test_every_metric_that_a_rule_or_dashboard_reads_is_served(series: dict[str, Any]) -> None:
    rules = yaml.safe_load((INTEGRATIONS / "prometheus/nla-monitor.rules.yaml").read_text(encoding="utf-8"))
    views = yaml.safe_load((INTEGRATIONS / "grafana/views.yaml").read_text(encoding="utf-8"))["prometheus"]
    asked = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    asked += [query["ask"] for board in views.values() for panel in board["panels"] for query in panel["queries"]]
    # Of exporters, and there is none here; test_telemetry_delivery reads it from a process that has one.
    wanted = names(asked) - {"nla_monitor_telemetry_lost_total"}
    assert len(wanted) > 15
    assert wanted <= set(series), wanted - set(series)
    recorded = {rule["record"] for group in rules["groups"] for rule in group["rules"] if "record" in rule}
    used = {name for text in asked for name in re.findall(r"nla_monitor:\w+(?::\w+)?", text)}
    assert used == recorded, used ^ recorded


def test_each_rule_has_its_series_from_the_start(series: dict[str, Any]) -> None:
    for name in (
        "matches_total",
        "unjudged_total",
        "guarantees_voided_total",
        "guarantees_void",
        "guarantees_standing",
    ):
        assert 'nla_monitor_rule_id="my-rule"' in series[f"nla_monitor_{name}"], name
    assert series["nla_monitor_verbalizations_total"] == {'outcome="ok"': 4.0, 'outcome="error"': 0.0}
    assert set(series["nla_monitor_store_drops"].values()) == {0.0}
    assert list(series["nla_monitor_clock_skewed_total"].values()) == [0.0], "so that the first is an increase"
    # The run was never registered, which must not hide its alert.
    assert list(series["nla_monitor_alerts_firing"].values()) == [1.0]


def test_what_explanations_leave_out_has_a_sum_and_a_count(series: dict[str, Any]) -> None:
    """Unlike the FVE, of which Prometheus gets neither: its lowest bounds are negative."""
    ((labels, count),) = series["nla_monitor_fidelity_unexplained_count"].items()
    assert (labels, count) == ('nla_monitor_phase="train"', 4.0)
    assert series["nla_monitor_fidelity_unexplained_sum"][labels] > 0
    assert "nla_monitor_fidelity_fve_sum" not in series
