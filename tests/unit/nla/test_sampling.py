"""Draws are the same whatever the batch: its size, its other rows, their order, and rows that leave it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nla_checkpoints import CONFIG

from nla_monitor.nla import TransformersVerbalizer
from nla_monitor.nla.sampling import sample

Vectors = npt.NDArray[np.float32]
_ROWS, _TEMPERATURE = 20, 0.8


@pytest.fixture(scope="module")
def alone(verbalizer: TransformersVerbalizer, vectors: Vectors) -> list[object]:
    """Each row's draw with its own number as seed, drawn in a batch of its own."""
    return [verbalizer.resample(vectors[[row]], [row], temperature=_TEMPERATURE)[0] for row in range(_ROWS)]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.integers(0, _ROWS - 1), min_size=1, max_size=24),
    batch_size=st.integers(1, 24),
    look_every=st.integers(1, 9),
    shrink_at=st.sampled_from([0.01, 0.125, 1.0]),
)
def test_any_batch_gives_a_row_the_same_draw(
    *,
    verbalizer: TransformersVerbalizer,
    vectors: Vectors,
    alone: list[object],
    rows: list[int],
    batch_size: int,
    look_every: int,
    shrink_at: float,
) -> None:
    """Rows in any order, repeated or left out, in batches of any size, ended rows taken out early, late or never."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nla_monitor.nla.decoding.SHRINK_AT", shrink_at)
        patch.setattr(verbalizer, "batch_size", batch_size)
        patch.setattr(verbalizer._decoder, "_look_every", look_every)
        drawn = verbalizer.resample(vectors[rows], rows, temperature=_TEMPERATURE)
    assert drawn == [alone[row] for row in rows]


@pytest.mark.parametrize("look_every", [2, 5, CONFIG.max_new_tokens + 1])
def test_looking_less_often_for_ended_rows_changes_no_token(
    verbalizer: TransformersVerbalizer, vectors: Vectors, look_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = verbalizer.generate(vectors)
    assert min(map(len, expected)) < max(map(len, expected))
    monkeypatch.setattr(verbalizer._decoder, "_look_every", look_every)
    assert verbalizer.generate(vectors) == expected


def test_several_draws_of_a_vector(verbalizer: TransformersVerbalizer, vectors: Vectors) -> None:
    seeds = list(range(6))
    three = sample(verbalizer, vectors[:6], seeds, samples=3, temperature=2.0)
    assert [len(draws) for draws in three] == [3] * 6
    assert [draws[0] for draws in three] == verbalizer.resample(vectors[:6], seeds, temperature=2.0)
    two = sample(verbalizer, vectors[:6], seeds, samples=2, temperature=2.0)
    assert two == [draws[:2] for draws in three]
    assert sample(verbalizer, vectors[[4]], [4], samples=3, temperature=2.0) == [three[4]]
    assert any(len({draw.text for draw in draws}) > 1 for draws in three)


@pytest.mark.parametrize(
    ("seeds", "samples", "message"),
    [([1, 2], 0, "at least 1"), ([1], 2, "2 vectors but 1 seeds"), ([1, 2**63], 1, "out of range"), ([-1, 1], 1, "-1")],
)
def test_what_cannot_be_drawn_is_refused(
    verbalizer: TransformersVerbalizer, vectors: Vectors, seeds: list[int], samples: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(verbalizer, vectors[:2], seeds, samples=samples)
