"""What watching an agent costs, and whether every sample lands where it belongs.

Four parts. *Latency*: a LangGraph agent with two tools over an 85M-parameter model, run with and without monitor and
handler in turns, and without once more (the A/A row is the noise). *Attribution*: three conversations of the organism
at once; each sample is compared with what a witness saw. *Events*: time spent in the handler. *Memory*: agent
runs, a tenth of them cancelled, half of these without any word to the handler.

    python -m tests.benchmarks.agent --json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.agent_latency import latency
from tests.benchmarks.agent_parts import attribution, events, memory


def measure(folder: Path, *, pairs: int, turns: int, event_runs: int, runs: int) -> dict[str, Any]:
    """All parts; the figures as one mapping."""
    return {
        **latency(folder / "latency", pairs),
        **attribution(folder / "attribution", turns),
        **events(folder / "events", event_runs),
        **memory(folder / "memory", runs),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit code 1 if a sample is out of place or a fault of ours was swallowed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--pairs", type=int, default=30, help="agent runs with and without the handler")
    parser.add_argument("--turns", type=int, default=32, help="tasks in each of the three conversations")
    parser.add_argument("--event-runs", type=int, default=2_000)
    parser.add_argument("--runs", type=int, default=10_000, help="agent runs of the memory part")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            Path(folder),
            pairs=options.pairs,
            turns=options.turns,
            event_runs=options.event_runs,
            runs=options.runs,
        )
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:28} {value}")
    return 0 if result["attribution"] == 1.0 and not result["faults"] else 1


if __name__ == "__main__":
    sys.exit(main())
