"""nla_monitor for Inspect AI: activations of a local model on the evaluation's sample and model call they belong to.

    model = get_model("hf/...")
    monitor = Monitor.from_config("nla-monitor.yaml").attach(model.api.model, model.api.tokenizer)
    install(monitor, model=model)
    eval(task, model=model)

Needs the extra ``nla-monitor[inspect]``.
"""

from __future__ import annotations

from nla_monitor.errors import MissingExtraError

try:
    import inspect_ai  # noqa: F401 -- only asks whether it is there, for an error that says what to install
except ModuleNotFoundError as error:
    raise MissingExtraError("inspect-ai", "inspect", "nla_monitor_inspect") from error

from nla_monitor.agent_calls import CallStats
from nla_monitor_inspect.hooks import AlertingMonitor, NLAHooks, install

__all__ = ["AlertingMonitor", "CallStats", "NLAHooks", "install"]
