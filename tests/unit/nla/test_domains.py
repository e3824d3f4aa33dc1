"""Denominators of one's own: what they are, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from nla_monitor.errors import ConfigError, VectorFileError
from nla_monitor.nla.domains import (
    Denominators,
    DomainStatistics,
    denominators_for,
    label_of,
    load_denominators,
    save_denominators,
)
from nla_monitor.nla.fidelity import cosines, score_of, variance_denominator
from nla_monitor.records import Phase
from tests.store_support import sample

D = 6


def rows_of(count: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, D)) + 1.0).astype(np.float32)


def measured(rows: np.ndarray, labels: list[Any], **options: Any) -> Denominators:
    statistics = DomainStatistics(D)
    statistics.add(rows, labels)
    return statistics.finish("set", **{"layer": 3, "by": "phase", "source": ["run-1"], "fewest": 5, **options})


@given(st.integers(10, 60), st.integers(0, 1000), st.integers(1, 30))
def test_the_figures_are_those_of_the_definition_whatever_the_batches(count: int, seed: int, size: int) -> None:
    rows = rows_of(count, seed)
    statistics = DomainStatistics(D)
    for start in range(0, count, size):
        part = rows[start : start + size]
        statistics.add(part, [None] * len(part))
    found = statistics.finish("set", layer=3, by=None, source=[], fewest=10).overall
    assert found.denominator == pytest.approx(variance_denominator(rows, "x").value)
    constant = np.tile(found.mean, (count, 1))
    assert found.constant_cosine == pytest.approx(cosines(rows, constant).mean())
    assert found.vectors == count


def test_a_domain_has_figures_of_its_own_and_small_ones_count_among_all() -> None:
    rows = rows_of(30)
    rows[:12] *= [1, 1, 1, -1, -1, -1]
    found = measured(rows, ["a"] * 12 + ["b"] * 15 + ["rare"] * 3)
    assert sorted(found.domains) == ["a", "b"]
    assert found.domains["a"].denominator == pytest.approx(variance_denominator(rows[:12], "x").value)
    assert found.overall.vectors == 30
    score = score_of(0.5, None)
    own = found.rescored(score, "a")
    assert (own.denominator_name, own.fve) == ("set/a", pytest.approx(1 - 1.0 / found.domains["a"].denominator))
    for unknown in ("rare", None, "never seen"):
        assert found.rescored(score, unknown).denominator_name == "set/all"


def test_predicting_the_mean_of_a_domain_has_fve_zero_in_it() -> None:
    """The bar that an AR must clear: the mean itself, unnormalised, is worth nothing."""
    rows = rows_of(200)
    found = measured(rows, ["a"] * 200)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    raw = ((unit - found.domains["a"].mean) ** 2).sum(1).mean()
    assert 1 - raw / found.domains["a"].denominator == pytest.approx(0, abs=1e-6)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    found = measured(rows_of(30), ["ä b", "c"] * 15)
    save_denominators(tmp_path / "d.safetensors", found)
    again = load_denominators(tmp_path / "d.safetensors")
    assert (again.name, again.layer, again.by, again.source) == ("set", 3, "phase", ("run-1",))
    assert list(again.domains) == ["c", "ä b"]
    for label in [None, "c", "ä b"]:
        assert again.domain(label)[1].denominator == found.domain(label)[1].denominator
    with pytest.raises(VectorFileError, match="cannot be written"):
        save_denominators(tmp_path / "no" / "d.safetensors", found)


def test_too_little_and_too_alike_is_refused() -> None:
    with pytest.raises(VectorFileError, match="30 readable activations are too few"):
        measured(rows_of(30), [None] * 30, fewest=31)
    with pytest.raises(VectorFileError, match="all point the same way"):
        measured(np.ones((30, D), np.float32), [None] * 30)


def test_training_means_the_checkpoints_own() -> None:
    assert denominators_for("training", 8, 3) is None


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    with pytest.raises(ConfigError, match=r"there is no file .*nla-monitor denominator"):
        denominators_for(str(path), D, 3)
    save_denominators(path, measured(rows_of(30), [None] * 30))
    assert denominators_for(str(path), D, 3) is not None
    assert denominators_for(str(path), D, None) is not None
    with pytest.raises(ConfigError, match="d_model 6, the AV reads 7"):
        denominators_for(str(path), 7, 3)
    with pytest.raises(ConfigError, match="layer 3, the AV reads layer 4"):
        denominators_for(str(path), D, 4)


@pytest.mark.parametrize("content", [b"", b"not safetensors", b"\xff" * 40])
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "d.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="holds no denominators"):
        load_denominators(path)


@pytest.mark.parametrize(
    ("mean", "metadata"),
    [
        (np.zeros((1, D)), None),
        (np.zeros((1, D)), {"nla_monitor_denominators": '{"format": 99}'}),
        (np.full((1, D), np.nan), {"nla_monitor_denominators": '{"format": 1, "domains": [], "vectors": [5]}'}),
        (np.full((1, D), 9.0), {"nla_monitor_denominators": '{"format": 1, "domains": [], "vectors": [5]}'}),
        (np.zeros((1, D)), {"nla_monitor_denominators": '{"format": 1, "domains": ["a"], "vectors": [5, 5]}'}),
    ],
)
def test_figures_that_cannot_be_are_refused(tmp_path: Path, mean: np.ndarray, metadata: Any) -> None:
    save_file({"mean": mean}, tmp_path / "d.safetensors", metadata=metadata)
    with pytest.raises(ConfigError, match="holds no denominators"):
        load_denominators(tmp_path / "d.safetensors")


def test_the_label_is_a_field_or_metadata() -> None:
    one = sample(0, phase=Phase.EVAL, role="user", attributes={"source": "web", "n": 3})
    assert label_of(one, "phase") == "eval"
    assert label_of(one, "role") == "user"
    assert (label_of(one, "meta.source"), label_of(one, "meta.n"), label_of(one, "meta.none")) == ("web", "3", None)
    assert label_of(one, None) is None
