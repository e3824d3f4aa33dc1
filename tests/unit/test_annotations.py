"""What is known of a sequence reaches its samples: by the hash of its tokens, whatever the padding, within bounds."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from nla_monitor.annotations import Annotations, sequence_id
from nla_monitor.records import ActivationSample, Phase, uuid7

sequences = st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=6), min_size=1, max_size=6)


def sample(sequence: str, **attributes: float) -> ActivationSample:
    return ActivationSample(
        sample_id=uuid7(),
        run_id="run",
        layer=2,
        vector=np.zeros(2, dtype=np.float32),
        norm=0.0,
        phase=Phase.TRAIN,
        sequence_id=sequence,
        position=0,
        token_id=1,
        trigger="random",
        captured_at=0.0,
        attributes=attributes,
    )


@given(rows=sequences, left=st.booleans())
def test_rows_of_a_batch_are_known_by_their_tokens(rows: list[list[int]], *, left: bool) -> None:
    """Padding on either side changes no identity; the samples keep what they had."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        columns = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, columns], mask[number, columns] = torch.tensor(row), 1
    annotations = Annotations()
    annotations.add_rows(ids, mask, [{"number": number} for number in range(len(rows))])
    last = {sequence_id(row): number for number, row in enumerate(rows)}
    for sequence, number in last.items():
        (joined,) = annotations.join([sample(sequence, epoch=0.5)])
        assert joined.attributes == {"epoch": 0.5, "number": number}
    (other,) = annotations.join([sample("of another sequence", epoch=0.5)])
    assert other.attributes == {"epoch": 0.5}
    assert annotations.joined == len(last)


@given(names=st.lists(st.text(max_size=3), min_size=1, max_size=30), bound=st.integers(1, 5))
def test_the_oldest_sequences_are_forgotten_first(names: list[str], bound: int) -> None:
    """Never more than the bound, and always the newest."""
    annotations = Annotations(bound)
    for number, name in enumerate(names):
        annotations.add(name, {"number": number})
    newest = list(dict.fromkeys(reversed(names)))[:bound]
    known = {name for name in names if annotations.join([sample(name)])[0].attributes}
    assert known == set(newest)


def test_later_attributes_are_added_to_earlier_ones() -> None:
    """A reward that comes after the pair does not wipe it out."""
    annotations = Annotations()
    annotations.add("a", {"pair": "chosen"})
    annotations.add("a", {"reward": 1.0})
    assert annotations.join([sample("a")])[0].attributes == {"pair": "chosen", "reward": 1.0}
