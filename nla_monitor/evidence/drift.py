"""Does a calibration still hold? Two tests that may be looked at after every sequence.

Training moves a model away from the traffic that a rule was calibrated on, and nothing in the scores of a benign
sequence says so. What does show is fidelity, which falls when the AV no longer knows what it reads, and the share of
sequences in which a control refutes a match, which rises when the AV begins to make things up. Each is counted per
sequence and held against the rate that the calibration set certifies; either alarm voids the guarantee from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from nla_monitor.evidence.calibration import Calibration
from nla_monitor.evidence.eprocess import RateTest

LEVEL: Final = 0.01
"""Chance that one of the tests ever calls a run drifted that has not: at most so much for each."""


@dataclass(frozen=True, slots=True)
class DriftTests:
    """The tests of one calibration."""

    fidelity: RateTest | None
    """On the share of sequences with low fidelity; None where the set has none (no AR)."""
    refuted: RateTest

    @classmethod
    def of(cls, calibration: Calibration) -> DriftTests:
        """The tests that hold a run against a calibration."""
        fidelity = None
        if calibration.floor is not None:
            fidelity = RateTest.against(calibration.floor_rank, calibration.measured, LEVEL)
        return cls(fidelity, RateTest.against(calibration.refuted, calibration.sequences, LEVEL))


def is_low(calibration: Calibration, worst_cosine: float | None) -> bool:
    """Whether a sequence's worst fidelity is below the calibration's floor."""
    return worst_cosine is not None and calibration.floor is not None and worst_cosine < calibration.floor
