"""Alarms that may be looked at after every sequence: e-processes for a rate that should not be exceeded.

For 0/1 outcomes whose chance of a 1, given the past, is at most ``p0``, the likelihood ratio of any ``q > p0`` against
``p0`` is a non-negative supermartingale that starts at 1. So is a mixture over ``q``; the one here has Jeffreys'
Beta(1/2, 1/2) density, truncated to ``q > p0`` (Robbins 1970). By Ville's inequality (1939) it ever reaches ``1 / a``
with probability at most ``a``, whenever one stops. It depends on the number of sequences and of hits alone.

A sequence counts from its first reading on and becomes a hit later, when a match comes: counting too few hits for a
while only lowers the value, which grows with the hits, so that looking early is safe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.special import betaincc, betaln

from nla_monitor.evidence.calibration import upper_bound

_HALF = 0.5


def log_e_value(hits: int, sequences: int, null: float) -> float:
    """Natural logarithm of the e-value against "a sequence is hit with probability ``null`` at most".

    Args:
        hits: how many sequences were hit.
        sequences: how many were seen.
        null: in (0, 1]; at 1 nothing speaks against it, and the value is 1.
    """
    if null >= 1.0:
        return 0.0
    seen, none = _HALF + hits, _HALF + sequences - hits
    mass, prior = float(betaincc(seen, none, null)), float(betaincc(_HALF, _HALF, null))
    if mass <= 0.0:  # so far below the null that the tail has no double
        return -math.inf
    ratio = float(betaln(seen, none)) + math.log(mass) - float(betaln(_HALF, _HALF)) - math.log(prior)
    return ratio - hits * math.log(null) - (sequences - hits) * math.log1p(-null)


@dataclass(frozen=True, slots=True)
class RateTest:
    """Raises an alarm once sequences are hit too often; wrong with probability ``level`` at most, over any horizon.

    The error is split: the null is the calibration's upper bound with confidence ``1 - level / 2``, and the alarm
    needs an e-value of ``2 / level``.
    """

    null: float
    level: float

    @classmethod
    def against(cls, count: int, total: int, level: float) -> RateTest:
        """Against the rate that ``count`` of ``total`` benign sequences certify."""
        return cls(upper_bound(count, total, 1 - level / 2), level)

    @property
    def log_limit(self) -> float:
        """Logarithm of the e-value that raises the alarm."""
        return math.log(2 / self.level)

    def log_e(self, hits: int, sequences: int) -> float:
        """Logarithm of the e-value so far."""
        return log_e_value(hits, sequences, self.null)


def e_bh(log_e_values: Mapping[str, float], level: float) -> frozenset[str]:
    """Names that survive the e-Benjamini-Hochberg procedure (Wang and Ramdas 2022).

    The expected share of false names among them is at most ``level``, however the e-values depend on each other. With
    e-values of ``RateTest`` it holds given that the bounds behind them do.
    """
    ranked = sorted(log_e_values.items(), key=lambda item: -item[1])
    needed = math.log(max(len(ranked), 1) / level)
    kept = [rank for rank, (_, value) in enumerate(ranked, 1) if value + math.log(rank) >= needed]
    return frozenset(name for name, _ in ranked[: max(kept, default=0)])
