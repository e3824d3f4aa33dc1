"""The AV's own probability of a claim against what else could stand in its place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol


class Likely(Protocol):
    """How probable a text was found."""

    @property
    def logprob(self) -> float:
        """Natural logarithm of its probability."""
        ...

    @property
    def tokens(self) -> int:
        """Over how many tokens."""
        ...


def claim_probability(options: Sequence[Likely]) -> float:
    """Share of the first option, the claim, among all, 0 to 1: softmax over log-probabilities of equal length.

    A longer sentence is less probable for its length alone; so each option's mean log-probability a token is taken
    times the mean length of all.
    """
    length = sum(option.tokens for option in options) / len(options)
    scaled = [option.logprob / max(option.tokens, 1) * length for option in options]
    top = max(scaled)
    weights = [math.exp(value - top) for value in scaled]
    return weights[0] / sum(weights)
