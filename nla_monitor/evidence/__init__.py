"""Evidence: results of controls on a candidate alert. First form: swap margin, recurrence and echo; pure functions."""

from __future__ import annotations

from nla_monitor.evidence.controls import collect_evidence, echo, recurred, recurrence
from nla_monitor.evidence.swap import SwapRule, check_swaps

__all__ = ["SwapRule", "check_swaps", "collect_evidence", "echo", "recurred", "recurrence"]
