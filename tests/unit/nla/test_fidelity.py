"""Scores and their denominators."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from nla_checkpoints import LAYER, sidecar

from nla_monitor.errors import SidecarError
from nla_monitor.nla.fidelity import cosines, denominator_of, score_of, variance_denominator
from nla_monitor.nla.sidecar import Denominator, parse_sidecar

Rows = arrays(np.float64, (3, 5), elements=st.floats(-100, 100).filter(lambda x: x == 0 or abs(x) > 1e-3))


@given(Rows, Rows, st.floats(0.01, 100))
def test_cosine_ignores_norms_and_stays_within_one(left: np.ndarray, right: np.ndarray, factor: float) -> None:
    found = cosines(left, right)
    assert np.all(np.abs(found) <= 1)
    np.testing.assert_allclose(cosines(left * factor, right), found, atol=1e-9)


def test_a_prediction_without_direction_scores_zero() -> None:
    assert cosines(np.ones((1, 4)), np.zeros((1, 4)))[0] == 0.0


@given(st.floats(-1, 1), st.floats(0.01, 2))
def test_fve_follows_its_definition(cosine: float, value: float) -> None:
    score = score_of(cosine, Denominator("training", value))
    assert score.mse_nrm == pytest.approx(2 * (1 - cosine))
    assert score.fve == pytest.approx(1 - 2 * (1 - cosine) / value)
    assert score.denominator_name == "training"
    assert score_of(cosine, None).fve is None


def test_predicting_the_mean_direction_of_the_reference_set_has_fve_near_zero() -> None:
    """By construction of the denominator: mean squared distance to the mean of unit vectors."""
    rows = np.random.default_rng(0).standard_normal((4000, 8)) + 1.0
    named = variance_denominator(rows, "own")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    raw = ((unit - unit.mean(0)) ** 2).sum(1).mean()
    assert 1 - raw / named.value == pytest.approx(0)


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"fve_denominator": {"name": "chat", "value": 0.7}}, Denominator("chat", 0.7)),
        ({"fve_denominator": 0.7, "fve_denominator_name": "chat"}, Denominator("chat", 0.7)),
        ({"fve_denominator": 1}, Denominator("training", 1.0)),
        ({}, None),
    ],
)
def test_the_denominator_comes_from_the_sidecar(training: dict[str, object], expected: Denominator | None) -> None:
    assert denominator_of(parse_sidecar({**sidecar("llama", "ar"), "training": training})) == expected


@pytest.mark.parametrize("value", [0, -1, "0.7", True, float("nan"), {"name": "x"}])
def test_a_denominator_that_is_no_positive_number_is_refused(value: object) -> None:
    meta = parse_sidecar({**sidecar("llama", "ar"), "training": {"fve_denominator": value}})
    with pytest.raises(SidecarError, match="fve_denominator"):
        denominator_of(meta)


@pytest.mark.parametrize(("layer", "known"), [(20, True), (LAYER, False)])
def test_released_checkpoints_are_known_by_base_and_layer(layer: int, known: bool) -> None:
    meta = {**sidecar("llama", "ar"), "base_checkpoint": "Qwen/Qwen2.5-7B-Instruct"}
    named = denominator_of(parse_sidecar({**meta, "extraction_layer_index": layer, "critic": None}))
    assert (named is not None) == known
    if named:
        assert named == Denominator("released training set", 0.7335)
