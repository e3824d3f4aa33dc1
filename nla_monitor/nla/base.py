"""Interfaces of the two halves of an NLA; implementations beside this file, third parties may bring their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Verbalization:
    """One explanation, before it gets the key of its sample."""

    text: str
    """Words between the explanation tags, stripped."""
    truncated: bool
    """The closing tag never came."""
    tokens: int


@dataclass(frozen=True, slots=True)
class Score:
    """Fidelity of one text to one vector; formulas in ``nla_monitor.nla.fidelity``."""

    cosine: float
    mse_nrm: float
    fve: float | None
    denominator: float | None
    denominator_name: str | None


class Verbalizer(Protocol):
    """AV: vectors in, English out."""

    d_model: int
    layer: int | None
    """K of the block whose output it reads, from the sidecar."""
    content_hash: str
    """Hash of the checkpoint's files: provenance of every explanation."""

    def verbalize(self, vectors: npt.NDArray[np.float32]) -> list[Verbalization]:
        """Greedy explanations of ``[batch, d_model]`` raw activations, in order.

        Raises:
            ActivationError: a vector is not finite, has zero norm or the wrong width (names the row).
        """
        ...


class Reconstructor(Protocol):
    """AR: English in, vectors out."""

    d_model: int
    content_hash: str

    def reconstruct(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """``[batch, d_model]`` predicted directions (norm without meaning)."""
        ...

    def score(self, vectors: npt.NDArray[np.float32], texts: Sequence[str]) -> list[Score]:
        """Fidelity of each text to its vector (``[batch, d_model]``), in order."""
        ...
