"""Budgets, reservoir and lots leave samples out by key and say with which chance; totals can be estimated from them."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from capture_kit import BOS, EOS, PAD, VOCAB
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_monitor.capture import sampling
from nla_monitor.capture.budget import FLOOR, Pace, Reservoir, TokenBucket
from nla_monitor.capture.keys import FULL, SALT_THIN, hash_of, hex_of, score, score_int, thinning_score
from nla_monitor.capture.policy import FIRST_TRIGGER, RANDOM, Policy, build_policy
from nla_monitor.capture.sampling import choose
from nla_monitor.config import CaptureConfig

TRIGGER = 5


class _ModelConfig:
    bos_token_id, eos_token_id, pad_token_id = BOS, EOS, PAD


@dataclass(frozen=True, slots=True)
class _Taken:
    sequence: str
    position: int
    kind: int
    token: int
    probability: float


@dataclass(slots=True)
class _Host:
    """One process that trains: a pace of its own, a clock and a queue that the test moves."""

    config: CaptureConfig
    now: float = 0.0
    fill: float = 0.0
    pace: Pace = field(init=False)
    policy: Policy = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.config.model_copy(update={"backpressure": True})
        self.pace = Pace(self.config, load=lambda: self.fill, clock=lambda: self.now)
        self.policy = build_policy(self.config, None, _ModelConfig())

    def forward(self, step: int, ids: torch.Tensor, epoch: int = 0) -> list[_Taken]:
        """The samples of one training forward, as the capture takes them."""
        self.pace.step(step)
        draw = self.pace.train(self.policy, ids.shape[0], epoch)
        choice = choose(draw, ids, ids != PAD)
        if choice is None:
            return []
        rows = choice.meta[choice.meta[:, sampling.VALID] == 1]
        self.pace.settle(draw.expected, len(rows))
        drawn = rows[rows[:, sampling.KIND] == RANDOM]
        keyed = score(self.config.seed, SALT_THIN, drawn[:, sampling.HASH], drawn[:, sampling.POSITION])
        self.pace.offer(epoch, keyed.tolist())
        taken = []
        for row in rows.tolist():
            kind = row[sampling.KIND]
            chance = draw.probability(kind, row[sampling.SEQUENCES], row[sampling.DRAWN_FROM])
            assert chance is not None
            taken.append(_Taken(hex_of(row[sampling.HASH]), row[sampling.POSITION], kind, row[sampling.TOKEN], chance))
        return taken


def _batches(steps: int, *, forwards: int = 3) -> list[tuple[int, torch.Tensor]]:
    """``forwards`` micro-batches a step, ``[4, 14]`` each, of sequences of 4 to 14 tokens."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for number in range(steps * forwards):
        ids = torch.randint(4, VOCAB, (4, 14), generator=generator)
        lengths = torch.randint(4, 15, (4, 1), generator=generator)
        ids[torch.rand(4, 14, generator=generator) < 0.2] = TRIGGER
        found.append((number // forwards, ids.masked_fill(torch.arange(14) >= lengths, PAD)))
    return found


def _totals(batches: list[tuple[int, torch.Tensor]]) -> dict[str, float]:
    ids = torch.cat([batch.flatten() for _, batch in batches])
    ordinary = ids[(ids != PAD) & (ids != TRIGGER)]
    return {"sum": float(ordinary.sum()), "count": float(len(ordinary)), "triggers": float((ids == TRIGGER).sum())}


def _estimates(batches: list[tuple[int, torch.Tensor]], seed: int, **config: Any) -> dict[str, float]:
    """Horvitz-Thompson sums of one run. The step before says how many forwards a step has."""
    host = _Host(CaptureConfig(seed=seed, skip_first=0, triggers=(str(TRIGGER),), **config))
    for _ in range(3):
        host.forward(-1, torch.tensor([[3, 3, 3]]), epoch=-1)
    found: dict[str, float] = defaultdict(float)
    for number, (step, ids) in enumerate(batches):
        host.now += 0.1 + 0.05 * (number % 3)
        host.fill = 0.9 if number % 7 == 3 else 0.0
        for taken in host.forward(step, ids):
            if taken.kind == RANDOM:
                found["sum"] += taken.token / taken.probability
                found["count"] += 1 / taken.probability
            else:
                found["triggers"] += 1 / taken.probability
    return found


def _unbiased(runs: int, **config: Any) -> None:
    """The mean over ``runs`` seeds is within 4 standard errors of the truth (a right one fails once in 5,000 times)."""
    batches = _batches(6)
    truth = _totals(batches)
    runs_found = [_estimates(batches, seed, **config) for seed in range(runs)]
    for name, value in truth.items():
        values = torch.tensor([found[name] for found in runs_found], dtype=torch.float64)
        error = float(values.std()) / math.sqrt(runs)
        assert 0 < error < 0.1 * value, (name, error, value)
        assert abs(float(values.mean()) - value) < 4 * error, (name, float(values.mean()), value, error)


def test_estimates_are_unbiased_with_every_limit_at_once() -> None:
    """Sequences by lot, positions, trigger limit, budget per second, backpressure and reservoir together."""
    _unbiased(
        100,
        sequences_per_step=7,
        tokens_per_sequence=2,
        triggers_per_sequence=1,
        samples_per_second=60.0,
        reservoir=25,
    )


def test_estimates_are_unbiased_with_fewer_sequences_than_forwards() -> None:
    """Two sequences for three micro-batches: a lot decides which gets none."""
    _unbiased(80, sequences_per_step=2, tokens_per_sequence=3, triggers_per_sequence=2)


_sequences = st.lists(
    st.lists(st.integers(3, VOCAB - 1), min_size=2, max_size=12), min_size=4, max_size=24, unique_by=tuple
)


def _train(
    rows: list[list[int]], host: CaptureConfig, *, world: int, batch: int, fill: float = 0.0, cut: int | None = None
) -> set[_Taken]:
    """An epoch dealt out to ``world`` ranks; after ``cut`` forwards all processes are new ones."""
    hosts = [_Host(host, fill=fill) for _ in range(world)]
    found: set[_Taken] = set()
    dealt = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    for number, part in enumerate(dealt):
        if number == cut:
            hosts = [_Host(host, fill=fill) for _ in range(world)]
        width = max(map(len, part))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in part])
        found.update(hosts[number % world].forward(number // world, ids))
    return found


def _where(taken: set[_Taken]) -> set[tuple[str, int, int]]:
    return {(item.sequence, item.position, item.kind) for item in taken}


@given(rows=_sequences, seed=st.integers(0, 2**40), data=st.data())
@settings(max_examples=40, deadline=None)
def test_rank_layout_and_resume_do_not_change_what_survives_a_threshold(
    rows: list[list[int]], seed: int, data: st.DataObject
) -> None:
    config = CaptureConfig(seed=seed, skip_first=3, triggers=("5",), sequences_per_step=24)
    fill = data.draw(st.sampled_from([0.0, 0.75, 0.9]))
    one = _train(rows, config, world=1, batch=len(rows), fill=fill)
    shuffled = data.draw(st.permutations(rows))
    world, batch = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 4))
    cut = data.draw(st.integers(0, len(rows)))
    assert _where(_train(shuffled, config, world=world, batch=batch, fill=fill, cut=cut)) == _where(one)


@given(rows=_sequences, seed=st.integers(0, 2**40), size=st.integers(1, 20), data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_reservoir_of_an_epoch_is_the_same_for_every_layout_and_resume(
    rows: list[list[int]], seed: int, size: int, data: st.DataObject
) -> None:
    """What several ranks, or a run and its resumption, took is reduced to the N smallest: those of all samples."""
    full = CaptureConfig(seed=seed, skip_first=0, sequences_per_step=24)
    everything = _where(_train(rows, full, world=1, batch=4))
    shuffled = data.draw(st.permutations(rows))
    taken = _train(
        shuffled,
        full.model_copy(update={"reservoir": size}),
        world=data.draw(st.integers(1, 8)),
        batch=data.draw(st.integers(1, 4)),
        cut=data.draw(st.integers(0, len(rows))),
    )

    def smallest(places: set[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
        return sorted(places, key=lambda place: thinning_score(seed, place[0], place[1]))[:size]

    assert smallest(_where(taken)) == smallest(everything)
    assert _where(taken) <= everything


@given(rows=_sequences, seed=st.integers(0, 2**40))
@settings(max_examples=20, deadline=None)
def test_what_survives_more_pressure_survives_less(rows: list[list[int]], seed: int) -> None:
    config = CaptureConfig(seed=seed, skip_first=0, triggers=("5",), sequences_per_step=24)
    levels = [_where(_train(rows, config, world=1, batch=4, fill=fill)) for fill in (0.2, 0.7, 0.8, 0.95, 1.0)]
    assert all(later <= earlier for earlier, later in pairwise(levels))


def test_the_share_under_pressure_is_what_is_said() -> None:
    ids = torch.randint(4, VOCAB, (2000, 8), generator=torch.Generator().manual_seed(2))
    config = CaptureConfig(skip_first=0, sequences_per_step=2000, tokens_per_sequence=2)
    host = _Host(config, fill=0.75)
    taken = host.forward(1, ids)
    assert {item.probability for item in taken} == {0.5 * 2 / 8}
    assert abs(len(taken) / 4000 - 0.5) < 0.04


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 10_000), st.integers(0, 2**63))
@settings(deadline=None)
def test_scores_are_the_same_for_tensors_integers_and_stored_samples(sequence: int, position: int, seed: int) -> None:
    keyed = int(score(seed, SALT_THIN, torch.tensor(sequence), torch.tensor(position)))
    assert keyed == score_int(seed, SALT_THIN, sequence, position)
    assert thinning_score(seed, hex_of(sequence), position) == keyed / FULL


def test_token_bucket_gives_its_rate_and_no_more() -> None:
    now = [0.0]
    bucket = TokenBucket(20.0, lambda: now[0])
    taken = 0.0
    for _ in range(1000):
        now[0] += 0.1
        taken += bucket.take(16.0) * 16.0
    assert 20.0 * 100 <= taken <= 20.0 * 100 + 20.0 + 1000 * 16 * FLOOR


def test_token_bucket_gets_back_what_was_not_used() -> None:
    now = [0.0]
    bucket = TokenBucket(20.0, lambda: now[0])
    used = 0.0
    for _ in range(1000):
        now[0] += 0.1
        share = bucket.take(16.0)
        used += share * 1.0  # one of sixteen slots is filled
        bucket.give_back(share * 15.0)
    assert used == 1000  # 10 samples a second: never thinned


def test_a_clock_that_jumps_back_takes_nothing() -> None:
    now = [1000.0]
    bucket = TokenBucket(10.0, lambda: now[0])
    assert bucket.take(5.0) == 1.0
    now[0] = 0.0
    assert bucket.take(5.0) == 1.0
    assert bucket.take(5.0) == FLOOR
    now[0] = 1e9
    assert bucket.take(20.0) == 0.5


@given(st.lists(st.integers(0, FULL - 1), max_size=200), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_reservoir_threshold_is_the_smallest_that_can_no_longer_enter(scores: list[int], size: int) -> None:
    reservoir = Reservoir(size)
    for start in range(0, len(scores), 7):
        reservoir.offer(0, scores[start : start + 7])
    distinct = sorted(set(scores))
    assert reservoir.threshold(0) == (distinct[size - 1] if len(distinct) >= size else FULL)
    assert reservoir.threshold(1) == FULL


def test_a_late_score_of_the_last_epoch_does_not_count_in_this_one() -> None:
    reservoir = Reservoir(1)
    reservoir.offer(1, [100])
    reservoir.offer(0, [1])
    assert (reservoir.threshold(1), reservoir.threshold(0)) == (100, FULL)


def test_micro_batches_share_a_step_evenly_once_their_number_is_known() -> None:
    host = _Host(CaptureConfig(sequences_per_step=6, tokens_per_sequence=1, skip_first=0))
    counts: dict[int, list[int]] = defaultdict(list)
    for step, ids in _batches(3):
        counts[step].append(len(host.forward(step, ids)))
    assert counts == {0: [4, 2, 0], 1: [2, 2, 2], 2: [2, 2, 2]}


def test_identity_of_what_is_taken_is_that_of_the_sequence() -> None:
    taken = _Host(CaptureConfig(skip_first=0, triggers=("5",))).forward(0, torch.tensor([[3, 5, 4, PAD]]))
    assert {item.sequence for item in taken} == {hex_of(hash_of([3, 5, 4]))}
    assert sorted((item.position, item.kind) for item in taken) == [(0, RANDOM), (1, FIRST_TRIGGER), (2, RANDOM)]
