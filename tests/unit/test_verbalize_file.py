"""A file of activations explained: every row once, whatever happens on the way, and the same in any batch."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_monitor.errors import ConfigError, EngineRefusedError, NonFiniteWeightsError, VectorFileError
from nla_monitor.nla.base import PartialReadError, Verbalization
from nla_monitor.nla.domains import DomainStatistics
from nla_monitor.testing import FakeReconstructor, FakeVerbalizer
from nla_monitor.vectors_file import VectorFile
from nla_monitor.verbalize_file import Sampling, Summary, verbalize_file
from tests.vectors_support import D, DrawingVerbalizer, readers, text_of, vectors, write_file

HASHES = ("fake-av", "fake-ar")


class Killed(BaseException):
    """The process ends here."""


def explain(source: Path, output: Path, nla: Any = None, **options: Any) -> Summary:
    file = VectorFile(source)
    try:
        return verbalize_file(file, output, nla or readers(), **{"batch_size": 4, **options})
    finally:
        file.close()


def rows_of(output: Path) -> list[dict[str, Any]]:
    if output.suffix == ".jsonl":
        return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    found: list[dict[str, Any]] = pq.read_table(output).to_pylist()
    return found


def failing(when: Callable[[np.ndarray], BaseException | None]) -> FakeVerbalizer:
    """A fake AV that raises what ``when`` gives for a batch."""

    class Failing(DrawingVerbalizer):
        def verbalize(self, rows: Any) -> list[Verbalization]:
            if (error := when(rows)) is not None:
                raise error
            return super().verbalize(rows)

    return Failing()


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_every_row_keeps_its_columns_and_gets_words_fidelity_and_provenance(tmp_path: Path, suffix: str) -> None:
    matrix = vectors(11)
    source = write_file(tmp_path / "a.parquet", matrix, note=["line\r\nend", *["n"] * 10])
    found = explain(source, tmp_path / f"b.{suffix}")
    rows = rows_of(tmp_path / f"b.{suffix}")
    assert [row["row"] for row in rows] == list(range(11))
    assert [row["doc_id"] for row in rows] == [f"doc-{row}" for row in range(11)]
    assert rows[0]["note"] == "line\r\nend"
    assert [row["explanation"] for row in rows] == [text_of(vector) for vector in matrix]
    assert [row["norm"] for row in rows] == pytest.approx(np.linalg.norm(matrix.astype(np.float64), axis=1).tolist())
    first = rows[0]
    assert (first["cosine"], first["denominator"], first["denominator_name"]) == (0.9, 1.0, "fake")
    assert first["fve"] == pytest.approx(0.8)
    assert all((row["av_hash"], row["ar_hash"], row["error"]) == (*HASHES, None) for row in rows)
    assert "activation_vector" not in first
    assert (found.rows, found.explanations, found.errors, found.resumed_from) == (11, 11, 0, 0)
    (one,) = found.fidelity
    assert (one.denominator_name, one.explanations, one.cosine) == ("fake", 11, pytest.approx(0.9))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.parquet", f"b.{suffix}"], "nothing is left over"


def test_the_parquet_file_says_how_it_was_made(tmp_path: Path) -> None:
    explain(write_file(tmp_path / "a.parquet", vectors(3)), tmp_path / "b.parquet", settings={"dtype": "float32"})
    told = json.loads(pq.read_schema(tmp_path / "b.parquet").metadata[b"nla_monitor"])
    assert told["input"]["name"] == "a.parquet"
    assert (told["av_hash"], told["ar_hash"], told["rows"], told["dtype"]) == (*HASHES, 3, "float32")


def test_vectors_are_kept_when_asked_for(tmp_path: Path) -> None:
    matrix = vectors(600)
    source = write_file(tmp_path / "a.parquet", matrix)
    explain(source, tmp_path / "b.parquet", with_vectors=True, batch_size=128)
    kept = pq.read_table(tmp_path / "b.parquet")
    assert kept.schema.field("activation_vector").type == pa.list_(pa.float32(), D)
    np.testing.assert_array_equal(np.stack(kept.column("activation_vector").to_pylist()), matrix)
    with pytest.raises(ConfigError, match=r"\.parquet"):
        explain(source, tmp_path / "b.jsonl", with_vectors=True)


def test_columns_of_ours_in_the_input_are_kept_under_another_name(tmp_path: Path) -> None:
    """An export, or the output of another run, is a file of activations, too."""
    more = {"explanation": ["old"] * 3, "fve": [0.5] * 3, "input_fve": [0.25] * 3}
    explain(write_file(tmp_path / "a.parquet", vectors(3), **more), tmp_path / "b.parquet")
    row = rows_of(tmp_path / "b.parquet")[0]
    assert (row["input_explanation"], row["input_fve"], row["input_input_fve"]) == ("old", 0.25, 0.5)
    assert row["explanation"].startswith("row 0")


def test_rows_that_cannot_be_read_become_rows_with_an_error(tmp_path: Path) -> None:
    rows: list[Any] = [*vectors(9)]
    rows[0], rows[4], rows[8] = None, np.zeros(D), np.full(D, np.inf)
    source = write_file(tmp_path / "a.parquet", rows)
    found = explain(source, tmp_path / "b.parquet", sampling=Sampling(2, 1.0))
    assert (found.rows, found.explanations, found.errors) == (9, 12, 3)
    told = {row["row"]: row for row in rows_of(tmp_path / "b.parquet") if row["error"]}
    assert sorted(told) == [0, 4, 8]
    assert "zero norm" in told[4]["error"]
    assert (told[4]["doc_id"], told[4]["explanation"], told[4]["av_hash"]) == ("doc-4", None, "fake-av")


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_file_without_rows_gives_one_without_rows(tmp_path: Path, suffix: str, count: int) -> None:
    found = explain(write_file(tmp_path / "a.parquet", vectors(count)), tmp_path / f"b.{suffix}")
    assert (found.rows, len(rows_of(tmp_path / f"b.{suffix}"))) == (count, count)


def test_a_file_with_nothing_but_vectors_will_do(tmp_path: Path) -> None:
    pq.write_table(pa.table({"activation_vector": [row.tolist() for row in vectors(5)]}), tmp_path / "a.parquet")
    explain(tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert [row["row"] for row in rows_of(tmp_path / "b.parquet")] == list(range(5))


def test_text_that_is_no_utf8_is_carried_in_parquet_and_escaped_in_jsonl(tmp_path: Path) -> None:
    bad = pa.array([b"caf\xe9", "né".encode(), None]).view(pa.string())
    source = write_file(tmp_path / "a.parquet", vectors(3), note=bad, raw=pa.array([b"\xff", b"ok", b""]))
    explain(source, tmp_path / "b.parquet")
    assert pq.read_table(tmp_path / "b.parquet").column("note").cast(pa.binary())[0].as_py() == b"caf\xe9"
    explain(source, tmp_path / "b.jsonl")
    assert [row["note"] for row in rows_of(tmp_path / "b.jsonl")] == ["caf\\xe9", "né", None]
    assert [row["raw"] for row in rows_of(tmp_path / "b.jsonl")] == ["\\xff", "ok", ""]


def test_odd_columns_are_plain_json(tmp_path: Path) -> None:
    nested = [{"a": [1.0, float("nan")]}, None]
    days = pa.array([0, 1], pa.date32())
    sorts = pa.array(["x", "y"]).dictionary_encode()
    source = write_file(tmp_path / "a.parquet", vectors(2), nested=nested, day=days, sort=sorts)
    explain(source, tmp_path / "b.jsonl")
    row = rows_of(tmp_path / "b.jsonl")[0]
    assert (row["nested"], row["day"], row["sort"]) == ({"a": [1.0, None]}, "1970-01-01", "x")
    explain(source, tmp_path / "b.parquet")
    assert rows_of(tmp_path / "b.parquet")[1]["sort"] == "y"


def test_a_limit_takes_the_first_rows(tmp_path: Path) -> None:
    found = explain(write_file(tmp_path / "a.parquet", vectors(20)), tmp_path / "b.parquet", limit=6)
    assert (found.rows, len(rows_of(tmp_path / "b.parquet"))) == (6, 6)


# -- samples ------------------------------------------------------------------------------------------------------


@given(batch=st.integers(1, 40), other=st.integers(1, 40), samples=st.integers(1, 5), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=25)
def test_draws_do_not_depend_on_the_batch(
    tmp_path_factory: pytest.TempPathFactory, batch: int, other: int, samples: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("draws")
    source, sampling = write_file(folder / "a.parquet", vectors(13)), Sampling(samples, 0.7, seed)
    outputs = []
    for size in (batch, other):
        explain(source, folder / f"{size}.jsonl", batch_size=size, sampling=sampling, overwrite=True)
        outputs.append((folder / f"{size}.jsonl").read_bytes())
    assert outputs[0] == outputs[1]


def test_each_sample_of_each_row_has_a_seed_of_its_own_that_is_told(tmp_path: Path) -> None:
    source = write_file(tmp_path / "a.parquet", vectors(10))
    explain(source, tmp_path / "b.parquet", sampling=Sampling(5, 1.0, seed=1))
    rows = rows_of(tmp_path / "b.parquet")
    assert [(row["row"], row["sample"]) for row in rows] == [(row, number) for row in range(10) for number in range(5)]
    assert len({row["seed"] for row in rows}) == 50
    assert all(f"seed {row['seed']} at 1.0" in row["explanation"] for row in rows)
    assert {row["doc_id"] for row in rows if row["row"] == 7} == {"doc-7"}
    explain(source, tmp_path / "c.parquet", sampling=Sampling(5, 1.0, seed=2))
    assert not {row["seed"] for row in rows} & {row["seed"] for row in rows_of(tmp_path / "c.parquet")}


def test_samples_that_would_be_alike_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all be the same"):
        Sampling(3)
    source = write_file(tmp_path / "a.parquet", vectors(2))
    greedy = FakeVerbalizer(text_of, d_model=D, layer=3)
    with pytest.raises(ConfigError, match="reads greedily only"):
        explain(source, tmp_path / "b.parquet", readers(verbalizer=greedy), sampling=Sampling(2, 1.0))


# -- interrupted --------------------------------------------------------------------------------------------------


@given(cut=st.floats(0, 1), suffix=st.sampled_from(["parquet", "jsonl"]), garbage=st.binary(max_size=3))
@settings(deadline=None, max_examples=30)
def test_cut_anywhere_it_goes_on_and_the_result_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, cut: float, suffix: str, garbage: bytes
) -> None:
    """Whatever prefix of the journal reached the disk, garbage behind it included: no row twice, none lost."""
    folder = tmp_path_factory.mktemp("cut")
    rows: list[Any] = [*vectors(12)]
    rows[5] = None
    source, sampling = write_file(folder / "a.parquet", rows), Sampling(2, 1.0)
    explain(source, folder / f"whole.{suffix}", sampling=sampling)
    output = folder / f"b.{suffix}"
    nla = readers(verbalizer=failing(lambda rows: Killed() if rows[0, 0] > 10 else None))
    with pytest.raises(Killed):
        explain(source, output, nla, sampling=sampling)
    assert not output.exists()
    journal = folder / f"b.{suffix}.journal"
    content = journal.read_bytes()
    journal.write_bytes(content[: round(cut * len(content))] + garbage)
    again = readers()
    found = explain(source, output, again, sampling=sampling)
    assert rows_of(output) == rows_of(folder / f"whole.{suffix}")
    read_again = {round(float(row[0])) - 1 for row in again.verbalizer.vectors}
    assert read_again == {row for row in range(found.resumed_from, 12) if row != 5}, "what is on disk is not read again"


PROGRAM = """
import os, signal, sys
from pathlib import Path
from nla_monitor.vectors_file import VectorFile
from nla_monitor.verbalize_file import verbalize_file
from tests.vectors_support import DrawingVerbalizer, readers

class Dying(DrawingVerbalizer):
    def verbalize(self, rows):
        if rows[0, 0] > 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().verbalize(rows)

verbalize_file(VectorFile(Path("a.parquet")), Path("b.jsonl"), readers(verbalizer=Dying()), batch_size=4)
"""


def test_killed_for_real_it_goes_on(tmp_path: Path) -> None:
    source = write_file(tmp_path / "a.parquet", vectors(14))
    roots = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env={**os.environ, "PYTHONPATH": roots}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    found = explain(source, tmp_path / "b.jsonl")
    assert (found.resumed_from, found.rows) == (12, 14)
    assert [row["row"] for row in rows_of(tmp_path / "b.jsonl")] == list(range(14))


def interrupt(source: Path, output: Path, **options: Any) -> None:
    with pytest.raises(Killed):
        explain(
            source, output, readers(verbalizer=failing(lambda rows: Killed() if rows[0, 0] > 4 else None)), **options
        )


def test_killed_between_the_output_and_the_end_it_finishes(tmp_path: Path) -> None:
    source = write_file(tmp_path / "a.parquet", vectors(6))
    interrupt(source, tmp_path / "b.parquet")
    explain(source, tmp_path / "c.parquet")
    (tmp_path / "c.parquet").rename(tmp_path / "b.parquet")  # as if killed before the journal was removed
    assert explain(source, tmp_path / "b.parquet").rows == 6
    assert not (tmp_path / "b.parquet.journal").exists()


def test_what_another_command_left_is_not_gone_on_with(tmp_path: Path) -> None:
    """Another AV, temperature or input would make a file of two halves."""
    source, output = write_file(tmp_path / "a.parquet", vectors(9)), tmp_path / "b.parquet"
    interrupt(source, output)
    with pytest.raises(VectorFileError, match=r"samples was 1, now 2; temperature was 0.0, now 1.0.*--overwrite"):
        explain(source, output, sampling=Sampling(2, 1.0))
    with pytest.raises(VectorFileError, match="dtype was None, now 'bfloat16'"):
        explain(source, output, settings={"dtype": "bfloat16"})
    write_file(source, vectors(9)[::-1])
    with pytest.raises(VectorFileError, match="input was"):
        explain(source, output)
    assert explain(source, output, overwrite=True).resumed_from == 0
    assert rows_of(output)[0]["explanation"].startswith("row 8 ")


def test_a_finished_output_is_not_replaced_unless_told(tmp_path: Path) -> None:
    source, output = write_file(tmp_path / "a.parquet", vectors(3)), tmp_path / "b.parquet"
    output.write_text("precious")
    with pytest.raises(VectorFileError, match=r"is there already.*--overwrite"):
        explain(source, output)
    assert output.read_text() == "precious"
    assert explain(source, output, overwrite=True).rows == 3


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    source, output = write_file(tmp_path / "a.parquet", vectors(9)), tmp_path / "b.parquet"
    seen: list[str] = []

    def at_the_same_time(done: int, _total: int) -> None:
        for overwrite in (False, True):
            with pytest.raises(VectorFileError, match="another process works on the same output"):
                explain(source, output, overwrite=overwrite)
        seen.append(str(done))

    explain(source, output, progress=at_the_same_time)
    assert seen == ["0", "4", "8", "9"]


def test_a_journal_of_something_else_is_left_alone(tmp_path: Path) -> None:
    source, journal = write_file(tmp_path / "a.parquet", vectors(2)), tmp_path / "b.parquet.journal"
    journal.write_text('{"my": "file"}\n')
    with pytest.raises(VectorFileError, match="is not a journal"):
        explain(source, tmp_path / "b.parquet")
    assert journal.read_text() == '{"my": "file"}\n'


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    source = write_file(tmp_path / "a.parquet", vectors(9))

    def change(done: int, _total: int) -> None:
        os.utime(source, ns=(1, 1)) if done == 4 else None

    with pytest.raises(VectorFileError, match="has changed while it was read"):
        explain(source, tmp_path / "b.parquet", progress=change)
    assert not (tmp_path / "b.parquet").exists()


# -- faults -------------------------------------------------------------------------------------------------------


def test_a_vector_that_breaks_the_model_costs_only_itself(tmp_path: Path) -> None:
    source = write_file(tmp_path / "a.parquet", vectors(9))
    broken = failing(lambda rows: RuntimeError("CUDA error: 7") if 6.0 in rows[:, 0] else None)
    found = explain(source, tmp_path / "b.parquet", readers(verbalizer=broken))
    assert (found.explanations, found.errors) == (8, 1)
    assert rows_of(tmp_path / "b.parquet")[5]["error"] == "RuntimeError: CUDA error: 7"


@pytest.mark.parametrize("samples", [1, 3])
def test_a_server_that_refuses_some_rows_costs_only_them(tmp_path: Path, samples: int) -> None:
    class Refusing(DrawingVerbalizer):
        def verbalize(self, rows: Any) -> list[Verbalization]:
            said = dict(enumerate(super().verbalize(rows)))
            bad = {at: EngineRefusedError("too long") for at, row in enumerate(rows) if row[0] == 6.0}
            if bad:
                raise PartialReadError({at: one for at, one in said.items() if at not in bad}, bad)
            return list(said.values())

    source, matrix = write_file(tmp_path / "a.parquet", vectors(9)), vectors(9)
    sampling = Sampling(samples, 1.0 if samples > 1 else 0.0)
    explain(source, tmp_path / "b.parquet", readers(verbalizer=Refusing()), sampling=sampling, batch_size=12)
    rows = rows_of(tmp_path / "b.parquet")
    assert {row["row"] for row in rows if row["error"] == "EngineRefusedError: too long"} == {5}
    for row in rows:
        assert row["row"] == 5 or row["explanation"].startswith(text_of(matrix[row["row"]]))
    assert len(rows) == 8 * samples + 1


@pytest.mark.parametrize("batch", [1, 4])
def test_a_model_that_reads_nothing_stops_the_work_and_keeps_what_is_done(tmp_path: Path, batch: int) -> None:
    source, output = write_file(tmp_path / "a.parquet", vectors(12)), tmp_path / "b.parquet"
    with pytest.raises(VectorFileError, match=r"from row 0 on could be read: RuntimeError: out of memory"):
        explain(source, output, readers(verbalizer=failing(lambda _: RuntimeError("out of memory"))), batch_size=batch)
    assert explain(source, output).resumed_from == 0


def test_a_damaged_checkpoint_is_no_fault_of_a_row(tmp_path: Path) -> None:
    source = write_file(tmp_path / "a.parquet", vectors(12))
    with pytest.raises(NonFiniteWeightsError):
        explain(source, tmp_path / "b.parquet", readers(verbalizer=failing(lambda _: NonFiniteWeightsError("NaN"))))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_full_disk_at_the_end_loses_nothing(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, output = write_file(tmp_path / "a.parquet", vectors(9)), tmp_path / f"b.{suffix}"

    def full(_self: Path, _target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(VectorFileError, match=r"cannot be written: No space left on device"):
            explain(source, output)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.parquet", f"b.{suffix}.journal"]
    assert explain(source, output).resumed_from == 9


def test_names_that_will_not_do_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    source = write_file(tmp_path / "a.parquet", vectors(2))
    for output, error, message in [
        (tmp_path / "b.csv", ConfigError, r"must end in \.parquet or \.jsonl"),
        (source, ConfigError, "is the input itself"),
        (tmp_path / "no" / "b.parquet", VectorFileError, "No such file or directory"),
    ]:
        with pytest.raises(error, match=message):
            explain(source, output, overwrite=True)


# -- denominators -------------------------------------------------------------------------------------------------


def test_each_row_is_held_against_its_own_domain(tmp_path: Path) -> None:
    matrix = vectors(60)
    labels = ["chat", "code", "rare"] * 20
    statistics = DomainStatistics(D)
    statistics.add(matrix[:40], [*(["chat", "code"] * 20)])
    own = statistics.finish("mine", layer=3, by="domain", source=["a"], fewest=10)
    source = write_file(tmp_path / "a.parquet", matrix, domain=labels)
    found = explain(
        source, tmp_path / "b.parquet", readers(denominators=own, reconstructor=FakeReconstructor(0.5, d_model=D))
    )
    rows = rows_of(tmp_path / "b.parquet")
    assert [row["denominator_name"] for row in rows[:3]] == ["mine/chat", "mine/code", "mine/all"]
    assert rows[0]["fve"] == pytest.approx(1 - 1.0 / own.domains["chat"].denominator)
    told = {one.denominator_name: one for one in found.fidelity}
    assert {name: one.explanations for name, one in told.items()} == {"mine/all": 20, "mine/chat": 20, "mine/code": 20}
    for label, domain in own.domains.items():
        assert told[f"mine/{label}"].constant_cosine == pytest.approx(domain.constant_cosine)
    assert told["mine/chat"].fve is not None
    assert told["mine/chat"].fve < 0, "cosine 0.5 does not beat the mean here"


def test_without_an_ar_there_is_no_fidelity(tmp_path: Path) -> None:
    found = explain(write_file(tmp_path / "a.parquet", vectors(3)), tmp_path / "b.parquet", readers(reconstructor=None))
    assert (found.fidelity, found.ar_hash) == ((), None)
    assert rows_of(tmp_path / "b.parquet")[0]["cosine"] is None
