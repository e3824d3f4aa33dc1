"""transformers ``Trainer`` integration of nla_monitor."""

from __future__ import annotations

from nla_monitor_transformers.callback import NLAMonitorCallback

__all__ = ["NLAMonitorCallback"]
