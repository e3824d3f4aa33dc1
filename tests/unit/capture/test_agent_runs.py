"""Agents' runs: what is new in a prompt goes first, a budget for each run, a closer look after a match."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from capture_kit import Captured, capturing, make_model, token_batch
from hypothesis import example, given
from hypothesis import strategies as st

from nla_monitor.capture import SessionRegistry, generation, sampling
from nla_monitor.capture.agent_runs import AgentRun, AgentRuns
from nla_monitor.capture.policy import build_policy, whole
from nla_monitor.capture.session import SessionHandle
from nla_monitor.config import CaptureConfig
from nla_monitor.records import ActivationSample, AgentContext, MessageSpan
from tests.langchain_support import byte_tokenizer

BURST = {"burst": {"steps": 2, "factor": 4}}


def _call(model: Any, captured: Captured, root: str, seed: int, new: int = 8) -> list[ActivationSample]:
    """The samples of one model call of an agent's run."""
    prompt = token_batch(1, 16, seed=seed)
    handle = captured.capture.sessions.open(AgentContext(f"call-{seed}", root_run_id=root), prompt[0].tolist())
    model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, eos_token_id=None
    )
    samples = captured.samples()
    captured.capture.sessions.close(handle)
    return samples


def _first_written(sample: ActivationSample) -> bool:
    return sample.agent is not None and sample.agent.token_index == 0


def _prompt(samples: list[ActivationSample]) -> list[tuple[int, str, float | None]]:
    return sorted(
        (sample.position, sample.trigger, sample.inclusion_probability)
        for sample in samples
        if sample.agent is not None and not sample.agent.generated
    )


# --- what is new goes first -------------------------------------------------------------------------------------------


def _triggered(prompt: list[int], **config: Any) -> list[tuple[int, str]]:
    policy = build_policy(CaptureConfig(tokens_per_sequence=0, **config))
    ids = torch.tensor([prompt])
    choice = sampling.choose(whole(policy), ids, torch.ones_like(ids, dtype=torch.bool), agent=True)
    assert choice is not None
    rows = [row for row in choice.meta.tolist() if row[sampling.VALID] and row[sampling.KIND] > 1]
    return sorted((row[sampling.POSITION], policy.name(row[sampling.KIND])) for row in rows)


def test_the_newest_place_of_each_trigger_is_taken_before_older_ones() -> None:
    prompt = [7, 20, 8, 21, 7, 22, 8, 23, 7, 24, 25]
    assert _triggered(prompt, triggers=("7", "8"), triggers_per_sequence=1) == [(8, "7")]
    assert _triggered(prompt, triggers=("7", "8"), triggers_per_sequence=2) == [(6, "8"), (8, "7")]
    assert _triggered(prompt, triggers=("7", "8"), triggers_per_sequence=3) == [(4, "7"), (6, "8"), (8, "7")]
    assert len(_triggered(prompt, triggers=("7", "8"), triggers_per_sequence=9)) == 5
    assert _triggered([8, 20, 7, 21, 7, 22], triggers=("7", "8"), triggers_per_sequence=2) == [(0, "8"), (4, "7")]
    assert _triggered([20, 21], triggers=("7", "8")) == []


def test_of_one_batch_each_row_has_its_own_newest() -> None:
    policy = build_policy(CaptureConfig(tokens_per_sequence=0, triggers=("7",), triggers_per_sequence=1))
    ids = torch.tensor([[7, 20, 7, 21], [7, 20, 21, 22]])
    choice = sampling.choose(whole(policy), ids, torch.ones_like(ids, dtype=torch.bool), agent=True)
    assert choice is not None
    taken = {row[sampling.POSITION] for row in choice.meta.tolist() if row[sampling.KIND] > 1 and row[sampling.VALID]}
    assert taken == {0, 2}


def test_an_end_of_a_prompt_that_is_a_trigger_is_read_once() -> None:
    """The token that opens the model's turn ends every prompt of an agent."""
    model, prompt = make_model(), torch.tensor([[20, 21, 22, 7]])
    with capturing(model, triggers=("7",), tokens_per_sequence=0) as captured, torch.no_grad():
        captured.capture.sessions.open(AgentContext("run"), prompt[0].tolist())
        model(prompt)
        assert [(sample.position, sample.trigger) for sample in captured.samples()] == [(3, "7")]


# --- budget of a run --------------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(0, 200))
def test_a_budget_is_spent_ever_more_slowly_and_never_exceeded(budget: int, taken: int) -> None:
    share = AgentRun(taken=taken).share(budget)
    assert 0.0 <= share <= 1.0
    assert (share == 0.0) == (taken >= budget)
    assert taken > budget / 2 or share == 1.0
    assert AgentRun(taken=taken).share(None) == 1.0


def test_an_agent_that_never_ends_stays_within_its_budget_and_leaves_others_theirs() -> None:
    model = make_model()
    with capturing(model, samples_per_agent_run=24, tokens_per_sequence=2) as captured:
        calls = [_call(model, captured, "endless", seed=number) for number in range(24)]
        other = _call(model, captured, "short", seed=99)
        left_out = captured.capture.sessions.runs.left_out
    counts = [len(samples) for samples in calls]
    each = counts[0]
    assert 20 <= sum(counts) <= 24 + each, "the last call that fits may go over it by what one forward gives"
    assert counts[:2] == [each, each]
    assert sum(counts[12:]) < sum(counts[:12])
    assert left_out > 0
    assert len(other) >= each - 1, "a budget of its own"
    sure = [sample for call in calls for sample in call if sample.trigger == "prompt_end" or _first_written(sample)]
    chances = [sample.inclusion_probability or 0.0 for sample in sure]
    assert chances[0] == 1.0
    assert chances == sorted(chances, reverse=True), "the share that is taken falls as the budget is spent"
    assert 0.0 < chances[-1] < 1.0


def test_the_runs_that_are_remembered_are_bounded() -> None:
    runs = AgentRuns(size=3)
    runs.of("old").left_out = 5
    for name in ("a", "b", "c"):
        runs.of(name)
    assert (len(runs), runs.left_out) == (3, 5)
    kept = runs.of("a")
    runs.of("d")
    assert runs.of("a") is kept
    assert runs.of("b") is not None
    assert len(runs) == 3


# --- a closer look ----------------------------------------------------------------------------------------------------


def test_only_the_run_with_a_match_is_looked_at_more_closely_and_only_for_its_next_calls() -> None:
    model = make_model()
    settings: dict[str, Any] = {"tokens_per_sequence": 1, "generated_tokens": 4, **BURST}
    with capturing(model, **settings) as captured:
        plain = _prompt(_call(model, captured, "found", seed=1))
        captured.capture.sessions.runs.look_closer("found", 2)
        captured.capture.burst()
        after = [_prompt(_call(model, captured, "found", seed=1)) for _ in range(3)]
        elsewhere = _prompt(_call(model, captured, "nothing", seed=1))
    assert elsewhere == after[2] == plain
    for closer in after[:2]:
        assert len(closer) == len(plain) + 3
        assert {place[0] for place in plain} < {place[0] for place in closer}
        random = [chance for _, trigger, chance in closer if trigger == "random"]
        assert len(random) == 4
        assert random == pytest.approx([4 * chance for _, trigger, chance in plain * 4 if trigger == "random"])


def _generation(
    config: CaptureConfig, hashes: list[int], *, closer: bool, tokenizer: Any = None
) -> generation.Generation:
    policy = build_policy(config, tokenizer).times(4 if closer else 1)
    rows = torch.arange(len(hashes))
    choice = sampling.Choice(
        index=rows,
        meta=torch.zeros(len(hashes), 10),
        context=None,
        rows=rows,
        hashes=torch.tensor(hashes),
        lengths=torch.full_like(rows, 16),
        pools=torch.ones_like(rows),
    )
    made = generation.start(whole(policy), choice, torch.zeros(len(hashes), 16), torch.ones(len(hashes), 16) > 0, None)
    for number in range(len(hashes)):
        handle = SessionHandle(AgentContext("run"), 0, None, 0.0, closer=closer)
        made.owners.of_row[number] = handle
    made.owners.known = True
    return made


@given(st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=5, unique=True), st.booleans())
def test_tokens_are_estimated_exactly_however_closely_they_are_looked_at(hashes: list[int], closer: bool) -> None:
    """The sum of 1 / probability over the samples of whole strata is the number of tokens, in every row."""
    made = _generation(CaptureConfig(generated_tokens=8, context_tokens=0, **BURST), hashes, closer=closer)
    estimate, taken = [0.0] * len(hashes), 0
    for _ in range(2**5 - 1):
        choice, _ = generation.advance(made, torch.full((len(hashes), 1), 9))
        for row in [] if choice is None else choice.meta.tolist():
            if row[sampling.VALID]:
                taken += 1
                estimate[row[sampling.ROW]] += row[sampling.DRAWN_FROM]
    assert estimate == [31.0] * len(hashes)
    assert taken == len(hashes) * (1 + 2 + 4 + 4 + 4 if closer else 5)


def test_a_long_gap_between_samples_loses_no_context() -> None:
    made = _generation(CaptureConfig(generated_tokens=12, context_tokens=8), [5], closer=False)
    made.history = torch.arange(8).unsqueeze(0)
    made.planned = frozenset({600})
    for number in range(600):
        generation.advance(made, torch.tensor([[100 + number]]))
        assert len(made.pending) <= generation._MOST_PENDING
    generation.advance(made, torch.tensor([[700]]))
    assert made.history.tolist() == [list(range(693, 701))]


class _Cache:
    """A KV cache, as far as a generation knows one."""


@given(
    st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=4, unique=True),
    st.sets(st.integers(0, 39)),
    st.integers(1, 8),
    st.sampled_from([(), ("b",), ("b", "ab", "cca")]),
    st.integers(0, 2**32),
)
@example([5], set(range(40)), 1, ("b",), 2)
def test_passes_that_are_waved_through_change_nothing_that_is_read(
    hashes: list[int], asked: set[int], generated: int, triggers: tuple[str, ...], seed: int
) -> None:
    """Whether all passes are planned in full, or those that ``passes`` takes are not: the same choices, in context."""
    config = CaptureConfig(generated_tokens=generated, context_tokens=6, triggers=triggers)
    tokenizer = byte_tokenizer(chat=False)
    drawn = torch.randint(0, 4, (40, len(hashes), 1), generator=torch.Generator().manual_seed(seed))
    # A special token is never drawn: where one stands, there is room for a trigger later.
    written = torch.tensor(tokenizer.convert_tokens_to_ids(["<eos>", "a", "b", "c"]))[drawn]
    quick, full = (_generation(config, hashes, closer=False, tokenizer=tokenizer) for _ in range(2))
    assert len(full.draw.policy.triggers) == len(triggers)
    cache = _Cache()
    quick.cache = weakref.ref(cache)
    waved = 0
    for number in range(40):
        ids = written[number]
        if number in asked and quick.passes(ids, cache):
            waved += 1
            assert generation.advance(full, ids) == (None, number)
            continue
        one, other = generation.advance(quick, ids), generation.advance(full, ids)
        assert one[1] == other[1] == number
        for left, right in zip(_tensors(one[0]), _tensors(other[0]), strict=True):
            assert torch.equal(left, right)
    planned = full.planned or frozenset()
    assert waved <= len(asked - planned)
    assert triggers or waved == len(asked - planned)


def _tensors(choice: sampling.Choice | None) -> list[torch.Tensor]:
    if choice is None:
        return []
    assert choice.context is not None
    return [choice.index, choice.meta, choice.context]


def test_a_pass_is_waved_through_only_when_it_surely_is_the_next_token() -> None:
    made, cache, other = _generation(CaptureConfig(), [5], closer=False), _Cache(), _Cache()
    made.planned = frozenset({3})
    made.cache = weakref.ref(cache)
    one = torch.tensor([[7]])
    refused = [
        (torch.tensor([[7, 8]]), cache),
        (torch.tensor([[7], [8]]), cache),
        (one, other),
        (one, None),
        (None, cache),
    ]
    assert not any(made.passes(ids, given_cache) for ids, given_cache in refused)
    assert not made.passes(one, cache, torch.ones(1, 1))  # the cache was emptied: this is a prompt of one token
    made.owners.known = True
    assert not made.passes(one, cache)  # whether it is looked at more closely is still to be found out
    made.judged = True
    assert made.index == 0
    assert [made.passes(one, cache) for _ in range(5)] == [True] * 3 + [False] * 2
    assert made.index == 3


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_token_s_message_is_found_once_and_only_when_it_is_asked_for() -> None:
    asked = []

    def outline() -> list[MessageSpan]:
        asked.append(True)
        return [MessageSpan(0, 4, "user"), MessageSpan(6, 9, "tool", "ls", "c1"), MessageSpan(9, None, "assistant")]

    handle = SessionRegistry().open(AgentContext("run"), [1, 2, 3])
    assert handle.message_at(0) is None  # nobody has described it
    handle = SessionRegistry().open(AgentContext("run"), [1, 2, 3])
    handle.describe(outline)
    assert asked == []
    roles = [span and span.role for span in map(handle.message_at, range(12))]
    assert roles == ["user"] * 4 + [None] * 2 + ["tool"] * 3 + ["assistant"] * 3
    assert asked == [True]


def test_prompts_of_ended_sessions_are_forgotten_after_a_while() -> None:
    """A prompt may be long; what is kept of thousands of ended sessions must not be."""
    registry, handles = SessionRegistry(), []
    for number in range(600):
        handle = registry.open(AgentContext(f"run-{number}"), [number])
        handle.describe(lambda: [MessageSpan(0, None, "user")])
        registry.close(handle)
        handles.append(handle)
    assert handles[0].message_at(0) is None
    assert handles[-1].message_at(0) is not None
    assert sum(handle.message_at(0) is not None for handle in handles) == 512
