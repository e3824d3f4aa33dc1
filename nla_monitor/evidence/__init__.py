"""Evidence: what controls say of a candidate alert. Pure; whoever has an AV, an AR or a store passes results in."""

from __future__ import annotations

from nla_monitor.evidence.bounds import Bound, decide
from nla_monitor.evidence.controls import (
    AWAITED,
    awaiting,
    best_shown,
    collect_evidence,
    completed,
    recurred,
    recurrence,
)

__all__ = [
    "AWAITED",
    "Bound",
    "awaiting",
    "best_shown",
    "collect_evidence",
    "completed",
    "decide",
    "recurred",
    "recurrence",
]
