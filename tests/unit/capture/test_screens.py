"""Screens: their numbers are the documented ones, they order what is read first, and they cost nothing when absent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from capture_kit import BLOCKS, D_MODEL, capturing, make_model, token_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_monitor.capture import screens as module
from nla_monitor.capture.screens import LinearScreen, NormScreen, NoveltyScreen, Screens, shrunk
from nla_monitor.errors import AttachError
from nla_monitor.rules.probe import Probe

WIDTH = 24


def _vectors(count: int, *, seed: int = 0, mean: float = 3.0) -> np.ndarray[Any, Any]:
    """Correlated vectors around a common direction, as a residual stream has one."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(WIDTH, WIDTH))
    return (random.normal(size=(count, WIDTH)) @ mixing + mean * np.arange(WIDTH)).astype(np.float32)


def _measure(screen: module.Screen, vectors: np.ndarray[Any, Any], layer: int = 0) -> np.ndarray[Any, Any]:
    values = Screens([screen]).measure(layer, torch.from_numpy(vectors))
    assert values is not None
    return np.asarray(values[:, 0])


@pytest.mark.parametrize("kind", ["direction", "logistic"])
@pytest.mark.parametrize("normalize", ["none", "unit"])
def test_a_probe_measures_what_it_measures_in_a_rule(kind: Any, normalize: Any) -> None:
    vectors = _vectors(20)
    weight = np.random.default_rng(1).normal(size=WIDTH) / 50
    probe = Probe(weight, 0.25, kind, None, None, normalize)
    screen = LinearScreen("lies", weight, bias=0.25, logistic=kind == "logistic", unit=normalize == "unit")
    assert np.allclose(_measure(screen, vectors), [probe.value(vector) for vector in vectors], rtol=1e-5, atol=1e-6)


def test_the_hosts_autocast_does_not_make_the_numbers_coarse() -> None:
    vectors, screen = _vectors(20), LinearScreen("lies", np.random.default_rng(1).normal(size=WIDTH))
    plain = _measure(screen, vectors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert np.array_equal(_measure(screen, vectors), plain)


def test_norm_is_the_norm_also_of_half_precision() -> None:
    vectors = _vectors(5)
    assert np.allclose(_measure(NormScreen("norm"), vectors), np.linalg.norm(vectors, axis=1), rtol=1e-6)
    half = Screens([NormScreen("norm")]).measure(0, torch.full((1, 4096), 200.0, dtype=torch.float16))
    assert half is not None
    assert half.item() == pytest.approx(200.0 * 64)  # the squares overflow float16


def test_novelty_is_the_mahalanobis_distance_of_the_projected_direction() -> None:
    """Against the formula of the module, written down once more in NumPy, with shrinkage by its own estimator."""
    dims, seen = 6, _vectors(200)
    screen = NoveltyScreen("odd", dims=dims, seed=5)
    assert np.isnan(_measure(screen, seen)).all()  # nothing learned yet
    screen.learn(0, seen)
    projection = torch.randn(WIDTH, dims, generator=torch.Generator().manual_seed(5), dtype=torch.float64).numpy()
    projection = projection / np.sqrt(dims)

    def project(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float64) @ projection

    z = project(seen)
    inverse = np.linalg.inv(_oas(np.cov(z.T, bias=True), len(z)))
    for vectors in (seen[:10], _vectors(10, seed=1), _vectors(10, seed=2, mean=-1.0)):
        away = project(vectors) - z.mean(axis=0)
        expected = np.sqrt(np.einsum("ni,ij,nj->n", away, inverse, away) / dims)
        assert np.allclose(_measure(screen, vectors), expected, rtol=1e-3, atol=1e-3)
    assert np.median(_measure(screen, _vectors(300, seed=3))) == pytest.approx(1.0, abs=0.2)
    assert _measure(screen, _vectors(10, seed=4, mean=-3.0)).min() > 3


def _oas(covariance: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """Chen et al. 2010, equation 23, as it is printed."""
    p, square, trace = len(covariance), np.trace(covariance @ covariance), np.trace(covariance)
    rho = ((1 - 2 / p) * square + trace**2) / ((count + 1 - 2 / p) * (square - trace**2 / p))
    rho = min(1.0, rho)
    return np.asarray((1 - rho) * covariance + rho * trace / p * np.eye(p))


@settings(max_examples=30, deadline=None)
@given(dims=st.integers(2, 8), count=st.integers(1, 200), scale=st.floats(1e-12, 1e6), rank=st.integers(0, 8))
def test_a_shrunk_covariance_can_always_be_inverted(dims: int, count: int, scale: float, rank: int) -> None:
    """Also of no vectors' worth of information: all the same, or fewer than dimensions."""
    rows = torch.randn(count, min(rank, dims), dtype=torch.float64) @ torch.randn(min(rank, dims), dims).double()
    covariance = scale * rows.T @ rows / count
    factor = torch.linalg.cholesky(shrunk(covariance, count))
    assert torch.isfinite(factor).all()


def test_novelty_is_of_the_direction_and_layers_are_learned_apart() -> None:
    screen = NoveltyScreen("odd", dims=4)
    screen.learn(0, _vectors(100))
    ordinary = _vectors(5, seed=8)
    assert np.allclose(_measure(screen, ordinary), _measure(screen, ordinary * 7), rtol=1e-4)
    assert np.isnan(_measure(screen, ordinary, layer=1)).all()
    assert np.isnan(_measure(screen, np.zeros((1, WIDTH), dtype=np.float32))).all()  # no direction, no novelty


def test_priority_is_the_highest_rank_and_small_norms_are_as_unusual_as_large_ones() -> None:
    screens = Screens([NormScreen("norm"), LinearScreen("lies", np.eye(WIDTH)[0])])
    vectors = _vectors(400)
    values = screens.measure(0, torch.from_numpy(vectors))
    assert values is not None
    screens.judge(0, values.numpy(), vectors)
    odd = np.stack([0.001 * vectors[0], 50 * vectors[0], vectors.mean(axis=0)])
    odd[0, 0], odd[1, 0], odd[2, 0] = 0.0, 0.0, 900.0
    measured = screens.measure(0, torch.from_numpy(odd))
    assert measured is not None
    judged = screens.judge(0, measured.numpy(), odd)
    assert [priority > 0.98 for priority, _ in judged] == [True, True, True]
    assert judged[2][1]["lies"] == pytest.approx(900.0)
    ordinary = screens.judge(0, values.numpy(), vectors)
    assert 0.4 < np.median([priority for priority, _ in ordinary]) < 0.9


def test_a_probe_of_another_layer_says_nothing_about_this_one() -> None:
    screens = Screens([LinearScreen("lies", np.ones(WIDTH), layer=2)])
    vectors = _vectors(3)
    for layer, known in ((2, {"lies"}), (1, set())):
        values = screens.measure(layer, torch.from_numpy(vectors))
        assert values is not None
        assert {frozenset(named) for _, named in screens.judge(layer, values.numpy(), vectors)} == {frozenset(known)}


@pytest.mark.parametrize(
    ("screen", "message"),
    [
        (LinearScreen("lies", np.ones(7)), r"screen 'lies'.*reads vectors of 7 numbers, the model's d_model is 32"),
        (LinearScreen("lies", np.ones(D_MODEL), layer=0), r"made on layer 0, and capture reads 1"),
        (
            NoveltyScreen("odd", dims=40),
            r"projects to 40 dimensions, the model's d_model is 32; set dims to 32 or less",
        ),
    ],
)
def test_screens_that_do_not_fit_the_model_are_refused_at_attach(screen: module.Screen, message: str) -> None:
    with capturing(None, screens=Screens([screen])) as captured, pytest.raises(AttachError, match=message):
        captured.capture.attach(make_model())


def test_samples_carry_what_was_measured_of_their_own_vector() -> None:
    model = make_model()
    weight = np.random.default_rng(2).normal(size=D_MODEL)
    screens = Screens([NormScreen("norm"), LinearScreen("lies", weight), NoveltyScreen("odd", dims=2)])
    layers = tuple(range(BLOCKS - 1))
    with capturing(model, layer=layers, screens=screens, tokens_per_sequence=4) as captured, torch.no_grad():
        for seed in range(4):
            model(token_batch(2, 16, seed=seed))
            samples = captured.samples()
    assert len(samples) == 2 * 2 * 4
    for one in samples:
        assert one.screens["norm"] == pytest.approx(one.norm, rel=1e-5)
        assert one.screens["lies"] == pytest.approx(float(one.vector @ weight), rel=1e-3, abs=1e-5)
        assert 0 < one.screens["odd"] < 10
        assert 0 < one.priority <= 1


def test_without_screens_nothing_is_measured() -> None:
    model = make_model()
    with capturing(model) as captured, torch.no_grad():
        model(token_batch(2, 16))
        samples = captured.samples()
    assert {(one.priority, len(one.screens)) for one in samples} == {(0.0, 0)}


def _losses(model: Any) -> Sequence[torch.Tensor]:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    found = []
    for step in range(3):
        ids = token_batch(2, 12, seed=step)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach().clone())
    return found


def test_screens_leave_training_bitwise_the_same() -> None:
    plain = _losses(make_model())
    watched = make_model()
    with capturing(watched, screens=Screens([NormScreen("norm"), NoveltyScreen("odd", dims=2)])):
        assert all(torch.equal(one, other) for one, other in zip(plain, _losses(watched), strict=True))


def test_a_screen_that_fails_costs_its_numbers_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NLA_MONITOR_STRICT")

    class Broken(NormScreen):
        def measure(self, layer: int, rows: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("injected")

    plain = _losses(make_model())
    watched = make_model()
    with capturing(watched, screens=Screens([Broken("norm")])) as captured:
        assert all(torch.equal(one, other) for one, other in zip(plain, _losses(watched), strict=True))
        samples = captured.samples()
        assert captured.guard.faults == {"capture.screen": 3}
    assert len(samples) == 12
    assert {len(one.screens) for one in samples} == {0}
