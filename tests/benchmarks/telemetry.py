"""What telemetry costs: time per sample in the real pipeline, series on ``/metrics``, memory with a dead collector.

    python -m tests.benchmarks.telemetry --json

``cost_per_sample_us`` is all telemetry of one sample, host side and worker, over the bundled organism: counters, spans
with links to their sources, evaluation events, histograms, the levels read from the store, encoding and sending by
batch processors to an OTLP receiver in another process, and a scrape every 15 s. ``share_of_pipeline`` sets it against
the same pipeline with telemetry off, in the same run (see ``telemetry_cost``). ``series`` is counted on ``/metrics`` of
a real worker process after 100 rules have fired in each of three runs. ``memory`` is flat if emitting 100,000 spans
into a port where nobody listens leaves no more than the bar's bytes per span, and if every span is accounted for.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from tests.benchmarks.rules import machine
from tests.benchmarks.telemetry_cost import cost
from tests.benchmarks.telemetry_memory import memory
from tests.benchmarks.telemetry_series import series

BARS: Final = {"share_of_pipeline": 0.02, "series": 2000, "slope_bytes_per_span": 16.0}
"""What each may be at most. A leak of one span would be some 2,000 bytes for each."""


def measure(folder: Path, *, pairs: int, samples: int, batch: int, rules: int, spans: int) -> dict[str, Any]:
    """All parts and the verdict."""
    found = {
        **memory(spans),
        **series(folder / "series", rules),
        **cost(folder / "cost", pairs=pairs, samples=samples, batch=batch),
    }
    return found | {"bars": BARS, **verdict(found), "machine": machine()}


def verdict(found: dict[str, Any]) -> dict[str, Any]:
    """Which bars are met."""
    flat = found["memory"]["slope_bytes_per_span"] <= BARS["slope_bytes_per_span"] and found["memory"]["adds_up"]
    met = {
        "share_of_pipeline": found["share_of_pipeline"] <= BARS["share_of_pipeline"],
        "series": found["series"] <= BARS["series"],
        "memory": flat,
    }
    return {"met": met, "passed": all(met.values())}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--pairs", type=int, default=7, help="runs with and without telemetry")
    parser.add_argument("--samples", type=int, default=256, help="of each run")
    parser.add_argument("--batch", type=int, default=64, help="samples of a lease")
    parser.add_argument("--rules", type=int, default=100)
    parser.add_argument("--spans", type=int, default=100_000)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            Path(folder),
            pairs=options.pairs,
            samples=options.samples,
            batch=options.batch,
            rules=options.rules,
            spans=options.spans,
        )
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:24} {value}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
