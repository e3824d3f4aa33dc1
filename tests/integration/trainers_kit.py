"""What the tests of trainers share: the bundled organism as the model, a monitor that only stores, what it stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nla_monitor import Monitor, NLAMonitorCallback
from nla_monitor.annotations import sequence_id
from nla_monitor.organism import load_target
from nla_monitor.store.queries import SampleView
from tests.integration.training import Losses, rows

CAPTURE = {
    "tokens_per_sequence": 2,
    "sequences_per_step": 64,
    "store_text": False,
    "skip_first": 0,
    "norm_sink_factor": None,
}
STEPS, BATCH = 3, 2


def settings(folder: Path, **overrides: Any) -> dict[str, Any]:
    """A monitor that stores what it samples and reads nothing."""
    return {"database": str(folder / "monitor.db"), "capture": CAPTURE, "worker": "external", **overrides}


def callback(folder: Path, **overrides: Any) -> NLAMonitorCallback:
    return NLAMonitorCallback(**settings(folder, **overrides))


def fresh_model() -> tuple[Any, Any]:
    """The same weights and the same random numbers to come, every time."""
    torch.manual_seed(0)
    return load_target("planted")


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    """Training arguments that every trainer of the transformers family takes."""
    return {
        "output_dir": str(folder / "trainer"),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 3e-4,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
        **more,
    }


def stored(monitor: Monitor) -> list[SampleView]:
    """Everything that the run stored; nothing was lost and nothing of ours failed."""
    assert not monitor.stats.faults
    assert not monitor.stats.dropped
    found = monitor.repository.samples(monitor.run_id, newest_first=False, limit=10_000)
    assert len(found) == monitor.stats.written > 0
    return found


__all__ = ["BATCH", "CAPTURE", "STEPS", "Losses", "arguments", "assert_same_bits", "callback", "fresh_model", "rows"]
__all__ += ["sequence_id", "settings", "stored", "weights"]
