"""Instructions of a training step, counted under callgrind: no load of the machine moves these figures.

One process runs under valgrind: every arm warms up uncounted, then takes the same step, its background work included.
A count is of the instructions of valgrind's simulated processor (no AVX-512), all threads; ``host`` is the training
thread alone. Many minutes for 50M parameters.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.capture_arms import ARMS, SIZES, Setting, unavailable

ROOT = Path(__file__).parents[2]
STEPS = 1
WARM_UP = 2
_TOTAL = re.compile(r"^(?:totals|summary): (\d+)", re.MULTILINE)


def count_instructions(size: str, names: Sequence[str]) -> dict[str, Any]:
    """Per arm: instructions of one step, and the ratios to the arm without a monitor; ``skipped`` without valgrind."""
    if shutil.which("valgrind") is None or not torch._C._valgrind_supported_platform():
        return {"skipped": "valgrind is not installed (apt-get install valgrind)"}
    wanted = [name for name in names if unavailable(name, None) is None]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind"
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--separate-threads=yes", "--quiet"]
        command += [f"--callgrind-out-file={out}", sys.executable, "-m", "tests.benchmarks.capture_instructions"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run(
            [*command, size, ",".join(wanted)], cwd=ROOT, env=environment, check=False, capture_output=True, text=True
        )
        if done.returncode:
            return {"skipped": f"callgrind failed: {done.stderr.strip()[-300:]}"}
        parts = json.loads(done.stdout.strip().splitlines()[-1])
        counts = {name: _counts(out, part) for name, part in parts.items()}
    return {name: _against(counts, name) for name in counts}


def _counts(out: Path, part: int) -> tuple[int, int]:
    """Instructions of the training thread, and of all threads, in one dump."""
    by_thread = {path.name.rpartition("-")[2]: path for path in out.parent.glob(f"{out.name}.{part}-*")}
    totals = {thread: _total(path.read_text(encoding="utf-8")) for thread, path in by_thread.items()}
    return totals["01"], sum(totals.values())


def _total(text: str) -> int:
    found = _TOTAL.search(text)
    if found is None:
        raise ValueError("a callgrind dump without a total")
    return int(found.group(1))


def _against(counts: dict[str, tuple[int, int]], name: str) -> dict[str, float]:
    base = ARMS[name].baseline if ARMS[name].baseline in counts else "plain"
    host, every = counts[name]
    return {
        "host": host,
        "all_threads": every,
        "host_ratio": round(host / counts[base][0], 6),
        "all_threads_ratio": round(every / counts[base][1], 6),
    }


def _simulated(size: str, names: Sequence[str]) -> dict[str, int]:
    """Inside valgrind: the steps; returns the number of each arm's dump."""
    torch.set_num_threads(1)
    parts, dumps = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(SIZES[size], Path(folder))
        arms = [ARMS[name](name, setting) for name in names]
        for arm in arms:
            for number in range(WARM_UP):
                arm.step(number)
                arm.settle()
        subprocess.run(
            ["callgrind_control", "--instr=on", str(os.getpid())], check=True, stdout=sys.stderr, stderr=sys.stderr
        )
        for arm in arms:
            torch._C._valgrind_toggle_and_dump_stats()  # what was counted so far is nobody's
            torch._C._valgrind_toggle()
            arm.step(WARM_UP)
            arm.settle()
            torch._C._valgrind_toggle_and_dump_stats()
            torch._C._valgrind_toggle()
            dumps += 2
            parts[arm.name] = dumps
        for arm in arms:
            arm.close()
    return parts


if __name__ == "__main__":
    print(json.dumps(_simulated(sys.argv[1], sys.argv[2].split(","))))
