"""Which activations of a running model are read, and how they get to the database without the model waiting."""

from __future__ import annotations

from nla_monitor.capture.capture import Capture
from nla_monitor.capture.keys import thinning_score
from nla_monitor.capture.layers import DecoderBlocks, find_blocks, unwrap
from nla_monitor.capture.session import SessionHandle, SessionRegistry
from nla_monitor.capture.stats import CaptureStats

__all__ = [
    "Capture",
    "CaptureStats",
    "DecoderBlocks",
    "SessionHandle",
    "SessionRegistry",
    "find_blocks",
    "thinning_score",
    "unwrap",
]
