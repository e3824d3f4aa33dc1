"""The fakes for users' tests keep the contract of the real ones."""

from __future__ import annotations

import numpy as np
import pytest

from nla_monitor.errors import ActivationError
from nla_monitor.nla.base import Reconstructor, Verbalizer
from nla_monitor.testing import FakeReconstructor, FakeVerbalizer, MemorySink


def vectors(count: int, d_model: int = 8) -> np.ndarray:
    return np.arange(1, count * d_model + 1, dtype=np.float32).reshape(count, d_model)


def test_texts_are_said_in_turn() -> None:
    verbalizer: Verbalizer = FakeVerbalizer(["one", "two words"])
    said = verbalizer.verbalize(vectors(3))
    assert [(item.text, item.tokens, item.truncated) for item in said] == [
        ("one", 1, False),
        ("two words", 2, False),
        ("one", 1, False),
    ]
    assert verbalizer.verbalize(vectors(1))[0].text == "two words"


def test_texts_may_depend_on_the_vector() -> None:
    verbalizer = FakeVerbalizer(lambda vector: f"norm {np.linalg.norm(vector):.0f}", d_model=2)
    assert verbalizer.verbalize(np.array([[3.0, 4.0]], dtype=np.float32))[0].text == "norm 5"
    assert np.array_equal(verbalizer.vectors[0], [3.0, 4.0])


@pytest.mark.parametrize("bad", [np.zeros((1, 8)), np.full((1, 8), np.nan), np.ones((1, 3)), np.ones(8)])
def test_unusable_vectors_are_refused_as_by_a_real_nla(bad: np.ndarray) -> None:
    with pytest.raises(ActivationError):
        FakeVerbalizer().verbalize(bad.astype(np.float32))
    with pytest.raises(ActivationError):
        FakeReconstructor().score(bad.astype(np.float32), ["x"])


def test_scores_follow_the_formulas() -> None:
    reconstructor: Reconstructor = FakeReconstructor(0.75)
    (score,) = reconstructor.score(vectors(1), ["x"])
    assert (score.cosine, score.mse_nrm, score.fve, score.denominator_name) == (0.75, 0.5, 0.5, "fake")
    first, again, other = reconstructor.reconstruct(["a", "a", "b"])
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert reconstructor.reconstruct([]).shape == (0, 8)


def test_no_texts_at_all_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        FakeVerbalizer([])


def test_the_sink_keeps_what_it_is_sent() -> None:
    from tests.cli_support import alert_of, reading, sample

    alert = alert_of(reading(sample(1, 0), "x"), 1)
    sink = MemorySink()
    sink.send("fired", alert)
    assert (sink.sent, sink.alerts) == ([("fired", alert)], [alert])
