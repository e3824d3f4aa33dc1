"""nla_monitor for the OpenAI Agents SDK: activations of a local model on the agent, turn and call they belong to.

    from agents import add_trace_processor
    from nla_monitor_openai_agents import NLATraceProcessor

    monitor = Monitor.from_config("nla-monitor.yaml").attach(model, tokenizer)
    add_trace_processor(NLATraceProcessor(monitor))

Needs the extra ``nla-monitor[openai-agents]``.
"""

from __future__ import annotations

from nla_monitor.errors import MissingExtraError

try:
    import agents  # noqa: F401 -- only asks whether it is there, for an error that says what to install
except ModuleNotFoundError as error:
    raise MissingExtraError("openai-agents", "openai-agents", "nla_monitor_openai_agents") from error

from nla_monitor.agent_calls import CallStats, SpanMonitor
from nla_monitor_openai_agents.hooks import NLARunHooks
from nla_monitor_openai_agents.processor import NLATraceProcessor

__all__ = ["CallStats", "NLARunHooks", "NLATraceProcessor", "SpanMonitor"]
