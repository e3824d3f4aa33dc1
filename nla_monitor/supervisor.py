"""The host's end of the worker process: start it, restart it when it dies, let it finish.

The config goes down the process's standard input (so that no database password shows in a process list). The pipe stays
open as long as the host lives: at its end, whether the host finished, crashed or was killed, the worker reads what is
left in the spool and goes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import Final

from nla_monitor.config import MonitorConfig
from nla_monitor.errors import WorkerError

logger = logging.getLogger("nla_monitor")

MAX_RESTARTS: Final = 5
"""Restarts in a row. A process that lived for ``GOOD_LIFE_SECONDS`` starts the count anew: a run may last for weeks."""
GOOD_LIFE_SECONDS: Final = 600.0
EXIT_REFUSED: Final = 78
"""Exit code (``EX_CONFIG``) of a worker that another start would not help: its log says what is wrong."""
END: Final = "end"
"""Said before the pipe is closed: a child that the host forked may hold a copy of its end."""

_supervisors: weakref.WeakSet[WorkerProcess] = weakref.WeakSet()


class WorkerProcess:
    """Host end: starts the process, restarts it when it dies, lets it finish at the end.

    For use from several threads: the one that watches, and the one that ends.

    Args:
        config: sent to the process.
        log_path: where the process writes its log; a temporary file by default.
        folder: what relative paths in ``config`` are relative to; the current folder by default.
    """

    def __init__(self, config: MonitorConfig, log_path: Path | None = None, folder: Path | None = None) -> None:
        self._config = config
        self._folder = folder or current_folder()
        self._own_log = log_path is None
        self.log_path = log_path or _temporary_log()
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        self._finishing = False
        self._in_a_row = 0
        self._lost = False
        self._started = 0.0
        self.restarts = 0
        _supervisors.add(self)

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
            with self.log_path.open("ab") if self.log_path is not None else open(os.devnull, "ab") as log:  # noqa: PTH123 -- no path
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "nla_monitor.worker_process"],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    text=True,
                    # A folder that is gone would keep torch from being loaded.
                    cwd=self._folder if self._folder is not None and self._folder.is_dir() else os.sep,
                    # Ctrl-C in the host's terminal must not stop the worker before it has read everything.
                    start_new_session=True,
                )
            self._started = time.monotonic()
            self._say(self._config.model_dump_json())
        except OSError as error:
            raise WorkerError(f"the worker process could not be started: {error}") from error

    def _say(self, line: str) -> None:
        if self._process is None or self._process.stdin is None:
            raise WorkerError("the worker process is not running")
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def supervise(self) -> bool:
        """Restart the process if it died; False (and logged) when it died too often, or will not start at all.

        What it had leased is leased again when the lease runs out.
        """
        with self._lock:
            if self._finishing or self._process is None or self._process.poll() is None:
                return True
            self._lost = self._lost or not self._restart(self._process.returncode)
            return not self._lost

    def _restart(self, code: int) -> bool:
        self._in_a_row = 0 if time.monotonic() - self._started > GOOD_LIFE_SECONDS else self._in_a_row
        if code == EXIT_REFUSED:
            logger.error("nla_monitor: the worker cannot start; samples stay in the database: %s", self.log_tail(1))
            return False
        if self._in_a_row >= MAX_RESTARTS:
            logger.error("nla_monitor: the worker died too often; samples stay in the database: %s", self.log_tail())
            return False
        self._in_a_row += 1
        self.restarts += 1
        logger.warning("worker process died (exit %s), restart %d: %s", code, self.restarts, self.log_tail())
        self._close_pipe()
        self.start()
        return True

    def log_tail(self, lines: int = 12) -> str:
        """The last lines of its log, for an error message."""
        if self.log_path is None:
            return "(no log: there is no folder for temporary files)"
        try:
            return "\n".join(self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        except OSError:
            return "(no log)"

    def finish(self, timeout: float) -> bool:
        """Let it read the rest and go; True when it went within ``timeout`` seconds. It goes on by itself otherwise.

        One that dies meanwhile is started again, so that what it held is read as well.
        """
        deadline = time.monotonic() + timeout
        with self._lock:
            self._finishing = True
        while self._process is not None:
            self._end()
            try:
                code = self._process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.warning("worker (pid %d) is still reading; it ends by itself when done", self._process.pid)
                return False
            if code == 0:
                break
            if self._lost or not self._restart(code):
                return False
        if self._own_log and self.log_path is not None:
            self.log_path.unlink(missing_ok=True)
        return True

    def kill(self) -> None:
        """End it at once (tests, and hosts that must leave)."""
        with self._lock:
            self._finishing = True
        if self._process is not None:
            self._process.kill()
            self._close_pipe()
            self._process.wait()

    def _end(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the reader may be gone, or the pipe closed already
            self._say(END)
        self._close_pipe()

    def _close_pipe(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # the reader may be gone already
                self._process.stdin.close()

    def forget_after_fork(self) -> None:
        """In the child of a fork: the process is the parent's, and the pipe must end with the parent."""
        self._lock = threading.Lock()
        self._close_pipe()
        if self._process is not None:
            self._process.returncode = 0  # not ours to wait for
        self._process = None
        self._own_log = False


def current_folder() -> Path | None:
    """The current folder; None when it was deleted."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return None


def _temporary_log() -> Path | None:
    """A file for the log; None where nothing can be written."""
    try:
        descriptor, name = tempfile.mkstemp(prefix="nla-monitor-worker-", suffix=".log")
    except OSError as error:
        logger.warning("the worker's log is lost: %s", error)
        return None
    os.close(descriptor)
    return Path(name)


def _forget_workers() -> None:
    for supervisor in list(_supervisors):
        supervisor.forget_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)
