"""Decoding of many prompts that differ in one embedding row: greedily, or drawn with a seed of its own for each row.

Everything before that row is the same for every vector: it runs once, at batch 1, and its KV is shared by the rows of
every batch. What remains per vector is the row itself, the few tokens after it, and the explanation. Rows that have
ended leave the batch, so that one long explanation does not make the others wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from nla_monitor.errors import NonFiniteWeightsError
from nla_monitor.nla.injection import Prompt
from nla_monitor.nla.kv import share_prefix

SHRINK_AT = 0.125
"""Share of ended rows at which they are taken out: each removal copies the KV of the others once."""


Choose: TypeAlias = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Next tokens ``[n]`` from logits ``[n, vocabulary]``, the numbers ``[n]`` of the rows, and the step."""


class SharedPrefixDecoder:
    """Decodes explanations for injected rows ``[batch, d_model]``.

    Holds the prefix's KV for its lifetime. Not for use from several threads at once.

    Args:
        model: causal LM in evaluation mode.
        prompt: ids and the marker's position.
        stop_ids: tokens that end a row (they are part of the output).
        max_new_tokens: cap for each row.
    """

    def __init__(self, model: PreTrainedModel, prompt: Prompt, *, stop_ids: Sequence[int], max_new_tokens: int) -> None:
        self._model = model
        self._max_new_tokens = max_new_tokens
        self._stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=model.device)
        with torch.inference_mode():
            self._prefix = self._embed(prompt.prefix)
            self._suffix = self._embed(prompt.suffix)
            cache = DynamicCache(config=model.config)
            self._forward(cache, inputs_embeds=self._prefix)
            self._cache = share_prefix(cache, capacity=len(prompt.ids) + max_new_tokens)

    def _embed(self, ids: Sequence[int]) -> torch.Tensor:
        """``[1, len(ids), d_model]``, by the model's own module: Gemma multiplies by sqrt(d_model) inside it."""
        embed = self._model.get_input_embeddings()
        rows: torch.Tensor = embed(torch.tensor([list(ids)], dtype=torch.long, device=self._model.device))
        return rows

    @torch.inference_mode()
    def embeddings(self, rows: torch.Tensor) -> torch.Tensor:
        """What the model sees: the whole prompt as ``[batch, tokens, d_model]`` with each row in the marker's place."""
        prefix = self._prefix.expand(len(rows), -1, -1)
        return torch.cat([prefix, self._tail(rows)], dim=1)

    def _tail(self, rows: torch.Tensor) -> torch.Tensor:
        injected = rows.to(self._suffix).unsqueeze(1)
        return torch.cat([injected, self._suffix.expand(len(rows), -1, -1)], dim=1)

    @torch.inference_mode()
    def decode(self, rows: torch.Tensor, choose: Choose | None = None, limit: int | None = None) -> list[list[int]]:
        """Token ids for each row of ``[batch, d_model]``, its stop token included.

        Args:
            rows: what is injected.
            choose: how the next token is chosen; the most probable one by default.
            limit: cap for each row, at most ``max_new_tokens``.

        Raises:
            NonFiniteWeightsError: the first logits hold NaN or Inf.
        """
        batch, longest = len(rows), min(limit or self._max_new_tokens, self._max_new_tokens)
        choose = choose or _most_probable
        output = torch.full((batch, longest), -1, dtype=torch.long, device=rows.device)
        alive = torch.arange(batch, device=rows.device)
        cache = self._cache.rows(batch)
        logits = self._forward(cache, inputs_embeds=self._tail(rows))
        _check_finite(logits)
        ended = torch.zeros(batch, dtype=torch.bool, device=rows.device)
        for step in range(longest):
            tokens = choose(logits, alive, step)
            output[alive, step] = torch.where(ended, -1, tokens)
            ended |= torch.isin(tokens, self._stop)
            over = int(ended.sum())
            if over == len(alive) or step + 1 == longest:
                break
            if over >= SHRINK_AT * len(alive):
                keep = (~ended).nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                alive, tokens, ended = alive[keep], tokens[keep], ended[keep]
            logits = self._forward(cache, input_ids=tokens.unsqueeze(1))
        return [[token for token in row if token >= 0] for row in output.tolist()]

    def _forward(self, cache: DynamicCache, **inputs: torch.Tensor) -> torch.Tensor:
        """Logits after the last position, ``[batch, vocabulary]``; the cache grows."""
        # No attention mask: all rows have the same length, nothing is padded.
        logits: torch.Tensor = self._model(past_key_values=cache, use_cache=True, logits_to_keep=1, **inputs).logits[
            :, -1
        ]
        return logits


def _most_probable(logits: torch.Tensor, _rows: torch.Tensor, _step: int) -> torch.Tensor:
    return logits.argmax(dim=-1)


class Draw:
    """Chooses by chance: each row has its own stream of numbers, so that its batch changes nothing.

    One uniform number a token, looked up in the cumulative distribution (inverse transform sampling). Streams are
    numpy's Philox, keyed by the seed alone.

    Args:
        seeds: one per row.
        temperature: of the softmax, above 0.
        steps: how many tokens a row may get.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, steps: int) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0 (greedy reading is verbalize)")
        rows = [np.random.Generator(np.random.Philox(key=seed)).random(steps) for seed in seeds]
        self._uniform = torch.from_numpy(np.stack(rows))
        self._temperature = temperature

    def __call__(self, logits: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        """Next tokens; see ``Choose``."""
        shares = (logits.double() / self._temperature).softmax(dim=-1).cumsum(dim=-1)
        wanted = self._uniform[rows.cpu(), step].to(shares).unsqueeze(1)
        # The sum may end a rounding error below 1: scaled, so that the last token is the end of the range.
        found = torch.searchsorted(shares, wanted * shares[:, -1:], right=True).squeeze(1)
        return found.clamp(max=logits.shape[-1] - 1)


def _check_finite(logits: torch.Tensor) -> None:
    bad = int((~torch.isfinite(logits).all(dim=-1)).sum())
    if bad:
        raise NonFiniteWeightsError(
            f"the AV's first logits hold NaN or Inf for {bad} of {len(logits)} vectors. If nla.dtype is float16, use "
            "bfloat16 or float32 (Gemma overflows in float16); otherwise the AV's weights are damaged: copy the "
            "checkpoint again."
        )
