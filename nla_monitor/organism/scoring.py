"""Small statistics for the card: shares, precision and recall, AUROC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Detection:
    """How well a flag finds what is there. A figure is None where its denominator is zero."""

    precision: float | None
    recall: float | None
    false_positive_rate: float | None
    positives: int
    negatives: int


def share(flags: Sequence[bool]) -> float:
    """Share of true values; 0 for none at all."""
    return sum(flags) / len(flags) if flags else 0.0


def detection(flagged: Sequence[bool], truth: Sequence[bool]) -> Detection:
    """Precision, recall and false-positive rate of flags against the truth."""
    true_positives = sum(flag and real for flag, real in zip(flagged, truth, strict=True))
    false_positives = sum(flagged) - true_positives
    positives, negatives = sum(truth), len(truth) - sum(truth)
    return Detection(
        precision=_ratio(true_positives, sum(flagged)),
        recall=_ratio(true_positives, positives),
        false_positive_rate=_ratio(false_positives, negatives),
        positives=positives,
        negatives=negatives,
    )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def auroc(scores: Sequence[float], truth: Sequence[bool]) -> float | None:
    """Chance that a positive scores above a negative, ties counting half (Mann-Whitney); None with only one class."""
    values, real = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=bool)
    if real.all() or not real.any():
        return None
    above = (values[real][:, None] > values[~real][None, :]).mean()
    equal = (values[real][:, None] == values[~real][None, :]).mean()
    return float(above + 0.5 * equal)
