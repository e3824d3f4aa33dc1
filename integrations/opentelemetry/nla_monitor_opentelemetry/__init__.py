"""nla_monitor for any agent framework that emits OpenTelemetry spans (``gen_ai.*`` or OpenInference).

    from nla_monitor import Monitor
    from nla_monitor_opentelemetry import NLASpanProcessor

    monitor = Monitor.from_config("nla-monitor.yaml").attach(model, tokenizer)
    tracer_provider.add_span_processor(NLASpanProcessor(monitor))

No code of the agent changes. Needs nothing beyond what ``nla-monitor`` itself requires.
"""

from __future__ import annotations

from nla_monitor.agent_calls import CallStats, SpanMonitor
from nla_monitor_opentelemetry.processor import NLASpanProcessor

__all__ = ["CallStats", "NLASpanProcessor", "SpanMonitor"]
