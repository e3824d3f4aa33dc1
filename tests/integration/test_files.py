"""From a run's database to a file of activations and back to explanations; denominators from a run to its readings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from nla_monitor.cli.app import app
from nla_monitor.config import load_config
from nla_monitor.errors import ConfigError
from nla_monitor.nla.domains import load_denominators
from nla_monitor.nla.fidelity import variance_denominator
from nla_monitor.records import Phase
from nla_monitor.reverbalize import reverbalize
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
from nla_monitor.store.stream import stream_readings
from nla_monitor.testing import FakeReconstructor, FakeVerbalizer
from nla_monitor.worker import Worker
from tests.organism_support import training_samples
from tests.store_support import new_database, run_info, sample


def cli(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return result


def read(worker: Worker) -> None:
    try:
        while worker.run_once():
            pass
    finally:
        worker.close()


@pytest.mark.parametrize("batch", [5, 64])
def test_an_export_verbalized_again_says_what_the_worker_stored(tmp_path: Path, batch: int) -> None:
    """The same vectors, bit for bit, and so the same greedy words and fidelity, in other batches than the worker's."""
    url = new_database(tmp_path / "w.db")
    SqlSpool(open_engine(url)).put(training_samples(20))
    read(Worker(load_config({"database": url, "nla": {"batch_size": 16}})))
    cli("export", tmp_path / "a.parquet", "--database", url)
    cli("verbalize", tmp_path / "a.parquet", "--batch-size", batch)
    rows = pq.read_table(tmp_path / "a.explanations.parquet").to_pylist()
    assert len(rows) == 20
    for row in rows:
        assert row["explanation"] == row["input_explanation"]
        assert row["cosine"] == pytest.approx(row["input_cosine"], abs=1e-5)
        assert row["denominator_name"] == row["input_denominator_name"] == "training"
        assert (row["av_hash"], row["ar_hash"]) == (row["input_av_hash"], row["input_ar_hash"])
        assert (row["tokens"], row["truncated"]) == (row["input_tokens"], row["input_truncated"])
    assert len({row["explanation"] for row in rows}) > 5


def test_a_baseline_runs_denominators_are_those_of_later_readings(tmp_path: Path) -> None:
    url = new_database(tmp_path / "w.db")
    samples = [
        sample(number, run_id="run-0", phase=Phase.EVAL if number % 2 else Phase.TRAIN, role="user")
        for number in range(240)
    ]
    Repository(open_engine(url)).start_run(run_info("run-0"))
    SqlSpool(open_engine(url)).put(samples)
    cli("denominator", "run-0", "--database", url, "--by", "phase", "-o", tmp_path / "own.safetensors")
    (tmp_path / "m.yaml").write_text(f"database: {tmp_path / 'w.db'}\nnla:\n  denominator: own.safetensors\n")
    config = load_config(tmp_path / "m.yaml")
    halves: Any = {
        "verbalizer": FakeVerbalizer(d_model=16, layer=3),
        "reconstructor": FakeReconstructor(0.8, d_model=16),
    }
    read(Worker(config, **halves))
    found = Repository(open_engine(url)).samples("run-0", limit=300)
    other = FakeVerbalizer(d_model=16, layer=3)
    other.content_hash = "another-av"
    engine, own = open_engine(url), load_denominators(config.nla.denominator)
    reverbalize(engine, other, halves["reconstructor"], ["run-0"], denominators=own)
    (again,) = stream_readings(engine, run_ids=["run-0"], av_hash="another-av")
    assert {(one.sample_id, one.fidelity) for one in again} == {(one.sample_id, one.fidelity) for one in found}
    evals = np.stack([one.vector for one in samples if one.phase is Phase.EVAL])
    expected = variance_denominator(evals, "x").value
    for one in found:
        assert one.fidelity is not None
        assert one.fidelity.denominator_name == f"own/{one.phase}"
        assert one.fidelity.cosine == 0.8
        if one.phase is Phase.EVAL:
            assert one.fidelity.denominator == pytest.approx(expected)
            assert one.fidelity.fve == pytest.approx(1 - 0.4 / expected)
    with pytest.raises(ConfigError, match="layer 3, the AV reads layer 4"):
        Worker(config, **{**halves, "verbalizer": FakeVerbalizer(d_model=16, layer=4)})
