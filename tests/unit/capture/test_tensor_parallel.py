"""Tensor parallelism over two processes: a replicated residual stream is read, a sharded one is refused and said."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def _run(mode: str) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = os.pathsep.join([str(HERE), str(HERE.parents[2]), *sys.path])
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "sharded_program.py"), mode, str(rank), str(port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": folders},
        )
        for rank in range(2)
    ]
    found = []
    for process in processes:
        out, errors = process.communicate(timeout=800)
        assert process.returncode == 0, errors
        found.append(json.loads(out.splitlines()[-1]))
    return found


def test_a_replicated_residual_is_read() -> None:
    """As a replicated ``DTensor`` of a block that does not say how it came by it."""
    for told in _run("replicated"):
        assert told == {"samples": 24, "same": True, "skipped": {}, "problem": None}


@pytest.mark.parametrize("mode", ["plain", "transformers"])
def test_a_residual_that_all_ranks_have_is_read_by_one(mode: str) -> None:
    """As the plain tensors that the tensor-parallel styles of torch and of transformers leave."""
    first, second = _run(mode)
    assert first == {"samples": 24, "same": True, "skipped": {}, "problem": None}
    assert second == {"samples": 0, "same": False, "skipped": {}, "problem": None}


@pytest.mark.parametrize("mode", ["sequence", "local"])
def test_a_sharded_residual_is_skipped_counted_and_said(mode: str) -> None:
    """As a sharded ``DTensor``, and as the plain part that each rank holds of it."""
    for told in _run(mode):
        assert told["samples"] == 0
        assert told["skipped"] == {"sharded_residual": 1}
        assert "captured 0 of 1 expected forwards at layer 1" in told["problem"]
        assert "PrepareModuleOutput" in told["problem"]
