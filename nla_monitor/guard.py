"""The host boundary: monitoring code never raises into the process it watches.

Every entry point that a host calls (hooks, callbacks, handlers) runs inside one ``Guard``. An exception of ours is
logged (once per kind, then counted), counted by reason, and swallowed; the host's own exceptions are never touched.
With ``NLA_MONITOR_STRICT=1`` (set by our tests) the guard re-raises, so that a test never hides a fault.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import Final

logger = logging.getLogger("nla_monitor")

STRICT_VARIABLE = "NLA_MONITOR_STRICT"
_NUMBER: Final = re.compile(r"\d+")
_KINDS: Final = 256
"""Kinds of faults that are logged; a host is not flooded, whatever goes wrong. Counting has no bound."""


def strict() -> bool:
    """Whether faults of ours are re-raised (tests) instead of swallowed (production)."""
    return os.environ.get(STRICT_VARIABLE, "") not in ("", "0")


class _Guarded:
    """The block that ``Guard.__call__`` opens."""

    __slots__ = ("_guard", "_where")

    def __init__(self, guard: Guard, where: str) -> None:
        self._guard = guard
        self._where = where

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Swallow what is an ``Exception``: the one place where everything of ours is caught."""
        if not isinstance(error, Exception):
            return False
        self._guard.fault(self._where, error)
        return True


class Guard:
    """Logs, counts and swallows faults at the host boundary.

    One per monitor; safe for use from several threads (the lock protects the two counters).

    Args:
        on_fault: called with ``(where, error)`` after counting; must not raise (telemetry hangs on it).
    """

    def __init__(self, on_fault: Callable[[str, BaseException], None] | None = None) -> None:
        self._on_fault = on_fault
        self._lock = threading.Lock()
        self._faults: Counter[str] = Counter()
        self._seen: set[tuple[str, str]] = set()

    def fault(self, where: str, error: BaseException) -> None:
        """Record a fault; re-raise it in strict mode."""
        text = f"{type(error).__name__}: {error}"
        with self._lock:
            self._faults[where] += 1
            kind = where, _NUMBER.sub("#", text)
            first = kind not in self._seen and len(self._seen) < _KINDS
            if first:
                self._seen.add(kind)
        if first:
            # The traceback once per kind: a fault in a hook may recur at every step, with another number in it.
            logger.warning("nla_monitor: fault in %s, the host goes on: %s", where, text, exc_info=error)
        if self._on_fault is not None:
            self._on_fault(where, error)
        if strict():
            raise error

    def __call__(self, where: str) -> _Guarded:
        """Run a block of ours; no ``Exception`` leaves it (``KeyboardInterrupt`` and ``SystemExit`` do)."""
        return _Guarded(self, where)

    @property
    def faults(self) -> dict[str, int]:
        """Number of swallowed faults, by place."""
        with self._lock:
            return dict(self._faults)
