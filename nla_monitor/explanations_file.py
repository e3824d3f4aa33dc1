"""Explanations of a file of activations as Parquet or JSON lines: its own columns, then what was read in each row."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol

from nla_monitor.errors import ConfigError, VectorFileError
from nla_monitor.vectors_file import VectorFile, arrow

PARQUET: Final = ".parquet"
JSONL: Final = ".jsonl"
METADATA_KEY: Final = b"nla_monitor"
"""Of the Parquet file's metadata: how the explanations were made, as JSON."""
COLUMNS: Final = {
    "row": "int64",
    "sample": "int32",
    "seed": "int64",
    "norm": "float64",
    "explanation": "string",
    "truncated": "bool_",
    "tokens": "int32",
    "cosine": "float64",
    "mse_nrm": "float64",
    "fve": "float64",
    "denominator": "float64",
    "denominator_name": "string",
    "av_hash": "string",
    "ar_hash": "string",
    "error": "string",
}
"""Name and Arrow type of what is written beside the input's own columns; ``row`` counts the input's rows from 0."""
_CHUNK: Final = 4096
_CHUNK_WITH_VECTORS: Final = 256


class Sink(Protocol):
    """What takes the finished tables."""

    def write(self, table: Any) -> None:
        """Write an Arrow table."""
        ...

    def close(self) -> None:
        """Finish the file."""
        ...


def result_rows(line: Sequence[Any], av_hash: str, ar_hash: str | None) -> Iterator[tuple[Any, ...]]:
    """Rows in the order of ``COLUMNS`` of one journal line ``[row, norm, error, [[seed, text, ...], ...]]``."""
    row, norm, error, samples = line
    if error is not None:
        yield row, 0, None, norm, *[None] * 8, av_hash, ar_hash, error
    for number, (seed, *said) in enumerate(samples):
        yield row, number, seed, norm, *said, av_hash, ar_hash, None


def write_explanations(
    output: Path,
    source: VectorFile,
    lines: Iterator[Sequence[Any]],
    rows: int,
    provenance: Mapping[str, Any],
    *,
    with_vectors: bool = False,
    seen: Callable[[Sequence[tuple[Any, ...]]], None],
) -> None:
    """Write the whole output beside its place, then put it there: readers see the old file or the new one.

    Args:
        output: ``.parquet`` or ``.jsonl``.
        source: the activations.
        lines: journal lines of its first rows, in order.
        rows: how many of them.
        provenance: how the explanations were made; ``av_hash`` and ``ar_hash`` stand in every row.
        with_vectors: keep the column of vectors (Parquet only).
        seen: told the result rows of each part, in order.

    Raises:
        VectorFileError: the file cannot be written, or the source is damaged.
    """
    pa = arrow()
    columns = [name for name in source.schema.names if with_vectors or name != source.column]
    taken = set(columns)
    fields = [pa.field(_free(name, taken), source.schema.field(name).type) for name in columns]
    fields += [pa.field(name, getattr(pa, kind)()) for name, kind in COLUMNS.items()]
    schema = pa.schema(fields, metadata={METADATA_KEY: json.dumps(dict(provenance)).encode()})
    size = _CHUNK_WITH_VECTORS if with_vectors else _CHUNK
    with replacing(output) as partial:
        sink = _sink(partial, output.suffix, schema)
        try:
            for part, count in _parts(source, columns, rows, size):
                results = [
                    list(result_rows(line, provenance["av_hash"], provenance["ar_hash"]))
                    for line in islice(lines, count)
                ]
                flat = [row for several in results for row in several]
                seen(flat)
                index = pa.array([at for at, several in enumerate(results) for _ in several], pa.int64())
                carried = part.take(index).columns if part is not None else []
                told = zip(*flat, strict=True) if flat else [()] * len(COLUMNS)
                made = [
                    pa.array(values, field.type) for values, field in zip(told, fields[len(columns) :], strict=True)
                ]
                sink.write(pa.Table.from_arrays([*carried, *made], schema=schema))
        finally:
            sink.close()


def _free(name: str, taken: set[str]) -> str:
    """A carried column's name; one that we use ourselves gets a prefix."""
    if name not in COLUMNS:
        return name
    renamed = f"input_{name}"
    while renamed in taken or renamed in COLUMNS:
        renamed = f"input_{renamed}"
    taken.add(renamed)
    return renamed


def _parts(source: VectorFile, columns: Sequence[str], rows: int, size: int) -> Iterator[tuple[Any, int]]:
    """The source's columns in parts, with the number of rows of each; None where it has no column to carry."""
    left = rows
    parts = source.batches(columns=columns, size=size) if columns else iter(())
    while left > 0:
        part = next(parts) if columns else None
        count = min(left, size if part is None else part.num_rows)
        yield (None if part is None else part.slice(0, count)), count
        left -= count


# -- the two formats ----------------------------------------------------------------------------------------------


def format_of(path: Path) -> str:
    """``.parquet`` or ``.jsonl``.

    Raises:
        ConfigError: the name ends otherwise.
    """
    suffix = path.suffix.lower()
    if suffix not in {PARQUET, JSONL}:
        raise ConfigError(f"--output {path}: the name must end in {PARQUET} or {JSONL}, which says the format")
    return suffix


def _sink(path: Path, suffix: str, schema: Any) -> Sink:
    if suffix.lower() == JSONL:
        return _Lines(path)
    writer: Sink = arrow("pyarrow.parquet").ParquetWriter(path, schema, compression="zstd")
    return writer


class _Lines:
    """One JSON object a line, UTF-8."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("w", encoding="utf-8", newline="\n")

    def write(self, table: Any) -> None:
        names = table.schema.names
        columns = [plain_values(table.column(number)) for number in range(len(names))]
        for row in zip(*columns, strict=True):
            self._stream.write(
                json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False, allow_nan=False) + "\n"
            )

    def close(self) -> None:
        self._stream.close()


def plain_values(column: Any) -> list[Any]:
    """The values of an Arrow column as JSON knows them; bytes that are no UTF-8 become hex escapes."""
    try:
        values = column.to_pylist()
    except UnicodeDecodeError:  # Parquet does not check that a text is UTF-8
        values = column.cast(arrow().large_binary()).to_pylist()
    return [_plain(value) for value in values]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A path beside ``output`` to write to, which takes its place at the end; it is removed if writing fails.

    Raises:
        VectorFileError: it cannot be written.
    """
    partial = output.with_name(f"{output.name}.tmp")
    try:
        try:
            yield partial
            with partial.open("rb") as stream:
                os.fsync(stream.fileno())
            partial.replace(output)
        except (OSError, arrow().ArrowException) as error:
            reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
            raise VectorFileError(f"{output} cannot be written: {reason}. Make room, or correct the path") from error
    finally:
        partial.unlink(missing_ok=True)
