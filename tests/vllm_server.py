"""A real vLLM server on a CPU, for the opt-in tier: VLLM_PYTHON names the interpreter of an environment with one."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

VARIABLE = "VLLM_PYTHON"
START_SECONDS = 280.0


def interpreter() -> str:
    """The interpreter; without one the test is skipped."""
    found = os.environ.get(VARIABLE)
    if not found:
        pytest.skip(f"{VARIABLE} names no interpreter of an environment with vLLM")
    return found


def bare_copy(folder: Path, to: Path) -> Path:
    """A checkpoint without weights beside the model's own, which vLLM would not take."""
    shutil.copytree(folder, to)
    for weights in to.glob("*.safetensors"):
        if weights.name != "model.safetensors":
            weights.unlink()
    return to


@contextmanager
def serving(model: Path, log: Path, *arguments: str) -> Iterator[str]:
    """URL of a server of ``model`` in float32 on one core; it is ended, with all its processes, at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [interpreter(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32"]
    command += ["--served-model-name", "organism", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "2048", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NLA_MONITOR_")}
    environment |= {
        "PYTHONPATH": str(Path(__file__).parent / "vllm_cpu"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        _await(f"http://127.0.0.1:{port}", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(30)


def _await(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health", timeout=2.0).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    pytest.fail(f"vLLM did not start: {log.read_text(errors='replace')[-3000:]}")
