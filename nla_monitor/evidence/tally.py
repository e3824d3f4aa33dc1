"""How one run stands against one calibration, sequence by sequence: a pure state machine over counts.

All that the tests need are counts of sequences; they only grow, in whatever order batches, ranks and workers come. An
alarm and a void calibration stay as they are once they are raised.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Final

from nla_monitor.evidence.calibration import Calibration, upper_bound
from nla_monitor.evidence.drift import DriftTests
from nla_monitor.evidence.eprocess import RateTest

FIDELITY = "fidelity"
REFUTED = "refuted matches"


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of one run against one calibration, and what they have shown."""

    sequences: int = 0
    matching: int = 0
    """Sequences with a match that no control refuted."""
    hits: int = 0
    """Those of them above the threshold."""
    refuted: int = 0
    measured: int = 0
    """Sequences with fidelity."""
    low: int = 0
    """Those of them below the calibration's floor."""
    alarm_step: int | None = None
    alarm_at: float | None = None
    """When the run-level test fired, by the run's own clock (Unix seconds); None: it has not."""
    void_step: int | None = None
    void_at: float | None = None
    void_by: str | None = None
    """What drifted; None: the calibration stands."""

    @property
    def alarmed(self) -> bool:
        """Whether the run-level test has fired."""
        return self.alarm_at is not None

    @property
    def void(self) -> bool:
        """Whether the calibration no longer speaks for this run."""
        return self.void_by is not None


@dataclass(frozen=True, slots=True)
class Change:
    """By how much the counts grow with one reading; each 0 or 1."""

    sequences: int = 0
    matching: int = 0
    hits: int = 0
    refuted: int = 0
    measured: int = 0
    low: int = 0


_COUNTS: Final = tuple(field.name for field in dataclasses.fields(Change))
_NOTHING: Final = Change()


@dataclass(frozen=True, slots=True)
class RunTests:
    """The three tests of a calibration, made once."""

    hits: RateTest
    drift: DriftTests

    @classmethod
    def of(cls, calibration: Calibration) -> RunTests:
        """The run-level test at the rule's alpha, and the tests for drift."""
        level = calibration.promise.alpha
        null = upper_bound(calibration.bounded, calibration.sequences, 1 - level / 2)
        return cls(RateTest(null, level), DriftTests.of(calibration))

    def after(self, tally: Tally, change: Change, *, step: int | None, now: float) -> Tally:
        """The tally once a reading is counted.

        Args:
            tally: before.
            change: what the reading adds.
            step: the run's step; None where it has none.
            now: time that goes with it, Unix seconds.
        """
        if change == _NOTHING:
            return tally
        grown = dataclasses.replace(tally, **{name: getattr(tally, name) + getattr(change, name) for name in _COUNTS})
        # A value can only rise with a hit, so that nothing else needs looking at.
        if change.hits and not tally.alarmed and self.log_e(grown) >= self.hits.log_limit:
            grown = dataclasses.replace(grown, alarm_step=step, alarm_at=now)
        if (change.low or change.refuted) and not tally.void and (why := self.drifted(grown)) is not None:
            grown = dataclasses.replace(grown, void_by=why, void_step=step, void_at=now)
        return grown

    def log_e(self, tally: Tally) -> float:
        """Logarithm of the e-value of the run-level test."""
        return self.hits.log_e(tally.hits, tally.sequences)

    def log_drift(self, tally: Tally) -> dict[str, float]:
        """Logarithms of the e-values of the drift tests, by what drifts."""
        found = {REFUTED: self.drift.refuted.log_e(tally.refuted, tally.sequences)}
        if self.drift.fidelity is not None:
            found[FIDELITY] = self.drift.fidelity.log_e(tally.low, tally.measured)
        return found

    def drifted(self, tally: Tally) -> str | None:
        """What has drifted by now."""
        limit = self.drift.refuted.log_limit
        over = {name: value for name, value in self.log_drift(tally).items() if value >= limit}
        return max(over, key=over.__getitem__, default=None)


def shown(log_value: float) -> float:
    """An e-value for people and JSON: finite, four digits."""
    return float(f"{math.exp(min(log_value, 700.0)):.4g}")
