"""What the tap survives: one row for each (family x compile x checkpointing x parallelism x precision), run for real.

Each case runs a tiny model of its family twice, plain and watched, and compares: losses and gradients (or the tokens
written) to the bit, the vectors with ``hidden_states[K + 1]`` of a plain eager model, the number of samples with what
the policy says (nothing missed, nothing twice), graphs compiled after the first step, graph breaks, faults. Cases of a
group share a process (or two ranks); a group that dies or takes too long costs its remaining rows, not the table.

    python -m tests.benchmarks.capture_matrix --json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.benchmarks.capture_matrix_data import GROUPS

_POLL_SECONDS = 0.2
_COLUMNS = TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()


def main() -> int:
    """Run the matrix, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--group", choices=sorted(GROUPS), action="append", help="only this group; may be repeated")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for each group")
    options = parser.parse_args()
    rows = [row for name in options.group or GROUPS for row in _group(name, options.timeout)]
    table = {"rows": rows, "ok": sum(row["ok"] is True for row in rows), "of": len(rows), "torch": version("torch")}
    if options.json:
        sys.stdout.write(json.dumps(table, indent=2) + "\n")
    else:
        sys.stdout.writelines(f"{_line(row)}\n" for row in rows)
    return 0 if all(row["ok"] is not False for row in rows) else 1


def _group(name: str, timeout: float) -> list[dict[str, Any]]:
    """The rows of a group, run in processes of its own."""
    cases, ranks = GROUPS[name]
    with tempfile.TemporaryDirectory() as kept:
        folder = Path(kept)
        processes = [_start(name, rank, folder) for rank in range(ranks)]
        results = folder / "results"
        until = time.monotonic() + timeout
        with Progress(*_COLUMNS, console=Console(stderr=True)) as bars:
            task = bars.add_task(name, total=len(cases))
            while any(process.poll() is None for process in processes) and time.monotonic() < until:
                bars.update(task, completed=len(_lines(results)))
                time.sleep(_POLL_SECONDS)
            bars.update(task, completed=len(_lines(results)))
        late = [process for process in processes if process.poll() is None]
        for process in late:
            process.kill()
        codes = [process.wait() for process in processes]
        rows = [json.loads(line) for line in _lines(results)]
        why = f"the group took more than {timeout:.0f} s" if late else f"its process ended with {codes}"
        said = (folder / "stderr-0").read_text().strip().splitlines()[-1:]
    return rows + [{**case.row, "ok": False, "reason": f"{why}: {said}"} for case in cases[len(rows) :]]


def _start(name: str, rank: int, folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.benchmarks.capture_matrix_run", name]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(GROUPS[name][1]),
        "LOCAL_WORLD_SIZE": str(GROUPS[name][1]),
        "MASTER_ADDR": "127.0.0.1",
    }
    with (folder / f"stderr-{rank}").open("wb") as errors:
        return subprocess.Popen(
            [*command, str(rank), str(folder)],
            stdout=errors,
            stderr=errors,
            env=environment,
        )


def _lines(results: Path) -> list[str]:
    """The rows so far, without one that is being written."""
    text = results.read_text() if results.exists() else ""
    return [line for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _line(row: dict[str, Any]) -> str:
    names = ("family", "compile", "attached", "checkpointing", "parallelism", "precision", "task", "backend")
    return " ".join(f"{row[name]:<19}" for name in names) + f" {row['ok']!s:<6} {row['reason'] or ''}"


if __name__ == "__main__":
    raise SystemExit(main())
