"""Sampling without the host's random state, stop texts, streaming threads."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from nla_monitor_langchain.generation import GumbelSampler, StopOnText, TextThread, cut_at_stop, hold_back, prompt_seed

from tests.langchain_support import byte_tokenizer

CPU = torch.device("cpu")
LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def draws(count: int, **settings: dict[str, object]) -> torch.Tensor:
    """Share of each token among ``count`` draws."""
    sampler = GumbelSampler(**{"temperature": 1.0, "seed": 0, "top_p": 1.0, "device": CPU, **settings})
    chosen = sampler(torch.zeros(count, 1), LOGITS.expand(count, -1)).argmax(dim=-1)
    return torch.bincount(chosen, minlength=4) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    expected = (LOGITS[0] / temperature).softmax(-1)
    assert torch.allclose(draws(40_000, temperature=temperature), expected, atol=0.01)


def test_top_p_keeps_the_smallest_sufficient_set_and_renormalises() -> None:
    kept = LOGITS[0, :2].softmax(-1)
    shares = draws(40_000, top_p=0.8)
    assert torch.allclose(shares[:2], kept, atol=0.01)
    assert shares[2:].sum() == 0
    assert draws(100, top_p=1e-6)[0] == 1


def test_the_hosts_random_state_is_not_touched() -> None:
    before = torch.get_rng_state()
    draws(10)
    draws(10, seed=None)
    assert torch.equal(before, torch.get_rng_state())


def test_a_seed_repeats_and_none_does_not() -> None:
    assert torch.equal(draws(50), draws(50))
    assert not torch.equal(draws(500, seed=None), draws(500, seed=None))


def test_the_same_seed_draws_differently_for_another_prompt() -> None:
    assert prompt_seed(1, [1, 2]) == prompt_seed(1, [1, 2])
    assert len({prompt_seed(seed, ids) for seed in (0, 1) for ids in ([1, 2], [12], [1], [2, 1])}) == 8


@given(st.text(max_size=30), st.lists(st.text(max_size=3), max_size=3))
def test_cutting_leaves_no_stop_text(text: str, stops: list[str]) -> None:
    cut, stopped = cut_at_stop(text, stops)
    assert text.startswith(cut)
    assert stopped is any(stop and stop in text for stop in stops)
    assert stopped or cut == text
    if stopped:
        assert any(stop and text[len(cut) :].startswith(stop) for stop in stops)


@given(
    st.lists(st.text(alphabet="ab.", max_size=4), max_size=12),
    st.lists(st.text("ab.", min_size=1, max_size=3), max_size=2),
)
@example([".b", "a"], ["b", ".ba"])
def test_streamed_pieces_join_to_the_text_cut_as_a_whole(pieces: list[str], stops: list[str]) -> None:
    streamed = list(hold_back(iter(pieces), stops))
    # A generation ends with the token that completes a stop text: what would come after it is never written.
    texts = ["".join(pieces[:number]) for number in range(len(pieces) + 1)]
    written = next((text for text in texts if cut_at_stop(text, stops)[1]), texts[-1])
    assert "".join(streamed) == cut_at_stop(written, stops)[0]
    assert all(streamed)


@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=4))
def test_a_stop_text_is_seen_in_the_completion_and_never_in_the_prompt(written: str, stop: str) -> None:
    tokenizer = byte_tokenizer(chat=False)
    prompt = tokenizer(f"{stop} prompt {stop}")["input_ids"]
    completion = tokenizer(written, add_special_tokens=False)["input_ids"]
    criterion = StopOnText(tokenizer, [stop], len(prompt), threading.Event())
    stopped = False
    for length in range(len(completion) + 1):
        stopped = stopped or bool(criterion(torch.tensor([prompt + completion[:length]]), None)[0])
    assert stopped is (stop in tokenizer.decode(completion))


def test_a_generation_ends_when_asked_to() -> None:
    cancelled = threading.Event()
    criterion = StopOnText(byte_tokenizer(), [], 0, cancelled)
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert criterion(ids, None).tolist() == [False, False]
    cancelled.set()
    assert criterion(ids, None).tolist() == [True, True]


def test_an_exception_in_the_generating_thread_reaches_the_consumer() -> None:
    def fail(streamer: TextThread) -> None:
        streamer.on_finalized_text("so far")
        raise MemoryError("out of memory")

    pieces = TextThread(byte_tokenizer(), fail, threading.Event()).pieces()
    assert next(pieces) == "so far"
    with pytest.raises(MemoryError, match="out of memory"):
        next(pieces)


def test_leaving_the_loop_ends_the_generation_and_its_thread() -> None:
    cancelled = threading.Event()
    finished = threading.Event()

    def endless(streamer: TextThread) -> None:
        while not cancelled.is_set():
            streamer.on_finalized_text("x")
        finished.set()

    pieces = TextThread(byte_tokenizer(), endless, cancelled).pieces()
    next(pieces)
    pieces.close()
    assert finished.is_set()
