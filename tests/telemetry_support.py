"""In-memory OpenTelemetry providers: what a backend would have received."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from nla_monitor.config import TelemetryConfig
from nla_monitor.telemetry import Telemetry


@dataclass
class Backend:
    """Where the signals of a test arrive."""

    tracer_provider: TracerProvider
    meter_provider: MeterProvider
    logger_provider: LoggerProvider
    _spans: InMemorySpanExporter
    _logs: InMemoryLogRecordExporter
    _reader: InMemoryMetricReader

    def telemetry(self, **config: Any) -> Telemetry:
        return Telemetry(
            self.tracer_provider, self.meter_provider, self.logger_provider, TelemetryConfig.model_validate(config)
        )

    def spans(self) -> list[Any]:
        return [span for span in self._spans.get_finished_spans() if span.name.startswith("nla_monitor.")]

    def events(self) -> list[Any]:
        return [data.log_record for data in self._logs.get_finished_logs()]

    def points(self) -> dict[str, list[Any]]:
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        metrics = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics]
        return {metric.name: list(metric.data.data_points) for metric in metrics}


@contextmanager
def in_memory_backend() -> Iterator[Backend]:
    resource = Resource({"service.name": "test"})
    spans, logs, reader = InMemorySpanExporter(), InMemoryLogRecordExporter(), InMemoryMetricReader()
    tracer_provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    tracer_provider.add_span_processor(SimpleSpanProcessor(spans))
    logger_provider = LoggerProvider(resource=resource, shutdown_on_exit=False)
    logger_provider.add_log_record_processor(SimpleLogRecordProcessor(logs))
    meter_provider = MeterProvider([reader], resource, shutdown_on_exit=False)
    yield Backend(tracer_provider, meter_provider, logger_provider, spans, logs, reader)
    tracer_provider.shutdown()
    logger_provider.shutdown()
    meter_provider.shutdown()
