"""Evidence: results of controls on a candidate alert. First form: recurrence and echo; both are pure functions."""

from __future__ import annotations

from nla_monitor.evidence.controls import collect_evidence, echo, recurrence

__all__ = ["collect_evidence", "echo", "recurrence"]
