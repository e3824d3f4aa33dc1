"""Files of activations, and fakes whose words depend on the vector alone: what a batch cannot change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from nla_monitor.nla.base import Verbalization
from nla_monitor.testing import FakeReconstructor, FakeVerbalizer
from nla_monitor.verbalize_file import Readers

D = 8
LAYER = 3


def vectors(count: int, d_model: int = D) -> npt.NDArray[np.float32]:
    """``[count, d_model]``; the first number of each is its row + 1."""
    matrix = np.random.default_rng(5).normal(size=(count, d_model)).astype(np.float32)
    matrix[:, 0] = np.arange(1, count + 1)
    return matrix


def write_file(
    path: Path, rows: Any, *, kind: str = "fixed", group: int = 7, layer: int | None = LAYER, **more: Any
) -> Path:
    """A Parquet file in the community's form; ``rows`` is a matrix, or a list of vectors and nulls."""
    listed = [None if row is None else [float(number) for number in row] for row in rows]
    width = next((len(row) for row in listed if row is not None), D)
    types = {
        "fixed": pa.list_(pa.float32(), width),
        "list": pa.list_(pa.float32()),
        "large": pa.large_list(pa.float32()),
        "double": pa.list_(pa.float64()),
        "half": pa.list_(pa.float16(), width),
    }
    if kind == "half":
        listed = [None if row is None else [np.float16(number) for number in row] for row in listed]
    columns: dict[str, Any] = {"activation_vector": pa.array(listed, types[kind])}
    if layer is not None:
        columns["activation_layer"] = pa.array([layer] * len(listed), pa.int32())
    columns["doc_id"] = [f"doc-{row}" for row in range(len(listed))]
    pq.write_table(pa.table(columns | more), path, row_group_size=group)
    return path


def text_of(vector: npt.NDArray[Any]) -> str:
    """What the fake AV says."""
    return f"row {round(float(vector[0])) - 1} of {float(vector.astype(np.float64).sum()):.6f}"


class DrawingVerbalizer(FakeVerbalizer):
    """A fake AV that can also draw: its words name vector, seed and temperature."""

    def __init__(self, d_model: int = D, layer: int | None = LAYER) -> None:
        super().__init__(text_of, d_model=d_model, layer=layer)

    def resample(
        self, rows: npt.NDArray[np.float32], seeds: Sequence[int], *, temperature: float = 1.0
    ) -> list[Verbalization]:
        """One made-up draw for each row."""
        said = self.verbalize(rows)
        return [
            Verbalization(f"{one.text} seed {seed} at {temperature}", truncated=seed % 2 == 0, tokens=one.tokens)
            for one, seed in zip(said, seeds, strict=True)
        ]


def readers(**changes: Any) -> Readers:
    """The fakes as a pair."""
    return Readers(**({"verbalizer": DrawingVerbalizer(), "reconstructor": FakeReconstructor(d_model=D)} | changes))
