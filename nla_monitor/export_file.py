"""Stored samples as a Parquet file in the NLA community's column names, with its dataset sidecar beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml
from sqlalchemy import Engine

from nla_monitor.errors import ConfigError, VectorFileError
from nla_monitor.explanations_file import PARQUET, replacing
from nla_monitor.store.export import Choice, Extent, StoredSample, extent, stored_samples
from nla_monitor.vectors_file import SIDECAR_SUFFIX, VECTOR_COLUMN, arrow

_TEXT: Final = ("detokenized_text_truncated", "token_text", "explanation")
"""Columns that hold content."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    output: Path
    sidecar: Path
    rows: int
    d_model: int | None
    layer: int | None


def export_file(
    engine: Engine,
    output: Path,
    choice: Choice,
    *,
    limit: int | None = None,
    with_text: bool = True,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write samples in the order in which they were taken, the earliest first; ``verbalize_file`` reads the file.

    Args:
        engine: from ``store.session.open_engine``.
        output: a name that ends in ``.parquet``; ``<output>.nla_meta.yaml`` is written beside it.
        choice: which samples.
        limit: at most so many.
        with_text: False leaves context, token and explanation out: vectors and numbers only.
        overwrite: replace what is there.
        progress: told, after each page, how many rows are written and how many there are.

    Raises:
        ConfigError: the name ends otherwise, or the choice holds nothing, or several layers or widths.
        VectorFileError: the file is there already, or cannot be written.
        ActivationError: a stored vector fails its checksum.
        StoreUnavailableError: the database cannot be read.
    """
    if output.suffix.lower() != PARQUET:
        raise ConfigError(f"{output}: an export is a Parquet file; name it so that it ends in {PARQUET}")
    sidecar = output.with_name(output.name + SIDECAR_SUFFIX)
    if not overwrite and (there := next((file for file in (output, sidecar) if file.exists()), None)):
        raise VectorFileError(f"{there} is there already. Name another file, or replace it with --overwrite")
    pa, parquet = arrow(), arrow("pyarrow.parquet")
    found = extent(engine, choice)
    _require_one(found)
    total = found.samples if limit is None else min(limit, found.samples)
    schema = _schema(pa, found.widths[0], with_text=with_text)
    rows = 0
    with replacing(output) as partial:
        writer = parquet.ParquetWriter(partial, schema, compression="zstd")
        try:
            for page in stored_samples(engine, choice, limit=limit):
                writer.write_table(_table(pa, page, schema))
                rows += len(page)
                if progress is not None:
                    progress(rows, max(total, rows))
        finally:
            writer.close()
        # Before the file itself is there: a vector file without its sidecar would be taken for one of any layer.
        _write_sidecar(sidecar, output, found, rows)
    return Exported(output, sidecar, rows, found.widths[0], found.layers[0])


def _require_one(found: Extent) -> None:
    if not found.samples:
        raise ConfigError("no stored sample is chosen; loosen the filters (nla-monitor samples shows what is stored)")
    if len(found.layers) > 1:
        told = ", ".join(map(str, found.layers))
        raise ConfigError(f"the samples are of layers {told}, and a dataset has one; choose it with --layer")
    if len(found.widths) > 1:
        told = ", ".join(map(str, found.widths))
        raise ConfigError(f"the samples are of models of d_model {told}, and a dataset has one width; choose a --run")


def _schema(pa: Any, d_model: int, *, with_text: bool) -> Any:
    # Fixed-size: lists with offsets of 32 bits overflow at some hundred thousand vectors.
    fields = {
        VECTOR_COLUMN: pa.list_(pa.float32(), d_model),
        "activation_layer": pa.int32(),
        "n_raw_tokens": pa.int64(),
        "doc_id": pa.string(),
        "detokenized_text_truncated": pa.string(),
        "sample_id": pa.string(),
        "run_id": pa.string(),
        "step": pa.int64(),
        "phase": pa.string(),
        "role": pa.string(),
        "position": pa.int64(),
        "token_id": pa.int64(),
        "token_text": pa.string(),
        "trigger": pa.string(),
        "inclusion_probability": pa.float64(),
        "captured_at": pa.float64(),
        "norm": pa.float64(),
        "model": pa.string(),
        "adapter": pa.string(),
        "attributes": pa.string(),
        "explanation": pa.string(),
        "truncated": pa.bool_(),
        "tokens": pa.int32(),
        "av_hash": pa.string(),
        "cosine": pa.float64(),
        "mse_nrm": pa.float64(),
        "fve": pa.float64(),
        "denominator": pa.float64(),
        "denominator_name": pa.string(),
        "ar_hash": pa.string(),
    }
    return pa.schema([(name, kind) for name, kind in fields.items() if with_text or name not in _TEXT])


def _table(pa: Any, page: Sequence[StoredSample], schema: Any) -> Any:
    columns = [_column(pa, page, field) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _column(pa: Any, page: Sequence[StoredSample], field: Any) -> Any:
    if field.name == VECTOR_COLUMN:
        flat = np.concatenate([one.sample.vector for one in page]).astype(np.float32, copy=False)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), field.type.list_size)
    return pa.array([_value(one, field.name) for one in page], field.type)


def _value(one: StoredSample, name: str) -> Any:
    """A column's value by the community's name, or by that of our records."""
    sample, explanation, fidelity = one
    if name in _RENAMED:
        return _RENAMED[name](one)
    for record in (sample, explanation, fidelity):
        if hasattr(record, name):
            value = getattr(record, name)
            return None if isinstance(value, float) and math.isnan(value) else value
    return None  # not read, or read without an AR


_RENAMED: Final[dict[str, Callable[[StoredSample], Any]]] = {
    "activation_layer": lambda one: one.sample.layer,
    "n_raw_tokens": lambda one: one.sample.position + 1,  # tokens up to and with this one
    "doc_id": lambda one: one.sample.sequence_id,
    "detokenized_text_truncated": lambda one: one.sample.context,
    "attributes": lambda one: json.dumps(dict(one.sample.attributes), sort_keys=True),
    "explanation": lambda one: one.explanation.text if one.explanation is not None else None,
}


def _write_sidecar(file: Path, output: Path, found: Extent, rows: int) -> None:
    """The dataset sidecar of the reference pipeline (schema 1); it has no injection scale on purpose."""
    from nla_monitor import __version__  # noqa: PLC0415 - the package's own module, lazily to stay acyclic

    content = {
        "kind": "nla_dataset",
        "schema_version": 1,
        "dataset_id": output.stem,
        "stage": "base",
        "row_count": rows,
        "extraction": {
            "base_model": found.models[0] if len(found.models) == 1 else list(found.models),
            "d_model": found.widths[0],
            "layer_index": found.layers[0],
            "norm": "none",
        },
        "parent_datasets": [],
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "created_by": f"nla-monitor {__version__}",
    }
    try:
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise VectorFileError(f"{file} cannot be written: {error.strerror or error}. Correct the path") from error
