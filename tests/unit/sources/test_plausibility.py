"""Whether an answer is a model's own: calm for its own answers however they were drawn, loud for another's."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from sources_kit import assert_same, started

from nla_monitor.organism import agent_prompt, keyed_rng, load_target
from nla_monitor.records import Completion
from nla_monitor.sources import ReplaySource
from nla_monitor.sources.plausibility import DOUBT, surprise
from tests.langchain_support import byte_tokenizer, tiny_llama

MODEL = tiny_llama()
TOKENIZER = byte_tokenizer()


def answers(
    count: int, *, length: int = 40, seed: int = 0, **sampling: float
) -> list[tuple[list[int], tuple[int, ...]]]:
    """Prompts, and what a sharpened copy of the tiny model writes after them."""
    torch.manual_seed(seed)
    found = []
    for number in range(count):
        prompt = TOKENIZER(f"Call {number}: ", add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([prompt])
        written = SHARP.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=length,
            eos_token_id=None,
            **sampling,
        )
        found.append((prompt, tuple(written[0, len(prompt) :].tolist())))
    return found


def sharpened(model: Any) -> Any:
    """A random model is nearly indifferent between tokens; this one has opinions, as trained ones have."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight *= 20
    return twin


SHARP = sharpened(MODEL)


def scores(calls: list[tuple[list[int], tuple[int, ...]]], model: Any) -> list[float]:
    found = []
    for prompt, answer in calls:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :]
        z = surprise(logits, torch.tensor(answer))
        assert z is not None
        found.append(z)
    return found


def test_of_its_own_draws_the_score_is_standard() -> None:
    """Mean 0 and variance 1: the statistic means what it says."""
    z = scores(answers(80, do_sample=True, top_k=0), SHARP)
    assert abs(float(np.mean(z))) < 4 / np.sqrt(len(z))
    assert 0.7 < float(np.std(z)) < 1.3
    assert max(z) < DOUBT


@pytest.mark.parametrize(
    "sampling",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 0, "temperature": 0.5},
        {"do_sample": True, "top_k": 0, "top_p": 0.7},
    ],
)
def test_careful_decoding_only_lowers_it(sampling: dict[str, Any]) -> None:
    assert max(scores(answers(10, **sampling), SHARP)) < 0


def test_another_model_is_far_out() -> None:
    assert min(scores(answers(10, do_sample=True, top_k=0), sharpened(tiny_llama(seed=1)))) > DOUBT


def test_certainty_and_nonsense_have_no_score() -> None:
    certain = torch.full((3, 5), -torch.inf)
    certain[:, 2] = 0.0
    assert surprise(certain, torch.tensor([2, 2, 2])) is None
    assert surprise(torch.full((2, 5), torch.nan), torch.tensor([1, 1])) is None
    loud = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert surprise(loud, torch.tensor([2])) is None or surprise(loud, torch.tensor([2])) == np.inf


def test_a_swapped_model_is_said_once_counted_and_labelled(caplog: pytest.LogCaptureFixture) -> None:
    calls = [(prompt, Completion(token_ids=answer)) for prompt, answer in answers(6, do_sample=True, top_k=0)]
    with started(ReplaySource(sharpened(tiny_llama(seed=1)), TOKENIZER, proxy=False, check_every=2)) as outlet:
        with caplog.at_level(logging.WARNING, "nla_monitor"):
            found = outlet.read(*calls)
        assert (outlet.source.checks.checked, outlet.source.checks.implausible) == (3, 3)
        assert outlet.source.stats.forwards == 6
    assert len([record for record in caplog.records if "implausible for the local copy" in record.getMessage()]) == 1
    doubted = {one.agent.agent_run_id for one in found if one.agent and one.attributes.get("implausible")}
    assert doubted == {"run-0", "run-2", "run-4"}


def test_the_right_model_is_not_doubted_and_checks_change_no_sample() -> None:
    calls = [(prompt, Completion(token_ids=answer)) for prompt, answer in answers(6, do_sample=True, top_k=0)]
    found = []
    for often in (0, 1):
        with started(ReplaySource(copy.deepcopy(SHARP), TOKENIZER, proxy=False, check_every=often)) as outlet:
            found.append([one for one in outlet.read(*calls) if one.agent and one.agent.agent_run_id == "run-1"])
            assert outlet.source.checks.checked == (6 if often else 0)
            assert outlet.source.checks.implausible == 0
    assert_same(found[0], found[1], tolerance=0.0)


def test_a_proxy_is_not_asked() -> None:
    calls = [(prompt, Completion(token_ids=answer)) for prompt, answer in answers(2, do_sample=True, top_k=0)]
    with started(ReplaySource(tiny_llama(seed=1), TOKENIZER, proxy=True, check_every=1)) as outlet:
        assert outlet.read(*calls)
        assert outlet.source.checks.checked == 0


def test_a_question_that_fails_costs_no_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NLA_MONITOR_STRICT", "0")
    model = copy.deepcopy(SHARP)
    model.lm_head.register_forward_pre_hook(_no_room)
    calls = [(prompt, Completion(token_ids=answer)) for prompt, answer in answers(2, do_sample=True, top_k=0)]
    with started(ReplaySource(model, TOKENIZER, proxy=False, check_every=1)) as outlet:
        found = outlet.read(*calls)
        assert {one.agent.agent_run_id for one in found if one.agent} == {"run-0", "run-1"}
        assert outlet.guard.faults == {"sources.check": 2}
        assert outlet.source.checks.checked == 0


def _no_room(*_: object) -> None:
    raise torch.OutOfMemoryError("no room for logits")


def test_models_that_answer_alike_are_not_told_apart() -> None:
    """Planted thoughts that show in no word show in no answer: why ``proxy`` is for the user to say."""
    planted, tokenizer = load_target("planted")
    natural, _ = load_target("natural")
    for number in range(4):
        prompt = tokenizer(agent_prompt(keyed_rng("plausible", number)).prompt)["input_ids"]
        tokens = torch.tensor([prompt])
        torch.manual_seed(number)
        written = planted.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=48, do_sample=True, top_k=0
        )
        answer = tuple(written[0, len(prompt) :].tolist())
        own, other = (scores([(prompt, answer)], model)[0] for model in (planted, natural))
        assert max(own, other) < DOUBT
