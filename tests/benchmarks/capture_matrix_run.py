"""One group of the capture matrix, in a process of its own: ``GROUP RANK FOLDER``; rows go to ``FOLDER/results``."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.capture_matrix_checks import NotRunError, check
from tests.benchmarks.capture_matrix_data import GROUPS, Case
from tests.benchmarks.capture_matrix_ranks import data_rank, everyone, join, leave, reads, wrapper


def run_group(name: str, rank: int, folder: Path) -> None:
    """Run the cases of a group as rank ``rank``."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    cases, ranks = GROUPS[name]
    if ranks > 1:
        join(rank, str(folder / "store"))
    with (folder / "results").open("a") if rank == 0 else open(os.devnull, "a") as results:  # noqa: PTH123 -- no path
        for row in _rows(cases, rank, ranks):
            results.write(json.dumps(row) + "\n")
            results.flush()
    if ranks > 1:
        leave()


def _rows(cases: Sequence[Case], rank: int, ranks: int) -> Iterator[dict[str, Any]]:
    for case in cases:
        started = time.perf_counter()
        answer = _answer(case, rank)
        answers = everyone(answer) if ranks > 1 else [answer]
        bad = next((one for one in answers if one["ok"] is not True), answers[0])
        yield {**case.row, **bad, "seconds": round(time.perf_counter() - started, 2)}


def _answer(case: Case, rank: int) -> dict[str, Any]:
    """The figures of a case; ``ok`` is None where it cannot be run here."""
    try:
        wrap = wrapper(case) if case.parallelism != "none" else None
        return check(case, data_rank(case, rank), wrap, reads=reads(case, rank))
    except NotRunError as refused:
        return {"ok": None, "reason": str(refused)}
    except Exception as error:  # noqa: BLE001 -- a row that fails is a row that says so
        text = str(error).strip() or "without a message"
        return {"ok": False, "reason": f"{type(error).__name__}: {text.splitlines()[0][:300]}"}


if __name__ == "__main__":
    run_group(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
