"""Files of activations: what is read, what is refused, and how little memory it takes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_monitor.errors import MissingExtraError, VectorFileError
from nla_monitor.vectors_file import VectorFile, vectors_in
from tests.vectors_support import LAYER, D, vectors, write_file


def read(file: VectorFile, size: int = 5, start: int = 0) -> list[Any]:
    return [vectors_in(table, file.column, D) for table in file.batches(size=size, start=start)]


@pytest.mark.parametrize("kind", ["fixed", "list", "large", "double"])
def test_every_list_type_gives_the_same_vectors(tmp_path: Path, kind: str) -> None:
    """Fixed-size, variable, 64-bit offsets and double precision: the community writes all of them."""
    file = VectorFile(write_file(tmp_path / "a.parquet", vectors(23), kind=kind))
    np.testing.assert_array_equal(np.concatenate([part.matrix for part in read(file)]), vectors(23))
    assert file.carried == ["activation_layer", "doc_id"]
    assert file.layers() == {LAYER}


def test_half_precision_and_tensors_are_read(tmp_path: Path) -> None:
    rows = np.round(vectors(6))
    assert np.array_equal(read(VectorFile(write_file(tmp_path / "h.parquet", rows, kind="half")), 9)[0].matrix, rows)
    tensor = pa.FixedShapeTensorArray.from_numpy_ndarray(rows)
    pq.write_table(pa.table({"activation_vector": tensor}), tmp_path / "t.parquet")
    assert np.array_equal(read(VectorFile(tmp_path / "t.parquet"), 9)[0].matrix, rows)


@given(rows=st.integers(1, 40), group=st.integers(1, 45), size=st.integers(1, 50), start=st.integers(0, 45))
def test_batches_are_full_and_complete_from_any_row(
    tmp_path_factory: pytest.TempPathFactory, rows: int, group: int, size: int, start: int
) -> None:
    """Neither small row groups nor a late start change which rows come, or make small batches."""
    path = write_file(tmp_path_factory.mktemp("v") / "a.parquet", vectors(rows), group=group)
    file = VectorFile(path)
    sizes = [table.num_rows for table in file.batches(size=size, start=start)]
    names = [name for table in file.batches(size=size, start=start) for name in table.column("doc_id").to_pylist()]
    file.close()
    assert names == [f"doc-{row}" for row in range(start, rows)]
    assert all(count == size for count in sizes[:-1])


def test_rows_that_cannot_be_read_are_set_apart_with_the_reason(tmp_path: Path) -> None:
    rows: list[Any] = [*vectors(6)]
    rows[1], rows[2] = None, np.zeros(D)
    rows[3] = np.full(D, np.nan)
    rows[4] = np.ones(D - 1)
    found = read(VectorFile(write_file(tmp_path / "a.parquet", rows, kind="list")), 10)[0]
    assert found.places.tolist() == [0, 5]
    assert sorted(found.errors) == [1, 2, 3, 4]
    for row, word in [(1, "null"), (2, "zero norm"), (3, "NaN"), (4, "7 numbers instead of 8")]:
        assert word in found.errors[row]


def test_nulls_in_a_fixed_size_column_do_not_shift_the_rows_behind_them(tmp_path: Path) -> None:
    rows: list[Any] = [*vectors(9)]
    rows[2] = rows[5] = None
    parts = read(VectorFile(write_file(tmp_path / "a.parquet", rows, group=4)), 3)
    found = [number for part in parts for number in part.matrix[:, 0]]
    assert found == [1, 2, 4, 5, 7, 8, 9]


def test_values_beyond_float32_and_null_numbers_are_errors_of_their_row(tmp_path: Path) -> None:
    column = pa.array([[1e300] * D, [1.0, None, *[1.0] * (D - 2)], [1.0] * D], pa.list_(pa.float64()))
    pq.write_table(pa.table({"activation_vector": column}), tmp_path / "a.parquet")
    found = read(VectorFile(tmp_path / "a.parquet"))[0]
    assert sorted(found.errors) == [0, 1]


# -- whole files that are refused ---------------------------------------------------------------------------------


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8:400] = b"\xff" * 392
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("row,vector\n1,2\n"), "another format"),
        (cut_off, "was cut off, or is still being written"),
        (lambda path: (path.unlink(), path.mkdir()), "is a folder"),
    ],
)
def test_a_file_that_is_no_whole_parquet_says_so(tmp_path: Path, spoil: Any, message: str) -> None:
    path = write_file(tmp_path / "a.parquet", vectors(5))
    spoil(path)
    with pytest.raises(VectorFileError, match=message):
        VectorFile(path)


def test_a_damaged_page_is_an_error_when_it_is_read(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.parquet", vectors(40))
    damaged(path)
    file = VectorFile(path)
    with pytest.raises(VectorFileError, match=r"cannot be read as Parquet.*damaged"):
        read(file)


def test_a_missing_column_names_those_that_are_there(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"activation_vectors": [[1.0]], "text": ["x"]}), path)
    with pytest.raises(
        VectorFileError, match=r"no column 'activation_vector'.*did you mean --column activation_vectors"
    ):
        VectorFile(path)
    pq.write_table(pa.table({"text": ["x"]}), path)
    with pytest.raises(VectorFileError, match="it has text"):
        VectorFile(path)


@pytest.mark.parametrize("column", [[1.0], ["x"], [["x"]], [[1, 2]]])
def test_a_column_that_holds_no_vectors_is_refused(tmp_path: Path, column: list[Any]) -> None:
    pq.write_table(pa.table({"activation_vector": column}), tmp_path / "a.parquet")
    with pytest.raises(VectorFileError, match="lists of floats"):
        VectorFile(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", ["fixed", "list"])
def test_vectors_of_another_width_are_refused_at_once(tmp_path: Path, kind: str) -> None:
    file = VectorFile(write_file(tmp_path / "a.parquet", vectors(5), kind=kind))
    file.require_fit(D, LAYER)
    with pytest.raises(VectorFileError, match=r"d_model 16, column 'activation_vector' holds d_model 8"):
        file.require_fit(16, LAYER)


def test_vectors_of_another_layer_are_refused_unless_told_otherwise(tmp_path: Path) -> None:
    file = VectorFile(write_file(tmp_path / "a.parquet", vectors(5)))
    with pytest.raises(VectorFileError, match=r"reads layer 20 .* holds vectors of layer 3\..*--ignore-layer"):
        file.require_fit(D, 20)
    file.require_fit(D, 20, ignore_layer=True)
    file.require_fit(D, None)


def test_the_dataset_sidecar_tells_the_layer_where_no_column_does(tmp_path: Path) -> None:
    path = write_file(tmp_path / "a.parquet", vectors(5), layer=None)
    sidecar = tmp_path / "a.parquet.nla_meta.yaml"
    sidecar.write_text("kind: nla_dataset\nextraction: {layer_index: 4, d_model: 8}\n")
    with pytest.raises(VectorFileError, match="holds vectors of layer 4"):
        VectorFile(path).require_fit(D, LAYER)
    sidecar.write_text("kind: nla_dataset\nextraction: {d_model: 9}\n")
    with pytest.raises(VectorFileError, match=r"extraction\.d_model is 9, the AV reads 8"):
        VectorFile(path).require_fit(D, LAYER)
    for broken, message in [("kind: nla_model\n", "kind: nla_dataset"), ("{", "cannot be read")]:
        sidecar.write_text(broken)
        with pytest.raises(VectorFileError, match=message):
            VectorFile(path)


def test_memory_does_not_grow_with_the_row_group(tmp_path: Path) -> None:
    """One row group of 32 MB is read in a few; without a buffered stream it would be taken whole."""
    count, width = 8_000, 1_024
    flat = pa.array(np.random.default_rng(0).standard_normal(count * width, dtype=np.float32))
    table = pa.table({"activation_vector": pa.FixedSizeListArray.from_arrays(flat, width)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=count, compression="none", use_dictionary=False)
    del table, flat
    pool = pa.default_memory_pool()
    pool.release_unused()
    before, most = pool.bytes_allocated(), 0
    for part in VectorFile(tmp_path / "a.parquet").batches(size=64):
        most = max(most, pool.bytes_allocated() - before)
        assert part.num_rows == 64
    assert most < 12_000_000


def test_without_pyarrow_the_pip_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(tmp_path / "a.parquet", vectors(2))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'nla-monitor\[parquet\]'"):
        VectorFile(path)
