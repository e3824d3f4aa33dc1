"""Work beside a host's thread, in the same interpreter. A leaf: imports nothing of ours."""

from __future__ import annotations

import threading
import time

_WORK_SECONDS = 1e-4
_REST_SECONDS = 1e-5


class _Thread(threading.local):
    rested = 0.0


_thread = _Thread()


def breathe() -> None:
    """Between pieces of pure Python: hand the interpreter to a host thread that waits for it, if 100 µs have passed.

    CPython lets a thread that asks wait up to 5 ms. ``sleep(0)`` does not help: the lock is taken back before the other
    thread, though signalled, has woken up.
    """
    if abs(time.perf_counter() - _thread.rested) > _WORK_SECONDS:
        time.sleep(_REST_SECONDS)
        _thread.rested = time.perf_counter()
