"""How probable an AV finds other words in the place of a claim: teacher-forced log-probabilities of continuations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla_monitor.nla.base import Choice, Likelihood


class Prompts(Protocol):
    """Where prompts come from; ``SharedPrefixDecoder`` is one."""

    def embeddings(self, rows: torch.Tensor) -> torch.Tensor:
        """The prompt for each of ``[batch, d_model]``, ``[batch, tokens, d_model]``."""
        ...

    def injecting(self, rows: torch.Tensor) -> AbstractContextManager[None]:
        """To be open around the forward pass over ``embeddings(rows)``."""
        ...


@dataclass(frozen=True, slots=True)
class _Row:
    """One option as token ids, and from which of them on it is judged."""

    owner: int
    ids: tuple[int, ...]
    start: int


class ContinuationScorer:
    """Scores texts that might have been written.

    An option is tokenized together with what stands before it, so that a tokenizer that merges over the seam sees what
    the AV would have written; the options of one choice are judged from their first differing token on.

    Args:
        model: causal LM in evaluation mode.
        tokenizer: its tokenizer.
        batch_size: options a forward pass.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size

    def score(self, prompts: Prompts, injected: torch.Tensor, choices: Sequence[Choice]) -> list[list[Likelihood]]:
        """Likelihood of every option after its own start.

        Args:
            prompts: makes the prompt's embeddings.
            injected: ``[batch, d_model]``, one row per choice.
            choices: what to score.
        """
        rows = [row for owner, choice in enumerate(choices) for row in self._rows(owner, choice)]
        # Similar lengths together: little is padded, and the logits that are kept span few positions.
        order = sorted(range(len(rows)), key=lambda number: (rows[number].start, len(rows[number].ids)))
        scores: dict[int, Likelihood] = {}
        for start in range(0, len(order), self._batch_size):
            part = order[start : start + self._batch_size]
            scores.update(zip(part, self._forward(prompts, injected, [rows[number] for number in part]), strict=True))
        result: list[list[Likelihood]] = [[] for _ in choices]
        for number, row in enumerate(rows):
            result[row.owner].append(scores[number])
        return result

    def _rows(self, owner: int, choice: Choice) -> list[_Row]:
        texts = [choice.start + option for option in choice.options]
        if not texts:
            return []
        encoded = [tuple(ids) for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]]
        start = _shared(encoded)
        return [_Row(owner, ids, start) for ids in encoded]

    @torch.inference_mode()
    def _forward(self, prompts: Prompts, injected: torch.Tensor, rows: Sequence[_Row]) -> list[Likelihood]:
        """Rows are padded on the right: under causal attention nothing before the padding can see it."""
        ids = torch.zeros((len(rows), max(len(row.ids) for row in rows)), dtype=torch.long, device=injected.device)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
        vectors = injected[[row.owner for row in rows]]
        prompt = prompts.embeddings(vectors)
        inputs = torch.cat([prompt, self._model.get_input_embeddings()(ids)], dim=1)
        first = min(row.start for row in rows)
        # Logits at position p judge the token at p + 1; only those are made that judge an option's token.
        kept = torch.arange(prompt.shape[1] + first - 1, inputs.shape[1] - 1, device=ids.device)
        with prompts.injecting(vectors):
            logits = self._model(inputs_embeds=inputs, use_cache=False, logits_to_keep=kept).logits
        tokens = logits.float().log_softmax(-1).gather(-1, ids[:, first:, None])[..., 0]
        return [
            Likelihood(float(tokens[number, row.start - first : len(row.ids) - first].sum()), len(row.ids) - row.start)
            for number, row in enumerate(rows)
        ]


def _shared(rows: Sequence[tuple[int, ...]]) -> int:
    """How many leading tokens all rows have in common; each keeps one to be judged by."""
    shortest = min(map(len, rows))
    same = next((at for at in range(shortest) if len({row[at] for row in rows}) > 1), shortest)
    return min(same, shortest - 1) if shortest else 0
