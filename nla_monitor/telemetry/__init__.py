"""OpenTelemetry: spans, metrics and evaluation events; ``telemetry.sdk`` is for applications (CLI, worker)."""

from nla_monitor.telemetry.facade import Telemetry
from nla_monitor.telemetry.spans import current_traceparent

__all__ = ["Telemetry", "current_traceparent"]
