"""Lightning integration of nla_monitor."""

from __future__ import annotations

from nla_monitor_lightning.callback import NLALightningCallback

__all__ = ["NLALightningCallback"]
