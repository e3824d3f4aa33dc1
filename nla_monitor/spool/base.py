"""The queue between the host and the workers: at-least-once, leased, acknowledged in the worker's own transaction."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from nla_monitor.records import ActivationSample


@dataclass(frozen=True, slots=True)
class Lease:
    """Samples that one worker may work on until ``expires_at`` (Unix seconds)."""

    owner: str
    samples: tuple[ActivationSample, ...]
    expires_at: float


@dataclass(frozen=True, slots=True)
class Depth:
    """How full the spool is."""

    waiting: int
    leased: int
    failed: int
    """Given up after the maximum of attempts; kept for inspection."""
    oldest_seconds: float | None


class Spool(Protocol):
    """Durable hand-over of samples."""

    def put(self, samples: Sequence[ActivationSample], *, unread: Collection[int] = ()) -> int:
        """Store samples durably; a known ``sample_id`` is ignored. Returns how many were new.

        Samples of the layers in ``unread`` are stored only: no worker is given them.

        Raises:
            StoreUnavailableError: read-only, full or locked; nothing of the batch was kept, try again.
        """
        ...

    def lease(self, owner: str, limit: int, seconds: float) -> Lease:
        """Take up to ``limit`` samples that are due; the lease may be empty.

        Expired leases come first, then what waits: by time of arrival less the head start of its priority.
        """
        ...

    def depth(self) -> Depth:
        """Current fill."""
        ...
