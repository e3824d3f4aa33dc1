"""The raw norm of an activation, which the AV does not see, against what is usual in its run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Final

FEWEST_NORMS: Final = 8
"""A median of fewer says little."""


def norm_ratio(norm: float, usual: Sequence[float]) -> float | None:
    """Norm over the median of the usual ones (raw L2 norms of the same run and layer); None with too few of them.

    Attention sinks lie far above 1; a masked or padded position far below it.
    """
    sound = [value for value in usual if value > 0.0]
    if len(sound) < FEWEST_NORMS:
        return None
    return norm / median(sound)
