"""What a capture counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CaptureStats:
    """Counters since construction."""

    forwards: int
    """Forward passes seen."""
    sampled: int
    """Samples built."""
    written: int
    """Samples that the sink took."""
    dropped: dict[str, int]
    """Samples lost, by reason."""
    skipped: dict[str, int]
    """Forward passes that could not be read, and samples left out (``norm_sink``), by reason."""
    unmatched_sessions: int
    """Ended agent sessions of which no forward was seen."""
    host_seconds: float = 0.0
    """CPU time of the host's threads spent in planning, gathering and handing over."""
    retries: int = 0
    """Batches that the sink could not take for now; they were kept and tried again."""
