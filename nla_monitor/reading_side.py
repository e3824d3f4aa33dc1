"""Who reads what a monitor's process samples: a worker process beside it, a thread in it, or somebody else's worker."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from sqlalchemy import Engine

from nla_monitor.config import MonitorConfig
from nla_monitor.guard import Guard
from nla_monitor.supervisor import WorkerProcess
from nla_monitor.telemetry import Telemetry
from nla_monitor.worker import Worker


class ReadingSide:
    """The worker that belongs to one monitor.

    Args:
        config: of the monitor; ``worker.mode`` says which worker.
        folder: where a worker process runs; None: where it can.
        engine: the database, for a worker in a thread.
        telemetry: of the monitor, for a worker in a thread.
        guard: takes the faults of a worker in a thread.
    """

    def __init__(
        self, config: MonitorConfig, *, folder: Path | None, engine: Engine, telemetry: Telemetry, guard: Guard
    ) -> None:
        self._config, self._folder, self._engine, self._telemetry, self._guard = (
            config,
            folder,
            engine,
            telemetry,
            guard,
        )
        self.process: WorkerProcess | None = None
        """The worker process, where there is one."""
        self._thread: threading.Thread | None = None
        self._stop, self._finish = threading.Event(), threading.Event()
        self._lost = False

    def start(self) -> None:
        """Begin to read.

        Raises:
            WorkerError: the process could not be started.
        """
        mode = self._config.worker.mode
        if mode == "process":
            self.process = WorkerProcess(self._config, folder=self._folder)
            self.process.start()
        elif mode == "thread":
            self._thread = threading.Thread(target=self._run, name="nla-monitor-worker", daemon=True)
            self._thread.start()

    def supervise(self) -> None:
        """Start a process again that died; for every second or so."""
        if self.process is not None:
            self.process.supervise()

    def finish(self, deadline: float) -> bool:
        """Read the rest and end; False if that took longer than until ``deadline`` (``time.monotonic()``)."""
        self._finish.set()
        if self.process is not None:
            return self.process.finish(max(0.0, deadline - time.monotonic()))
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            return not self._thread.is_alive() and not self._lost
        return True

    @property
    def restarts(self) -> int:
        """How often the process died and was started again."""
        return self.process.restarts if self.process is not None else 0

    def _run(self) -> None:
        self._lost = True
        with self._guard("worker"):
            Worker(self._config, telemetry=self._telemetry, engine=self._engine).run(self._stop, self._finish)
            self._lost = False
