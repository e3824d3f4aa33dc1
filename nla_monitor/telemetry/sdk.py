"""An OpenTelemetry SDK for our own applications (CLI, worker process); library code never imports this.

Configured by the standard variables, most of them read by the SDK itself:

- ``OTEL_TRACES_EXPORTER``, ``OTEL_METRICS_EXPORTER``, ``OTEL_LOGS_EXPORTER``: ``otlp``, ``console``, ``none``, or a
  list of them; metrics also ``prometheus``. Default: ``otlp`` when an OTLP endpoint is set, ``none`` otherwise.
- ``OTEL_EXPORTER_OTLP_ENDPOINT``, ``..._HEADERS``, ``..._PROTOCOL`` and the like; ``OTEL_SDK_DISABLED``;
  ``OTEL_SERVICE_NAME``; ``OTEL_RESOURCE_ATTRIBUTES``; ``OTEL_EXPORTER_PROMETHEUS_HOST`` (default localhost);
  ``OTEL_BSP_*``, ``OTEL_BLRP_*``, ``OTEL_METRIC_EXPORT_INTERVAL``, ``OTEL_TRACES_SAMPLER``.

What was exported and what was lost is counted (``telemetry.delivery``), told as ``nla_monitor.telemetry.*`` and, at the
end, in the log.

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
from typing import Any, Final, Self
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
from nla_monitor.telemetry.delivery import (
    REASONS,
    CountedLogs,
    CountedSpans,
    Signal,
    Tally,
    counted,
    in_own_words,
    observe,
)
from nla_monitor.telemetry.facade import Telemetry

logger = logging.getLogger("nla_monitor.telemetry")

# A leased batch may hold so many samples, each of another trace (config: nla.batch_size).
MAX_LINKS: Final = 4096
DEFAULT_PROMETHEUS_PORT: Final = 9464
_PATIENCE: Final = 5.0
"""Seconds that an orderly end may take."""
_AFTER_FAILURE: Final = 1.0
_LAST_SHARE: Final = 0.3
"""Of the time for an orderly end, what the metrics may take at least."""
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
    _tallies: list[Tally] = field(default_factory=list, repr=False)

    def telemetry(self, config: TelemetryConfig | None = None) -> Telemetry:
        """The facade over these providers."""
        return Telemetry(self.tracer_provider, self.meter_provider, self.logger_provider, config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The orderly end; a short one after an exception, whose message must not wait for a dead endpoint."""
        self.shutdown(_PATIENCE if kind is None else _AFTER_FAILURE)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """What became of each signal, by ``signal/exporter``: see ``Tally.counts``."""
        return {f"{tally.signal}/{tally.exporter}": tally.counts for tally in self._tallies}

    def shutdown(self, timeout: float = _PATIENCE) -> bool:
        """Send what is left and stop; False when a dead endpoint did not let it finish within ``timeout`` seconds.

        The wait is bounded: what could not be sent by then is lost, counted, and a warning says so. Metrics go last,
        so that the last ones say what became of the other signals. May be called twice.
        """
        deadline = time.monotonic() + timeout
        threads = [_start_shutdown(provider) for provider in (self.tracer_provider, self.logger_provider)]
        _join(threads, deadline - timeout * _LAST_SHARE)
        threads.append(_start_shutdown(self.meter_provider))
        _join(threads, deadline)
        finished = not any(thread.is_alive() for thread in threads)
        if not finished:
            self._give_up()
        server, self._server = self._server, None
        if server is not None:  # it may be scraped until the end
            server.shutdown()
            server.server_close()
        self._sum_up(finished=finished, timeout=timeout)
        self.tracer_provider, self.logger_provider = trace.NoOpTracerProvider(), events.NoOpLoggerProvider()
        self.meter_provider = metrics.NoOpMeterProvider()
        return finished

    def _give_up(self) -> None:
        """End the exporters themselves: their retries would go on in threads of a process that lives on."""
        for tally in self._tallies:
            try:
                tally.end()
            except Exception as error:  # noqa: BLE001 -- an exporter's own fault ends no process
                logger.warning("telemetry: an exporter could not be ended (%s)", type(error).__name__)

    def _sum_up(self, *, finished: bool, timeout: float) -> None:
        for tally in self._tallies:
            tally.close()
        if not finished:
            logger.warning("telemetry could not be sent within %.0f s and is lost: is the OTLP endpoint up?", timeout)
        for name, counts in self.counts.items():
            lost = {reason: counts[reason] for reason in REASONS if counts[reason]}
            told = ", ".join(f"{count} lost ({reason})" for reason, count in lost.items()) or "none lost"
            level = logging.WARNING if lost else logging.INFO
            logger.log(level, "telemetry: %s: %d exported, %s", name, counts["exported"], told)


def configure(service_name: str = "nla-monitor", metrics_port: int | None = None, *, serve: bool = True) -> SdkHandle:
    """Build the SDK from the environment; nothing is registered globally.

    Args:
        service_name: unless ``OTEL_SERVICE_NAME`` says otherwise.
        metrics_port: serve Prometheus metrics at ``/metrics`` on this port; 0 takes a free one.
        serve: False: never serve them, whatever the environment says. The port belongs to this process's worker.

    Raises:
        ConfigError: an unknown exporter or protocol, or the port is taken.
        MissingExtraError: an exporter that is asked for is not installed.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        if metrics_port is not None:
            logger.warning("OTEL_SDK_DISABLED is set: no metrics are served on port %d", metrics_port)
        return SdkHandle(trace.NoOpTracerProvider(), metrics.NoOpMeterProvider(), events.NoOpLoggerProvider())
    resource = _resource(service_name)
    tallies: list[Tally] = []
    readers = [_metric_reader(name, tallies) for name in _exporters("metrics") if name != "prometheus"]
    if metrics_port is None and serve and "prometheus" in _exporters("metrics"):
        metrics_port = _prometheus_port()
    server: WSGIServer | None = None
    if metrics_port is not None:
        reader, server = _prometheus(metrics_port)
        readers.append(reader)
    handle = SdkHandle(
        _tracer_provider(resource, tallies),
        MeterProvider(readers, resource, shutdown_on_exit=False) if readers else metrics.NoOpMeterProvider(),
        _logger_provider(resource, tallies),
        server.server_port if server is not None else None,
        server,
        tallies,
    )
    observe(handle.meter_provider, tallies)
    in_own_words()
    return handle


def _join(threads: list[threading.Thread], deadline: float) -> None:
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


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


def _tracer_provider(resource: Resource, tallies: list[Tally]) -> trace.TracerProvider:
    names = _exporters("traces")
    if not names:
        return trace.NoOpTracerProvider()
    limited = os.environ.get("OTEL_SPAN_LINK_COUNT_LIMIT") or os.environ.get("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT")
    limits = SpanLimits() if limited else SpanLimits(max_links=MAX_LINKS)
    provider = TracerProvider(resource=resource, shutdown_on_exit=False, span_limits=limits)
    for name in names:
        capacity = _queue("OTEL_BSP")
        tally = _tally(tallies, "traces", name, capacity)
        inner = BatchSpanProcessor(counted(_exporter("traces", name), tally), max_queue_size=capacity)
        provider.add_span_processor(CountedSpans(inner, tally))
    return provider


def _logger_provider(resource: Resource, tallies: list[Tally]) -> events.LoggerProvider:
    names = _exporters("logs")
    if not names:
        return events.NoOpLoggerProvider()
    provider = LoggerProvider(resource=resource, shutdown_on_exit=False)
    for name in names:
        capacity = _queue("OTEL_BLRP")
        tally = _tally(tallies, "logs", name, capacity)
        inner = BatchLogRecordProcessor(counted(_exporter("logs", name), tally), max_queue_size=capacity)
        provider.add_log_record_processor(CountedLogs(inner, tally))
    return provider


def _tally(tallies: list[Tally], signal: Signal, exporter: str, capacity: int | None = None) -> Tally:
    tallies.append(tally := Tally(signal, exporter, capacity))
    return tally


def _queue(prefix: str) -> int:
    """Records that may wait for a batch processor; what the SDK would only log, or not say at all, is an error here."""
    sizes = []
    for name, default in ((f"{prefix}_MAX_QUEUE_SIZE", 2048), (f"{prefix}_MAX_EXPORT_BATCH_SIZE", 512)):
        text = os.environ.get(name, "").strip() or str(default)
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError(f"{name}={text!r} is not a positive whole number; the default is {default}")
        sizes.append(int(text))
    if sizes[1] > sizes[0]:
        raise ConfigError(
            f"{prefix}_MAX_EXPORT_BATCH_SIZE is {sizes[1]}, more than {prefix}_MAX_QUEUE_SIZE, which is {sizes[0]}; "
            "set a smaller batch or a longer queue"
        )
    return sizes[0]


def _metric_reader(name: str, tallies: list[Tally]) -> MetricReader:
    exporter = counted(_exporter("metrics", name), _tally(tallies, "metrics", name))
    try:
        return PeriodicExportingMetricReader(exporter)
    except ValueError as error:
        raise ConfigError("OTEL_METRIC_EXPORT_INTERVAL is not a positive number of milliseconds") from error


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
    extra = "otlp-grpc" if name.endswith("_grpc") else "otlp"
    raise MissingExtraError(package, extra, "sending telemetry by OTLP")


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
