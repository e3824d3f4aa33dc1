"""Instructions of a training step, counted under callgrind: no load of the machine moves these figures.

One process runs under valgrind: every arm warms up uncounted, then takes the same steps; what they leave to other
threads is finished between them, uncounted. A count is of the training thread's instructions on valgrind's simulated
processor (no AVX-512), a step on average. Some ten minutes for the thin model, on which the capture benchmark counts;
one step of 50M parameters would take as long.
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
STEPS = 4
WARM_UP = 4
"""Beyond the first steps, in which adapters are looked for that came late (once a run, not once a step)."""
_TOTAL = re.compile(r"^(?:totals|summary): (\d+)", re.MULTILINE)


def count_instructions(size: str, names: Sequence[str]) -> dict[str, Any]:
    """Per arm: the host's instructions a step, and what it adds to its baseline; ``skipped`` without valgrind."""
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


def _counts(out: Path, part: int) -> float:
    """Instructions of the training thread a step, in one dump."""
    return _total(out.with_name(f"{out.name}.{part}-01").read_text(encoding="utf-8")) / STEPS


def _total(text: str) -> int:
    found = _TOTAL.search(text)
    if found is None:
        raise ValueError("a callgrind dump without a total")
    return int(found.group(1))


def _against(counts: dict[str, float], name: str) -> dict[str, float]:
    base = ARMS[name].baseline if ARMS[name].baseline in counts else "plain"
    return {
        "host": round(counts[name]),
        "added": round(counts[name] - counts[base]),
        "ratio": round(counts[name] / counts[base], 6),
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
            for number in range(WARM_UP, WARM_UP + STEPS):
                torch._C._valgrind_toggle()
                arm.step(number)
                torch._C._valgrind_toggle()
                arm.settle()
            torch._C._valgrind_toggle()
            torch._C._valgrind_toggle_and_dump_stats()
            torch._C._valgrind_toggle()
            dumps += 2
            parts[arm.name] = dumps
        for arm in arms:
            arm.close()
    return parts


if __name__ == "__main__":
    print(json.dumps(_simulated(sys.argv[1], sys.argv[2].split(","))))
