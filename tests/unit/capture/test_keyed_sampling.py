"""Which positions are read depends on seed and sequence alone; what is eligible is what the config says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from capture_kit import BOS, EOS, PAD, VOCAB, capturing, left_pad, make_model, places, token_batch, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_monitor.capture import policy as kinds
from nla_monitor.capture import sampling
from nla_monitor.capture.keys import hash_of, hex_of
from nla_monitor.capture.policy import build_policy, whole
from nla_monitor.capture.sampling import choose, real_tokens
from nla_monitor.config import CaptureConfig
from nla_monitor.mixing import mix, mix_int, mix_tensor
from nla_monitor.records import Phase

Sequences = list[list[int]]
_words = st.lists(st.integers(3, VOCAB - 1), min_size=1, max_size=20)
_batches = st.lists(_words, min_size=1, max_size=6, unique_by=tuple)
_SPECIALS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


class _ModelConfig:
    bos_token_id, eos_token_id, pad_token_id = BOS, EOS, PAD


def _chosen(batch: Sequences, side: str = "left", **config: Any) -> dict[str, set[tuple[int, int]]]:
    """Sequence → (position, kind) of every valid choice."""
    policy = build_policy(CaptureConfig(**{"skip_first": 0} | config), None, _ModelConfig())
    ids, mask = left_pad([torch.tensor(row) for row in batch], side)
    choice = choose(whole(policy), ids, real_tokens(ids, mask, None))
    assert choice is not None
    found: dict[str, set[tuple[int, int]]] = {}
    for row, index in zip(choice.meta.tolist(), choice.index.tolist(), strict=True):
        if row[sampling.VALID]:
            assert ids.flatten()[index] == row[sampling.TOKEN]
            assert mask.flatten()[index] == 1
            place = (row[sampling.POSITION], row[sampling.KIND])
            mine = found.setdefault(hex_of(row[sampling.HASH]), set())
            assert place not in mine
            mine.add(place)
    return found


@given(batch=_batches, seed=st.integers(0, 2**63), data=st.data())
@settings(max_examples=60, deadline=None)
def test_choice_does_not_depend_on_batch_order_or_padding(batch: Sequences, seed: int, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(batch))
    config = {"seed": seed, "tokens_per_sequence": 3, "triggers": ("5", "9")}
    together = _chosen(batch, "left", **config)
    assert _chosen(shuffled, "right", **config) == together
    alone: dict[str, set[tuple[int, int]]] = {}
    for row in batch:
        alone |= _chosen([row], **config)
    assert alone == together


@given(batch=_batches)
@settings(max_examples=30, deadline=None)
def test_identity_is_the_hash_of_the_unpadded_tokens(batch: Sequences) -> None:
    assert set(_chosen(batch)) == {hex_of(hash_of(row)) for row in batch}


@given(st.integers(-(2**63), 2**63 - 1))
@settings(deadline=None)
def test_mixer_is_the_same_for_tensors_and_integers(value: int) -> None:
    assert int(mix(torch.tensor(value))) == int(mix_tensor(torch.tensor(value))) == mix_int(value)


@given(rows=st.lists(_words, min_size=2, max_size=40, unique_by=tuple))
@settings(max_examples=30, deadline=None)
def test_different_sequences_have_different_hashes(rows: Sequences) -> None:
    assert len({hash_of(row) for row in rows}) == len(rows)


def test_hash_sees_order_and_length() -> None:
    assert len({hash_of(row) for row in ([3, 4], [4, 3], [3, 4, 4], [3], [])}) == 5


def test_hash_is_pinned() -> None:
    """Stored sequence ids must mean the same in every version."""
    assert hex_of(hash_of([3, 1, 4, 1, 5])) == "71605d07a24b9008"


@given(batch=_batches, count=st.integers(1, 4), skip=st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_random_part_takes_as_many_as_there_are(batch: Sequences, count: int, skip: int) -> None:
    found = _chosen(batch, tokens_per_sequence=count, skip_first=skip, sequences_per_step=10)
    for row in batch:
        got = found.get(hex_of(hash_of(row)), set())
        late = len(row) - skip
        assert len(got) == min(count, late if late > 0 else len(row))
        assert late <= 0 or all(position >= skip for position, _ in got)


def test_seed_changes_the_choice() -> None:
    batch = token_batch(4, 20).tolist()
    assert _chosen(batch, seed=1) != _chosen(batch, seed=2)


def test_random_positions_are_uniform() -> None:
    """Chi-square over 2,000 sequences of 10 tokens: within 4 sigma of its mean."""
    ids = torch.randint(3, VOCAB, (2000, 10), generator=torch.Generator().manual_seed(1))
    found = _chosen(ids.tolist(), tokens_per_sequence=1, sequences_per_step=2000)
    counts = Counter(position for places_ in found.values() for position, _ in places_)
    expected = len(found) / 10
    chi = sum((counts[position] - expected) ** 2 / expected for position in range(10))
    assert chi < 9 + 4 * (2 * 9) ** 0.5


def test_inclusion_probability_is_the_share_of_sequences_times_the_share_of_positions() -> None:
    """Summing 1/p over the samples of many batches estimates the number of tokens."""
    model = make_model()
    with capturing(model, tokens_per_sequence=2, sequences_per_step=2) as captured, torch.no_grad():
        for seed in range(3):
            model(token_batch(4, 10, seed=seed))
        samples = captured.samples()
    assert {sample.inclusion_probability for sample in samples} == {(2 / 4) * (2 / 10)}
    assert sum(1 / (sample.inclusion_probability or 1) for sample in samples) == pytest.approx(3 * 4 * 10)


def test_special_tokens_and_padding_are_never_drawn() -> None:
    batch = [[BOS, 10, 11, EOS], [BOS, 12, EOS]]
    ordinary = {hex_of(hash_of(row)): {(i, 0) for i, token in enumerate(row) if token > PAD} for row in batch}
    assert _chosen(batch, tokens_per_sequence=4) == ordinary
    everything = _chosen(batch, tokens_per_sequence=4, skip_special_tokens=False)
    assert {len(found) for found in everything.values()} == {4, 3}


def test_trigger_wins_over_special_and_is_limited() -> None:
    row = [BOS, 7, EOS, 8, EOS, 9, EOS]
    found = _chosen([row], triggers=(str(EOS),), triggers_per_sequence=2, tokens_per_sequence=2)[hex_of(hash_of(row))]
    assert sum(kind == kinds.FIRST_TRIGGER for _, kind in found) == 2
    assert {position for position, kind in found if kind == kinds.RANDOM} <= {1, 3, 5}


def test_sequence_of_padding_only_gives_nothing() -> None:
    policy = build_policy(CaptureConfig(), None, _ModelConfig())
    ids = torch.full((2, 5), PAD)
    choice = choose(whole(policy), ids, real_tokens(ids, None, PAD))
    assert choice is not None
    assert not choice.meta[:, sampling.VALID].any()


def test_right_padding_is_recognised_without_a_mask() -> None:
    model = make_model()
    with capturing(model, tokens_per_sequence=9) as captured, torch.no_grad():
        model(torch.tensor([[5, 6, 7, PAD, PAD]]))
        samples = captured.samples()
    assert {sample.position for sample in samples} == {0, 1, 2}
    assert {sample.sequence_id for sample in samples} == {hex_of(hash_of([5, 6, 7]))}


@pytest.mark.parametrize(
    ("positions", "expected"),
    [("prompt", {0, 1, 2}), ("completion", {3, 4, 5, 6}), ("all", set(range(7)))],
)
def test_labels_divide_prompt_and_completion(positions: str, expected: set[int]) -> None:
    model = make_model().train()
    ids = token_batch(1, 7)
    labels = ids.clone()
    labels[:, :3] = -100
    with capturing(model, tokens_per_sequence=7, positions=positions) as captured:
        model(ids, labels=labels).loss.backward()
        samples = captured.samples()
    assert {sample.position for sample in samples} == expected
    assert all(sample.role == ("prompt" if sample.position < 3 else "completion") for sample in samples)


def test_without_labels_every_position_counts() -> None:
    model = make_model().train()
    with capturing(model, tokens_per_sequence=7, positions="completion") as captured:
        model(token_batch(1, 7))
        assert {sample.position for sample in captured.samples()} == set(range(7))


def test_positions_are_the_same_after_a_resume_and_on_another_rank() -> None:
    """Two processes' worth of captures, other weights, other batches: the same places."""
    ids = token_batch(6, 15)
    found = []
    for rows in (ids, ids.flip(0)):
        model = make_model(seed=len(found))
        with capturing(model, seed=3) as captured, torch.no_grad():
            for row in rows.split(2):
                model(row)
            found.append(places(captured.samples()))
    assert found[0] == found[1]


def test_sequence_budget_is_shared_by_the_micro_batches_of_a_step() -> None:
    model = make_model().train()
    with capturing(model, sequences_per_step=3, tokens_per_sequence=1) as captured:
        for step in (1, 1, 1, 2):
            captured.capture.step(step, shard=step)
            model(token_batch(2, seed=step))
        samples = captured.samples()
    assert Counter(sample.step for sample in samples) == {1: 3, 2: 1}  # a third of the budget: two more may come
    assert {sample.attributes["shard"] for sample in samples} == {1, 2}


def test_budget_in_evaluation_is_per_forward() -> None:
    model = make_model()
    with capturing(model, sequences_per_step=1, tokens_per_sequence=1) as captured, torch.no_grad():
        captured.capture.step(4)
        for seed in range(3):
            model(token_batch(2, seed=seed))
        assert len(captured.samples()) == 3


def test_every_n_steps_thins_training_only() -> None:
    model = make_model().train()
    with capturing(model, every_n_steps=3, tokens_per_sequence=1) as captured:
        for step in range(1, 8):
            captured.capture.step(step)
            model(token_batch(1, seed=step))
        with torch.no_grad():
            model(token_batch(1, seed=99))
        samples = captured.samples()
    assert [(sample.step, sample.phase) for sample in samples] == [
        (3, Phase.TRAIN),
        (6, Phase.TRAIN),
        (7, Phase.EVAL),
    ]


def test_phases_are_told_apart_filtered_and_overridden() -> None:
    model = make_model()
    with capturing(model, phases=("train", "agent"), tokens_per_sequence=1) as captured:
        with torch.no_grad():
            model(token_batch(1))
            with captured.capture.phase(Phase.AGENT, probe="p1"):
                model(token_batch(1))
        model.train()
        model(token_batch(1))
        with captured.capture.pause():
            model(token_batch(1))
        samples = captured.samples()
    assert [sample.phase for sample in samples if sample.trigger == "random"] == [Phase.AGENT, Phase.TRAIN]
    assert samples[0].attributes == {"probe": "p1"}


def test_text_and_context_come_from_the_tokenizer() -> None:
    model, tokenizer = make_model(), word_tokenizer()
    ids, mask = left_pad([torch.tensor([BOS, 10, 11, 12, 13]), torch.tensor([20, 21])])
    with (
        capturing(
            model, tokenizer=tokenizer, triggers=("w12", "w21"), tokens_per_sequence=0, context_tokens=3
        ) as captured,
        torch.no_grad(),
    ):
        model(ids, attention_mask=mask)
        samples = {sample.trigger: sample for sample in captured.samples()}
    texts = {trigger: (sample.token_text, sample.context) for trigger, sample in samples.items()}
    assert texts == {"w12": ("w12", "w10 w11 w12"), "w21": ("w21", "w20 w21")}


def test_no_text_is_kept_when_switched_off() -> None:
    model = make_model()
    with capturing(model, tokenizer=word_tokenizer(), store_text=False) as captured, torch.no_grad():
        model(token_batch(1))
        samples = captured.samples()
    assert samples
    assert {(sample.token_text, sample.context) for sample in samples} == {(None, None)}


def test_triggers_are_tokens_or_ids() -> None:
    tokenizer = word_tokenizer()
    policy = build_policy(CaptureConfig(triggers=("w10", "11", "<eos>")), tokenizer)
    assert policy.triggers == ("w10", "11", "<eos>")
    assert policy.kinds(torch.tensor([10, 11, EOS, BOS, 12, 10**9])).tolist() == [2, 3, 4, 1, 0, 0]


@given(hashes=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_generated_tokens_are_drawn_once_in_each_doubling_stratum(hashes: list[int], seed: int) -> None:
    policy = build_policy(CaptureConfig(seed=seed, generated_tokens=10), None, _ModelConfig())
    plan = sampling.schedule(policy, torch.tensor(hashes))
    for row in plan.tolist():
        assert [sampling.stratum(index) for index in row] == list(range(10))
