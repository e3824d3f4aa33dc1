"""nla_monitor for smolagents: activations of a local model on the agent, run, step and call they belong to.

    model = TransformersModel("...")
    agent = ToolCallingAgent(tools=[...], model=model)
    monitor = Monitor.from_config("nla-monitor.yaml").attach(model.model, model.tokenizer)
    watch(agent, monitor)

Needs the extra ``nla-monitor[smolagents]``.
"""

from __future__ import annotations

from nla_monitor.errors import MissingExtraError

try:
    import smolagents  # type: ignore[import-untyped]  # noqa: F401 -- only asks whether it is there
except ModuleNotFoundError as error:
    raise MissingExtraError("smolagents", "smolagents", "nla_monitor_smolagents") from error

from nla_monitor.agent_calls import CallStats
from nla_monitor_smolagents.watch import AlertingMonitor, NLAStepCallback, watch

__all__ = ["AlertingMonitor", "CallStats", "NLAStepCallback", "watch"]
