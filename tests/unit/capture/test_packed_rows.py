"""A sequence is read alike whether it has a row of its own, is padded, or is packed with others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture_kit import BOS, EOS, PAD, VOCAB, capturing, left_pad, make_model, places, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from nla_monitor.capture import sampling
from nla_monitor.capture.keys import hash_of, hex_of
from nla_monitor.capture.packing import Borders
from nla_monitor.capture.policy import build_policy, whole
from nla_monitor.capture.sampling import choose, real_tokens
from nla_monitor.config import CaptureConfig
from nla_monitor.records import ActivationSample

Rows = list[list[int]]
Place = tuple[int, int, int, int, tuple[int, ...]]
_sequences = st.lists(st.integers(3, VOCAB - 1), min_size=2, max_size=20)
_batches = st.lists(_sequences, min_size=1, max_size=6, unique_by=tuple)


class _ModelConfig:
    bos_token_id, eos_token_id, pad_token_id = BOS, EOS, PAD


def _places(
    ids: torch.Tensor, mask: torch.Tensor | None, borders: Borders | None, **config: Any
) -> dict[str, set[Place]]:
    """Sequence → position, kind, length, drawn from, context of every valid choice; each token is where it is said."""
    policy = build_policy(CaptureConfig(context_tokens=4, **config), None, _ModelConfig())
    real = real_tokens(ids, mask, policy.pad_id)
    choice = choose(whole(policy), ids, real, borders=borders, masked=mask is not None)
    assert choice is not None
    assert choice.context is not None
    found: dict[str, set[Place]] = {}
    for row, index, context in zip(choice.meta.tolist(), choice.index.tolist(), choice.context.tolist(), strict=True):
        if row[sampling.VALID]:
            assert ids.flatten()[index] == row[sampling.TOKEN]
            columns = (sampling.POSITION, sampling.KIND, sampling.LENGTH, sampling.DRAWN_FROM)
            place = (*(row[column] for column in columns), tuple(context))
            found.setdefault(hex_of(row[sampling.HASH]), set()).add(place)
    return found


def _positions(rows: Rows) -> torch.Tensor:
    return torch.cat([torch.arange(len(row)) for row in rows]).unsqueeze(0)


def _offsets(rows: Rows) -> torch.Tensor:
    return torch.tensor([0, *(len(row) for row in rows)], dtype=torch.int32).cumsum(0).int()


def _numbers(rows: Rows) -> torch.Tensor:
    return torch.cat([torch.full((len(row),), number) for number, row in enumerate(rows)]).unsqueeze(0).int()


@given(batch=_batches, seed=st.integers(0, 2**63), data=st.data())
@settings(max_examples=60, deadline=None)
def test_packed_padded_and_alone_give_the_same_places(batch: Rows, seed: int, data: st.DataObject) -> None:
    config = {
        "seed": seed,
        "tokens_per_sequence": 3,
        "triggers": ("5", "9"),
        "skip_first": data.draw(st.integers(0, 8)),
    }
    ids, mask = left_pad([torch.tensor(row) for row in batch])
    padded = _places(ids, mask, None, **config)
    assert set(padded) == {hex_of(hash_of(row)) for row in batch}
    shuffled = data.draw(st.permutations(batch))
    flat = torch.tensor([[token for row in shuffled for token in row]])
    for borders in (
        Borders(positions=_positions(shuffled)),
        Borders(sequences=_numbers(shuffled)),
        Borders(offsets=_offsets(shuffled)),
        Borders(positions=_positions(shuffled), offsets=_offsets(shuffled)),
    ):
        assert _places(flat, None, borders, **config) == padded
    alone: dict[str, set[Place]] = {}
    for row in batch:
        alone |= _places(torch.tensor([row]), None, Borders(positions=_positions([row])), **config)
    assert alone == padded


@given(batch=_batches, cut=st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_two_packed_rows_with_padding_at_their_ends(batch: Rows, cut: int) -> None:
    """As TRL packs: rows of several sequences, filled up with padding whose positions are 0."""
    halves = [rows for rows in (batch[:cut], batch[cut:]) if rows]
    width = max(sum(map(len, rows)) for rows in halves) + 3
    ids = torch.full((len(halves), width), PAD)
    positions = torch.zeros_like(ids)
    for number, rows in enumerate(halves):
        flat = [token for row in rows for token in row]
        ids[number, : len(flat)], positions[number, : len(flat)] = torch.tensor(flat), _positions(rows)[0]
    alone: dict[str, set[Place]] = {}
    for row in batch:
        alone |= _places(torch.tensor([row]), None, None)
    assert _places(ids, None, Borders(positions=positions)) == alone


@given(batch=_batches, fill=st.integers(0, 1))
@settings(max_examples=40, deadline=None)
def test_positions_of_a_padded_batch_change_nothing(batch: Rows, fill: int) -> None:
    """A batch with a mask and the positions that ``generate`` makes of it holds one sequence in each row."""
    for side in ("left", "right"):
        ids, mask = left_pad([torch.tensor(row) for row in batch], side)
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, fill)
        assert _places(ids, mask, Borders(positions=positions)) == _places(ids, mask, None)


def test_a_hole_in_a_masked_row_does_not_split_its_sequence() -> None:
    ids = torch.tensor([[5, 6, PAD, PAD, 7, 8, 9]])
    mask = (ids != PAD).long()
    positions = mask.cumsum(1) - 1
    found = _places(ids, mask, Borders(positions=positions))
    assert found == _places(ids, mask, None)
    assert set(found) == {hex_of(hash_of([5, 6, 7, 8, 9]))}


def test_the_rest_of_a_cached_sequence_is_not_taken_for_one() -> None:
    """Continuous batching: one row holds a prompt, a chunk whose beginning is cached, and single decoded tokens."""
    prompt, chunk, decoded = [5, 6, 7, 8], [9, 10, 11], [12]
    ids = torch.tensor([[*prompt, *chunk, *decoded]])
    positions = torch.tensor([[0, 1, 2, 3, 16, 17, 18, 40]])
    offsets = torch.tensor([0, 4, 7, 8], dtype=torch.int32)
    assert set(_places(ids, None, Borders(positions, None, offsets))) == {hex_of(hash_of(prompt))}


def test_a_longer_trigger_does_not_match_over_the_border_of_two_sequences() -> None:
    rows = [[3, 4, 10], [11, 5, 10, 11]]
    flat = torch.tensor([[token for row in rows for token in row]])
    policy = build_policy(CaptureConfig(tokens_per_sequence=0, triggers=("w10 w11",)), word_tokenizer())
    choice = choose(whole(policy), flat, torch.ones_like(flat, dtype=torch.bool), borders=Borders(_positions(rows)))
    assert choice is not None
    valid = choice.meta[choice.meta[:, sampling.VALID] == 1]
    assert valid[:, sampling.POSITION].tolist() == [3]


@pytest.mark.parametrize("flags", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}])
def test_transformers_flattening_collator(flags: dict[str, bool]) -> None:
    """The same vectors at the same places, and prompt and completion told apart as in rows of their own."""
    rows = [[10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25, 26], [30, 31, 32]]
    features = [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in rows]
    packed = DataCollatorWithFlattening(**flags)(features, return_tensors="pt")
    model = make_model().train()
    config: dict[str, Any] = {"tokens_per_sequence": 9, "positions": "completion"}
    with capturing(model, **config) as captured:
        model(**packed, use_cache=False).loss.backward()  # with a cache transformers does not look for borders
        together = captured.samples()
        for feature in features:
            model(**{key: torch.tensor([value]) for key, value in feature.items()}).loss.backward()
        alone = captured.samples()
    assert places(together) == places(alone)
    assert {sample.sequence_id for sample in together} == {hex_of(hash_of(row)) for row in rows}
    assert {sample.inclusion_probability for sample in together} == {1.0}
    by_place = {(sample.sequence_id, sample.position): sample for sample in alone}
    for sample in together:
        _check_same(sample, by_place[sample.sequence_id, sample.position])


def _check_same(packed: ActivationSample, alone: ActivationSample) -> None:
    assert packed.token_id == alone.token_id
    torch.testing.assert_close(torch.from_numpy(packed.vector), torch.from_numpy(alone.vector), rtol=1e-4, atol=1e-5)


def test_compiled_model_is_told_of_packed_rows() -> None:
    model = make_model()
    rows = [[10, 11, 12, 13], [20, 21, 22]]
    ids = torch.tensor([[token for row in rows for token in row]])
    with capturing(model, tokens_per_sequence=9) as captured, torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(input_ids=ids, position_ids=_positions(rows))
        samples = captured.samples()
    assert {sample.sequence_id for sample in samples} == {hex_of(hash_of(row)) for row in rows}
    assert sorted(sample.position for sample in samples) == [0, 0, 1, 1, 2, 2, 3]
