"""Stored samples as a file of activations, and denominators measured on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sqlalchemy import Engine, text

from nla_monitor.domains import measure_file, measure_runs
from nla_monitor.errors import ActivationError, ConfigError, VectorFileError
from nla_monitor.export_file import export_file
from nla_monitor.nla.fidelity import variance_denominator
from nla_monitor.records import Phase
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import open_engine
from nla_monitor.store.export import Choice
from nla_monitor.store.repository import Repository
from nla_monitor.vectors_file import VectorFile, vectors_in
from tests.store_support import match, new_database, reading, run_info, sample

COUNT = 30


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    """A database with thirty samples, the first twenty read, the first three matched."""
    made = open_engine(new_database(tmp_path / "nla.db"))
    samples = [
        sample(
            number,
            sample_id=f"0199aaaa-0000-7000-8000-{number:012d}",
            phase=Phase.EVAL if number % 3 == 0 else Phase.TRAIN,
            context=f"text {number}\r\n",
            inclusion_probability=0.25,
            attributes={"source": "web"},
        )
        for number in range(COUNT)
    ]
    spool, repository = SqlSpool(made), Repository(made)
    repository.start_run(run_info(model="org/model"))
    spool.put(samples)
    with repository.transaction(["run-1"]) as tx:
        tx.add_readings([reading(one, f"says {one.position}") for one in samples[:20]])
        tx.add_matches([match(one) for one in samples[:3]], {})
    yield made
    made.dispose()


def export(engine: Engine, path: Path, choice: Choice | None = None, **options: Any) -> list[dict[str, Any]]:
    export_file(engine, path, choice or Choice(), **options)
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def test_every_sample_is_written_in_the_communitys_names(engine: Engine, tmp_path: Path) -> None:
    rows = export(engine, tmp_path / "a.parquet")
    assert len(rows) == COUNT
    first = rows[0]
    np.testing.assert_array_equal(np.float32(first["activation_vector"]), sample(0).vector)
    assert (first["activation_layer"], first["n_raw_tokens"], first["position"]) == (3, 11, 10)
    assert (first["doc_id"], first["detokenized_text_truncated"]) == ("sequence-0", "text 0\r\n")
    assert (first["explanation"], first["cosine"], first["denominator_name"]) == ("says 10", 0.9, "held-out")
    assert (first["phase"], first["step"], first["inclusion_probability"]) == ("eval", 0, 0.25)
    assert (first["av_hash"], first["ar_hash"], first["attributes"]) == ("av-1", "ar-1", '{"source": "web"}')
    assert rows[25]["explanation"] is None
    assert pq.read_schema(tmp_path / "a.parquet").field("activation_vector").type == pa.list_(pa.float32(), 16)


def test_the_sidecar_says_what_the_vectors_are(engine: Engine, tmp_path: Path) -> None:
    export(engine, tmp_path / "a.parquet", limit=7)
    told = yaml.safe_load((tmp_path / "a.parquet.nla_meta.yaml").read_text())
    assert (told["kind"], told["schema_version"], told["stage"], told["row_count"]) == ("nla_dataset", 1, "base", 7)
    extraction = {"base_model": "org/model", "d_model": 16, "layer_index": 3, "norm": "none"}
    assert told["extraction"] == extraction, "no injection_scale: a dataset has none"
    file = VectorFile(tmp_path / "a.parquet")
    assert (file.sidecar, file.layers()) == ({"layer_index": 3, "d_model": 16}, {3})


@pytest.mark.parametrize(
    ("choice", "count"),
    [
        (Choice(run_ids=["run-1"]), COUNT),
        (Choice(rule="hack"), 3),
        (Choice(phase=Phase.EVAL), 10),
        (Choice(phase=Phase.EVAL, read_only=True), 7),
        (Choice(layer=3, read_only=True), 20),
    ],
)
def test_samples_can_be_chosen(engine: Engine, tmp_path: Path, choice: Choice, count: int) -> None:
    assert len(export(engine, tmp_path / "a.parquet", choice)) == count


def test_a_limit_takes_the_earliest(engine: Engine, tmp_path: Path) -> None:
    assert [row["position"] for row in export(engine, tmp_path / "a.parquet", limit=4)] == [10, 11, 12, 13]


def test_text_can_be_left_out(engine: Engine, tmp_path: Path) -> None:
    rows = export(engine, tmp_path / "a.parquet", with_text=False)
    assert not {"explanation", "detokenized_text_truncated", "token_text"} & set(rows[0])
    assert rows[0]["cosine"] == 0.9


@pytest.mark.parametrize("choice", [Choice(rule="none"), Choice(run_ids=["other"])])
def test_an_empty_choice_is_refused(engine: Engine, tmp_path: Path, choice: Choice) -> None:
    with pytest.raises(ConfigError, match="no stored sample is chosen"):
        export(engine, tmp_path / "a.parquet", choice)
    assert not list(tmp_path.glob("a.parquet*"))


def test_several_layers_or_widths_are_refused(engine: Engine, tmp_path: Path) -> None:
    SqlSpool(engine).put([sample(50, layer=5)])
    with pytest.raises(ConfigError, match=r"layers 3, 5.*--layer"):
        export(engine, tmp_path / "a.parquet")
    assert len(export(engine, tmp_path / "a.parquet", Choice(layer=5))) == 1
    SqlSpool(engine).put([sample(51, vector=np.ones(9, np.float32))])
    with pytest.raises(ConfigError, match="d_model 9, 16"):
        export(engine, tmp_path / "b.parquet", Choice(layer=3))


def test_nothing_is_replaced_unless_told_and_other_names_are_refused(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "a.parquet.nla_meta.yaml").write_text("mine")
    with pytest.raises(VectorFileError, match=r"nla_meta\.yaml is there already"):
        export(engine, tmp_path / "a.parquet")
    assert len(export(engine, tmp_path / "a.parquet", overwrite=True)) == COUNT
    with pytest.raises(ConfigError, match=r"ends in \.parquet"):
        export(engine, tmp_path / "a.csv")
    with pytest.raises(VectorFileError, match="cannot be written"):
        export(engine, tmp_path / "no" / "a.parquet")


def test_a_damaged_vector_stops_the_export_and_leaves_no_half_file(engine: Engine, tmp_path: Path) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE nla_samples SET checksum = 1 WHERE position = 20"))
    with pytest.raises(ActivationError, match="CRC-32"):
        export(engine, tmp_path / "a.parquet")
    assert not list(tmp_path.glob("a.parquet*"))


# -- denominators -------------------------------------------------------------------------------------------------


def test_a_run_and_its_export_have_the_same_denominators(engine: Engine, tmp_path: Path) -> None:
    stored = measure_runs(engine, ["run-1"], "mine", by="phase", fewest=5)
    export(engine, tmp_path / "a.parquet")
    filed = measure_file(VectorFile(tmp_path / "a.parquet"), "mine", by="phase", fewest=5)
    assert (stored.layer, stored.d_model, sorted(stored.domains)) == (3, 16, ["eval", "train"])
    for label in (None, "eval", "train"):
        assert stored.domain(label)[1].denominator == pytest.approx(filed.domain(label)[1].denominator)
    evals = np.stack([sample(number).vector for number in range(0, COUNT, 3)])
    assert stored.domains["eval"].denominator == pytest.approx(variance_denominator(evals, "x").value)
    assert sorted(measure_runs(engine, ["run-1"], "mine", by="meta.source", fewest=5).domains) == ["web"]


def test_vectors_that_no_av_can_read_count_in_no_denominator(engine: Engine) -> None:
    SqlSpool(engine).put([sample(60, vector=np.zeros(16, np.float32))])
    assert measure_runs(engine, ["run-1"], "mine", fewest=5).overall.vectors == COUNT


def test_what_has_no_one_layer_or_label_is_refused(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"valid are phase, role"):
        measure_runs(engine, ["run-1"], "mine", by="colour")
    with pytest.raises(ConfigError, match="no sample"):
        measure_runs(engine, ["other"], "mine")
    export(engine, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="no such column"):
        measure_file(VectorFile(tmp_path / "a.parquet"), "mine", by="colour")
    SqlSpool(engine).put([sample(50, layer=5)])
    with pytest.raises(ConfigError, match="--layer"):
        measure_runs(engine, ["run-1"], "mine")


def test_an_export_is_a_file_of_activations(engine: Engine, tmp_path: Path) -> None:
    export(engine, tmp_path / "a.parquet")
    file = VectorFile(tmp_path / "a.parquet")
    file.require_fit(16, 3)
    (table,) = file.batches(size=100)
    assert np.array_equal(vectors_in(table, file.column, 16).matrix[7], sample(7).vector)
