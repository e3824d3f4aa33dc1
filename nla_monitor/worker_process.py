"""The worker as its own process: ``python -m nla_monitor.worker_process``, started by ``supervisor.WorkerProcess``.

Reads its config as one line of JSON from standard input; a second line, or the end of that input, means: read what is
left, then go.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator

import torch

from nla_monitor.config import MonitorConfig
from nla_monitor.errors import NLAMonitorError, StoreUnavailableError
from nla_monitor.supervisor import EXIT_REFUSED
from nla_monitor.telemetry import sdk
from nla_monitor.worker import Worker

logger = logging.getLogger("nla_monitor.worker")

READY = "nla_monitor worker ready"


def main() -> int:
    """Worker end of the pipe."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would say every request to the AV's server
    lines = _lines(sys.stdin.fileno())
    first = next(lines, None)
    if first is None:  # the host was gone before it could say anything
        return 0
    config = MonitorConfig.model_validate_json(first)
    _be_modest(config)
    stop, finish = threading.Event(), threading.Event()
    threading.Thread(target=_wait_for_end, args=(lines, finish), name="nla-monitor-pipe", daemon=True).start()
    try:
        with sdk.configure("nla-monitor-worker", metrics_port=config.worker.metrics_port) as handle:
            worker = Worker(config, telemetry=handle.telemetry(config.telemetry))
            logger.info("%s (pid %d)", READY, os.getpid())
            worker.run(stop, finish)
            worker.close()
    except StoreUnavailableError as error:
        logger.error("%s", error)  # noqa: TRY400 -- no fault of ours
        return 1
    except NLAMonitorError as error:
        logger.error("%s", error)  # noqa: TRY400 -- a wrong config, checkpoint or database: the message says it all
        return EXIT_REFUSED
    return 0


def _be_modest(config: MonitorConfig) -> None:
    """The host comes first: lower priority on a shared CPU, and few threads."""
    if config.nla.device.startswith("cpu"):
        with contextlib.suppress(OSError, AttributeError):  # not on every platform
            os.nice(5)
        torch.set_num_threads(config.nla.threads or 1)


def _lines(descriptor: int) -> Iterator[bytes]:
    """Whole lines, unbuffered: a thread that waits inside ``sys.stdin`` would keep the interpreter from ending."""
    rest = b""
    while chunk := os.read(descriptor, 65536):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole


def _wait_for_end(lines: Iterator[bytes], finish: threading.Event) -> None:
    next(lines, None)
    finish.set()


if __name__ == "__main__":
    sys.exit(main())
