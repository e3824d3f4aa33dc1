"""Files of activations in the NLA community's Parquet format, read as a stream.

One row is one activation: ``activation_vector``, a list (fixed-size or not) of floats as the model had them, beside
``activation_layer`` (K), ``doc_id``, ``n_raw_tokens`` and whatever else its maker kept. A sidecar
``<file>.nla_meta.yaml`` (``kind: nla_dataset``) may say the layer and the width. Memory holds a few batches, whatever
the size of the file or of its row groups.
"""

from __future__ import annotations

import bisect
import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import yaml

from nla_monitor.errors import MissingExtraError, VectorFileError
from nla_monitor.nla.injection import bad_rows

VECTOR_COLUMN: Final = "activation_vector"
LAYER_COLUMN: Final = "activation_layer"
SIDECAR_SUFFIX: Final = ".nla_meta.yaml"
_BUFFER: Final = 1 << 20
"""Bytes read ahead of each column: without it a whole row group's column is read at once."""
_SCAN: Final = 65_536


def arrow(module: str = "pyarrow") -> Any:
    """The module ``pyarrow`` or one inside it.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError("pyarrow", "parquet", "reading and writing Parquet files") from error


@dataclass(frozen=True, slots=True)
class Vectors:
    """The vectors of a batch, sorted into those that can be read and those that cannot."""

    matrix: npt.NDArray[np.float32]
    """``[readable, d_model]``, as stored."""
    places: npt.NDArray[np.int64]
    """Row of the batch for each row of ``matrix``, ascending."""
    errors: Mapping[int, str]
    """Why each other row of the batch cannot be read."""


class VectorFile:
    """A Parquet file with a column of vectors.

    Args:
        path: the file.
        column: name of the column of vectors.

    Raises:
        VectorFileError: it is missing, no Parquet file (or cut off, or still being written), or has no such column of
            float lists.
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(self, path: Path, *, column: str = VECTOR_COLUMN) -> None:
        self.path = path
        self.column = column
        self._stat = _stat(path)
        with _reading(path):
            self._file = arrow("pyarrow.parquet").ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False)
            self.schema: Any = self._file.schema_arrow
        self.rows: int = self._file.metadata.num_rows
        groups = (self._file.metadata.row_group(number).num_rows for number in range(self._file.num_row_groups))
        self._starts = [0, *itertools.accumulate(groups)]
        self.width = self._checked_width()
        self.sidecar = _dataset_sidecar(path)

    @property
    def stamp(self) -> dict[str, Any]:
        """What tells whether the file is the same as before: name, bytes, time of change, rows."""
        size, changed = self._stat
        return {"name": self.path.name, "bytes": size, "mtime_ns": changed, "rows": self.rows}

    @property
    def carried(self) -> list[str]:
        """Names of the columns beside the vectors."""
        return [name for name in self.schema.names if name != self.column]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def require_unchanged(self) -> None:
        """Raises ``VectorFileError`` if the file was written to since it was opened."""
        if _stat(self.path) != self._stat:
            raise VectorFileError(
                f"{self.path} has changed while it was read, so that rows and explanations may not belong together. "
                "Wait until it is written, then run the command again with --overwrite"
            )

    def require_fit(self, d_model: int, layer: int | None, *, ignore_layer: bool = False) -> None:
        """Refuse a file whose vectors are of another width or layer than the AV reads.

        Args:
            d_model: width that the AV reads.
            layer: K that the AV reads; None: unknown, so not compared.
            ignore_layer: do not compare layers.

        Raises:
            VectorFileError: they differ; the message names both sides.
        """
        widths = {self.width} if self.width is not None else self._first_widths()
        told = self.sidecar.get("d_model")
        if self.rows and widths and d_model not in widths:
            found = ", ".join(map(str, sorted(widths)))
            raise VectorFileError(
                f"{self.path}: the AV reads vectors of d_model {d_model}, column {self.column!r} holds d_model "
                f"{found}. Name an AV of the model that was captured, with --av"
            )
        if told is not None and told != d_model:
            raise VectorFileError(
                f"{self.path.name}{SIDECAR_SUFFIX}: extraction.d_model is {told}, the AV reads {d_model}. Name an AV "
                "of the model that was captured, or take the sidecar that belongs to the file"
            )
        if layer is None or ignore_layer:
            return
        if others := self.layers() - {layer}:
            found = ", ".join(map(str, sorted(others)))
            raise VectorFileError(
                f"{self.path}: the AV reads layer {layer} (output of block {layer}), the file holds vectors of layer "
                f"{found}. Off its layer an AV writes fluent text that means nothing: name the AV of that layer with "
                "--av, or read on all the same with --ignore-layer (if the file counts hidden_states instead of blocks)"
            )

    def common_width(self) -> int:
        """The width of the vectors; where each row has its own, that of the first ones.

        Raises:
            VectorFileError: they have no width in common, or there is none.
        """
        widths = {self.width} if self.width is not None else self._first_widths()
        if len(widths) != 1:
            found = ", ".join(map(str, sorted(widths))) or "no vector"
            raise VectorFileError(f"{self.path}: column {self.column!r} must hold vectors of one width, found {found}")
        return widths.pop()

    def layers(self) -> set[int]:
        """Layers that the file names, in its column or, without one, its sidecar; empty: it names none."""
        if LAYER_COLUMN not in self.schema.names:
            told = self.sidecar.get("layer_index")
            return set() if told is None else {told}
        compute, found = arrow("pyarrow.compute"), set()
        for batch in self.batches(columns=[LAYER_COLUMN], size=_SCAN):
            found |= set(compute.unique(batch.column(0)).drop_null().to_pylist())
        if odd := [value for value in found if not isinstance(value, int)]:
            raise VectorFileError(
                f"{self.path}: column {LAYER_COLUMN!r} must hold whole numbers (K of the block), found {odd[0]!r}"
            )
        return found

    def batches(self, *, columns: Sequence[str] | None = None, size: int, start: int = 0) -> Iterator[Any]:
        """Tables of ``size`` rows (the last may be smaller), from row ``start`` on, across row groups.

        Raises:
            VectorFileError: the file is damaged there.
        """
        if start >= self.rows:
            return
        group = bisect.bisect_right(self._starts, start) - 1
        groups = list(range(group, len(self._starts) - 1))
        with _reading(self.path):
            parts = self._file.iter_batches(
                batch_size=size, row_groups=groups, columns=columns, use_threads=False, use_pandas_metadata=False
            )
            yield from _rebatched(_without_first(parts, start - self._starts[group]), size)

    def _checked_width(self) -> int | None:
        """Width of a fixed-size column; None where each row has its own."""
        names = self.schema.names
        if self.column not in names:
            nearest = difflib.get_close_matches(self.column, names, n=1, cutoff=0.4)
            hint = f"did you mean --column {nearest[0]}?" if nearest else "name the column of vectors with --column"
            raise VectorFileError(
                f"{self.path} has no column {self.column!r}; it has {', '.join(names) or 'none'}. {hint}"
            )
        types, kind = arrow().types, _storage(self.schema.field(self.column).type)
        fixed = types.is_fixed_size_list(kind)
        listed = fixed or types.is_list(kind) or types.is_large_list(kind)
        if not listed or not types.is_floating(kind.value_type):
            raise VectorFileError(
                f"{self.path}: column {self.column!r} must hold lists of floats (one vector a row), found {kind}"
            )
        return int(kind.list_size) if fixed else None

    def _first_widths(self) -> set[int]:
        """Lengths of the first vectors; empty where they are all null."""
        first = next(self.batches(columns=[self.column], size=256), None)
        if first is None:
            return set()
        return set(arrow("pyarrow.compute").list_value_length(_array(first.column(0))).drop_null().to_pylist())


def vectors_in(table: Any, column: str, d_model: int) -> Vectors:
    """The vectors of a table's column as float32, those that no AV can read set apart with the reason.

    Args:
        table: from ``VectorFile.batches``.
        column: name of the column of vectors.
        d_model: width that is wanted.
    """
    array = _array(table.column(column))
    lengths = arrow("pyarrow.compute").list_value_length(array).fill_null(-1).to_numpy(zero_copy_only=False)
    fits = lengths == d_model
    errors = {int(row): _misfit(int(lengths[row]), d_model) for row in np.flatnonzero(~fits)}
    kept = array.filter(arrow().array(fits)) if errors else array
    flat = kept.flatten().cast(arrow().float32(), safe=False).to_numpy(zero_copy_only=False)
    matrix, places = flat.reshape(-1, d_model), np.flatnonzero(fits)
    # One pass over the whole batch finds the rows worth a closer look; most batches have none.
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(matrix, axis=1)
    odd = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    why = bad_rows(matrix[odd], d_model)
    errors |= {int(places[odd[number]]): reason for number, reason in why.items()}
    sound = np.setdiff1d(np.arange(len(matrix)), [odd[number] for number in why])
    return Vectors(np.ascontiguousarray(matrix[sound]), places[sound], errors)


def _misfit(length: int, d_model: int) -> str:
    if length < 0:
        return "no vector (null)"
    return f"{length} numbers instead of {d_model}: captured from another model or layer than this NLA reads"


def _storage(kind: Any) -> Any:
    """The type below an extension type (fixed-shape tensors)."""
    return kind.storage_type if isinstance(kind, arrow().BaseExtensionType) else kind


def _array(column: Any) -> Any:
    """A chunked column as one array of its storage type."""
    array = column.combine_chunks()
    if isinstance(array, arrow().ChunkedArray):  # what combine_chunks gives for a column without chunks
        array = arrow().concat_arrays(array.chunks) if array.num_chunks else arrow().array([], array.type)
    return array.storage if isinstance(array, arrow().ExtensionArray) else array


def _rebatched(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """The same rows in tables of ``size``: small row groups must not make small batches."""
    from_batches = arrow().Table.from_batches
    waiting: list[Any] = []
    held = 0
    for batch in batches:
        waiting.append(batch)
        held += batch.num_rows
        if held < size:
            continue
        table = from_batches(waiting)
        whole = held - held % size
        for start in range(0, whole, size):
            yield table.slice(start, size)
        rest = table.slice(whole)
        waiting, held = rest.to_batches(), rest.num_rows
    if held:
        yield from_batches(waiting)


def _without_first(batches: Iterable[Any], count: int) -> Iterator[Any]:
    for batch in batches:
        kept = batch.slice(min(count, batch.num_rows))
        count -= batch.num_rows - kept.num_rows
        if kept.num_rows:
            yield kept


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what a file that is no sound Parquet makes pyarrow raise into ``VectorFileError``."""
    try:
        yield
    except (OSError, arrow().ArrowException) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise VectorFileError(
            f"{path} cannot be read as Parquet: {reason}. It is another format, or damaged, or was cut off, or is "
            "still being written (the index of a Parquet file comes last)"
        ) from error


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise VectorFileError(f"{path} cannot be read: {error.strerror or error}. Correct the path") from error
    if path.is_dir():
        raise VectorFileError(f"{path} is a folder. Name one Parquet file")
    if found.st_size == 0:
        raise VectorFileError(f"{path} is empty (0 bytes): nothing was written to it, or it is still being written")
    return found.st_size, found.st_mtime_ns


def _dataset_sidecar(path: Path) -> dict[str, int]:
    """``layer_index`` and ``d_model`` from the dataset sidecar beside the file, as far as they are there."""
    file = path.with_name(path.name + SIDECAR_SUFFIX)
    if not file.is_file():
        return {}
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise VectorFileError(f"{file} cannot be read: {error}. Correct or remove it") from error
    if not isinstance(data, Mapping) or data.get("kind") != "nla_dataset":
        raise VectorFileError(
            f"{file} must be a dataset's sidecar (kind: nla_dataset); take the one that belongs to the file, or "
            "remove it"
        )
    extraction = data.get("extraction")
    fields = extraction if isinstance(extraction, Mapping) else {}
    told = {name: fields.get(name) for name in ("layer_index", "d_model")}
    return {name: value for name, value in told.items() if isinstance(value, int) and not isinstance(value, bool)}
