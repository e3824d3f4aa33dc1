"""What may be decided on findings, and a decision with its reasons."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from nla_monitor.records import Alert
from nla_monitor.store.findings import Place

DecidedBy = Literal["findings", "callback", "person", "undecided", "fault"]


class Verdict(StrEnum):
    """What an agent is to do; ordered by ``rank``."""

    PROCEED = "proceed"
    REVIEW = "review"
    """Wait for a person."""
    BLOCK = "block"
    """Do not do it."""

    @property
    def rank(self) -> int:
        """Position in the order proceed < review < block."""
        return list(Verdict).index(self)


@dataclass(frozen=True, slots=True)
class Point:
    """Where the agent stands when it asks."""

    name: str = "model"
    """``model``: it has answered; ``tool``: it is about to run one; or a name of one's own."""
    tool: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided, and why."""

    decision_id: str
    verdict: Verdict
    decided_by: DecidedBy
    """``undecided``: not all was read in time; ``fault``: the callback or the store failed. ``findings`` with no alert:
    all was read, and nothing found."""
    place: Place
    point: Point
    alerts: tuple[Alert, ...]
    """What it rests on, oldest first."""
    complete: bool
    """Whether all that was sampled of the place had been read."""
    failed: int = 0
    """Samples of the place that were given up: nobody will read them."""
    seconds: float = 0.0
    """How long the agent waited."""
    note: str | None = None
    at: float = 0.0
    """Unix seconds."""

    @property
    def stops(self) -> bool:
        """Whether the agent may not simply go on."""
        return self.verdict is not Verdict.PROCEED

    def payload(self, *, content: bool = False) -> dict[str, Any]:
        """The decision as JSON for a person or another system.

        Args:
            content: with the words of explanations. Without, an alert's id leads to them
                (``nla-monitor alerts show ID``).
        """
        return {
            "type": "nla_monitor_review",
            "decision_id": self.decision_id,
            "verdict": self.verdict.value,
            "decided_by": self.decided_by,
            "complete": self.complete,
            "failed": self.failed,
            "run_id": self.place.run_id,
            "conversation": self.place.conversation,
            "root_run_id": self.place.root_run_id,
            "point": self.point.name,
            "tool": self.point.tool,
            "tool_call_id": self.point.tool_call_id,
            "findings": [_told(alert, content=content) for alert in self.alerts],
        }


def _told(alert: Alert, *, content: bool) -> dict[str, Any]:
    told: dict[str, Any] = {
        "alert_id": alert.alert_id,
        "rule": alert.rule_id,
        "title": alert.rule_title,
        "severity": alert.severity.value,
        "matches": alert.matches,
        "calibration": str(alert.calibration.get("status", "uncalibrated")),
    }
    return {**told, "quote": alert.quote, "explanation": alert.explanation} if content else told
