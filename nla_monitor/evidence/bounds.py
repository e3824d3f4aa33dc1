"""What a rule demands of its controls, and the verdict on one match."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nla_monitor.records import Support


@dataclass(frozen=True, slots=True)
class Bound:
    """Where a required control's result must lie."""

    least: float | None = None
    most: float | None = None
    refute_missing: bool = False
    """Whether a match whose control could not be measured is refuted; by default it counts, and its alert says so."""

    def holds(self, value: float) -> bool:
        """Whether a result is inside; NaN never is."""
        above = self.least is None or value >= self.least
        return above and (self.most is None or value <= self.most) and value == value  # noqa: PLR0124 -- NaN

    def document(self) -> dict[str, float]:
        """The limits as JSON: ``min``, ``max`` or both."""
        limits = {"min": self.least, "max": self.most}
        return {name: limit for name, limit in limits.items() if limit is not None}


def decide(
    match_id: str,
    results: Mapping[str, float],
    not_run: Mapping[str, str],
    bounds: Mapping[str, Bound],
    score: float | None = None,
) -> Support:
    """The verdict of the required controls on one match.

    Args:
        match_id: the match.
        results: measured, by name of the control.
        not_run: wanted and not measured, with the reason.
        bounds: required, by name of the control.
        score: the statistic that calibration ranks.
    """
    failed = [name for name, bound in bounds.items() if name in results and not bound.holds(results[name])]
    failed += [name for name, bound in bounds.items() if name not in results and bound.refute_missing]
    return Support(match_id, not failed, dict(results), tuple(failed), dict(not_run), score)
