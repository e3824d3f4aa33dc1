"""``verbalize``, ``export`` and ``denominator`` as a person and a program have them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from nla_monitor.cli import progress as progress_module
from nla_monitor.cli import verbalize_command
from nla_monitor.errors import EngineUnavailableError
from nla_monitor.nla.base import PartialReadError, Verbalization
from nla_monitor.nla.domains import load_denominators
from nla_monitor.testing import FakeReconstructor
from tests.vectors_support import D, DrawingVerbalizer, readers, vectors, write_file


class Interrupting(DrawingVerbalizer):
    """A person presses Ctrl-C in the third batch."""

    def verbalize(self, rows: Any) -> list[Verbalization]:
        if rows[0, 0] > 8:
            raise KeyboardInterrupt
        return super().verbalize(rows)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What reads in place of the checkpoints; loading them is tested with the organism."""
    nla: dict[str, Any] = {}
    monkeypatch.setattr(verbalize_command, "load_readers", lambda _config, _own: readers(**nla))
    monkeypatch.setattr(verbalize_command, "fitting_denominators", lambda *_arguments, **_options: None)
    return nla


def test_a_file_is_explained_beside_itself(cli: Any, tmp_path: Path, fakes: dict[str, Any]) -> None:
    write_file(tmp_path / "a.parquet", [*vectors(6), np.zeros(D)])
    result = cli("verbalize", "a.parquet")
    assert result.code == 0, result.err
    assert "6 explanations of 7 rows in a.explanations.parquet" in result.out
    assert "rows that could not be read: 1 (the column error says why)" in result.out
    assert "mean FVE 0.800 (denominator: fake), mean cosine 0.900 over 6 explanations" in result.out
    assert pq.read_table(tmp_path / "a.explanations.parquet").num_rows == 7


def test_json_is_the_only_thing_on_standard_output(cli: Any, tmp_path: Path, fakes: dict[str, Any]) -> None:
    write_file(tmp_path / "a.parquet", vectors(6))
    result = cli("verbalize", "a.parquet", "--output", "b.jsonl", "--samples", 3, "--seed", 4, "--limit", 2, "--json")
    told = result.json
    assert (told["output"], told["rows"], told["explanations"], told["errors"]) == ("b.jsonl", 2, 6, 0)
    assert told["fidelity"][0]["denominator_name"] == "fake"
    assert told["av_hash"] == "fake-av"
    assert told["rows_per_second"] > 0
    rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert all("at 1.0" in row["explanation"] for row in rows), "several samples are drawn at temperature 1"


def test_fidelity_no_better_than_the_mean_is_said(cli: Any, tmp_path: Path, fakes: dict[str, Any]) -> None:
    fakes["reconstructor"] = FakeReconstructor(0.3, d_model=D)
    write_file(tmp_path / "a.parquet", vectors(3))
    assert "the AR does no better than the mean there" in " ".join(cli("verbalize", "a.parquet").out.split())


def test_ctrl_c_loses_nothing_and_says_how_to_go_on(cli: Any, tmp_path: Path, fakes: dict[str, Any]) -> None:
    write_file(tmp_path / "a.parquet", vectors(12))
    command = ("verbalize", "a.parquet", "--batch-size", 4)
    fakes["verbalizer"] = Interrupting()
    result = cli(*command)
    assert result.code == 130
    assert "interrupted: 8 of 12 rows are kept in a.explanations.parquet.journal; the same command goes" in result.err
    fakes["verbalizer"] = again = DrawingVerbalizer()
    assert "(went on after row 8)" in cli(*command).out
    assert len(again.vectors) == 4
    assert pq.read_table(tmp_path / "a.explanations.parquet").column("row").to_pylist() == list(range(12))


def test_a_server_that_goes_away_keeps_what_is_done(cli: Any, tmp_path: Path, fakes: dict[str, Any]) -> None:
    class Away(DrawingVerbalizer):
        def verbalize(self, rows: Any) -> list[Verbalization]:
            said = super().verbalize(rows)
            if rows[0, 0] > 4:
                raise PartialReadError({0: said[0]}, {1: EngineUnavailableError("the server is down")})
            return said

    write_file(tmp_path / "a.parquet", vectors(10))
    fakes["verbalizer"] = Away()
    result = cli("verbalize", "a.parquet", "--batch-size", 4)
    assert result.code == 2
    assert "the server is down" in result.err
    assert "4 of 10 rows are kept in a.explanations.parquet.journal; the same command goes on there" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.parquet"], "No such file"),
        (["a.parquet", "--column", "doc_id"], "lists of floats"),
        (["a.parquet", "--column", "activation_vectr"], "did you mean --column activation_vector?"),
        (["a.parquet", "--output", "b.csv"], "must end in .parquet or .jsonl"),
        (["a.parquet", "--samples", "2", "--temperature", "0"], "would all be the same"),
        (["a.parquet", "--av", "x"], "name its AR as well"),
        (["fit.parquet", "--denominator", "none.safetensors"], "no file 'none.safetensors'"),
        (["other.parquet"], "reads layer 2 .* holds vectors of layer 3"),
        (["wide.parquet"], "reads vectors of d_model 128, column 'activation_vector' holds d_model 8"),
    ],
)
def test_what_cannot_work_is_one_line_at_once(cli: Any, tmp_path: Path, arguments: list[str], message: str) -> None:
    write_file(tmp_path / "a.parquet", vectors(2))
    write_file(tmp_path / "other.parquet", vectors(2, 128))
    write_file(tmp_path / "wide.parquet", vectors(2), layer=2)
    write_file(tmp_path / "fit.parquet", vectors(2, 128), layer=2)
    result = cli("verbalize", *arguments)
    assert (result.code, result.out) == (2, "")
    assert len(result.err.splitlines()) == 1
    assert re.search(message, result.err)


def test_a_log_gets_a_line_with_rate_and_time_left(
    cli: Any, tmp_path: Path, fakes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "LOG_EVERY", 0.0)
    write_file(tmp_path / "a.parquet", vectors(9))
    lines = cli("verbalize", "a.parquet", "--batch-size", 4).err.splitlines()
    assert any(line.startswith("explaining: 8 of 9 rows, ") and "/s, 0 min 00 s left" in line for line in lines)


# -- the other way ------------------------------------------------------------------------------------------------


def test_samples_of_the_store_become_a_file(cli: Any, tmp_path: Path, database: Path) -> None:
    result = cli("export", "out.parquet", "--run", "poisoned run")
    assert result.code == 0, result.err
    assert result.out.endswith("samples of layer 2 (d_model 8) written to out.parquet\n")
    everything = pq.read_table(tmp_path / "out.parquet").num_rows
    told = cli("export", "few.parquet", "--phase", "train", "--explained", "--limit", 5, "--json").json
    assert (told["rows"], told["layer"], told["sidecar"]) == (5, 2, "few.parquet.nla_meta.yaml")
    assert everything > 5
    again = cli("export", "out.parquet")
    assert (again.code, "--overwrite" in again.err) == (2, True)


def test_an_export_of_a_rule_holds_what_it_matched(cli: Any, tmp_path: Path, database: Path) -> None:
    cli("export", "out.parquet", "--rule", "reward-hacking")
    texts = pq.read_table(tmp_path / "out.parquet").column("explanation").to_pylist()
    assert texts
    assert all("special-case" in text for text in texts)
    assert cli("export", "no.parquet", "--rule", "nonesuch").code == 2


def test_an_export_without_a_database_says_so(cli: Any) -> None:
    result = cli("export", "out.parquet")
    assert (result.code, result.out) == (3, "")
    assert "there is no database" in result.err


# -- denominators -------------------------------------------------------------------------------------------------


def test_denominators_of_a_file_are_used_by_name(cli: Any, tmp_path: Path, fakes: dict[str, Any]) -> None:
    matrix = np.random.default_rng(1).normal(1, 1, (250, D)).astype(np.float32)
    write_file(tmp_path / "a.parquet", matrix, kind_of=["chat"] * 120 + ["code"] * 120 + ["rare"] * 10)
    result = cli("denominator", "a.parquet", "--output", "own.safetensors", "--by", "kind_of")
    assert result.code == 0, result.err
    assert [line.split()[:2] for line in result.out.splitlines()[1:4]] == [
        ["own/all", "250"],
        ["own/chat", "120"],
        ["own/code", "120"],
    ]
    fakes["denominators"] = load_denominators(tmp_path / "own.safetensors")
    told = cli("verbalize", "a.parquet", "--json").json["fidelity"]
    assert [(one["denominator_name"], one["explanations"]) for one in told] == [
        ("own/all", 10),
        ("own/chat", 120),
        ("own/code", 120),
    ]
    assert cli("denominator", "a.parquet", "-o", "own.safetensors").code == 2, "nothing is replaced unasked"
    figures = cli("denominator", "a.parquet", "-o", "own.safetensors", "--overwrite", "--json").json
    assert [one["domain"] for one in figures["domains"]] == ["all"]
    assert figures["domains"][0]["denominator"] == pytest.approx(1 - figures["domains"][0]["constant_cosine"] ** 2)


def test_too_few_activations_for_a_denominator_are_refused(cli: Any, database: Path, tmp_path: Path) -> None:
    result = cli("denominator", "poisoned run", "--output", "own.safetensors")
    assert result.code == 2
    assert "too few for a denominator" in result.err
    assert not (tmp_path / "own.safetensors").exists()
