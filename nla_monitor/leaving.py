"""Threads of ours when the interpreter ends. A leaf: imports nothing of ours.

A daemon thread that comes back from torch after finalization has begun is ended by CPython (before 3.14) in the middle
of C++ code that must not be unwound, and the process aborts: a host that had done all its work would end with SIGABRT.
So work in torch on threads of ours is done in ``busy()``. When the interpreter ends, it waits for such work to reach
its end or a ``checkpoint()``, a few seconds at most, and the thread stops there for good.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from types import TracebackType
from typing import Final

_PATIENCE_SECONDS: Final = 10.0
"""For one step of work; an operation of torch is over long before."""

_turn = threading.Condition(threading.Lock())
_busy: set[int] = set()
"""Threads at work, by identity."""
_leaving = False


class _Here(threading.local):
    depth = 0


_here = _Here()


class busy:  # noqa: N801 -- used as a function
    """``with busy():`` around work in torch, on a thread of ours."""

    __slots__ = ()

    def __enter__(self) -> None:
        """Stops here for good when the interpreter is ending."""
        _here.depth += 1
        if _here.depth > 1:
            return
        with _turn:
            if not _leaving:
                _busy.add(threading.get_ident())
                return
        _park()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The work is over."""
        _here.depth -= 1
        if _here.depth:
            return
        with _turn:
            _busy.discard(threading.get_ident())
            _turn.notify_all()


def checkpoint() -> None:
    """Between steps of long work in ``busy()``: nothing, unless the interpreter is ending. Nothing in other threads."""
    if _leaving and _here.depth:
        with _turn:
            _busy.discard(threading.get_ident())
            _turn.notify_all()
        _park()


def _park() -> None:
    # A thread that waits for a lock has no frame of C++ below it: the end of the process takes it along.
    while True:
        threading.Event().wait()


def _leave() -> None:
    global _leaving  # noqa: PLW0603 -- the interpreter ends once
    deadline = time.monotonic() + _PATIENCE_SECONDS
    with _turn:
        _leaving = True
        _busy.discard(threading.get_ident())
        while _busy and (left := deadline - time.monotonic()) > 0:
            _turn.wait(left)


def _forget() -> None:
    """In the child of a fork no other thread lives, and the lock may be held by nobody."""
    global _turn  # noqa: PLW0603 -- the old one is useless here
    _turn = threading.Condition(threading.Lock())
    _busy.clear()


atexit.register(_leave)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
