"""How much of a vector the words hold.

``cosine`` between activation and reconstruction; ``mse_nrm = 2 * (1 - cosine)``, the squared error once both are scaled
to the same norm; ``fve = 1 - mse_nrm / denominator``. Raw cosines must not be compared between checkpoints (predicting
the mean already gives 0.985 on one and 0.29 on another), so every FVE carries the name of its denominator. None of
these says that a claim is true.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from nla_monitor.nla.base import Score
from nla_monitor.nla.sidecar import Denominator, Sidecar
from nla_monitor.records import Fidelity

RELEASED_DENOMINATORS: dict[tuple[str, int], float] = {
    ("qwen2.5-7b-instruct", 20): 0.7335,
    ("gemma-3-12b-it", 32): 0.0302,
    ("gemma-3-27b-it", 41): 0.0579,
    ("llama-3.3-70b-instruct", 53): 0.9169,
}
"""Variance of unit-normalised activations on the training data of the released checkpoints, by base model and layer.
Published beside the checkpoints, not in their sidecars."""


def denominator_of(sidecar: Sidecar) -> Denominator | None:
    """The denominator in the AR's sidecar, else that of a released checkpoint, else None."""
    own = sidecar.fve_denominator()
    if own is not None or sidecar.base_checkpoint is None or sidecar.layer is None:
        return own
    base = sidecar.base_checkpoint.rstrip("/").rsplit("/", 1)[-1].lower()
    value = RELEASED_DENOMINATORS.get((base, sidecar.layer))
    return None if value is None else Denominator("released training set", value)


def cosines(vectors: npt.NDArray[Any], predictions: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Row-wise cosine of two ``[batch, d_model]`` arrays, in float64; 0 where a prediction has no direction."""
    left, right = vectors.astype(np.float64), predictions.astype(np.float64)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    dots = np.einsum("ij,ij->i", left, right)
    ratios: npt.NDArray[np.float64] = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
    return ratios.clip(-1.0, 1.0)


def score_of(cosine: float, denominator: Denominator | None) -> Score:
    """Cosine, ``mse_nrm`` and FVE (None without a denominator) as one record."""
    mse = 2.0 * (1.0 - cosine)
    if denominator is None:
        return Score(cosine, mse, None, None, None)
    return Score(cosine, mse, 1.0 - mse / denominator.value, denominator.value, denominator.name)


def record_of(sample_id: str, score: Score, ar_hash: str) -> Fidelity:
    """A score as the record of a sample."""
    numbers = (score.cosine, score.mse_nrm, score.fve, score.denominator, score.denominator_name)
    return Fidelity(sample_id, *numbers, ar_hash)


def variance_denominator(vectors: npt.NDArray[Any], name: str) -> Denominator:
    """The denominator of a reference set ``[n, d_model]``: mean of ``||v/|v| - mean(v/|v|)||^2``."""
    rows = vectors.astype(np.float64)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return Denominator(name, float(((unit - unit.mean(axis=0)) ** 2).sum(axis=1).mean()))
