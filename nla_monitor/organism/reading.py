"""Reads activations of an organism with its NLA pair, and asks AV and target what evaluation needs beside that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from nla_monitor.config import NLAConfig
from nla_monitor.errors import CheckpointError
from nla_monitor.nla import TransformersReconstructor, load_reconstructor, load_verbalizer
from nla_monitor.organism import captions, load_target, paths, recipe
from nla_monitor.organism.train import Encoded, av_prompt, inject, pad_right

_BATCH = 64
_JOBS = 256


@dataclass(slots=True)
class Readings:
    """What the NLA says of ``[n, d_model]`` vectors."""

    texts: list[str]
    cosines: Tensor
    """``[n]``: cosine between vector and reconstruction."""


class Reader:
    """Target, AV and AR of one variant, ready to read. AV and AR are the product's own classes."""

    def __init__(self, variant: str, *, root: Path | None = None) -> None:
        self.folders = folders = paths(variant, root=root)
        config = NLAConfig(av=str(folders.av), ar=str(folders.ar), dtype="float32", batch_size=_BATCH)
        self.target, self.tokenizer = load_target(variant, root=root)
        self.verbalizer = load_verbalizer(folders.av, config)
        self.reconstructor = load_reconstructor(folders.ar, config)
        self.statistics = load_file(folders.ar / "activation_stats.safetensors")
        self.denominator = _denominator(self.reconstructor)
        self._prompt, self._marker = av_prompt(self.tokenizer)

    def verbalize(self, vectors: Tensor) -> list[str]:
        """Greedy explanations of raw activations ``[n, d_model]``."""
        return [written.text for written in self.verbalizer.verbalize(vectors.numpy())]

    def reconstruct(self, texts: Sequence[str]) -> Tensor:
        """Predicted directions ``[n, d_model]``."""
        return torch.from_numpy(self.reconstructor.reconstruct(texts))

    def read(self, vectors: Tensor) -> Readings:
        """Explanations and their fidelity."""
        texts = self.verbalize(vectors)
        return Readings(texts, functional.cosine_similarity(self.reconstruct(texts), vectors, dim=-1))

    def fve(self, cosines: Tensor) -> float:
        """``1 - mean(2 (1 - cosine)) / denominator`` with the training denominator."""
        return 1 - float((2 * (1 - cosines)).mean()) / self.denominator

    def claim_probabilities(self, vectors: Tensor, texts: Sequence[str], latent: str) -> list[dict[str, float]]:
        """The AV's own probability of each value of a latent's claim, after the explanation up to that claim.

        All wordings of all values are scored as continuations; softmax over wordings, summed by value.
        """
        wordings = [(value, text) for value, options in captions.PARAPHRASES[latent].items() for text in options]
        starts = [next((claim.start for claim in captions.find(text) if claim.latent == latent), 0) for text in texts]
        jobs = [
            (row, text[:start].rstrip(), option)
            for row, (text, start) in enumerate(zip(texts, starts, strict=True))
            for _, option in wordings
        ]
        scores = torch.cat([self._scores(vectors, jobs[at : at + _JOBS]) for at in range(0, len(jobs), _JOBS)])
        found = []
        for shares in scores.view(len(texts), len(wordings)).softmax(-1).tolist():
            totals = dict.fromkeys(captions.PARAPHRASES[latent], 0.0)
            for (value, _), part in zip(wordings, shares, strict=True):
                totals[value] += part
            found.append(totals)
        return found

    def _scores(self, vectors: Tensor, jobs: Sequence[tuple[int, str, str]]) -> Tensor:
        """Log-probability of each option after the explanation's start, ``[jobs]``; a job is (row, start, option)."""
        model, scale = self.verbalizer.model, self.verbalizer.contract.injection_scale or 1.0
        begins = self.tokenizer([f"{recipe.EXPLANATION_OPEN}{before}" for _, before, _ in jobs])["input_ids"]
        ends = self.tokenizer([f" {option}" if before else option for _, before, option in jobs])["input_ids"]
        rows = [[*self._prompt, *begin, *end] for begin, end in zip(begins, ends, strict=True)]
        ids = pad_right(rows, self.tokenizer.pad_token_id)
        scaled = functional.normalize(vectors[[row for row, _, _ in jobs]], dim=-1) * scale
        with torch.inference_mode():
            logits = model(inputs_embeds=inject(model, ids, scaled, self._marker), use_cache=False).logits
            tokens = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        spans = [(len(row) - len(end) - 1, len(row) - 1) for row, end in zip(rows, ends, strict=True)]
        return torch.stack([tokens[row, first:last].sum() for row, (first, last) in enumerate(spans)])

    def swap_margins(self, vectors: Tensor, texts: Sequence[str], latent: str) -> Tensor:
        """Cosine as stated minus the best with an alternative in the claim's place, ``[n]``; NaN without the claim."""
        claims = [next((claim for claim in captions.find(text) if claim.latent == latent), None) for text in texts]
        jobs = [
            (row, text)
            for row, claim in enumerate(claims)
            if claim is not None
            for text in (texts[row], *captions.swap(texts[row], claim))
        ]
        margins = torch.full((len(texts),), torch.nan)
        if not jobs:
            return margins
        owners = torch.tensor([row for row, _ in jobs])
        cosines = functional.cosine_similarity(self.reconstruct([text for _, text in jobs]), vectors[owners], dim=-1)
        for row in sorted({row for row, _ in jobs}):
            own = cosines[owners == row]
            margins[row] = own[0] - own[1:].max()
        return margins

    def continue_text(self, docs: Sequence[Encoded], positions: Sequence[int], *, tokens: int = 72) -> list[str]:
        """What the target greedily writes after the token at each position."""
        return continue_greedily(
            self.target, self.tokenizer, [doc.ids[: at + 1] for doc, at in zip(docs, positions, strict=True)], tokens
        )


def continue_greedily(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prefixes: Sequence[list[int]], tokens: int
) -> list[str]:
    """Greedy continuations of token prefixes, without closing tokens."""
    # Any: the stub of generate binds self to a mixin that the class is not known to have.
    generate: Any = model.generate  # type: ignore[misc]
    texts: list[str] = []
    for start in range(0, len(prefixes), _BATCH):
        part = prefixes[start : start + _BATCH]
        longest = max(map(len, part))
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in part])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in part])
        with torch.inference_mode():
            rows = generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        texts += tokenizer.batch_decode(rows[:, longest:], skip_special_tokens=True)
    return texts


def _denominator(reconstructor: TransformersReconstructor) -> float:
    if reconstructor.denominator is None:
        raise CheckpointError(
            "the AR's sidecar names no training.fve_denominator. Rebuild it: python -m nla_monitor.organism.build"
        )
    return reconstructor.denominator.value
