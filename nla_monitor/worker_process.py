"""The worker as its own process: ``python -m nla_monitor.worker_process``, started by ``supervisor.WorkerProcess``.

Reads its config as one line of JSON from standard input; the end of that input means: read what is left, then go.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from typing import IO

import torch

from nla_monitor.config import MonitorConfig
from nla_monitor.errors import NLAMonitorError
from nla_monitor.telemetry import sdk
from nla_monitor.worker import Worker

logger = logging.getLogger("nla_monitor.worker")

READY = "nla_monitor worker ready"


def main() -> int:
    """Worker end of the pipe."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    config = MonitorConfig.model_validate_json(sys.stdin.readline())
    _be_modest(config)
    handle = sdk.configure("nla-monitor-worker", metrics_port=config.worker.metrics_port)
    stop, finish = threading.Event(), threading.Event()
    threading.Thread(target=_wait_for_end, args=(sys.stdin, finish), name="nla-monitor-pipe", daemon=True).start()
    try:
        worker = Worker(config)
        logger.info("%s (pid %d)", READY, os.getpid())
        worker.run(stop, finish)
        worker.close()
    except NLAMonitorError:
        logger.exception("worker cannot go on")
        return 1
    finally:
        handle.shutdown()
    return 0


def _be_modest(config: MonitorConfig) -> None:
    """The host comes first: lower priority on a shared CPU, and few threads."""
    if config.nla.device.startswith("cpu"):
        with contextlib.suppress(OSError, AttributeError):  # not on every platform
            os.nice(5)
        torch.set_num_threads(config.nla.threads or 1)


def _wait_for_end(pipe: IO[str], finish: threading.Event) -> None:
    while pipe.readline():
        pass
    finish.set()


if __name__ == "__main__":
    sys.exit(main())
