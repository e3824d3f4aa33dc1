"""What capturing activations costs a training step: the monitor, and others that do the same, in one run.

Every arm trains a copy of one model (50M parameters by default) on the same batches: forward, backward, optimizer. The
arms take turns step by step, in random order; each ratio is paired with the step of the same number without a monitor.
``noise`` is a second arm without one: what differs there is the machine.

    python -m tests.benchmarks.capture --json                                   # fp32, eager
    python -m tests.benchmarks.capture --json --configurations all              # and bf16 autocast, and compiled
    python -m tests.benchmarks.capture --json --instructions                    # and of the thin model (valgrind; slow)
    python -m tests.benchmarks.capture --json --device cuda --size 1b --dtype bf16 --compile

Figures are ``p50`` (with a bootstrap interval) and ``p99`` of: ``overhead_ratio``, seconds; ``extra_ms``, their paired
difference (``fine``: over a model so thin that noise does not hide it); ``cpu_ratio``, CPU time of
the process during the step; ``cpu_ratio_with_background``, also that of finishing the background work afterwards. Peers
(nnsight, TransformerLens) may live in another interpreter, ``--peer-python``, and are then compared with a run without
capture in that interpreter; one that is not installed is ``skipped``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.capture_arms import ARMS, HOST, MONITOR, PEERS, PRECISIONS, SIZES, Arm, Setting, unavailable
from tests.benchmarks.capture_instructions import count_instructions
from tests.benchmarks.capture_timing import Record, alternate, compare

ROOT = Path(__file__).parents[2]
BAR = {"cpu": {"p50": 1.005}, "cuda": {"p50": 1.001, "p99": 1.01}}
CHECK_STEPS = 6
FINE = "thin"
"""Model on which a step's noise does not hide what is added to it."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured."""

    size: str = "50m"
    device: str = "cpu"
    precision: str = "fp32"
    backend: str | None = None
    steps: int = 60
    warm_up: int = 3
    arms: tuple[str, ...] = tuple(name for name in ARMS if name != HOST)
    peer_python: str | None = None
    fine_steps: int = 0


def measure(options: Options) -> dict[str, Any]:
    """One configuration: every arm that can run, against its baseline."""
    reasons = {name: unavailable(name, options.backend) for name in options.arms}
    names = [name for name, reason in reasons.items() if reason is None]
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(SIZES[options.size], Path(folder), options.device, options.precision, options.backend)
        with arms_of(names, setting) as arms:
            parameters = sum(one.numel() for one in arms[0].model.parameters())
            label = f"{options.precision}, {options.backend or 'eager'}"
            records = alternate(arms, options.warm_up + options.steps, options.warm_up, label=label)
            rows = {arm.name: {**_row(arm, records, options.warm_up), **arm.facts()} for arm in arms}
    rows.update({name: {"skipped": reason} for name, reason in reasons.items() if reason is not None})
    rows.update(_elsewhere(options, [name for name in reasons if reasons[name] is not None]))
    size, plain = setting.size, records["plain"]
    return {
        "precision": options.precision,
        "compile": options.backend,
        "device": options.device,
        "parameters": parameters,
        "batch": [size.batch, size.length],
        "steps": options.steps,
        "step_seconds": sorted(plain.wall[options.warm_up :])[options.steps // 2],
        "noise": rows.get("plain_again"),
        "monitor": {name: rows[name] for name in MONITOR if name in rows},
        HOST: rows.get(HOST),
        "peers": {name: rows[name] for name in PEERS if name in rows},
        "transformer_lens_own_forward": rows.get("transformer_lens_plain"),
        **_verdict(rows),
    }


@contextlib.contextmanager
def arms_of(names: Sequence[str], setting: Setting) -> Iterator[list[Arm]]:
    """The arms, closed at the end."""
    with contextlib.ExitStack() as stack:
        arms = []
        for name in names:
            arms.append(ARMS[name](name, setting))
            stack.callback(arms[-1].close)
        yield arms


def _row(arm: Arm, records: dict[str, Record], warm_up: int) -> dict[str, Any]:
    found = compare(records[arm.name], records[arm.baseline], warm_up)
    if arm.baseline != "plain" and "plain" in records:
        against = compare(records[arm.name], records["plain"], warm_up)
        found |= {
            "baseline": arm.baseline,
            "overhead_ratio_to_transformers": against["overhead_ratio"],
            "cpu_ratio_to_transformers": against["cpu_ratio"],
        }
    return found


def _verdict(rows: dict[str, Any]) -> dict[str, Any]:
    """Over the monitor's arms: sums and conjunctions."""
    ours = [rows[name] for name in MONITOR if name in rows]
    syncs = [row["syncs"] for row in ours]
    return {
        "recompiles": sum(row["recompiles"] for row in ours),
        "graph_breaks": sum(row["graph_breaks"] for row in ours),
        "syncs": None if None in syncs else sum(syncs),
        "loss_bitwise_equal": bool(ours) and all(row["loss_bitwise_equal"] for row in ours),
        "grads_bitwise_equal": bool(ours) and all(row["grads_bitwise_equal"] for row in ours),
        "weights_bitwise_equal": bool(ours) and all(row["weights_bitwise_equal"] for row in ours),
    }


def _elsewhere(options: Options, missing: Sequence[str]) -> dict[str, Any]:
    """Rows of peers that only another interpreter has; their baseline runs there, too."""
    wanted = [name for name in missing if unavailable(name, options.backend) and options.backend is None]
    if options.peer_python is None or not wanted:
        return {}
    command = [options.peer_python, "-m", "tests.benchmarks.capture", "--json", "--no-check"]
    command += ["--arms", ",".join(["plain", *wanted]), "--size", options.size, "--device", options.device]
    command += ["--dtype", options.precision, "--steps", str(options.steps), "--warm-up", str(options.warm_up)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout.strip():
        reason = f"{options.peer_python} failed: {done.stderr.strip().splitlines()[-1:]}"
        return {name: {"skipped": reason} for name in wanted}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    rows = {**found["peers"], "transformer_lens_plain": found["transformer_lens_own_forward"]}
    return {name: {**rows[name], "interpreter": options.peer_python} for name in wanted if rows.get(name) is not None}


def fine(options: Options, step_seconds: float) -> dict[str, Any]:
    """What a step costs more in milliseconds, over a thin model with as many blocks and the same batch.

    The work of a hook does not grow with the model's width, but what a machine's noise hides does: a thin model shows
    it. ``ratio``: what the milliseconds are to a step of the model that was asked for. More than there: while the
    thin model's operations are short, work beside them is met by more of them. ``default_host`` is without that work.
    """
    arms = (*options.arms, HOST)
    found = measure(replace(options, size=FINE, steps=options.fine_steps, peer_python=None, arms=arms))
    rows = {"noise": found["noise"], **found["monitor"], HOST: found[HOST], **found["peers"]}
    measured = {name: row["extra_ms"] for name, row in rows.items() if row is not None and "extra_ms" in row}
    return {
        name: {"extra_ms": extra, "ratio": round(1 + extra["p50"] / (1000 * step_seconds), 5)}
        for name, extra in measured.items()
    }


def check_compiled(device: str, backend: str) -> dict[str, Any]:
    """A small model under ``torch.compile``: recompilations, graph breaks and equality of bits, without timings."""
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(SIZES["tiny"], Path(folder), device, backend=backend)
        with arms_of(["plain", *MONITOR], setting) as arms:
            records = alternate(arms, CHECK_STEPS, warm_up=2)
    rows = {name: compare(records[name], records["plain"], 2) for name in MONITOR}
    return {"backend": backend, "plain_graph_breaks": records["plain"].graph_breaks, **_verdict(rows)}


def judge(found: dict[str, Any], device: str) -> dict[str, Any]:
    """The bar: p50 (and p99 on CUDA) of the default, and below every peer; by time and by CPU time."""
    default, bar = found["monitor"].get("default"), BAR[torch.device(device).type]
    if default is None:
        return {}
    peers = [row for row in found["peers"].values() if "skipped" not in row]

    def verdict(kind: str) -> dict[str, bool]:
        own = default[kind]
        return {
            **{f"{name}_met": own[name] <= limit for name, limit in bar.items()},
            "below_every_peer": bool(peers) and all(own["p50"] < row[kind]["p50"] for row in peers),
        }

    found_fine = {"fine": _finely(found["fine"], bar["p50"])} if "fine" in found else {}
    return {"limits": bar, "seconds": verdict("overhead_ratio"), "cpu": verdict("cpu_ratio"), **found_fine}


def _finely(rows: dict[str, Any], limit: float) -> dict[str, Any]:
    """The verdict by the thin model: the bar with all that runs beside, peers against the host's thread alone.

    ``below`` and ``above`` name peers whose whole interval lies on the other side of ours.
    """
    own, peers = rows[HOST], [name for name in PEERS if name in rows]
    return {
        "p50_met": rows["default"]["ratio"] <= limit,
        "below": [name for name in peers if own["extra_ms"]["p50_ci95"][1] < rows[name]["extra_ms"]["p50_ci95"][0]],
        "above": [name for name in peers if own["extra_ms"]["p50_ci95"][0] > rows[name]["extra_ms"]["p50_ci95"][1]],
    }


def run(options: Options, configurations: Sequence[tuple[str, str | None]], *, check: bool) -> dict[str, Any]:
    """Every configuration; the first one's figures stand at the top."""
    results = []
    for precision, backend in configurations:
        found = measure(replace(options, precision=precision, backend=backend))
        if options.size == "50m" and options.fine_steps:
            found["fine"] = fine(replace(options, precision=precision, backend=backend), found["step_seconds"])
        results.append({**found, "bar": judge(found, options.device)})
        torch._dynamo.reset()
    checked = {"compiled_check": check_compiled(options.device, "aot_eager")} if check else {}
    return {
        **results[0],
        **checked,
        "configurations": results[1:],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--size", choices=SIZES, default="50m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=PRECISIONS, default="fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile with its default backend")
    parser.add_argument("--configurations", choices=["one", "all"], default="one", help="all: fp32, bf16; compiled")
    parser.add_argument("--steps", type=int, default=60, help="measured steps of each arm")
    parser.add_argument("--fine-steps", type=int, default=150, help="steps of the thin model (0: without it)")
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="torch CPU threads")
    parser.add_argument(
        "--arms", default=",".join(name for name in ARMS if name != HOST), help="which arms, separated by commas"
    )
    parser.add_argument("--peer-python", default=os.environ.get("CAPTURE_PEER_PYTHON"))
    parser.add_argument("--no-check", action="store_true", help="without the small compiled check")
    parser.add_argument(
        "--instructions", action="store_true", help="count the thin model's instructions, too (ten minutes)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit code 1 if the monitor changed a bit or captured nothing."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    torch._dynamo.config.recompile_limit = 64  # every arm compiles the same code objects
    backend = "inductor" if options.compile else None
    configurations: list[tuple[str, str | None]] = [(options.dtype, backend)]
    if options.configurations == "all":
        every = [(precision, kind) for kind in (None, "inductor") for precision in ("fp32", "bf16-autocast")]
        configurations += [one for one in every if one not in configurations]
    wanted = Options(
        size=options.size,
        device=options.device,
        steps=options.steps,
        warm_up=options.warm_up,
        arms=tuple(options.arms.split(",")),
        peer_python=options.peer_python,
        fine_steps=options.fine_steps,
    )
    found = run(wanted, configurations, check=not options.no_check)
    if options.instructions:
        found["instructions"] = count_instructions(FINE, wanted.arms)
    if options.json:
        print(json.dumps(found))
    else:
        print(json.dumps(found, indent=2))
    ours = found["monitor"].values()
    fine = all(row["loss_bitwise_equal"] and row["grads_bitwise_equal"] and row["samples"] for row in ours)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
