"""What a dead collector does to the memory of a process that goes on emitting, and whether every span is accounted for.

Light on purpose: the process that is measured imports no torch. It is a fresh one:

    python -m tests.benchmarks.telemetry_memory 100000
"""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from nla_monitor.telemetry import sdk

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
WARM_UP: Final = 0.2
"""Share of the spans until queue, allocator and interpreter have what they will keep."""


def memory(spans: int) -> dict[str, Any]:
    """Memory of a process of its own that emits so many spans, and as many events, to a collector that is down."""
    command = [sys.executable, "-m", "tests.benchmarks.telemetry_memory", str(spans)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return {"memory": json.loads(done.stdout)}


def emitted_into_the_void(spans: int) -> dict[str, Any]:
    """RSS along the way; the slope is of what came after the warm-up."""
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = f"http://127.0.0.1:{closed_port()}"
    handle = sdk.configure("benchmark", metrics_port=0)
    telemetry = handle.telemetry()
    before, sizes, started = rss(), [], time.perf_counter()
    for number in range(1, spans + 1):
        with telemetry.evaluate_span(number):
            telemetry.guarantee_voided("rule")
        if number % max(spans // 50, 1) == 0:
            sizes.append((number, rss()))
    seconds = time.perf_counter() - started
    gc.collect()
    after = rss()
    ended = time.perf_counter()
    finished = handle.shutdown(timeout=2.0)
    counts = handle.counts["traces/otlp"]
    late = [(number, size) for number, size in sizes if number > WARM_UP * spans]
    slope = float(np.polyfit(*zip(*late, strict=True), 1)[0])
    return {
        "spans": spans,
        "rss_before_mb": round(before / 2**20, 2),
        "rss_warm_mb": round(late[0][1] / 2**20, 2),
        "rss_after_mb": round(after / 2**20, 2),
        "slope_bytes_per_span": round(slope, 2),
        "span_us": round(seconds / spans * 1e6, 2),
        "shutdown_seconds": round(time.perf_counter() - ended, 2),
        "shutdown_finished": finished,
        "counts": counts,
        "adds_up": counts["emitted"] == spans == sum(counts.values()) - counts["emitted"],
    }


def closed_port() -> int:
    """A port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def rss() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * PAGE


if __name__ == "__main__":
    print(json.dumps(emitted_into_the_void(int(sys.argv[1]))))
