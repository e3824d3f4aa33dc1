"""Samples of a generation belong to the session whose prompt it is: batched, padded, streamed, concurrent."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from capture_kit import BOS, EOS, Captured, capturing, left_pad, make_model, places, token_batch, word_tokenizer

from nla_monitor.capture import SessionRegistry
from nla_monitor.capture.keys import hash_of, hex_of
from nla_monitor.records import ActivationSample, AgentContext, Phase


def _generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, new: int = 20, **kwargs: Any) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None, **kwargs)


def _by_agent(samples: list[ActivationSample]) -> dict[str, list[ActivationSample]]:
    found: dict[str, list[ActivationSample]] = {}
    for sample in samples:
        found.setdefault(sample.agent.agent_run_id if sample.agent else "none", []).append(sample)
    return found


def _check_vectors(model: Any, captured: Captured, full: torch.Tensor, samples: list[ActivationSample]) -> None:
    """Every vector is, up to the cache's rounding, that of one unpadded pass over prompt and answer."""
    with captured.capture.pause(), torch.no_grad():
        hidden = model(full.unsqueeze(0), output_hidden_states=True).hidden_states[2][0]
    for sample in samples:
        assert sample.token_id == full[sample.position]
        assert np.allclose(sample.vector, hidden[sample.position].numpy(), atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gemma3"])
def test_batched_left_padded_generation_is_told_apart(family: str) -> None:
    model = make_model(family)
    prompts = [token_batch(1, length, seed=length)[0] for length in (4, 7, 11)]
    ids, mask = left_pad(prompts)
    with capturing(model) as captured:
        for number, prompt in enumerate(prompts):
            captured.capture.sessions.open(AgentContext(f"run-{number}"), prompt.tolist())
        output = _generate(model, ids, mask)
        found = _by_agent(captured.samples())
        assert set(found) == {"run-0", "run-1", "run-2"}
        for number, prompt in enumerate(prompts):
            samples = found[f"run-{number}"]
            assert {sample.sequence_id for sample in samples} == {hex_of(hash_of(prompt.tolist()))}
            assert {sample.phase for sample in samples} == {Phase.AGENT}
            ends = [sample for sample in samples if sample.trigger == "prompt_end"]
            assert [sample.position for sample in ends] == [len(prompt) - 1]
            for sample in samples:
                assert sample.agent is not None
                assert sample.agent.generated == (sample.position >= len(prompt))
                assert sample.role == ("completion" if sample.agent.generated else "prompt")
                index = sample.position - len(prompt) if sample.agent.generated else None
                assert sample.agent.token_index == index
            assert sum(sample.position >= len(prompt) for sample in samples) >= 3
            full = torch.cat([prompt, output[number, ids.shape[1] :]])
            _check_vectors(model, captured, full, samples)


def test_padding_and_batching_do_not_change_what_is_read() -> None:
    model = make_model()
    prompts = [token_batch(1, length, seed=length)[0] for length in (4, 9)]
    found = []
    for batches in ([left_pad(prompts)], [left_pad([prompt]) for prompt in prompts]):
        with capturing(model) as captured:
            for prompt in prompts:
                captured.capture.sessions.open(AgentContext("run"), prompt.tolist())
            for ids, mask in batches:
                _generate(model, ids, mask)
            found.append(places(captured.samples()))
    assert found[0] == found[1]


def test_generated_tokens_are_bounded_and_triggers_are_read() -> None:
    model = make_model()
    prompt = token_batch(1, 5)
    with torch.no_grad():
        answer = _generate(model, prompt, new=40)[0, 5:].tolist()
    with capturing(model, generated_tokens=4, triggers=(str(answer[2]),), triggers_per_sequence=1) as captured:
        captured.capture.sessions.open(AgentContext("run"), prompt[0].tolist())
        _generate(model, prompt, new=40)
        written = [sample for sample in captured.samples() if sample.agent and sample.agent.generated]
    assert len(written) <= 4
    triggered = [sample for sample in written if sample.trigger == str(answer[2])]
    first = answer.index(answer[2])
    assert [(sample.position, sample.token_id) for sample in triggered] == [(5 + first, answer[2])]


def test_context_grows_with_the_answer() -> None:
    model, tokenizer = make_model(), word_tokenizer()
    prompt = torch.tensor([[BOS, 10, 11, 12]])
    with capturing(model, tokenizer=tokenizer, context_tokens=6) as captured:
        captured.capture.sessions.open(AgentContext("run"), prompt[0].tolist())
        output = _generate(model, prompt)[0].tolist()
        samples = captured.samples()
    assert any(sample.agent and sample.agent.generated for sample in samples)
    for sample in samples:
        start = max(0, sample.position - 5)
        assert sample.context == tokenizer.decode(output[start : sample.position + 1])


def test_four_threads_on_one_model_do_not_mix() -> None:
    """Different sessions, lengths and speeds; each sample is its own session's, to the vector."""
    model = make_model()
    prompts = [token_batch(1, 5 + number, seed=number) for number in range(4)]
    barrier = threading.Barrier(4)
    outputs: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        handle = captured.capture.sessions.open(AgentContext(f"run-{number}"), prompts[number][0].tolist())
        barrier.wait(10)
        for _ in range(3):
            outputs[number] = _generate(model, prompts[number], new=12 + number)[0]
        captured.capture.sessions.close(handle)

    with capturing(model, triggers=("9",)) as captured:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        found = _by_agent(captured.samples())
        assert set(found) == {f"run-{number}" for number in range(4)}
        counts = {len(samples) % 3 for samples in found.values()}
        assert counts == {0}  # three equal generations each
        for number in range(4):
            _check_vectors(model, captured, outputs[number], found[f"run-{number}"])
        assert captured.capture.stats.unmatched_sessions == 0


def test_streaming_thread_keeps_the_session_of_the_thread_that_opened_it() -> None:
    """A pipeline streams from a bare thread that inherits no context."""
    model = make_model()
    prompt = token_batch(1, 6)
    with capturing(model) as captured:
        handle = captured.capture.sessions.open(
            AgentContext("run", tool="search"),
            prompt[0].tolist(),
            traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            attributes={"env": "test"},
        )
        thread = threading.Thread(target=_generate, args=(model, prompt))
        thread.start()
        thread.join(30)
        captured.capture.sessions.close(handle)
        samples = captured.samples()
    assert len(samples) >= 5
    for sample in samples:
        assert sample.agent is not None
        assert (sample.agent.agent_run_id, sample.agent.tool) == ("run", "search")
        assert sample.traceparent == "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        assert sample.attributes == {"env": "test"}


def test_session_bound_to_a_thread_takes_every_forward_of_it() -> None:
    model = make_model()
    with capturing(model) as captured:
        handle = captured.capture.sessions.open(AgentContext("mine"), None)
        other = threading.Thread(target=lambda: _generate(model, token_batch(1, 5, seed=1)))
        other.start()
        other.join(30)
        _generate(model, token_batch(1, 5, seed=2))
        captured.capture.sessions.close(handle)
        _generate(model, token_batch(1, 5, seed=3))
        found = _by_agent(captured.samples())
    assert set(found) == {"mine", "none"}
    mine = {sample.sequence_id for sample in found["mine"]}
    assert mine == {hex_of(hash_of(token_batch(1, 5, seed=2)[0].tolist()))}
    assert {sample.phase for sample in found["none"]} == {Phase.EVAL}


def test_rows_without_a_session_are_evaluation_and_their_answers_are_not_read() -> None:
    model = make_model()
    ids = token_batch(2, 6)
    with capturing(model, tokens_per_sequence=1) as captured:
        captured.capture.sessions.open(AgentContext("run"), ids[0].tolist())
        _generate(model, ids)
        found = _by_agent(captured.samples())
    assert [(sample.phase, sample.trigger) for sample in found["none"]] == [(Phase.EVAL, "random")]
    assert len(found["run"]) > 3


def test_plain_generation_is_read_as_its_prompt_only() -> None:
    model = make_model()
    with capturing(model, tokens_per_sequence=1) as captured:
        _generate(model, token_batch(2, 6))
        samples = captured.samples()
    assert len(samples) == 2
    assert {sample.phase for sample in samples} == {Phase.EVAL}


def test_explicit_agent_phase_reads_answers_without_a_session() -> None:
    model = make_model()
    with capturing(model) as captured, captured.capture.phase(Phase.AGENT):
        _generate(model, token_batch(1, 6))
        samples = captured.samples()
    assert {sample.phase for sample in samples} == {Phase.AGENT}
    assert max(sample.position for sample in samples) >= 6


def test_two_calls_with_the_same_prompt_go_to_two_sessions() -> None:
    model = make_model()
    prompt = token_batch(1, 6)
    with capturing(model) as captured:
        for name in ("first", "second"):
            captured.capture.sessions.open(AgentContext(name), prompt[0].tolist())
        for _ in range(2):
            _generate(model, prompt)
        assert set(_by_agent(captured.samples())) == {"first", "second"}


def test_open_sessions_go_before_other_rows_of_a_large_batch() -> None:
    model = make_model()
    ids = token_batch(12, 6)
    with capturing(model, sequences_per_step=2) as captured, torch.no_grad():
        for row in (10, 11):
            captured.capture.sessions.open(AgentContext(str(row)), ids[row].tolist())
        model(ids)
        assert set(_by_agent(captured.samples())) == {"10", "11"}


def test_manual_decoding_without_masks_is_followed() -> None:
    model = make_model()
    prompt = token_batch(1, 5)
    with capturing(model, generated_tokens=8) as captured, torch.no_grad():
        captured.capture.sessions.open(AgentContext("run"), prompt[0].tolist())
        output = model(prompt, use_cache=True)
        tokens = [int(output.logits[0, -1].argmax())]
        for _ in range(10):
            step = torch.tensor([[tokens[-1]]])
            output = model(step, past_key_values=output.past_key_values, use_cache=True)
            tokens.append(int(output.logits[0, -1].argmax()))
        samples = [sample for sample in captured.samples() if sample.agent and sample.agent.generated]
    assert samples
    assert all(sample.token_id == tokens[sample.position - 5] for sample in samples)


def test_several_tokens_after_a_cache_are_counted_not_misread() -> None:
    model = make_model()
    ids = token_batch(1, 8)
    with capturing(model) as captured, torch.no_grad():
        captured.capture.sessions.open(AgentContext("run"), ids[0, :5].tolist())
        cache = model(ids[:, :5], use_cache=True).past_key_values
        model(ids[:, 5:], past_key_values=cache, attention_mask=torch.ones_like(ids))
        samples = captured.samples()
        assert {sample.agent.generated for sample in samples if sample.agent} == {False}
        assert captured.capture.stats.skipped == {"cached_continuation": 1}


def test_end_of_sequence_in_the_answer_is_special_unless_a_trigger() -> None:
    model = make_model()
    prompt = token_batch(1, 5)
    with capturing(model, triggers=(str(EOS),)) as captured, torch.no_grad():
        captured.capture.sessions.open(AgentContext("run"), prompt[0].tolist())
        cache = model(prompt, use_cache=True).past_key_values
        model(torch.tensor([[EOS]]), past_key_values=cache)
        written = [sample for sample in captured.samples() if sample.agent and sample.agent.generated]
    assert [(sample.trigger, sample.position) for sample in written] == [(str(EOS), 5)]


def test_registry_is_bounded_by_number_and_age_and_counts_the_unseen() -> None:
    now = [0.0]
    registry = SessionRegistry(max_open=2, ttl_seconds=10, clock=lambda: now[0])
    handles = [registry.open(AgentContext(str(number)), [3, number]) for number in range(3)]
    assert len(registry) == 2
    assert registry.evicted == 1
    now[0] = 11.0
    registry.open(AgentContext("late"), [9])
    assert len(registry) == 1
    for handle in handles:
        registry.close(handle)
        registry.close(handle)
    assert registry.unmatched == 3


def test_view_is_a_snapshot() -> None:
    """A forward keeps the sessions that were open when it ran, however late its samples are built."""
    registry = SessionRegistry()
    handle = registry.open(AgentContext("run"), [3, 4])
    view = registry.view
    registry.close(handle)
    assert view.claim(hash_of([3, 4])) is handle
    assert registry.view.claim(hash_of([3, 4])) is None
    assert not registry.view
