"""Null readings: what the NLA scores on vectors that mean nothing, and on texts of other vectors.

A fidelity that nulls reach as well is none. A zero vector is no null: its direction is undefined.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]

_KEY: Final = b"nla_monitor"


def seed_of(*parts: object) -> int:
    """A 63-bit seed that depends on nothing but its parts: the same on any machine, in any batch."""
    text = "\x1f".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=_KEY).digest(), "big") >> 1


def gaussian(count: int, d_model: int, seed: int, norm: float = 1.0) -> Vectors:
    """Random directions at one norm, ``[count, d_model]``."""
    rows = np.random.default_rng(seed).standard_normal((count, d_model))
    scaled: Vectors = (rows * (norm / np.linalg.norm(rows, axis=1, keepdims=True))).astype(np.float32)
    return scaled


def coordinate_shuffled(vector: Vectors, count: int, seed: int) -> Vectors:
    """The same numbers in other places, ``[count, d_model]``: norm and outliers kept, direction lost."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(vector) for _ in range(count)])


def percentile(value: float, nulls: Sequence[float]) -> float:
    """Share of nulls that lie below a value, 0 to 1; ties count as not below."""
    return sum(null < value for null in nulls) / len(nulls)
