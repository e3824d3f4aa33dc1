"""What a long job has done so far, as an append-only file: a header that says which job, then one line per row.

Killed at any instant, the file holds whole lines and at most one broken one at its end, which is cut off when the job
goes on. One process at a time may hold it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from nla_monitor.errors import VectorFileError

_FORMAT: Final = 1
_SYNC_EVERY: Final = 1.0
"""Seconds between two waits for the disk: small models finish many batches a second."""


class Journal:
    """An open journal; ``rows`` of the job are done.

    Args:
        path: the file; made where it is not there.
        job: what the results depend on, as plain JSON values; a journal of another job is refused.

    Raises:
        VectorFileError: it belongs to another job, another process holds it, or it cannot be read or written.
    """

    def __init__(self, path: Path, job: Mapping[str, Any]) -> None:
        self.path = path
        self.rows = 0
        self._synced = time.monotonic()
        try:
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            _lock(self._file, path)
            self._begin(dict(job))
        except BaseException:
            self._file.close()
            raise

    @staticmethod
    def discard(path: Path) -> None:
        """Delete a journal, if there is one.

        Raises:
            VectorFileError: another process holds it, or it cannot be deleted.
        """
        if not path.exists():
            return
        try:
            with path.open("a+b") as file:
                _lock(file, path)
                path.unlink()
        except OSError as error:
            raise _unwritable(path, error) from error

    def append(self, lines: Sequence[Sequence[Any]]) -> None:
        """Add results, each of which begins with its row number.

        On return they survive the end of this process, and a second later that of the machine.

        Raises:
            VectorFileError: they cannot be written (disk full).
        """
        text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        try:
            self._file.write(text.encode())
            self._file.flush()
            if time.monotonic() - self._synced >= _SYNC_EVERY:
                self._sync()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.rows += len(lines)

    def lines(self) -> Iterator[list[Any]]:
        """All results, in order."""
        with self.path.open("rb") as stream:
            next(stream)
            for line in stream:
                yield json.loads(line)

    def close(self) -> None:
        """Give the file free for another process."""
        self._file.close()

    def remove(self) -> None:
        """Close and delete: the job is done."""
        self.path.unlink(missing_ok=True)
        self.close()

    def _begin(self, job: dict[str, Any]) -> None:
        self._file.seek(0)
        header = _parsed(self._file.readline())
        if header is None:
            self._file.truncate(0)
            self._file.write(json.dumps({"nla_monitor_journal": _FORMAT, "job": job}).encode() + b"\n")
            self._sync()
            return
        if not isinstance(header, dict) or header.get("nla_monitor_journal") != _FORMAT:
            raise VectorFileError(f"{self.path} is not a journal of this version of nla-monitor; move it away")
        self._require_same(header["job"], job)
        self._file.truncate(self._end_of_rows())
        self._file.seek(0, os.SEEK_END)

    def _end_of_rows(self) -> int:
        """Counts whole rows; returns where the last of them ends."""
        end = self._file.tell()
        for line in self._file:
            found = _parsed(line)
            if not isinstance(found, list) or not found or found[0] != self.rows:
                break
            end += len(line)
            self.rows += 1
        return end

    def _require_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if not differing:
            return
        told = "; ".join(f"{name} was {before.get(name)!r}, now {now.get(name)!r}" for name in differing)
        raise VectorFileError(
            f"{self.path} holds what another command had done when it was interrupted: {told}. Run that command again "
            "to go on with it, name another --output, or start anew with --overwrite"
        )

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def _parsed(line: bytes) -> Any:
    """The value of a whole line; None for a broken one."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)
    except ValueError:
        return None


def _lock(file: BinaryIO, path: Path) -> None:
    if sys.platform == "win32":  # pragma: no cover -- no advisory locks there
        return
    import fcntl  # noqa: PLC0415 -- not on every platform

    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise VectorFileError(
            f"another process works on the same output (it holds {path}). Wait for it, or name another --output"
        ) from error


def _unwritable(path: Path, error: OSError) -> VectorFileError:
    return VectorFileError(
        f"{path} cannot be written: {error.strerror or error}. Make room or correct the path; what is there stays, and "
        "the same command goes on with it"
    )
