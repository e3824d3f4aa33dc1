"""A training run to be killed, interrupted or deprived: ``python -m tests.acceptance.training_program CONFIG``.

Says on standard output when it trains, and at the end what the monitor did, as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from nla_monitor import NLAMonitorCallback
from tests.integration.training import train


class Speaks(TrainerCallback):
    """Tells each finished step, and the worker's process id."""

    def __init__(self, watch: NLAMonitorCallback) -> None:
        self._watch = watch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        worker = self._watch.monitor._reader.process
        print(json.dumps({"step": state.global_step, "worker": worker.pid if worker else None}), flush=True)


def main() -> None:
    """Train with the callback."""
    torch.set_num_threads(1)
    settings = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    steps = settings.pop("steps")
    watch = NLAMonitorCallback(settings)
    with tempfile.TemporaryDirectory() as folder:
        losses, _, _ = train(Path(folder), [watch, Speaks(watch)], steps=steps)
    stats = watch.monitor.stats
    print(
        json.dumps(
            {
                "losses": losses,
                "written": stats.written,
                "sampled": stats.sampled,
                "dropped": dict(stats.dropped),
                "faults": dict(stats.faults),
                "run": watch.monitor.run_id,
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
