"""Drawn explanations and likelihoods of other words, against plain PyTorch written from their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nla_checkpoints import tokenizer_of

from nla_monitor.nla import TransformersVerbalizer
from nla_monitor.nla.base import Choice, ClaimScorer, Resampler
from nla_monitor.nla.decoding import Draw, _gumbel

Vectors = npt.NDArray[np.float32]
SHARED = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_the_av_can_do_both(verbalizer: TransformersVerbalizer) -> None:
    assert isinstance(verbalizer, Resampler)
    assert isinstance(verbalizer, ClaimScorer)


# -- draws -------------------------------------------------------------------------------------------------------


def test_a_draw_depends_on_vector_seed_and_temperature_only(
    verbalizer: TransformersVerbalizer, vectors: Vectors
) -> None:
    seeds = list(range(100, 120))
    together = verbalizer.resample(vectors, seeds)
    assert together == verbalizer.resample(vectors, seeds)
    order = np.random.default_rng(0).permutation(len(vectors))
    assert verbalizer.resample(vectors[order], [seeds[at] for at in order]) == [together[at] for at in order]
    alone = [verbalizer.resample(vectors[[at]], [seeds[at]])[0] for at in range(6)]
    assert alone == together[:6]
    assert verbalizer.resample(vectors, [seed + 1 for seed in seeds]) != together


def test_a_cold_draw_is_greedy_and_a_hot_one_is_not(verbalizer: TransformersVerbalizer, vectors: Vectors) -> None:
    greedy = verbalizer.verbalize(vectors)
    assert verbalizer.resample(vectors, range(20), temperature=1e-4) == greedy
    assert verbalizer.resample(vectors, range(20), temperature=2.0) != greedy


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(-8, 8), min_size=2, max_size=12), st.floats(0.2, 3.0))
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(logits: list[float], temperature: float) -> None:
    rows = 2000
    draw = Draw(list(range(rows)), temperature)
    tokens = draw(torch.tensor([logits]).expand(rows, -1), torch.arange(rows), 0)
    shares = torch.bincount(tokens, minlength=len(logits)) / rows
    expected = (torch.tensor(logits).double() / temperature).softmax(0)
    assert (shares - expected).abs().max() < 0.06


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.full((500, 6), -torch.inf)
    logits[:, 3] = 0.0
    tokens = Draw(list(range(500)), 1.0)(logits, torch.arange(500), 0)
    assert set(tokens.tolist()) == {3}


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_none_is_refused(
    verbalizer: TransformersVerbalizer, vectors: Vectors, temperature: float
) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        verbalizer.resample(vectors[:1], [0], temperature=temperature)


def test_every_vector_needs_a_seed(verbalizer: TransformersVerbalizer, vectors: Vectors) -> None:
    with pytest.raises(ValueError, match="20 vectors but 3 seeds"):
        verbalizer.resample(vectors, [1, 2, 3])


# -- likelihoods -------------------------------------------------------------------------------------------------


def plain_logprob(verbalizer: TransformersVerbalizer, family: str, vector: Vectors, opening: str, text: str) -> float:
    """Log-probability of a whole text after the prompt, token by token, without cache or padding."""
    ids = tokenizer_of(family).encode(opening + text, add_special_tokens=False)
    prompt = verbalizer.prompt_embeddings(vector[None])
    words = verbalizer.model.get_input_embeddings()(torch.tensor([ids]))
    with torch.inference_mode():
        logits = verbalizer.model(inputs_embeds=torch.cat([prompt, words], dim=1)).logits[0]
    shares = logits[prompt.shape[1] - 1 : -1].float().log_softmax(-1)
    return float(shares[torch.arange(len(ids)), torch.tensor(ids)].sum())


def test_differences_of_likelihoods_equal_plain_pytorch(
    verbalizer: TransformersVerbalizer, family: str, vectors: Vectors
) -> None:
    """Options share a beginning that is not judged; what differs is exact."""
    choices = [
        Choice("The model ", ("plans a hack.", "plans nothing.", "is tested.")),
        Choice("", ("It is honest.", "A longer sentence about the code of the server.")),
        Choice("A. B. ", ("words", "words and more words")),
    ]
    found = verbalizer.score_continuations(vectors[:3], choices)
    openings = verbalizer._openings(verbalizer._rows(vectors[:3]))
    for vector, choice, opening, options in zip(vectors[:3], choices, openings, found, strict=True):
        plain = [plain_logprob(verbalizer, family, vector, opening, choice.start + option) for option in choice.options]
        ours = [option.logprob for option in options]
        np.testing.assert_allclose(np.subtract(ours, ours[0]), np.subtract(plain, plain[0]), atol=2e-3)
        assert all(option.tokens >= 1 for option in options)


def test_likelihoods_do_not_depend_on_the_batch(verbalizer: TransformersVerbalizer, vectors: Vectors) -> None:
    choices = [Choice("Start. " * (at % 5), ("one way", "the other way round", "x")) for at in range(20)]
    together = verbalizer.score_continuations(vectors, choices)
    for at in (0, 7, 19):
        (alone,) = verbalizer.score_continuations(vectors[[at]], [choices[at]])
        assert [one.tokens for one in alone] == [one.tokens for one in together[at]]
        np.testing.assert_allclose([one.logprob for one in alone], [one.logprob for one in together[at]], atol=2e-3)


@SHARED
@given(start=st.text(max_size=12), options=st.lists(st.text(max_size=12), max_size=4))
def test_any_words_have_a_likelihood(
    verbalizer: TransformersVerbalizer, vectors: Vectors, start: str, options: list[str]
) -> None:
    (found,) = verbalizer.score_continuations(vectors[:1], [Choice(start, tuple(options))])
    assert len(found) == len(options)
    assert all(one.logprob <= 1e-3 and one.tokens >= 0 for one in found)


@pytest.mark.parametrize(("difference", "doubtful"), [(1e-4, [0]), (1e-2, [])])
def test_a_draw_that_rounding_could_turn_is_doubtful(difference: float, doubtful: list[int]) -> None:
    """The noise of two tokens is taken back, so that their scores are ``difference`` apart; a third is far below."""
    noise = _gumbel(Draw([5], 1.0)._keys, 0, 3)[0]
    logits = torch.stack([-noise[0], difference - noise[1], -noise[2] - 50.0])
    draw = Draw([5], 1.0)
    assert draw(logits.unsqueeze(0), torch.arange(1), 0).tolist() == [1]
    assert draw.doubtful == doubtful


def test_doubtful_rows_are_drawn_alone(
    verbalizer: TransformersVerbalizer, vectors: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = verbalizer.resample(vectors[:6], range(6))
    decode, sizes = verbalizer._decoder.decode, []

    def counted(rows: torch.Tensor, *arguments: Any) -> list[list[int]]:
        sizes.append(len(rows))
        return decode(rows, *arguments)

    monkeypatch.setattr(verbalizer._decoder, "decode", counted)
    monkeypatch.setattr("nla_monitor.nla.decoding.CLOSE", 1e9)
    assert verbalizer.resample(vectors[:6], range(6)) == expected
    assert sizes == [6, 1, 1, 1, 1, 1, 1]
