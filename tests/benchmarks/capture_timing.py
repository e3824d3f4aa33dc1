"""Paired measurements of several arms: who takes a step when, what a step costs, whether it computes the same bits."""

from __future__ import annotations

import gc
import hashlib
import random
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from tests.benchmarks.capture_arms import Arm

_RESAMPLES = 2_000


@dataclass
class Record:
    """What was measured of one arm, a value a step."""

    wall: list[float] = field(default_factory=list)
    """Seconds from the step's start to its end; on CUDA until the device is done."""
    cpu: list[float] = field(default_factory=list)
    """CPU seconds of the whole process meanwhile, threads included."""
    background: list[float] = field(default_factory=list)
    """CPU seconds that finishing the background work took after the step."""
    losses: list[Tensor] = field(default_factory=list)
    digests: dict[tuple[str, int], str] = field(default_factory=dict)
    """Of gradients and weights, after some steps."""
    recompiles: int = 0
    """Graphs compiled after the warm-up."""
    graph_breaks: int = 0
    syncs: int | None = None
    """Waits of the host for the device within one step; None where there is no such device."""


def alternate(
    arms: Sequence[Arm], steps: int, warm_up: int, seed: int = 0, label: str = "steps of all arms"
) -> dict[str, Record]:
    """All arms take step 0, then all step 1, and so on, each time in another (seeded) order; the rest waits.

    A change of the machine's load so meets all of them, and no arm always follows the same other.
    """
    records = {arm.name: Record() for arm in arms}
    shuffle = random.Random(seed)
    for number in track(range(steps), label, console=Console(stderr=True)):
        for arm in shuffle.sample(list(arms), len(arms)):
            _step(arm, records[arm.name], number, warm=number >= warm_up)
            if number in {warm_up, steps - 1}:
                _check(arm, records[arm.name], number)
    if arms and arms[0].setting.device != "cpu":
        for arm in arms:
            records[arm.name].syncs = count_syncs(arm, steps)
    return records


def _step(arm: Arm, record: Record, number: int, *, warm: bool) -> None:
    _synchronize(arm)
    before = _compiled()
    wall, cpu = time.perf_counter(), time.process_time()
    loss = arm.step(number)
    _synchronize(arm)
    stepped = time.process_time()
    record.wall.append(time.perf_counter() - wall)
    record.cpu.append(stepped - cpu)
    arm.settle()
    record.background.append(time.process_time() - stepped)
    record.losses.append(loss)
    graphs, breaks = (after - earlier for after, earlier in zip(_compiled(), before, strict=True))
    record.recompiles += graphs if warm else 0
    record.graph_breaks += breaks


def _synchronize(arm: Arm) -> None:
    if arm.setting.device != "cpu":
        torch.cuda.synchronize()


def _compiled() -> tuple[int, int]:
    """Graphs compiled and graph breaks met by dynamo in this process so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def _check(arm: Arm, record: Record, number: int) -> None:
    parameters = list(arm.model.parameters())
    record.digests["weights", number] = digest(parameters)
    record.digests["grads", number] = digest(one.grad for one in parameters if one.grad is not None)
    gc.collect()


def digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the tensors' bytes, in order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def count_syncs(arm: Arm, number: int) -> int:
    """Waits of the host for a CUDA device in one step, as ``torch.cuda.set_sync_debug_mode`` reports them."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            arm.step(number)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    arm.settle()
    return sum("synchronizing CUDA operation" in str(one.message) for one in caught)


def ratio(left: Sequence[float], right: Sequence[float]) -> dict[str, float | list[float]]:
    """Paired ratios ``left / right``: p50 with its 95 % bootstrap interval (percentiles, pairs resampled), p99."""
    return _summary(np.asarray(left) / np.asarray(right))


def extra_ms(left: Sequence[float], right: Sequence[float]) -> dict[str, float | list[float]]:
    """Paired differences ``left - right`` of seconds, in milliseconds; summarized as ``ratio`` does."""
    return _summary(1000 * (np.asarray(left) - np.asarray(right)))


def _summary(values: npt.NDArray[np.float64]) -> dict[str, float | list[float]]:
    drawn = np.random.default_rng(0).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[drawn], axis=1), [2.5, 97.5])
    return {
        "p50": round(float(np.median(values)), 5),
        "p99": round(float(np.percentile(values, 99)), 5),
        "p50_ci95": [round(float(low), 5), round(float(high), 5)],
    }


def compare(record: Record, baseline: Record, warm_up: int) -> dict[str, Any]:
    """The cost of an arm above its baseline, and whether it trained the same bits."""
    own, base = slice(warm_up, None), baseline.cpu[warm_up:]
    whole = [step + rest for step, rest in zip(record.cpu[own], record.background[own], strict=True)]
    return {
        "overhead_ratio": ratio(record.wall[own], baseline.wall[own]),
        "extra_ms": extra_ms(record.wall[own], baseline.wall[own]),
        "cpu_ratio": ratio(record.cpu[own], base),
        "cpu_ratio_with_background": ratio(whole, base),
        "recompiles": record.recompiles,
        "graph_breaks": record.graph_breaks - baseline.graph_breaks,
        "syncs": None if record.syncs is None or baseline.syncs is None else record.syncs - baseline.syncs,
        **same(record, baseline),
    }


def same(record: Record, baseline: Record) -> dict[str, bool]:
    """Bit for bit: every loss; gradients and weights where they were looked at."""
    return {
        "loss_bitwise_equal": len(record.losses) == len(baseline.losses) > 0
        and all(torch.equal(one, other) for one, other in zip(record.losses, baseline.losses, strict=True)),
        "grads_bitwise_equal": _equal(record.digests, baseline.digests, "grads"),
        "weights_bitwise_equal": _equal(record.digests, baseline.digests, "weights"),
    }


def _equal(left: Mapping[tuple[str, int], str], right: Mapping[tuple[str, int], str], kind: str) -> bool:
    wanted = {key: value for key, value in right.items() if key[0] == kind}
    return bool(wanted) and wanted == {key: value for key, value in left.items() if key[0] == kind}
