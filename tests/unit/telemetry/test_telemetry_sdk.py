"""The SDK of our applications, against real HTTP."""

from __future__ import annotations

import gzip
import http.server
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from nla_monitor.errors import ConfigError, MissingExtraError
from nla_monitor.records import RuleHeader, Severity
from nla_monitor.telemetry import sdk

pytest.importorskip("prometheus_client")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=5) as response:
        return response.read().decode()


def test_metrics_can_be_scraped_under_their_prometheus_names(make_alert: Callable[..., Any]) -> None:
    handle = sdk.configure("nla-monitor-test", metrics_port=0)
    try:
        telemetry = handle.telemetry()
        telemetry.expect_rules([RuleHeader("quiet-rule", "Title", "v", Severity.LOW)])
        telemetry.alert(make_alert(), "fired", 4.0)
        telemetry.verbalized(64, "ok", 0.7)
        telemetry.dropped("queue_full", 3)
        telemetry.queue_size(9)
        assert handle.metrics_port
        text = scrape(handle.metrics_port)
    finally:
        assert handle.shutdown()
    lines = {line.split(" ")[0].split("{")[0] for line in text.splitlines() if not line.startswith("#")}
    assert {
        "nla_monitor_alerts_total",
        "nla_monitor_verbalizations_total",
        "nla_monitor_verbalization_duration_seconds_bucket",
        "nla_monitor_detection_delay_seconds_sum",
        "nla_monitor_activations_dropped_total",
        "nla_monitor_queue_size",
        "process_resident_memory_bytes",
    } <= lines
    (fired,) = [line for line in text.splitlines() if "_alerts_total{" in line and "evaluation-awareness" in line]
    assert fired.endswith(" 1.0")
    assert 'nla_monitor_rule_id="evaluation-awareness"' in fired
    assert 'nla_monitor_severity="high"' in fired
    (quiet,) = [line for line in text.splitlines() if "_alerts_total{" in line and "quiet-rule" in line]
    assert quiet.endswith(" 0.0")
    assert 'service_name="nla-monitor-test"' in text
    assert "run-1" not in text, "no run in a label: each would be a new time series"


def test_the_port_is_free_again_after_shutdown() -> None:
    first = sdk.configure(metrics_port=0)
    port = first.metrics_port
    first.shutdown()
    second = sdk.configure(metrics_port=port)
    assert second.metrics_port == port
    second.shutdown()
    second.shutdown()


def test_a_taken_port_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"{port}.*--metrics-port"):
            sdk.configure(metrics_port=port)


def test_without_any_variable_nothing_is_recorded_and_no_global_is_set() -> None:
    before = trace.get_tracer_provider()
    handle = sdk.configure()
    with handle.telemetry().verbalize_span([]) as span:
        assert not span.is_recording()
    assert trace.get_tracer_provider() is before
    assert handle.metrics_port is None
    assert handle.shutdown(timeout=1.0)


def test_sdk_disabled_wins(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    handle = sdk.configure(metrics_port=0)
    with handle.telemetry().verbalize_span([]) as span:
        assert not span.is_recording()
    assert handle.metrics_port is None
    assert "OTEL_SDK_DISABLED" in caplog.text


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", r"unknown exporter 'zipkin'; valid: otlp, console, none"),
        ("OTEL_METRICS_EXPORTER", "otlp,statsd", r"unknown exporter 'statsd'"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon", r"valid: http/protobuf, grpc"),
    ],
)
def test_a_wrong_variable_is_named_with_its_valid_values(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None, message: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:1")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        sdk.configure()


@pytest.mark.parametrize(("protocol", "extra"), [("http/protobuf", "otlp"), ("grpc", "otlp-grpc")])
def test_a_missing_exporter_names_its_extra(monkeypatch: pytest.MonkeyPatch, protocol: str, extra: str) -> None:
    monkeypatch.setattr(sdk, "entry_points", lambda **_: ())
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    with pytest.raises(MissingExtraError, match=rf"nla-monitor\[{extra}\]"):
        sdk.configure()


def test_a_missing_prometheus_client_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match=r"nla-monitor\[prometheus\]"):
        sdk.configure(metrics_port=0)


def test_console_exporters_leave_standard_output_to_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    handle = sdk.configure()
    with handle.telemetry().evaluate_span(2):
        pass
    assert handle.shutdown()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err)["name"] == "nla_monitor.evaluate"


def test_a_dead_endpoint_neither_blocks_nor_raises(
    monkeypatch: pytest.MonkeyPatch,
    make_alert: Callable[..., Any],
    make_sample: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    handle = sdk.configure()
    telemetry = handle.telemetry()
    started = time.perf_counter()
    for _ in range(500):
        with telemetry.verbalize_span([make_sample()]):
            telemetry.alert(make_alert(), "fired", 1.0)
    assert time.perf_counter() - started < 2.0
    started = time.perf_counter()
    assert not handle.shutdown(timeout=0.5)
    assert time.perf_counter() - started < 1.5
    assert "is the OTLP endpoint up" in caplog.text
    left = [thread for thread in threading.enumerate() if thread.name == "nla-monitor-telemetry-shutdown"]
    for thread in left:
        thread.join(5.0)
    assert not any(thread.is_alive() for thread in left), "retries go on in threads that nobody waits for"


def test_a_process_with_a_dead_endpoint_ends_in_time() -> None:
    code = (
        "from nla_monitor.telemetry import sdk\n"
        "h = sdk.configure()\n"
        "with h.telemetry().evaluate_span(1): pass\n"
        "h.shutdown(0.3)\n"
    )
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code],
        env={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "PATH": "/usr/bin:/bin"},
        check=True,
        capture_output=True,
        timeout=60,
    )
    assert time.perf_counter() - started < 20.0


class Receiver(http.server.BaseHTTPRequestHandler):
    received: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.received.append((self.path, body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[tuple[int, list[tuple[str, bytes]]]]:
    received: list[tuple[str, bytes]] = []
    handler = type("Handler", (Receiver,), {"received": received})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port, received
    server.shutdown()
    thread.join()
    server.server_close()


def test_all_three_signals_arrive_by_otlp_with_more_links_than_the_default_limit(
    receiver: Any, monkeypatch: pytest.MonkeyPatch, make_alert: Callable[..., Any], make_sample: Callable[..., Any]
) -> None:
    port, received = receiver
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "my-fleet")
    handle = sdk.configure("ignored")
    telemetry = handle.telemetry()
    samples = [make_sample(str(i), traceparent=f"00-{i + 1:032x}-{i + 1:016x}-01") for i in range(300)]
    with telemetry.verbalize_span(samples):
        pass
    telemetry.alert(make_alert(), "fired", 2.0)
    assert handle.shutdown()
    bodies = dict(received)
    assert set(bodies) == {"/v1/traces", "/v1/logs", "/v1/metrics"}
    traces = ExportTraceServiceRequest.FromString(bodies["/v1/traces"]).resource_spans[0]
    assert ("service.name", "my-fleet") in [(kv.key, kv.value.string_value) for kv in traces.resource.attributes]
    spans = {span.name: span for span in traces.scope_spans[0].spans}
    assert len(spans["nla_monitor.verbalize"].links) == 300
    logs = ExportLogsServiceRequest.FromString(bodies["/v1/logs"]).resource_logs[0].scope_logs[0].log_records
    assert [log.event_name for log in logs] == ["gen_ai.evaluation.result"]
    assert logs[0].span_id == spans["nla_monitor.alert"].span_id
    names = [
        metric.name
        for metric in ExportMetricsServiceRequest.FromString(bodies["/v1/metrics"])
        .resource_metrics[0]
        .scope_metrics[0]
        .metrics
    ]
    assert "nla_monitor.detection.delay" in names
