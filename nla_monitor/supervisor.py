"""The host's end of the worker process: start it, restart it when it dies, let it finish.

The config goes down the process's standard input (so that no database password shows in a process list). The pipe stays
open as long as the host lives: when it closes, whether the host finished, crashed or was killed, the worker reads what
is left in the spool and goes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from nla_monitor.config import MonitorConfig
from nla_monitor.errors import WorkerError

logger = logging.getLogger("nla_monitor")

MAX_RESTARTS = 5


class WorkerProcess:
    """Host end: starts the process, restarts it when it dies, lets it finish at the end.

    Args:
        config: sent to the process.
        log_path: where the process writes its log; a temporary file by default.
    """

    def __init__(self, config: MonitorConfig, log_path: Path | None = None) -> None:
        self._config = config
        self._own_log = log_path is None
        self.log_path = log_path or _temporary_log()
        self._process: subprocess.Popen[str] | None = None
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Start the process; returns at once (loading the models takes seconds).

        Raises:
            WorkerError: the process could not be started.
        """
        try:
            with self.log_path.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "nla_monitor.worker_process"],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    text=True,
                    # Ctrl-C in the host's terminal must not stop the worker before it has read everything.
                    start_new_session=True,
                )
            stdin = self._stdin()
            stdin.write(self._config.model_dump_json() + "\n")
            stdin.flush()
        except OSError as error:
            raise WorkerError(f"the worker process could not be started: {error}") from error

    def _stdin(self) -> IO[str]:
        if self._process is None or self._process.stdin is None:
            raise WorkerError("the worker process is not running")
        return self._process.stdin

    def supervise(self) -> bool:
        """Restart the process if it died; False when it died too often to be tried again.

        What it had leased is leased again when the lease runs out.
        """
        if self._process is None or self._process.poll() is None:
            return True
        if self.restarts >= MAX_RESTARTS:
            return False
        code = self._process.returncode
        self.restarts += 1
        logger.warning("worker process died (exit %s), restart %d: %s", code, self.restarts, self.log_tail())
        self._discard_pipe()
        self.start()
        return True

    def log_tail(self, lines: int = 12) -> str:
        """The last lines of its log, for an error message."""
        try:
            return "\n".join(self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"

    def finish(self, timeout: float) -> bool:
        """Let it read the rest and go; True when it went within ``timeout`` seconds. It goes on by itself otherwise."""
        if self._process is None:
            return True
        self._discard_pipe()
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            logger.warning("worker (pid %d) is still reading; it ends by itself when done", self._process.pid)
            return False
        if code == 0 and self._own_log:
            self.log_path.unlink(missing_ok=True)
        return code == 0

    def kill(self) -> None:
        """End it at once (tests, and hosts that must leave)."""
        if self._process is not None:
            self._process.kill()
            self._discard_pipe()
            self._process.wait()

    def _discard_pipe(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # the reader may be gone already
                self._process.stdin.close()


def _temporary_log() -> Path:
    descriptor, name = tempfile.mkstemp(prefix="nla-monitor-worker-", suffix=".log")
    os.close(descriptor)
    return Path(name)
