"""A generation in flight: which rows of a cached decode are read, and where they are in their sequence.

The prompt pass (prefill) fixes rows, identities and lengths; each later pass feeds one token per row. Rows advance in
step, so the index of the generated token is known on the host; everything else stays in tensors.
Beam search permutes rows between passes: its rows keep the identity of their place in the batch.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nla_monitor.capture import sampling
from nla_monitor.capture.assembly import Owners
from nla_monitor.capture.sampling import FIRST_TRIGGER, RANDOM, Choice, Policy


@dataclass(eq=False, slots=True)
class Generation:
    """State of one batch that is being generated."""

    batch: int
    rows: Tensor
    """``[r]`` int64 batch rows that are read."""
    hashes: Tensor
    lengths: Tensor
    """``[r]`` int64 real prompt tokens."""
    sequences: Tensor
    """Scalar int64: rows that the choice was made from."""
    schedule: Tensor
    """``[r, strata]`` indices of the generated tokens to read."""
    history: Tensor | None
    """``[r, context]`` newest token ids."""
    owners: Owners = field(default_factory=Owners)
    cache: weakref.ref[Any] | None = None
    index: int = 0
    """Of the next generated token."""
    taken: Tensor = field(init=False)
    triggered: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.taken = torch.zeros_like(self.lengths)
        self.triggered = torch.zeros_like(self.lengths)

    def continues(self, ids: Tensor, cache: Any) -> bool:
        """Whether a pass over ``ids`` with this KV cache is the next token of this generation."""
        known = self.cache() if self.cache is not None else None
        return ids.shape == (self.batch, 1) and (known is None or cache is None or known is cache)


def start(policy: Policy, choice: Choice, ids: Tensor, real: Tensor, cache: Any) -> Generation:
    """The generation whose prompt pass is ``ids`` ``[batch, seq]``."""
    history = sampling.last_tokens(ids[choice.rows], real[choice.rows], policy.context) if policy.context else None
    return Generation(
        batch=ids.shape[0],
        rows=choice.rows,
        hashes=choice.hashes,
        lengths=choice.lengths,
        sequences=real.any(dim=1).sum(),
        schedule=sampling.schedule(policy, choice.hashes),
        history=history,
        cache=_reference(cache),
    )


def _reference(cache: Any) -> weakref.ref[Any] | None:
    try:
        return None if cache is None else weakref.ref(cache)
    except TypeError:  # a tuple of tensors, as of old: known by thread and batch only
        return None


def advance(policy: Policy, generation: Generation, ids: Tensor) -> tuple[Choice | None, int]:
    """The rows to read of one decode pass ``ids`` ``[batch, 1]``, and the index of its token."""
    index = generation.index
    generation.index += 1
    stratum = sampling.stratum(index)
    planned = stratum < generation.schedule.shape[1]
    if not planned and not policy.triggers:
        return None, index
    tokens = ids[:, 0].long()[generation.rows]
    if generation.history is not None:
        generation.history = torch.cat([generation.history[:, 1:], tokens.unsqueeze(1)], dim=1)
    kinds = policy.kinds(tokens)
    by_key = generation.schedule[:, stratum] == index if planned else torch.zeros_like(kinds, dtype=torch.bool)
    by_trigger = (kinds >= FIRST_TRIGGER) & (generation.triggered < policy.trigger_limit)
    valid = ((by_key & (kinds == 0)) | by_trigger) & (generation.taken < policy.generated)
    generation.taken += valid
    generation.triggered += valid & by_trigger
    if valid.device.type == "cpu" and not bool(valid.any()):
        return None, index
    return _choice(generation, tokens, torch.where(by_trigger, kinds, RANDOM), valid, width=1 << stratum), index


def _choice(generation: Generation, tokens: Tensor, kinds: Tensor, valid: Tensor, *, width: int) -> Choice:
    number = torch.arange(len(tokens), device=tokens.device)
    fields = [
        number,
        valid.long(),
        generation.lengths + (generation.index - 1),
        tokens,
        kinds,
        torch.full_like(tokens, width),
        generation.sequences.expand_as(tokens),
        generation.hashes,
        generation.lengths,
        torch.ones_like(tokens),
    ]
    return Choice(
        index=generation.rows,
        meta=torch.stack(fields, dim=1),
        context=generation.history,
        rows=generation.rows,
        hashes=generation.hashes,
        lengths=generation.lengths,
    )
