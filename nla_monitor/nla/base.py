"""Interfaces of the two halves of an NLA; implementations beside this file, third parties may bring their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from nla_monitor.errors import NLAMonitorError


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


class PartialReadError(NLAMonitorError):
    """Some rows of a batch failed where they were read one by one; the others are here.

    Args:
        done: explanations by row.
        failed: what went wrong, by row.
    """

    def __init__(self, done: Mapping[int, Verbalization], failed: Mapping[int, NLAMonitorError]) -> None:
        row, error = next(iter(failed.items()))
        super().__init__(f"{len(failed)} of {len(failed) + len(done)} vectors could not be read; row {row}: {error}")
        self.done = done
        self.failed = failed


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


@runtime_checkable
class Checkable(Protocol):
    """An AV that runs elsewhere, and can be asked beforehand whether it is what it should be."""

    def check(self) -> object:
        """What was found; nothing is returned of one that cannot be used.

        Raises:
            EngineUnavailableError: it is not there now.
            EngineError: it cannot be used as it is.
        """
        ...


@runtime_checkable
class Resampler(Protocol):
    """What an AV can do beside greedy reading: draw other explanations. Without it there is no agreement control."""

    def resample(
        self, vectors: npt.NDArray[np.float32], seeds: Sequence[int], *, temperature: float = 1.0
    ) -> list[Verbalization]:
        """One drawn explanation for each of ``[batch, d_model]``, in order.

        Args:
            vectors: raw activations; repeat a row for several draws.
            seeds: one per row; the same vector, seed and temperature give the same text in any batch.
            temperature: of the softmax, above 0.
        """
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """How one explanation might go on."""

    start: str
    """The explanation up to there, as in ``Verbalization.text``."""
    options: tuple[str, ...]
    """Texts that may follow at once, white space at their beginnings included."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How probable an AV finds a continuation."""

    logprob: float
    """Natural logarithm of its probability, summed over its tokens."""
    tokens: int
    """How many tokens it was judged by."""


@runtime_checkable
class ClaimScorer(Protocol):
    """What an AV can do beside writing: say how probable other words were. Without it there is no claim probability."""

    def score_continuations(
        self, vectors: npt.NDArray[np.float32], choices: Sequence[Choice]
    ) -> list[list[Likelihood]]:
        """For each of ``[batch, d_model]`` the likelihood of each option of its choice, in order."""
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
