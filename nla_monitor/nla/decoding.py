"""Decoding of many prompts that differ in one vector: greedily, or drawn with a seed of its own for each row.

Everything before the first marker is the same for every vector: it runs once, at batch 1, and its KV is shared by the
rows of every batch. What remains per vector is the marker, the few tokens after it, and the explanation. Rows that have
ended leave the batch, so that one long explanation does not make the others wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

import torch
from transformers import DynamicCache, PreTrainedModel

from nla_monitor.errors import NonFiniteWeightsError
from nla_monitor.leaving import checkpoint
from nla_monitor.mixing import WORD, logical_shift, mix, mix_int, signed
from nla_monitor.nla.injection import Prompt
from nla_monitor.nla.injectors import Injector, ReplaceRow
from nla_monitor.nla.kv import share_prefix

SHRINK_AT = 0.125
"""Share of ended rows at which they are taken out: each removal copies the KV of the others once."""
LOOK_EVERY = 8
"""Steps on a GPU from one look at which rows have ended to the next: the host waits for the device there. Rows that
ended meanwhile compute tokens that nobody keeps."""


CLOSE = 1e-3
"""Difference in logits below which a draw is doubtful: far above the rounding of float32 logits, and rarely met."""
_ODD = signed(0x9E3779B97F4A7C15)


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
        injector: how rows get into the model; by the marker's embedding row by default.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: Prompt,
        *,
        stop_ids: Sequence[int],
        max_new_tokens: int,
        injector: Injector | None = None,
    ) -> None:
        self._model = model
        self._injector = injector or ReplaceRow()
        self._max_new_tokens = max_new_tokens
        self._look_every = LOOK_EVERY if model.device.type == "cuda" else 1
        self._stop = torch.tensor(sorted(stop_ids), dtype=torch.long, device=model.device)
        with torch.inference_mode():
            self._prefix = self._embed(prompt.prefix)
            self._plain = self._embed(prompt.ids[prompt.marker :])
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
        """What the model reads for each row: the whole prompt, ``[batch, tokens, d_model]``; see ``injecting``."""
        prefix = self._prefix.expand(len(rows), -1, -1)
        return torch.cat([prefix, self._injector.tail(rows, self._plain)], dim=1)

    def injecting(self, rows: torch.Tensor) -> AbstractContextManager[None]:
        """To be open around a forward pass that starts with ``embeddings(rows)`` and uses no cache."""
        return self._injector.during(rows, self._prefix.shape[1])

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
        with self._injector.during(rows, 0):
            logits = self._forward(cache, inputs_embeds=self._injector.tail(rows, self._plain))
        _check_finite(logits)
        ended = torch.zeros(batch, dtype=torch.bool, device=rows.device)
        for step in range(longest):
            checkpoint()
            tokens = choose(logits, alive, step)
            output[alive, step] = torch.where(ended, -1, tokens)
            ended |= torch.isin(tokens, self._stop)
            if step + 1 == longest:
                break
            over = int(ended.sum()) if (step + 1) % self._look_every == 0 else 0
            if over == len(alive):
                break
            if over and over >= SHRINK_AT * len(alive):
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

    The most probable token after Gumbel noise is added (Gumbel-max), which is a draw from the softmax. The noise of a
    token is a hash of the row's seed, the step and the token's id.

    Other rows change the last bits of a row's logits, because kernels add in another order; where the two best tokens
    are closer than that, the batch would choose. Such rows are ``doubtful``.

    Args:
        seeds: one per row.
        temperature: of the softmax, above 0.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0 (greedy reading is verbalize)")
        self._keys = torch.tensor([_key(seed) for seed in seeds], dtype=torch.int64)
        self._doubtful = torch.zeros(len(seeds), dtype=torch.bool)
        self._temperature = temperature

    def __call__(self, logits: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
        """Next tokens; see ``Choose``."""
        self._keys, self._doubtful = self._keys.to(rows.device), self._doubtful.to(rows.device)
        noise = _gumbel(self._keys[rows], step, logits.shape[-1])
        best = (logits.double() / self._temperature + noise).topk(2, dim=-1)
        self._doubtful[rows] |= best.values[:, 0] - best.values[:, 1] < CLOSE / self._temperature
        return best.indices[:, 0]

    @property
    def doubtful(self) -> list[int]:
        """Numbers of the rows of which some token was as good as a tie."""
        return self._doubtful.nonzero().flatten().tolist()


def _key(seed: int) -> int:
    """A word from a seed of any size."""
    key = 0
    while seed:
        key, seed = mix_int(key ^ seed % WORD), seed // WORD
    return key


def _gumbel(keys: torch.Tensor, step: int, vocabulary: int) -> torch.Tensor:
    """Standard Gumbel noise ``[rows, vocabulary]``, float64, for row keys ``[rows]``."""
    tokens = torch.arange(1, vocabulary + 1, device=keys.device)
    words = mix(mix(keys + mix_int(step + 1)).unsqueeze(1) + tokens * _ODD)
    uniform = (logical_shift(words, 11).double() + 0.5) / (1 << 53)
    return -(-uniform.log()).log()


def _check_finite(logits: torch.Tensor) -> None:
    bad = int((~torch.isfinite(logits).all(dim=-1)).sum())
    if bad:
        raise NonFiniteWeightsError(
            f"the AV's first logits hold NaN or Inf for {bad} of {len(logits)} vectors. If nla.dtype is float16, use "
            "bfloat16 or float32 (Gemma overflows in float16); otherwise the AV's weights are damaged: copy the "
            "checkpoint again."
        )
