"""Alternating measurements: every way of doing a thing runs once, then all of them again, in another order."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from rich.progress import Progress

Result = TypeVar("Result")
Ways = Mapping[str, Callable[[], Result]]


def alternate(
    ways: Ways[Result], repeats: int, progress: Progress, label: str, *, device: str
) -> tuple[dict[str, float], dict[str, Result]]:
    """Median seconds of each way, and what it last returned.

    The first round is warm-up and is not counted. The order changes from round to round (seeded), so that a change of
    the machine's load meets all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Result] = {}
    shuffle = random.Random(0)
    task = progress.add_task(label, total=(repeats + 1) * len(ways))
    for number in range(repeats + 1):
        for name in shuffle.sample(sorted(ways), len(ways)):
            taken, results[name] = timed(ways[name], device)
            if number:
                seconds[name].append(taken)
            progress.advance(task)
    return {name: statistics.median(values) for name, values in seconds.items()}, results


def timed(way: Callable[[], Result], device: str) -> tuple[float, Result]:
    """Seconds until the result is there, and the result."""
    _wait(device)
    started = time.perf_counter()
    result = way()
    _wait(device)
    return time.perf_counter() - started, result


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: str) -> str:
    """What the figures were measured on."""
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    load = os.getloadavg()[0]
    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} torch threads, "
        f"torch {torch.__version__}, load {load:.1f}"
    )
