"""Fakes for your own tests: a verbalizer, a reconstructor and a sink that need no model and no network.

They are fakes: what they say is what you gave them, not what an activation holds. They keep the real ones' contract
(shapes, order, refusal of unusable vectors), so that code tested with them meets no surprise with a real NLA.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from itertools import count
from typing import Final

import numpy as np
import numpy.typing as npt

from nla_monitor.errors import ActivationError
from nla_monitor.nla.base import Score, Verbalization
from nla_monitor.records import Alert, Vector

__all__ = ["FakeReconstructor", "FakeVerbalizer", "MemorySink"]

_DENOMINATOR: Final = 1.0


class FakeVerbalizer:
    """Says given texts, whatever the vectors are.

    Args:
        texts: said in turn, one per vector, from the start again when used up; or a function of one vector
            ``[d_model]``, for texts that depend on it.
        d_model: width of the vectors it takes.
        layer: what it claims to read.
    """

    def __init__(
        self,
        texts: Sequence[str] | Callable[[Vector], str] = ("A fake explanation.",),
        *,
        d_model: int = 8,
        layer: int | None = 0,
    ) -> None:
        if not callable(texts) and not texts:
            raise ValueError("a FakeVerbalizer needs at least one text")
        self.d_model = d_model
        self.layer = layer
        self.content_hash = "fake-av"
        self.vectors: list[Vector] = []
        """Every vector that it was given, in order."""
        self._texts = texts
        self._turn = count()
        self._lock = threading.Lock()  # a worker thread and the test may both call

    def verbalize(self, vectors: npt.NDArray[np.float32]) -> list[Verbalization]:
        """One text per row of ``[batch, d_model]``.

        Raises:
            ActivationError: a row is not finite, has zero norm or the wrong width, as with a real AV.
        """
        _refuse_unusable(vectors, self.d_model)
        with self._lock:
            self.vectors += list(vectors)
            texts = [self._say(vector) for vector in vectors]
        return [Verbalization(text, truncated=False, tokens=len(text.split())) for text in texts]

    def _say(self, vector: Vector) -> str:
        if callable(self._texts):
            return self._texts(vector)
        return self._texts[next(self._turn) % len(self._texts)]


class FakeReconstructor:
    """Gives every text the same fidelity, and the same made-up direction for the same text.

    Args:
        cosine: of every score; FVE follows from it with the denominator 1, named ``fake``.
        d_model: width of the vectors.
    """

    def __init__(self, cosine: float = 0.9, *, d_model: int = 8) -> None:
        self.cosine = cosine
        self.d_model = d_model
        self.content_hash = "fake-ar"

    def reconstruct(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """``[batch, d_model]`` unit vectors drawn with the text's hash as the seed."""
        rows = [_direction(text, self.d_model) for text in texts]
        return np.stack(rows) if rows else np.zeros((0, self.d_model), dtype=np.float32)

    def score(self, vectors: npt.NDArray[np.float32], texts: Sequence[str]) -> list[Score]:
        """The fixed fidelity, once per row.

        Raises:
            ActivationError: as ``FakeVerbalizer.verbalize``.
        """
        _refuse_unusable(vectors, self.d_model)
        mse = 2.0 * (1.0 - self.cosine)
        score = Score(self.cosine, mse, 1.0 - mse / _DENOMINATOR, _DENOMINATOR, "fake")
        return [score for _ in texts]


class MemorySink:
    """Keeps the alerts that it is sent.

    Args:
        fail: called with ``(kind, alert)`` before an alert is kept; raise ``DeliveryError`` there to rehearse an
            outage.
    """

    name = "memory"

    def __init__(self, fail: Callable[[str, Alert], None] | None = None) -> None:
        self.sent: list[tuple[str, Alert]] = []
        """``(kind, alert)`` in the order of delivery; kind is ``fired`` or ``resolved``."""
        self._fail = fail

    @property
    def alerts(self) -> list[Alert]:
        """The alerts alone."""
        return [alert for _, alert in self.sent]

    def send(self, kind: str, alert: Alert) -> None:
        """Keep an alert."""
        if self._fail is not None:
            self._fail(kind, alert)
        self.sent.append((kind, alert))


def _direction(text: str, d_model: int) -> Vector:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    vector = np.random.default_rng(seed).standard_normal(d_model).astype(np.float32)
    unit: Vector = vector / np.linalg.norm(vector)
    return unit


def _refuse_unusable(vectors: npt.NDArray[np.float32], d_model: int) -> None:
    if vectors.ndim != 2 or vectors.shape[1] != d_model:
        raise ActivationError(f"expected vectors [batch, {d_model}], found {list(vectors.shape)}")
    for row, vector in enumerate(vectors):
        if not np.isfinite(vector).all():
            raise ActivationError(f"vector {row} is not finite")
        if not vector.any():
            raise ActivationError(f"vector {row} has zero norm")
