"""What arrives at an OpenTelemetry backend: whole spans, links, events and metrics."""

from __future__ import annotations

import ast
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.metrics import NoOpMeter, NoOpMeterProvider
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

import nla_monitor.telemetry
from nla_monitor import semconv
from nla_monitor.config import TelemetryConfig
from nla_monitor.guard import Guard
from nla_monitor.records import AgentContext, AlertState, RuleHeader, Severity, Support
from nla_monitor.telemetry import Telemetry, current_traceparent, delivery
from nla_monitor.telemetry.metrics import Instruments

TRACE_A, SPAN_A = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACE_B, SPAN_B = "1bf7651916cd43dd8448eb211c80319c", "c7ad6b7169203331"
SOURCE_A = f"00-{TRACE_A}-{SPAN_A}-01"
SOURCE_B = f"00-{TRACE_B}-{SPAN_B}-01"


def ids(context: Any) -> tuple[str, str]:
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def test_a_verbalized_batch_is_its_own_trace_with_one_link_per_distinct_source(
    backend: Any, make_sample: Callable[..., Any]
) -> None:
    samples = [
        make_sample("1", traceparent=SOURCE_A),
        make_sample("2", traceparent=SOURCE_B),
        make_sample("3", traceparent=SOURCE_A),
        make_sample("4"),
        make_sample("5", traceparent="no traceparent"),
    ]
    with backend.telemetry().verbalize_span(samples, av_hash="av-hash") as span:
        assert trace.get_current_span() is span
    (span,) = backend.spans()
    assert span.name == "nla_monitor.verbalize"
    assert span.parent is None
    assert [ids(link.context) for link in span.links] == [(TRACE_A, SPAN_A), (TRACE_B, SPAN_B)]
    assert f"{span.context.trace_id:032x}" not in (TRACE_A, TRACE_B)
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "verbalize",
        "gen_ai.provider.name": "nla_monitor",
        "gen_ai.conversation.id": "conversation-1",
        "openinference.span.kind": "EVALUATOR",
        "nla_monitor.batch.size": 5,
        "nla_monitor.batch.sources": 2,
        "nla_monitor.run.id": "run-1",
        "nla_monitor.layer": 4,
        "nla_monitor.phase": "agent",
        "nla_monitor.step": 7,
        "nla_monitor.av.hash": "av-hash",
    }
    assert span.status.is_ok
    assert span.instrumentation_scope.name == "nla_monitor"
    assert span.instrumentation_scope.schema_url.startswith("https://opentelemetry.io/schemas/")


def test_a_batch_of_several_runs_names_none_of_them(backend: Any, make_sample: Callable[..., Any]) -> None:
    with backend.telemetry().verbalize_span([make_sample("1"), make_sample("2", run_id="run-2", step=8)]):
        pass
    (span,) = backend.spans()
    assert "nla_monitor.run.id" not in span.attributes
    assert "nla_monitor.step" not in span.attributes
    assert span.attributes["nla_monitor.layer"] == 4


def test_child_mode_puts_a_span_into_every_source_trace(backend: Any, make_sample: Callable[..., Any]) -> None:
    samples = [make_sample("1", traceparent=SOURCE_A), make_sample("2", traceparent=SOURCE_B)]
    with backend.telemetry(parent="child").verbalize_span(samples):
        pass
    spans = backend.spans()
    assert [ids(span.parent) for span in spans] == [(TRACE_A, SPAN_A), (TRACE_B, SPAN_B)]
    assert [span.links for span in spans] == [(), ()]


def test_capture_of_one_source_is_a_child_of_it_and_of_several_is_linked(
    backend: Any, make_sample: Callable[..., Any]
) -> None:
    telemetry = backend.telemetry()
    with telemetry.capture_span([make_sample("1", traceparent=SOURCE_A), make_sample("2", traceparent=SOURCE_A)]):
        pass
    with telemetry.capture_span([make_sample("1", traceparent=SOURCE_A), make_sample("2", traceparent=SOURCE_B)]):
        pass
    one, several = backend.spans()
    assert one.name == several.name == "nla_monitor.capture"
    assert ids(one.parent) == (TRACE_A, SPAN_A)
    assert one.links == ()
    assert several.parent is None
    assert len(several.links) == 2


def test_evaluation_nests_in_a_surrounding_span_and_links_when_it_knows_its_sources(
    backend: Any, make_reading: Callable[..., Any]
) -> None:
    telemetry = backend.telemetry()
    with telemetry.verbalize_span([]) as outer, telemetry.evaluate_span(3):
        pass
    with telemetry.evaluate_span([make_reading(traceparent=SOURCE_A)]):
        pass
    inner, _, linked = backend.spans()
    assert inner.name == "nla_monitor.evaluate"
    assert inner.parent.span_id == outer.get_span_context().span_id
    assert inner.attributes["nla_monitor.batch.size"] == 3
    assert [ids(link.context) for link in linked.links] == [(TRACE_A, SPAN_A)]


def test_an_exception_of_the_block_leaves_unchanged_and_marks_the_span_by_type_only(backend: Any) -> None:
    error = ValueError("SECRET-TEXT")
    with pytest.raises(ValueError, match="SECRET-TEXT") as caught, backend.telemetry().evaluate_span(1):
        raise error
    assert caught.value is error
    (span,) = backend.spans()
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.attributes["error.type"] == "ValueError"
    assert "SECRET" not in span.to_json()


def test_a_span_that_goes_well_inside_an_except_block_is_not_marked_as_failed(backend: Any) -> None:
    telemetry = backend.telemetry()
    try:
        {}["handled elsewhere"]
    except KeyError:
        with telemetry.evaluate_span(1):
            pass
    assert "error.type" not in backend.spans()[0].attributes


def test_a_match_is_an_event_in_the_context_of_the_source_span_without_content(
    backend: Any, make_match: Callable[..., Any], make_reading: Callable[..., Any]
) -> None:
    backend.telemetry().evaluation_event(make_match(), make_reading(traceparent=SOURCE_A))
    (record,) = backend.events()
    assert record.event_name == "gen_ai.evaluation.result"
    assert ids(record) == (TRACE_A, SPAN_A)
    assert record.severity_text == "HIGH"
    assert dict(record.attributes) == {
        "gen_ai.evaluation.name": "evaluation-awareness",
        "gen_ai.evaluation.score.label": "match",
        "gen_ai.evaluation.score.value": 1.0,
        "gen_ai.conversation.id": "conversation-1",
        "nla_monitor.run.id": "run-1",
        "nla_monitor.sample.id": "sample-1",
        "nla_monitor.rule.id": "evaluation-awareness",
        "nla_monitor.rule.version": "v-abc",
        "nla_monitor.severity": "high",
        "nla_monitor.step": 7,
        "nla_monitor.position": 17,
        "nla_monitor.layer": 4,
        "nla_monitor.phase": "agent",
        "nla_monitor.av.hash": "av-hash",
        "nla_monitor.ar.hash": "ar-hash",
        "nla_monitor.fidelity.cosine": 0.93,
        "nla_monitor.fidelity.fve": 0.71,
        "nla_monitor.fidelity.denominator": "train-corpus",
    }
    (point,) = backend.points()["nla_monitor.matches"]
    assert (point.value, dict(point.attributes)) == (1, {"nla_monitor.rule.id": "evaluation-awareness"})


def test_a_fired_alert_is_a_linked_span_an_event_a_count_and_a_delay(
    backend: Any, make_alert: Callable[..., Any]
) -> None:
    backend.telemetry().alert(make_alert(traceparent=SOURCE_A), "fired", 3.0)
    (span,) = backend.spans()
    assert span.name == "nla_monitor.alert"
    assert [ids(link.context) for link in span.links] == [(TRACE_A, SPAN_A)]
    assert span.attributes["nla_monitor.alert.id"] == "alert-1"
    assert span.attributes["nla_monitor.calibration.status"] == "uncalibrated"
    assert span.attributes["gen_ai.operation.name"] == "alert"
    (record,) = backend.events()
    assert ids(record) == (TRACE_A, SPAN_A)
    assert record.attributes["gen_ai.evaluation.score.label"] == "firing"
    points = backend.points()
    labels = {"nla_monitor.rule.id": "evaluation-awareness", "nla_monitor.severity": "high"}
    assert [(point.value, dict(point.attributes)) for point in points["nla_monitor.alerts"]] == [(1, labels)]
    (delay,) = points["nla_monitor.detection.delay"]
    assert (delay.sum, delay.count, dict(delay.attributes)) == (3.0, 1, {"nla_monitor.severity": "high"})
    assert f"{delay.exemplars[0].span_id:016x}" == SPAN_A, "the exemplar leads from the number to the source span"


CALIBRATION = {
    "status": "certified",
    "says": "certified: SECRET-WORDS",
    "set": "benign",
    "calibration_id": "calibration-1",
    "alpha": 0.01,
    "sequences": 299,
    "fpr_upper": 0.00997,
    "confidence": 0.95,
    "p_value": 0.0033,
    "threshold": None,
    "run": {"e_value": 3.0},
}
CALIBRATED = {
    "nla_monitor.calibration.status": "certified",
    "nla_monitor.calibration.id": "calibration-1",
    "nla_monitor.calibration.set": "benign",
    "nla_monitor.calibration.sequences": 299,
    "nla_monitor.calibration.alpha": 0.01,
    "nla_monitor.calibration.fpr_upper": 0.00997,
    "nla_monitor.calibration.confidence": 0.95,
    "nla_monitor.calibration.p_value": 0.0033,
}


def test_an_alert_carries_checkpoints_evidence_and_guarantee_on_its_span_and_event(
    backend: Any, make_alert: Callable[..., Any], make_reading: Callable[..., Any]
) -> None:
    evidence = {
        "recurrence": {"readings": 4, "sequences": 2, "positions": 4, "steps": 3, "needed": 3},
        "raw_norm": 12.5,
        "swap_margin": {"exhibit": 0.21, "median": 0.2, "measured": 3, "required": {"min": 0.02}, "passed": True},
        "echo": {"exhibit": 0.6, "required": {"max": 0.5}, "passed": False},
        "claim_probability": {"required": {"min": 0.3}},
        "not_run": {"claim_probability": "SECRET-REASON"},
        "proxy": True,
    }
    alert = make_alert(evidence=evidence, calibration=CALIBRATION)
    backend.telemetry().alert(alert, "fired", 1.0, make_reading())
    (span,), (record,) = backend.spans(), backend.events()
    wanted = {
        "nla_monitor.rule.id": "evaluation-awareness",
        "nla_monitor.rule.version": "v-abc",
        "nla_monitor.av.hash": "av-hash",
        "nla_monitor.ar.hash": "ar-hash",
        "nla_monitor.fidelity.cosine": 0.93,
        "nla_monitor.fidelity.fve": 0.71,
        "nla_monitor.fidelity.denominator": "train-corpus",
        "nla_monitor.evidence.swap_margin": 0.21,
        "nla_monitor.evidence.echo": 0.6,
        "nla_monitor.evidence.failed": ("echo",),
        "nla_monitor.evidence.not_run": ("claim_probability",),
        "nla_monitor.evidence.readings": 4,
        "nla_monitor.evidence.proxy": True,
        **CALIBRATED,
    }
    for attributes in (span.attributes, record.attributes):
        assert {key: attributes.get(key) for key in wanted} == wanted
        assert "SECRET" not in str(dict(attributes))
        assert not any(key.startswith("nla_monitor.evidence.claim") for key in attributes), "never invented"


def test_a_match_carries_what_its_controls_measured_and_its_guarantee(
    backend: Any, make_match: Callable[..., Any], make_reading: Callable[..., Any]
) -> None:
    support = Support(
        "m", supported=True, controls={"swap_margin": 0.4, "norm": 1.1}, not_run={"agreement": "SECRET"}, score=0.4
    )
    backend.telemetry().evaluation_event(make_match(), make_reading(), support, CALIBRATION)
    (record,) = backend.events()
    wanted = {
        "nla_monitor.evidence.swap_margin": 0.4,
        "nla_monitor.evidence.norm": 1.1,
        "nla_monitor.evidence.not_run": ("agreement",),
        **CALIBRATED,
    }
    assert {key: record.attributes.get(key) for key in wanted} == wanted
    assert "SECRET" not in str(dict(record.attributes))


def test_an_alert_from_the_future_is_counted_said_once_and_delayed_by_nothing(
    backend: Any, make_alert: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The host's clock is ahead of the worker's."""
    telemetry = backend.telemetry()
    for delay in (-30.0, -3600.0, -0.001, 2.0):
        telemetry.alert(make_alert(), "fired", delay)
    points = backend.points()
    assert points["nla_monitor.clock.skewed"][0].value == 2
    (delay,) = points["nla_monitor.detection.delay"]
    assert (delay.sum, delay.count, delay.min) == (2.0, 4, 0.0)
    assert caplog.text.count("clocks of host and worker disagree") == 1
    assert "30.0 s" in caplog.text


HOSTILE = 'quote " back\\slash new\nline tab\t emoji 🧨 zero\0 half \ud800 '


def test_hostile_and_endless_names_are_bounded_and_stay_apart(
    backend: Any, make_alert: Callable[..., Any], make_sample: Callable[..., Any]
) -> None:
    telemetry = backend.telemetry()
    long = HOSTILE + "x" * 10_000
    for rule_id in (HOSTILE, long + "1", long + "2"):
        telemetry.alert(make_alert(rule_id=rule_id, explanation="e" * 20_000), "fired", 1.0)
    with telemetry.verbalize_span([make_sample(run_id=long, agent=AgentContext("a", conversation_id=long))]):
        pass
    rules = {point.attributes["nla_monitor.rule.id"] for point in backend.points()["nla_monitor.alerts"]}
    assert len(rules) == 3
    values = [value for span in backend.spans() for value in span.attributes.values() if isinstance(value, str)]
    for value in [*rules, *values]:
        assert len(value) <= 200
        value.encode()
    assert any(value.startswith('quote " back') for value in values)


def test_a_hosts_own_sink_may_have_any_name(backend: Any) -> None:
    telemetry = backend.telemetry()
    endless = HOSTILE + "x" * 10_000
    telemetry.expect_sinks([HOSTILE, endless])
    telemetry.delivery(HOSTILE, "failed")
    telemetry.delivery(endless, "delivered")
    points = backend.points()["nla_monitor.deliveries"]
    assert len(points) == 8, "a delivery counts on the series that was begun for it"
    for point in points:
        assert len(point.attributes["sink"]) <= 200
        point.attributes["sink"].encode()


def test_content_is_bounded_where_it_is_let_through(
    backend: Any, make_alert: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "SPAN_AND_EVENT")
    backend.telemetry().alert(make_alert(explanation="e\ud800" * 20_000), "fired", 1.0)
    for holder in (backend.spans()[0], backend.events()[0]):
        text = holder.attributes["gen_ai.evaluation.explanation"]
        assert len(text) == 8192
        text.encode()


def test_a_fidelity_that_is_no_number_does_not_spoil_the_sum(backend: Any, make_reading: Callable[..., Any]) -> None:
    telemetry = backend.telemetry()
    for fve in (math.nan, math.inf, 0.5):
        telemetry.fidelity(make_reading(fve=fve))
    (point,) = backend.points()["nla_monitor.fidelity.fve"]
    assert (point.sum, point.count) == (0.5, 1)


def test_faults_of_telemetry_itself_are_counted(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    monkeypatch.delenv("NLA_MONITOR_STRICT", raising=False)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Exploding(at="end"))
    telemetry = Telemetry(provider, backend.meter_provider)
    with telemetry.evaluate_span(1):
        pass
    (point,) = backend.points()["nla_monitor.telemetry.faults"]
    assert (point.value, dict(point.attributes)) == (1, {"place": "telemetry.span"})


def test_every_instrument_says_its_unit_and_what_it_counts() -> None:
    """And every histogram of ours its own boundaries: the default ones begin at 5."""
    made: list[tuple[str, str, str, str, Any]] = []

    class Recording(NoOpMeter):
        def _note(self, kind: str, name: str, unit: str, description: str, bounds: Any = None) -> None:
            made.append((kind, name, unit, description, bounds))

        def create_counter(self, name: str, unit: str = "", description: str = "") -> Any:
            self._note("counter", name, unit, description)
            return super().create_counter(name, unit, description)

        def create_gauge(self, name: str, unit: str = "", description: str = "") -> Any:
            self._note("gauge", name, unit, description)
            return super().create_gauge(name, unit, description)

        def create_observable_counter(
            self, name: str, callbacks: Any = None, unit: str = "", description: str = ""
        ) -> Any:
            self._note("counter", name, unit, description)
            return super().create_observable_counter(name, callbacks, unit, description)

        def create_histogram(
            self, name: str, unit: str = "", description: str = "", *, explicit_bucket_boundaries_advisory: Any = None
        ) -> Any:
            self._note("histogram", name, unit, description, explicit_bucket_boundaries_advisory)
            return super().create_histogram(name, unit, description)

    class Provider(NoOpMeterProvider):
        def get_meter(self, *_: Any, **__: Any) -> Any:
            return Recording("test")

    Instruments(Recording("test"), dict)
    delivery.observe(Provider(), [])
    names = {value for key, value in vars(semconv).items() if key.startswith("METRIC_")}
    assert {name for _, name, *_ in made} == names
    for kind, name, unit, description, bounds in made:
        assert unit, name
        assert len(description) > 10, name
        assert not name.endswith("total")
        if kind == "histogram":
            assert bounds, name
            assert list(bounds) == sorted(set(bounds))


def test_an_alert_without_a_source_has_its_event_in_its_own_span(backend: Any, make_alert: Callable[..., Any]) -> None:
    backend.telemetry().alert(make_alert(), "fired", None)
    (span,), (record,) = backend.spans(), backend.events()
    assert (record.trace_id, record.span_id) == (span.context.trace_id, span.context.span_id)
    assert "nla_monitor.detection.delay" not in backend.points()


def test_a_resolved_alert_is_told_but_not_counted_and_an_update_is_no_news(
    backend: Any, make_alert: Callable[..., Any]
) -> None:
    telemetry = backend.telemetry()
    telemetry.alert(make_alert(), "updated", 1.0)
    assert (backend.spans(), backend.events()) == ([], [])
    telemetry.alert(make_alert(state=AlertState.RESOLVED), "resolved", 1.0)
    (record,) = backend.events()
    assert record.attributes["gen_ai.evaluation.score.label"] == "resolved"
    assert record.attributes["gen_ai.evaluation.score.value"] == 0.0
    assert "nla_monitor.alerts" not in backend.points()


@pytest.mark.parametrize(
    ("value", "on_span", "on_event"),
    [
        (None, False, False),
        ("NO_CONTENT", False, False),
        ("true", False, False),
        ("1", False, False),
        ("SPAN_ONLY", True, False),
        ("event_only", False, True),
        ("SPAN_AND_EVENT", True, True),
    ],
)
def test_content_leaves_only_where_the_standard_variable_lets_it(
    backend: Any, records: Any, monkeypatch: pytest.MonkeyPatch, value: str | None, *, on_span: bool, on_event: bool
) -> None:
    if value is not None:
        monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", value)
    telemetry = backend.telemetry()
    with telemetry.verbalize_span([records.sample()]), telemetry.capture_span([records.sample()]):
        pass
    with telemetry.evaluate_span([records.reading()]):
        telemetry.evaluation_event(records.match(), records.reading())
    telemetry.alert(records.alert(), "fired", 1.0)
    telemetry.fidelity(records.reading())
    spans = "".join(span.to_json() for span in backend.spans())
    events = "".join(str(dict(record.attributes)) for record in backend.events())
    assert ("SECRET" in spans) is on_span
    assert ("SECRET" in events) is on_event
    assert "SECRET" not in str(backend.points())
    for never in ("SECRET-CONTEXT", "SECRET-GROUP"):
        assert never not in spans + events


def test_a_content_setting_that_means_nothing_is_told(
    backend: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "true")
    backend.telemetry()
    assert "no content is sent" in caplog.text


def test_every_span_carries_a_gen_ai_key(backend: Any, make_alert: Callable[..., Any]) -> None:
    """Some backends show only spans with such a key."""
    telemetry = backend.telemetry()
    with telemetry.capture_span([]), telemetry.verbalize_span([]), telemetry.evaluate_span(0):
        telemetry.alert(make_alert(), "fired", None)
    assert len(backend.spans()) == 4
    for span in backend.spans():
        assert any(key.startswith("gen_ai.") for key in span.attributes)


def test_the_counters_and_histograms_hold_what_was_said(backend: Any, make_reading: Callable[..., Any]) -> None:
    telemetry = backend.telemetry()
    telemetry.sampled(5)
    telemetry.dropped("queue_full", 2)
    telemetry.fault("hook", RuntimeError("x"))
    telemetry.verbalized(64, "ok", 1.7)
    telemetry.verbalized(1, "error", 0.0)
    telemetry.queue_size(12)
    telemetry.queue_size(9)
    telemetry.capture_duration(0.0002)
    telemetry.fidelity(make_reading())
    telemetry.fidelity(make_reading(fve=None))
    points = backend.points()
    counts = {
        name: [(point.value, dict(point.attributes)) for point in points[name]]
        for name in ("sampled", "dropped")
        for name in [f"nla_monitor.activations.{name}"]
    }
    assert counts["nla_monitor.activations.sampled"] == [(5, {})]
    assert counts["nla_monitor.activations.dropped"] == [(2, {"reason": "queue_full"})]
    (fault,) = points["nla_monitor.faults"]
    assert dict(fault.attributes) == {"place": "hook", "error.type": "RuntimeError"}
    assert {p.attributes["outcome"]: p.value for p in points["nla_monitor.verbalizations"]} == {"ok": 64, "error": 1}
    (duration,) = points["nla_monitor.verbalization.duration"]
    assert (duration.sum, duration.count) == (1.7, 1)
    assert points["nla_monitor.queue.size"][0].value == 9
    (fve,) = points["nla_monitor.fidelity.fve"]
    assert (fve.sum, fve.count, fve.min) == (0.71, 1, 0.71)


@pytest.mark.parametrize(
    ("name", "typical"),
    [
        ("nla_monitor.verbalization.duration", 0.7),
        ("nla_monitor.detection.delay", 4.0),
        ("nla_monitor.capture.overhead", 0.00012),
        ("nla_monitor.fidelity.fve", 0.55),
    ],
)
def test_histogram_buckets_fit_what_they_measure(
    backend: Any, make_alert: Callable[..., Any], make_reading: Callable[..., Any], name: str, typical: float
) -> None:
    """A typical value lies well inside the boundaries, not in the first or the last bucket."""
    telemetry = backend.telemetry()
    telemetry.verbalized(1, "ok", typical)
    telemetry.alert(make_alert(), "fired", typical)
    telemetry.capture_duration(typical)
    telemetry.fidelity(make_reading(fve=typical))
    (point,) = backend.points()[name]
    bucket = list(point.bucket_counts).index(1)
    assert 3 <= bucket <= len(point.explicit_bounds) - 3
    assert list(point.explicit_bounds) == sorted(set(point.explicit_bounds))


def test_expected_rules_start_at_zero(backend: Any) -> None:
    backend.telemetry().expect_rules([RuleHeader("r", "Title", "v", Severity.LOW)])
    (point,) = backend.points()["nla_monitor.alerts"]
    assert (point.value, dict(point.attributes)) == (
        0,
        {"nla_monitor.rule.id": "r", "nla_monitor.severity": "low"},
    )


def test_switched_off_nothing_is_sent(
    backend: Any,
    make_sample: Callable[..., Any],
    make_alert: Callable[..., Any],
    make_match: Callable[..., Any],
    make_reading: Callable[..., Any],
) -> None:
    telemetry = backend.telemetry(enabled=False)
    with telemetry.verbalize_span([make_sample(traceparent=SOURCE_A)]):
        telemetry.evaluation_event(make_match(), make_reading())
        telemetry.alert(make_alert(), "fired", 1.0)
        telemetry.sampled(3)
    assert (backend.spans(), backend.events(), backend.points()) == ([], [], {})


class Exploding(SpanProcessor):
    """A processor with a fault, as a user's own may have."""

    def __init__(self, *, at: str) -> None:
        self._at = at

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        if self._at == "start":
            raise RuntimeError("boom at start")

    def on_end(self, span: Any) -> None:
        if self._at == "end":
            raise RuntimeError("boom at end")


@pytest.mark.parametrize("at", ["start", "end"])
def test_a_fault_of_telemetry_never_reaches_the_caller(
    at: str, make_alert: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NLA_MONITOR_STRICT", raising=False)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Exploding(at=at))
    telemetry = Telemetry(provider)
    done = []
    for _ in range(3):
        with telemetry.verbalize_span([]):
            done.append(1)
    telemetry.alert(make_alert(), "fired", 1.0)
    assert done == [1, 1, 1]
    assert telemetry.faults == {"telemetry.span": 4}
    assert caplog.text.count("Traceback") == 1, "one traceback per kind, not one per batch"


@pytest.mark.parametrize("at", ["start", "end"])
def test_a_fault_of_telemetry_does_not_hide_the_error_of_the_block(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NLA_MONITOR_STRICT", raising=False)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(Exploding(at=at))
    with pytest.raises(KeyError), Telemetry(provider).evaluate_span(1):
        raise KeyError("mine")


def test_it_fits_the_guard_of_the_host_boundary(backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NLA_MONITOR_STRICT", raising=False)
    guard = Guard(on_fault=backend.telemetry().fault)
    with guard("capture.hook"):
        raise OSError("x")
    (point,) = backend.points()["nla_monitor.faults"]
    assert point.attributes["place"] == "capture.hook"


def test_the_current_traceparent_leads_back_to_the_span(backend: Any, make_sample: Callable[..., Any]) -> None:
    assert current_traceparent() is None
    with backend.tracer_provider.get_tracer("host").start_as_current_span("chat") as host:
        carried = current_traceparent()
    result = []
    # The worker is another thread or process: nothing may rest on ambient context.
    worker = threading.Thread(
        target=lambda: result.append(backend.telemetry().verbalize_span([make_sample(traceparent=carried)]).__enter__())
    )
    worker.start()
    worker.join()
    (link,) = result[0].links
    assert link.context.span_id == host.get_span_context().span_id


def test_by_default_the_global_providers_are_used_and_none_is_set() -> None:
    before = trace.get_tracer_provider()
    telemetry = Telemetry(config=TelemetryConfig())
    with telemetry.verbalize_span([]) as span:
        assert not span.is_recording()
    telemetry.sampled(1)
    assert trace.get_tracer_provider() is before


def test_library_code_depends_on_the_api_only() -> None:
    folder = Path(nla_monitor.telemetry.__file__).parent
    for path in folder.glob("*.py"):
        if path.name in {"sdk.py", "delivery.py"}:  # the second is the first one's
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert not (module or "").startswith(("opentelemetry.sdk", "opentelemetry.exporter")), path
            assert module not in {"nla_monitor.telemetry.sdk", "nla_monitor.telemetry.delivery"}, path
            assert not (isinstance(node, ast.Attribute) and node.attr.startswith("set_tracer_provider")), path


def test_spans_are_made_in_one_place_only() -> None:
    """Where each of them gets its ``gen_ai`` key; a span made elsewhere would vanish in Langfuse."""
    root = Path(nla_monitor.telemetry.__file__).parents[2]
    makers = {"start_span", "start_as_current_span"}
    found = {
        path.relative_to(root).as_posix()
        for folder in ("nla_monitor", "integrations")
        for path in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr in makers
    }
    assert found == {"nla_monitor/telemetry/spans.py"}
