"""Replay gives the samples that a tap would have taken, says what it is, and harms nobody."""

from __future__ import annotations

import copy
import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sources_kit import LAYER, Outlet, assert_same, by_place, context_of, started, tapped

from nla_monitor.config import BurstConfig, QueueConfig
from nla_monitor.errors import AttachError
from nla_monitor.guard import STRICT_VARIABLE, Guard
from nla_monitor.records import AgentContext, Completion
from nla_monitor.sources import ReplaySource, TapSource
from tests.langchain_support import byte_tokenizer, tiny_llama

TOLERANCE = 1e-5
"""Of a vector's norm: what float32 kernels round differently in one pass and in many."""

TOKENIZER = byte_tokenizer()
MODEL = tiny_llama()
OTHER = tiny_llama(seed=1)


@pytest.fixture
def replay() -> Iterator[Outlet]:
    with started(ReplaySource(copy.deepcopy(MODEL), TOKENIZER, proxy=False)) as outlet:
        yield outlet


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


TOKENS = st.lists(st.integers(3, 258), min_size=1, max_size=40)


POLICIES = st.fixed_dictionaries(
    {
        "positions": st.sampled_from(["all", "prompt", "completion"]),
        "triggers": st.sampled_from([("z",), ("a",), ("the", "e")]),
        "text_triggers": st.sampled_from([(), ("[aeiou]{2}",)]),
        "tokens_per_sequence": st.integers(0, 3),
        "generated_tokens": st.integers(0, 6),
        "seed": st.integers(0, 3),
        "layers": st.sampled_from([(1,), (0, 3)]),
    }
)


@settings(max_examples=25, deadline=None)
@given(prompt=TOKENS, answer=TOKENS, policy=POLICIES)
def test_replay_takes_what_a_tap_takes(prompt: list[int], answer: list[int], policy: dict[str, Any]) -> None:
    """Same places, same words, same chances; vectors up to rounding; whatever the text and the policy are."""
    expected = tapped(MODEL, TOKENIZER, prompt, answer, **policy)
    with started(ReplaySource(copy.deepcopy(MODEL), TOKENIZER, proxy=False), **policy) as outlet:
        found = outlet.read((prompt, Completion(token_ids=tuple(answer))))
    assert_same(expected, found, tolerance=TOLERANCE)


@pytest.mark.parametrize("do_sample", [False, True])
def test_greedy_and_sampled_answers_are_read_alike(*, do_sample: bool, replay: Outlet) -> None:
    """How a token was chosen leaves no trace in the residual stream: only which it is."""
    prompt = ids("What do you think of it?")
    source = TapSource(MODEL, TOKENIZER)
    with started(source) as outlet:
        handle = source.open_session(AgentContext("run-0"), prompt)
        torch.manual_seed(3)
        tokens = torch.tensor([prompt])
        written = MODEL.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=24,
            do_sample=do_sample,
            temperature=2.0 if do_sample else None,
        )[0, len(prompt) :].tolist()
        source.close_session(handle)
        assert source.flush(30)
        expected = list(outlet.samples)
    found = replay.read((prompt, Completion(token_ids=tuple(written))))
    assert sum(sample.agent is not None and sample.agent.generated for sample in found) >= 4
    assert_same(expected, found, tolerance=TOLERANCE)


def test_a_text_alone_is_read_up_to_its_last_token_and_says_so(replay: Outlet) -> None:
    prompt, answer = ids("Say it: "), "I would rather not."
    found = replay.read((prompt, Completion(text=answer)))
    assert {sample.attributes["source"] for sample in found} == {"replay"}
    assert {sample.attributes.get("retokenized") for sample in found} == {True}
    exact = replay.read((prompt, Completion(text=answer, token_ids=(*ids(answer), 2))))
    assert {sample.attributes.get("retokenized") for sample in exact} == {None}
    assert by_place(exact).keys() == by_place(found).keys()


def test_a_call_without_an_answer_is_read_as_its_prompt(replay: Outlet) -> None:
    """A cancelled or failed call: what the model was asked went in all the same."""
    found = replay.read((ids("Hello there"), None))
    assert {sample.role for sample in found} == {"prompt"}
    assert "prompt_end" in {sample.trigger for sample in found}


def test_another_model_than_the_one_that_answers_is_labelled_in_every_sample() -> None:
    call = (ids("Hello there"), Completion(text="General"))
    with started(ReplaySource(copy.deepcopy(OTHER), TOKENIZER, proxy=True)) as outlet:
        proxy = outlet.read(call)
    with started(ReplaySource(copy.deepcopy(MODEL), TOKENIZER, proxy=False)) as outlet:
        same = outlet.read(call)
    assert {sample.attributes.get("proxy") for sample in proxy} == {True}
    assert {sample.attributes.get("proxy") for sample in same} == {None}
    assert by_place(proxy).keys() == by_place(same).keys()
    assert all(
        not np.allclose(by_place(proxy)[place].vector, sample.vector) for place, sample in by_place(same).items()
    )


def test_the_handlers_context_trace_and_attributes_travel(replay: Outlet) -> None:
    context = AgentContext("call-7", root_run_id="root-1", tool="shell", conversation_id="talk")
    handle = replay.source.open_session(context, ids("Hello"), traceparent="00-1-2-01", attributes={"model_type": "x"})
    replay.source.close_session(handle, completion=Completion(text=" you"))
    assert replay.source.flush(30)
    for sample in replay.samples:
        assert sample.agent is not None
        assert (sample.agent.agent_run_id, sample.agent.tool, sample.agent.conversation_id) == (
            "call-7",
            "shell",
            "talk",
        )
        assert sample.traceparent == "00-1-2-01"
        assert dict(sample.attributes) == {"model_type": "x", "source": "replay", "retokenized": True}
    assert handle.forwards == 1


def test_what_is_known_of_a_call_while_it_waits(replay: Outlet) -> None:
    """``forwards`` is None until the call is read, so that nobody counts it as one without activations."""
    handle = replay.source.open_session(AgentContext("run"), ids("Hello"))
    assert handle.forwards is None
    replay.source.close_session(handle)
    assert replay.source.flush(30)
    assert handle.forwards == 1
    lost = replay.source.open_session(AgentContext("run"), None)
    replay.source.close_session(lost)
    assert replay.source.flush(30)
    assert lost.forwards == 0


def test_closing_twice_reads_once_and_never_closing_reads_nothing(replay: Outlet) -> None:
    handle = replay.source.open_session(AgentContext("run"), ids("Hello"))
    replay.source.open_session(AgentContext("endless"), ids("Forever"))
    replay.source.close_session(handle)
    replay.source.close_session(handle, completion=Completion(text="again"))
    assert replay.source.flush(30)
    assert replay.source.stats.forwards == 1
    assert {sample.agent.agent_run_id for sample in replay.samples if sample.agent} == {"run"}


@pytest.mark.parametrize(
    ("call", "reason", "words"),
    [
        ((None, Completion(text="x")), "no_prompt", "token ids are not known"),
        (([5, 9_000], Completion(text="x")), "tokenizer_mismatch", "beyond the vocabulary of 259"),
        (([5, -1], Completion(text="x")), "tokenizer_mismatch", "beyond the vocabulary"),
        (([5], Completion(token_ids=(9_000,))), "tokenizer_mismatch", "cannot be written in tokens"),
        (([5] * 2_040, Completion(token_ids=(5,) * 20)), "too_long", "2060 tokens"),
    ],
)
def test_a_call_that_cannot_be_read_is_counted_and_said_once(
    call: Any, reason: str, words: str, replay: Outlet, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "nla_monitor"):
        assert replay.read(call, call) == []
    stats = replay.source.stats
    assert (stats.skipped, stats.unmatched_sessions, stats.forwards) == ({reason: 2}, 2, 0)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert words in said[0]
    assert replay.read((ids("and on"), None)), "the next call is read"


def test_ids_that_say_another_text_than_the_answer_give_way_to_the_text(replay: Outlet) -> None:
    """The server's tokenizer is not ours, though its ids lie within our vocabulary."""
    prompt = ids("Say it: ")
    foreign = tuple(token + 1 for token in ids("I would rather not."))
    found = replay.read((prompt, Completion(text="I would rather not.", token_ids=foreign)))
    expected = replay.read((prompt, Completion(text="I would rather not.")))
    assert {sample.attributes.get("retokenized") for sample in found} == {True}
    assert_same(expected, found, tolerance=0.0)


def test_without_a_tokenizer_ids_are_read_and_texts_are_not(caplog: pytest.LogCaptureFixture) -> None:
    with started(ReplaySource(copy.deepcopy(MODEL), proxy=False)) as outlet:
        assert outlet.read((ids("Hello"), Completion(token_ids=(5, 6, 7))))
        assert outlet.read((ids("Hello"), Completion(text="there"))) == []
        assert outlet.source.stats.skipped == {"no_answer": 1}
    assert "the source has no tokenizer" in caplog.text


def test_vectors_that_are_not_finite_are_counted_and_not_sampled() -> None:
    model = copy.deepcopy(MODEL)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.nan
    with started(ReplaySource(model, proxy=False), generated_tokens=0) as outlet:
        found = outlet.read(([5, 7, 6], None))
        assert all(np.isfinite(sample.vector).all() for sample in found)
        assert outlet.source.stats.dropped["non_finite"] >= 1
        assert ("non_finite", outlet.source.stats.dropped["non_finite"]) in outlet.dropped


def test_a_pass_that_fails_costs_its_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STRICT_VARIABLE, "0")
    model = copy.deepcopy(MODEL)
    source = ReplaySource(model, TOKENIZER, proxy=False)
    with started(source) as outlet:
        broken = model.model.layers[0].register_forward_pre_hook(_out_of_memory)
        assert outlet.read((ids("one"), None)) == []
        broken.remove()
        assert outlet.read((ids("two"), None))
        assert outlet.guard.faults == {"capture.build": 1}
        assert source.stats.skipped == {"fault": 1}
        assert source.stats.unmatched_sessions == 1


def _out_of_memory(*_: Any) -> None:
    raise torch.OutOfMemoryError("no room")


def test_a_queue_that_is_full_drops_its_oldest_calls_and_counts_them() -> None:
    source = ReplaySource(copy.deepcopy(MODEL), TOKENIZER, proxy=False)
    with started(source, queue=QueueConfig(max_samples=1)):
        gate = threading.Event()
        block = source.model.model.layers[0].register_forward_pre_hook(lambda *_: gate.wait(30) and None)
        handles = [source.open_session(AgentContext(f"run-{number}"), ids("Hello")) for number in range(6)]
        for handle in handles:
            source.close_session(handle)
        gate.set()
        assert source.flush(30)
        block.remove()
        stats = source.stats
        assert stats.skipped["queue_full"] >= 4
        assert stats.forwards + stats.unmatched_sessions == 6
        assert handles[-1].forwards == 1, "the newest is read"
        assert 0 in [handle.forwards for handle in handles]


def test_a_model_in_training_mode_is_refused_before_and_counted_after(caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(MODEL).train()
    with (
        pytest.raises(AttachError, match=r"training mode.*Call model.eval\(\)"),
        started(ReplaySource(model, proxy=False)),
    ):
        pass
    model.eval()
    with started(ReplaySource(model, proxy=False)) as outlet:
        model.train()
        assert outlet.read((ids("Hello"), None)) == []
        assert outlet.source.stats.skipped == {"training_mode": 1}
    assert "training mode" in caplog.text


def test_a_copy_of_another_width_is_refused_with_what_to_do() -> None:
    source = ReplaySource(copy.deepcopy(MODEL), proxy=False)
    outlet = Outlet(source, Guard())
    wide = context_of(outlet)
    object.__setattr__(wide, "width", 64)
    with pytest.raises(AttachError, match="d_model 32, but the AV reads 64"):
        source.start(wide)


def test_one_source_serves_one_monitor() -> None:
    source = ReplaySource(copy.deepcopy(MODEL), proxy=False)
    with started(source) as outlet, pytest.raises(AttachError, match="make one for each"):
        source.start(context_of(outlet))


def test_whoever_else_runs_the_same_modules_notices_nothing(replay: Outlet) -> None:
    """Passes of ours stop half way; the host's, in other threads on the same weights, do not."""
    model, prompt = replay.source.model, torch.tensor([ids("Hello there, how are you?")])
    with torch.no_grad():
        expected = model(prompt).logits
    wrong: list[float] = []
    done = threading.Event()

    def host() -> None:
        with torch.no_grad():
            while not done.is_set():
                wrong.append(float((model(prompt).logits - expected).abs().max()))

    thread = threading.Thread(target=host)
    thread.start()
    found = replay.read(*[(ids(f"call {number}"), Completion(text="so be it")) for number in range(12)])
    done.set()
    thread.join()
    assert replay.source.stats.forwards == 12
    assert len(found) > 12
    assert wrong
    assert set(wrong) == {0.0}


def test_a_copy_of_the_model_is_not_read_and_can_be_made(replay: Outlet) -> None:
    twin = copy.deepcopy(replay.source.model)
    with torch.no_grad():
        assert torch.equal(twin(torch.tensor([[5, 6, 7]])).logits, MODEL(torch.tensor([[5, 6, 7]])).logits)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_passes_run_at_the_lowest_priority_and_the_host_keeps_its_own(replay: Outlet) -> None:
    nice: list[int] = []

    def note(*_: Any) -> None:
        nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    hook = replay.source.model.model.layers[0].register_forward_pre_hook(note)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    replay.read((ids("Hello"), None))
    hook.remove()
    assert nice == [19]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before


def test_a_pass_ends_behind_the_last_block_that_is_read(replay: Outlet) -> None:
    seen: list[int] = []
    hooks = [
        block.register_forward_pre_hook(lambda *_, number=number: seen.append(number))
        for number, block in enumerate(replay.source.model.model.layers)
    ]
    replay.read((ids("Hello"), None))
    for hook in hooks:
        hook.remove()
    assert seen == list(range(LAYER + 1))


def test_a_burst_reads_more_of_each_call() -> None:
    source = ReplaySource(copy.deepcopy(MODEL), TOKENIZER, proxy=False)
    with started(source, burst=BurstConfig(steps=5, factor=4), tokens_per_sequence=1) as outlet:
        prompt = ids("A long enough prompt to draw from, with many places in it.")
        plain = [sample for sample in outlet.read((prompt, None)) if sample.trigger == "random"]
        source.burst()
        assert len(plain) == 1
        closer = source.open_session(AgentContext("run-0"), prompt)
        closer.session.closer = True
        source.close_session(closer)
        assert source.flush(30)
        assert sum(sample.trigger == "random" for sample in outlet.samples) == len(plain) + 4


def test_agents_that_are_not_to_be_sampled_are_not_run_again() -> None:
    source = ReplaySource(copy.deepcopy(MODEL), TOKENIZER, proxy=False)
    with started(source, phases=("train",)) as outlet:
        assert outlet.read((ids("Hello"), None)) == []


def test_what_is_open_or_queued_at_the_end_is_handed_over_in_time() -> None:
    source = ReplaySource(copy.deepcopy(MODEL), TOKENIZER, proxy=False)
    outlet = Outlet(source, Guard())
    source.start(context_of(outlet))
    handles = [source.open_session(AgentContext(f"run-{number}"), ids("Hello")) for number in range(5)]
    for handle in handles[:4]:
        source.close_session(handle)
    assert source.close(30)
    assert source.stats.forwards == 4
    source.close_session(handles[4])
    assert source.stats.skipped["closed"] == 1
    assert source.close(1), "closing twice is harmless"
