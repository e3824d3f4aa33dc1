"""A training run on several ranks; started by ``torchrun`` from the test."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from nla_monitor import NLAMonitorCallback
from tests.integration.training import train


def main() -> None:
    """Train under the monitor and leave one JSON file per rank."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    stop_on = sys.argv[2] if len(sys.argv) > 2 else None
    rank = os.environ["RANK"]
    callback = NLAMonitorCallback(
        database=str(folder / "monitor.db"),
        capture={"positions": "prompt", "triggers": ["\n"], "tokens_per_sequence": 1},
        stop_on=stop_on,
    )
    _, _, trainer = train(folder, [callback], steps=300 if stop_on else 8, ddp_backend="gloo")
    stats = callback.monitor.stats
    result = {
        "run": callback.monitor.run_id,
        "steps": trainer.state.global_step,
        "written": stats.written,
        "dropped": stats.dropped,
        "faults": stats.faults,
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
