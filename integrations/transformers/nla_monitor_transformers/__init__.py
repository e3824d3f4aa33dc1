"""transformers ``Trainer`` integration of nla_monitor; TRL's trainers derive from it."""

from __future__ import annotations

from nla_monitor_transformers.callback import NLAMonitorCallback
from nla_monitor_transformers.reward import NLAMonitorReward

__all__ = ["NLAMonitorCallback", "NLAMonitorReward"]
