"""An OpenTelemetry SDK for our own applications (CLI, worker process); library code never imports this.

Configured by the standard variables, most of them read by the SDK itself:

- ``OTEL_TRACES_EXPORTER``, ``OTEL_METRICS_EXPORTER``, ``OTEL_LOGS_EXPORTER``: ``otlp``, ``console``, ``none``, or a
  list of them; metrics also ``prometheus``. Default: ``otlp`` when an OTLP endpoint is set, ``none`` otherwise.
- ``OTEL_EXPORTER_OTLP_ENDPOINT``, ``..._HEADERS``, ``..._PROTOCOL`` and the like; ``OTEL_SDK_DISABLED``;
  ``OTEL_SERVICE_NAME``; ``OTEL_RESOURCE_ATTRIBUTES``; ``OTEL_EXPORTER_PROMETHEUS_HOST`` (default localhost).

The console exporters write to standard error here, since standard output belongs to the command's own result.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import Any, Final, Literal
from wsgiref.simple_server import WSGIServer

from opentelemetry import metrics, trace
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from nla_monitor.config import TelemetryConfig
from nla_monitor.errors import ConfigError, MissingExtraError
from nla_monitor.telemetry import events
from nla_monitor.telemetry.facade import Telemetry

logger = logging.getLogger("nla_monitor.telemetry")

Signal = Literal["traces", "metrics", "logs"]

# A leased batch may hold so many samples, each of another trace (config: nla.batch_size).
MAX_LINKS: Final = 4096
DEFAULT_PROMETHEUS_PORT: Final = 9464
_PROTOCOLS: Final = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}


@dataclass
class SdkHandle:
    """A configured SDK: its providers, and the way to end it."""

    tracer_provider: trace.TracerProvider
    meter_provider: metrics.MeterProvider
    logger_provider: events.LoggerProvider
    metrics_port: int | None = None
    """Port of ``/metrics``, the real one when 0 was asked for."""
    _server: WSGIServer | None = field(default=None, repr=False)

    def telemetry(self, config: TelemetryConfig | None = None) -> Telemetry:
        """The facade over these providers."""
        return Telemetry(self.tracer_provider, self.meter_provider, self.logger_provider, config)

    def shutdown(self, timeout: float = 5.0) -> bool:
        """Send what is left and stop; False when a dead endpoint did not let it finish within ``timeout`` seconds.

        The wait is bounded: what could not be sent by then is lost, and a warning says so. May be called twice.
        """
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        threads = [_start_shutdown(provider) for provider in (self.tracer_provider, self.logger_provider)]
        threads.append(_start_shutdown(self.meter_provider))
        deadline = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        finished = not any(thread.is_alive() for thread in threads)
        if not finished:
            logger.warning("telemetry could not be sent within %.0f s and is lost: is the OTLP endpoint up?", timeout)
        self.tracer_provider, self.logger_provider = trace.NoOpTracerProvider(), events.NoOpLoggerProvider()
        self.meter_provider = metrics.NoOpMeterProvider()
        return finished


def configure(service_name: str = "nla-monitor", metrics_port: int | None = None) -> SdkHandle:
    """Build the SDK from the environment; nothing is registered globally.

    Args:
        service_name: unless ``OTEL_SERVICE_NAME`` says otherwise.
        metrics_port: serve Prometheus metrics at ``/metrics`` on this port; 0 takes a free one.

    Raises:
        ConfigError: an unknown exporter or protocol, or the port is taken.
        MissingExtraError: an exporter that is asked for is not installed.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        if metrics_port is not None:
            logger.warning("OTEL_SDK_DISABLED is set: no metrics are served on port %d", metrics_port)
        return SdkHandle(trace.NoOpTracerProvider(), metrics.NoOpMeterProvider(), events.NoOpLoggerProvider())
    resource = _resource(service_name)
    readers = [_metric_reader(name) for name in _exporters("metrics") if name != "prometheus"]
    if metrics_port is None and "prometheus" in _exporters("metrics"):
        metrics_port = _prometheus_port()
    server: WSGIServer | None = None
    if metrics_port is not None:
        reader, server = _prometheus(metrics_port)
        readers.append(reader)
    return SdkHandle(
        _tracer_provider(resource),
        MeterProvider(readers, resource, shutdown_on_exit=False) if readers else metrics.NoOpMeterProvider(),
        _logger_provider(resource),
        server.server_port if server is not None else None,
        server,
    )


def _start_shutdown(provider: object) -> threading.Thread:
    stop: Callable[[], object] = getattr(provider, "shutdown", lambda: None)
    thread = threading.Thread(target=stop, name="nla-monitor-telemetry-shutdown", daemon=True)
    thread.start()
    return thread


def _resource(service_name: str) -> Resource:
    own = Resource.create({})
    if str(own.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
        own = own.merge(Resource({"service.name": service_name}))
    return own


def _tracer_provider(resource: Resource) -> trace.TracerProvider:
    names = _exporters("traces")
    if not names:
        return trace.NoOpTracerProvider()
    limited = os.environ.get("OTEL_SPAN_LINK_COUNT_LIMIT") or os.environ.get("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT")
    limits = SpanLimits() if limited else SpanLimits(max_links=MAX_LINKS)
    provider = TracerProvider(resource=resource, shutdown_on_exit=False, span_limits=limits)
    for name in names:
        provider.add_span_processor(BatchSpanProcessor(_exporter("traces", name)))
    return provider


def _logger_provider(resource: Resource) -> events.LoggerProvider:
    names = _exporters("logs")
    if not names:
        return events.NoOpLoggerProvider()
    provider = LoggerProvider(resource=resource, shutdown_on_exit=False)
    for name in names:
        provider.add_log_record_processor(BatchLogRecordProcessor(_exporter("logs", name)))
    return provider


def _metric_reader(name: str) -> MetricReader:
    return PeriodicExportingMetricReader(_exporter("metrics", name))


def _exporters(signal: Signal) -> list[str]:
    """Names of the exporters of a signal, as the environment asks."""
    variable = f"OTEL_{signal.upper()}_EXPORTER"
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT")
    default = "otlp" if any(os.environ.get(endpoint) for endpoint in endpoints) else "none"
    value = os.environ.get(variable, "").strip() or default
    names = [name.strip().lower() for name in value.split(",") if name.strip()]
    valid = ["otlp", "console", "none", *(["prometheus"] if signal == "metrics" else [])]
    for name in names:
        if name not in valid:
            raise ConfigError(f"{variable}={value!r}: unknown exporter {name!r}; valid: {', '.join(valid)}")
    return [name for name in names if name != "none"]


def _exporter(signal: Signal, name: str) -> Any:
    """An exporter object, found as the SDK finds it: by entry point."""
    group = f"opentelemetry_{signal}_exporter"
    if name == "console":
        return _load(group, "console")(out=sys.stderr)
    specific = os.environ.get(f"OTEL_EXPORTER_OTLP_{signal.upper()}_PROTOCOL")
    protocol = specific or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    if protocol not in _PROTOCOLS:
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol!r}; valid: {', '.join(_PROTOCOLS)}")
    return _load(group, _PROTOCOLS[protocol])()


def _load(group: str, name: str) -> Any:
    for point in entry_points(group=group, name=name):
        return point.load()
    package = f"opentelemetry-exporter-{name.replace('_', '-')}"
    raise MissingExtraError(package, "otlp", "sending telemetry by OTLP")


def _prometheus_port() -> int:
    text = os.environ.get("OTEL_EXPORTER_PROMETHEUS_PORT", "") or str(DEFAULT_PROMETHEUS_PORT)
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"OTEL_EXPORTER_PROMETHEUS_PORT={text!r} is not a port number") from error


def _prometheus(port: int) -> tuple[MetricReader, WSGIServer]:
    """A reader that the HTTP server collects from at each scrape."""
    try:
        import prometheus_client  # noqa: PLC0415 -- optional extra
        from opentelemetry.exporter.prometheus import PrometheusMetricReader  # noqa: PLC0415 -- optional extra
    except ImportError as error:
        raise MissingExtraError("opentelemetry-exporter-prometheus", "prometheus", "serving /metrics") from error
    host = os.environ.get("OTEL_EXPORTER_PROMETHEUS_HOST") or "localhost"
    try:
        server, _ = prometheus_client.start_http_server(port, addr=host)
    except OSError as error:
        raise ConfigError(
            f"metrics cannot be served on {host}:{port}: {error.strerror or error}; choose another --metrics-port"
        ) from error
    return PrometheusMetricReader(), server
