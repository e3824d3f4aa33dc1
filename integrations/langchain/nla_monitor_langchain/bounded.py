"""A map that cannot leak: at most so many entries, none older than so long."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class BoundedMap(Generic[K, V]):
    """Entries in order of arrival, evicted by number and age.

    An end event may never come (cancelled stream, killed task): what waits for one must not grow. Not thread-safe: its
    owner holds a lock.

    Args:
        size: entries kept; the oldest goes first.
        ttl_seconds: age at which an entry is dropped at the next ``put``.
        clock: seconds, monotonic.
    """

    def __init__(self, size: int, ttl_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = size
        self._ttl = ttl_seconds
        self._clock = clock
        self._entries: OrderedDict[K, tuple[float, V]] = OrderedDict()

    def put(self, key: K, value: V) -> list[V]:
        """Add or replace an entry; the values that had to go for it."""
        now = self._clock()
        self._entries[key] = (now, value)
        self._entries.move_to_end(key)
        evicted: list[V] = []
        while self._entries and self._oldest_must_go(now):
            evicted.append(self._entries.popitem(last=False)[1][1])
        return evicted

    def _oldest_must_go(self, now: float) -> bool:
        born, _ = next(iter(self._entries.values()))
        return len(self._entries) > self._size or now - born > self._ttl

    def get(self, key: K) -> V | None:
        """The value, or None."""
        entry = self._entries.get(key)
        return None if entry is None else entry[1]

    def pop(self, key: K) -> V | None:
        """Remove and return the value, or None."""
        entry = self._entries.pop(key, None)
        return None if entry is None else entry[1]

    def values(self) -> list[V]:
        """All values, oldest first."""
        return [value for _, value in self._entries.values()]

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)


class Families:
    """What is open under each root; a root with nothing open is forgotten. Not thread-safe: its owner holds a lock."""

    def __init__(self) -> None:
        self._members: dict[str, set[str]] = {}

    def add(self, root: str, member: str) -> None:
        """Something has begun under this root."""
        self._members.setdefault(root, set()).add(member)

    def discard(self, root: str, member: str) -> None:
        """It has ended, or was given up."""
        members = self._members.get(root)
        if members is not None:
            members.discard(member)
            if not members:
                del self._members[root]

    def pop(self, root: str) -> set[str]:
        """All that is still open under a root that has ended."""
        return self._members.pop(root, set())

    def __len__(self) -> int:
        return len(self._members)
