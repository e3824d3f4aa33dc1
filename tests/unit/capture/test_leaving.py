"""A host that ends while threads of ours are at work ends as it would without them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HOST = """
import torch
from capture_kit import make_model, token_batch
from nla_monitor.capture import Capture
from nla_monitor.config import CaptureConfig, QueueConfig
from nla_monitor.guard import Guard

def sink(samples):
    matrix = torch.randn({size}, {size})
    while {forever}:
        matrix = matrix @ matrix
        matrix /= matrix.norm()
        {between}

queue = QueueConfig(write_interval_seconds=0.05)
capture = Capture(CaptureConfig(), run_id="r", layer=1, sink=sink, guard=Guard(), queue=queue)
model = make_model()
capture.attach(model)
with torch.no_grad():
    for number in range(3):
        model(token_batch(2, 12, seed=number))
import time
time.sleep(0.3)
print("done")
"""


def _end(program: str) -> tuple[int, str, float]:
    began = time.monotonic()
    folders = os.pathsep.join([str(HERE), str(HERE.parents[2]), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


@pytest.mark.parametrize("attempt", range(3))
def test_a_thread_at_work_in_torch_does_not_abort_the_host(attempt: int) -> None:
    """Where to stop it may, its work or a checkpoint of it ends, within the patience of an exit."""
    between = "from nla_monitor.leaving import checkpoint; checkpoint()"
    code, said, _ = _end(HOST.format(forever="True", between=between, size=700))
    assert (code, said) == (0, "done\n"), attempt


def test_work_without_an_end_is_not_waited_for_for_long() -> None:
    """It is no torch that holds the thread up here: a server that does not answer, say."""
    program = HOST.format(forever="time.sleep(1) is None", between="", size=2)
    program = "import time" + program
    code, said, seconds = _end(program)
    assert (code, said) == (0, "done\n")
    assert seconds < 60
