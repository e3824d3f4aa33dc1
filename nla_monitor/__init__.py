"""nla_monitor: reads what a model represents, not only what it says.

Natural Language Autoencoders for the oversight of training runs and agents: activation in, evidence-backed alert out.
The names below are the public surface; they load on first use, so that importing the package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nla_monitor_lightning import NLALightningCallback
    from nla_monitor_transformers import NLAMonitorCallback, NLAMonitorReward

    from nla_monitor.config import MonitorConfig, load_config
    from nla_monitor.errors import NLAMonitorError
    from nla_monitor.monitor import Monitor
    from nla_monitor.records import (
        ActivationSample,
        AgentContext,
        Alert,
        AlertState,
        Completion,
        Explanation,
        Fidelity,
        Match,
        Phase,
        Reading,
        Severity,
        TriageState,
    )
    from nla_monitor.worker import Worker

__version__ = "0.1.0"

_HOME = {
    "ActivationSample": "nla_monitor.records",
    "AgentContext": "nla_monitor.records",
    "Alert": "nla_monitor.records",
    "AlertState": "nla_monitor.records",
    "Completion": "nla_monitor.records",
    "Explanation": "nla_monitor.records",
    "Fidelity": "nla_monitor.records",
    "Match": "nla_monitor.records",
    "Monitor": "nla_monitor.monitor",
    "MonitorConfig": "nla_monitor.config",
    "NLALightningCallback": "nla_monitor_lightning",
    "NLAMonitorCallback": "nla_monitor_transformers",
    "NLAMonitorError": "nla_monitor.errors",
    "NLAMonitorReward": "nla_monitor_transformers",
    "Phase": "nla_monitor.records",
    "Reading": "nla_monitor.records",
    "Severity": "nla_monitor.records",
    "TriageState": "nla_monitor.records",
    "Worker": "nla_monitor.worker",
    "load_config": "nla_monitor.config",
}

__all__ = [
    "ActivationSample",
    "AgentContext",
    "Alert",
    "AlertState",
    "Completion",
    "Explanation",
    "Fidelity",
    "Match",
    "Monitor",
    "MonitorConfig",
    "NLALightningCallback",
    "NLAMonitorCallback",
    "NLAMonitorError",
    "NLAMonitorReward",
    "Phase",
    "Reading",
    "Severity",
    "TriageState",
    "Worker",
    "load_config",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'nla_monitor' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
