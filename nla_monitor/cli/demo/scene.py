"""Who takes part in a run of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nla_monitor.cli.demo.stories import Story
from nla_monitor.cli.demo.view import View
from nla_monitor.monitor import Monitor


@dataclass(frozen=True, slots=True)
class Scene:
    """One story under way."""

    story: Story
    seed: int
    model: Any
    """The organism's target, a transformers causal LM; trained in place."""
    tokenizer: Any
    monitor: Monitor
    view: View
