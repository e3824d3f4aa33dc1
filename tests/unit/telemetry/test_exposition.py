"""Names that nobody should have chosen, on ``/metrics`` as Prometheus' own parsers read it, and through OTLP."""

from __future__ import annotations

import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from nla_monitor import semconv
from nla_monitor.records import AgentContext, RuleHeader, Severity
from nla_monitor.telemetry import bounded, sdk
from tests.conftest import missing_service
from tests.otlp_receiver import attributes, receiver

HOSTILE = (
    'quote " and } and {a="b"}',
    "new\nline\r\n# HELP nla_monitor_alerts_total broken",
    "back\\slash at the end\\",
    "emoji 🧨 and \u202eright to left",
    "tab\tzero\0",
    "half a surrogate \ud800",
    "ten kilobytes " + "x" * 10_000,
    "ten kilobytes " + "x" * 10_000 + "y",
    "",
)


@pytest.fixture
def page(make_alert: Callable[..., Any], make_match: Callable[..., Any], make_reading: Any) -> Iterator[str]:
    handle = sdk.configure("test", metrics_port=0)
    telemetry = handle.telemetry()
    telemetry.expect_rules(RuleHeader(name, name, "v", Severity.LOW) for name in HOSTILE)
    for name in HOSTILE:
        telemetry.alert(make_alert(rule_id=name), "fired", 2.0)
        telemetry.evaluation_event(make_match(rule_id=name), make_reading())
        telemetry.dropped(name, 1)
        telemetry.fault(name, RuntimeError(name))
        telemetry.unjudged(name, 1)
        telemetry.level(semconv.METRIC_ALERTS_FIRING, 1.0, {semconv.ATTR_RULE: name, semconv.ATTR_SEVERITY: "low"})
    telemetry.verbalized(3, "ok", 0.5)
    telemetry.fidelity(make_reading())
    telemetry.capture_duration(1e-4)
    telemetry.queue_size(3)
    with urllib.request.urlopen(f"http://localhost:{handle.metrics_port}/metrics", timeout=5) as response:
        yield response.read().decode()
    handle.shutdown()


def test_each_hostile_rule_is_one_series_that_reads_back_as_it_was(page: str) -> None:
    families = {family.name: family for family in text_string_to_metric_families(page)}
    for name in ("nla_monitor_alerts", "nla_monitor_matches", "nla_monitor_unjudged", "nla_monitor_alerts_firing"):
        labels = {one.labels["nla_monitor_rule_id"]: one.value for one in families[name].samples if one.value}
        assert set(labels) == {bounded.name(text) for text in HOSTILE}, name
        assert all(value == 1 for value in labels.values())
        assert all(len(label) <= bounded.NAME_CHARACTERS for label in labels)
    assert {one.labels["reason"] for one in families["nla_monitor_activations_dropped"].samples} == {
        bounded.name(text) for text in HOSTILE
    }


def test_prometheus_itself_takes_the_page(page: str) -> None:
    """``promtool check metrics`` also says what does not keep to Prometheus' naming rules."""
    if shutil.which("promtool") is None:
        missing_service("promtool is not installed (apt-get install prometheus)")
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "nla_monitor" in line]
    assert said == []
    assert "error while linting" not in done.stderr


def test_they_arrive_by_otlp_as_well(monkeypatch: pytest.MonkeyPatch, make_alert: Callable[..., Any]) -> None:
    """One string without a UTF-8 form would lose its whole batch."""
    with receiver() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        handle = sdk.configure("test")
        telemetry = handle.telemetry()
        for name in HOSTILE:
            telemetry.alert(make_alert(rule_id=name, agent=AgentContext("a", conversation_id=name)), "fired", 1.0)
        assert handle.shutdown()
    wanted = {bounded.name(name) for name in HOSTILE}
    for holders in (found.spans, found.logs, found.points["nla_monitor.alerts"]):
        assert {attributes(one)["nla_monitor.rule.id"] for one in holders} == wanted
    assert {attributes(one)["gen_ai.conversation.id"] for one in found.spans} == wanted


@given(st.text(), st.text())
def test_names_are_bounded_encodable_and_as_different_as_before(one: str, other: str) -> None:
    for text in (one, one * 50):
        assert len(bounded.name(text)) <= bounded.NAME_CHARACTERS
        bounded.name(text).encode()
    assert bounded.name(one) == one or len(one) > bounded.NAME_CHARACTERS
    long = "x" * bounded.NAME_CHARACTERS
    assert (bounded.name(long + one) == bounded.name(long + other)) == (one == other)
