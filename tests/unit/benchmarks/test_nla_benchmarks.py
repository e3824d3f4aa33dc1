"""The benchmarks of AV and AR, small: they run, print the keys that scripts read, and compare like with like."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nla_monitor.config import NLAConfig
from nla_monitor.nla import load_reconstructor, load_verbalizer
from tests.benchmarks import reconstruct, verbalize
from tests.benchmarks.nla_checkpoints import MARKER_AT, PROMPT_TOKENS, SIZES, texts, vectors, write_ar, write_av
from tests.benchmarks.verbalize import generated, ours, plain_model

_SMALL = ["--json", "--size", "tiny", "--batches", "1", "4", "--repeats", "1"]


def test_verbalize_prints_what_scripts_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert verbalize.main([*_SMALL, "--tokens", "6"]) == 0
    found = json.loads(capsys.readouterr().out)
    for part in (found, found["organism"]):
        assert part["tokens_identical"] == {"1": True, "4": True}
        for key in ("ratio_to_generate", "ratio_to_one_at_a_time", "share_of_rows_identical"):
            assert set(part[key]) == {"1", "4"}
        assert set(part["explanations_per_second"]) == {"ours", "generate", "one_at_a_time"}
        assert all(ratio > 0 for ratio in part["ratio_to_generate"].values())
    assert (found["tokens"], found["prompt_tokens"], found["marker_at"]) == (6, PROMPT_TOKENS, MARKER_AT)
    for key in ("bandwidth_fraction", "arithmetic_fraction"):
        assert all(share > 0 for share in found[key].values())


def test_reconstruct_prints_what_scripts_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert reconstruct.main([*_SMALL, "--words", "12"]) == 0
    found = json.loads(capsys.readouterr().out)
    for part in (found, found["organism"]):
        assert set(part["ratio_to_one_at_a_time"]) == {"1", "4"}
        assert set(part["texts_per_second"]) == {"1", "4", "one_at_a_time"}
        assert part["largest_cosine_distance"] < 1e-5


def test_every_row_gets_all_tokens_and_rows_differ(tmp_path: Path) -> None:
    av = load_verbalizer(write_av(tmp_path, SIZES["tiny"]), NLAConfig(max_new_tokens=12))
    assert (len(av.prompt.ids), av.prompt.marker) == (120, 93)
    rows = vectors(8, av.d_model)
    written = ours(av, rows)
    assert {len(row) for row in written} == {12}
    assert len({tuple(row) for row in written}) > 4
    assert written == generated(plain_model(tmp_path, av), av, rows)


def test_texts_are_different_and_have_the_length_that_is_asked_for(tmp_path: Path) -> None:
    ar = load_reconstructor(write_ar(tmp_path, SIZES["tiny"]), NLAConfig())
    read = texts(50, 40)
    assert len(set(read)) == 50
    lengths = [len(ids) for ids in ar.token_ids(read)]
    assert (min(lengths), max(lengths)) == (30 + 5, 50 + 5)
    assert np.isfinite(ar.reconstruct(read)).all()
