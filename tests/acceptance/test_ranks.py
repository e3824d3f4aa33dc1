"""Two ranks, one run: each samples its own data, one worker reads it, and both stop at the same step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nla_monitor.store.repository import Repository
from nla_monitor.store.session import open_engine

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Two processes on this machine; what each of them reported."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-m", "tests.acceptance.rank_program", str(folder), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def test_each_rank_samples_its_own_data_into_one_run(tmp_path: Path) -> None:
    """Both ranks' samples are in one run, none twice, all read by the one worker."""
    first, second = run_ranks(tmp_path)
    assert first["run"] == second["run"]
    assert first["written"] > 0
    assert second["written"] > 0
    assert not first["dropped"] | second["dropped"] | first["faults"] | second["faults"]
    repository = Repository(open_engine(f"sqlite:///{tmp_path / 'monitor.db'}"))
    samples = repository.samples(run_id=first["run"], limit=100_000)
    assert {sample.rank for sample in samples} == {0, 1}
    assert len(samples) == first["written"] + second["written"]
    assert {sample.state for sample in samples} == {"read"}
    by_rank = [{sample.sequence_id for sample in samples if sample.rank == rank} for rank in (0, 1)]
    assert not by_rank[0] & by_rank[1], "the ranks read different sequences"


@pytest.mark.slow
def test_both_ranks_stop_at_the_same_step(tmp_path: Path) -> None:
    """An alert seen by rank 0 ends the run on all ranks at one step; neither hangs in a gradient reduction."""
    first, second = run_ranks(tmp_path, "high")
    assert first["steps"] == second["steps"] < 300
