"""Where activations come from: a tap in the model's process, a replay, or a vLLM server. One interface for all."""

from __future__ import annotations

from nla_monitor.sources.base import ActivationSource
from nla_monitor.sources.opening import open_source
from nla_monitor.sources.replay import ReplaySource
from nla_monitor.sources.tap import TapSource
from nla_monitor.sources.vllm import CaptureReplica, HiddenStatesFolder

__all__ = ["ActivationSource", "CaptureReplica", "HiddenStatesFolder", "ReplaySource", "TapSource", "open_source"]
