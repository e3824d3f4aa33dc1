"""A generation in flight: which rows of a cached decode are read, and where they are in their sequence.

The prompt pass (prefill) fixes rows, identities and lengths; each later pass feeds one token per row. Rows advance in
step, so the index of the generated token is known on the host; everything else stays in tensors.
Beam search permutes rows between passes: its rows keep the identity of their place in the batch.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from nla_monitor.capture import sampling
from nla_monitor.capture.assembly import Owners
from nla_monitor.capture.keys import SALT_THIN, score
from nla_monitor.capture.policy import FIRST_TRIGGER, RANDOM, Draw, Policy
from nla_monitor.capture.sampling import Choice

_MOST_PENDING: Final = 256


@dataclass(eq=False, slots=True)
class Generation:
    """State of one batch that is being generated."""

    batch: int
    draw: Draw
    """Of its prompt; its thresholds hold for the whole generation."""
    rows: Tensor
    """``[r]`` int64 batch rows that are read."""
    hashes: Tensor
    lengths: Tensor
    """``[r]`` int64 real prompt tokens."""
    pools: Tensor
    """``[r]`` int64: how many rows each was chosen from."""
    schedule: Tensor
    """``[r, strata]`` indices of the generated tokens to read."""
    planned: frozenset[int] | None
    """The same of all rows together, on a CPU: at all other tokens nothing need be computed. None on other devices."""
    history: Tensor | None
    """``[r, policy.history]`` newest token ids, but for those of ``pending``."""
    pending: list[list[int]] = field(default_factory=list)
    """``[n, batch]`` token ids that ``history`` lacks, oldest first; on a CPU only."""
    owners: Owners = field(default_factory=Owners)
    cache: weakref.ref[Any] | None = None
    index: int = 0
    """Of the next generated token."""
    closer: Tensor | None = None
    """``[r]`` bool: rows of agents that are looked at more closely; None until it is known that there are any."""
    judged: bool = False
    """Whether that has been looked for."""
    taken: Tensor = field(init=False)
    triggered: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.taken = torch.zeros_like(self.lengths)
        self.triggered = torch.zeros_like(self.lengths)

    def continues(self, ids: Tensor, cache: Any) -> bool:
        """Whether a pass over ``ids`` with this KV cache is the next token of this generation."""
        known = self.cache() if self.cache is not None else None
        return ids.shape == (self.batch, 1) and (known is None or cache is None or known is cache)

    def passes(self, ids: Any, cache: Any, mask: Any = None) -> bool:
        """Whether nothing is read of the pass over ``ids`` ``[batch, 1]``; if so, it is counted.

        A mask ``[batch, 1]`` tells of a prompt: its cache was emptied and is used again.

        True for most tokens that an agent on a CPU writes: it costs next to nothing, and False commits to nothing.
        """
        policy = self.draw.policy
        idle = self.planned is not None and self.index not in self.planned
        undecided = self.closer is not None or (self.owners.known and not self.judged)
        if not idle or undecided or len(self.pending) >= _MOST_PENDING:
            return False
        if cache is None or self.cache is None or self.cache() is not cache:
            return False
        if not isinstance(ids, Tensor) or ids.shape != (self.batch, 1):
            return False
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] <= 1:
            return False
        tokens = ids[:, 0].tolist()
        if not policy.trigger_ends.isdisjoint(tokens):
            return False
        read_on = bool(policy.triggers) or sampling.stratum(self.index) < self.schedule.shape[1]
        if self.history is not None and read_on and policy.positions != "prompt":
            self.pending.append(tokens)
        self.index += 1
        return True


def start(draw: Draw, choice: Choice, ids: Tensor, real: Tensor, cache: Any) -> Generation:
    """The generation whose prompt pass is ``ids`` ``[batch, seq]``."""
    width = draw.policy.history
    schedule = sampling.schedule(draw.policy, choice.hashes)
    return Generation(
        batch=ids.shape[0],
        draw=draw,
        rows=choice.rows,
        hashes=choice.hashes,
        lengths=choice.lengths,
        pools=choice.pools,
        schedule=schedule,
        planned=frozenset(schedule.flatten().tolist()) if schedule.device.type == "cpu" else None,
        history=sampling.last_tokens(ids[choice.rows], real[choice.rows], width) if width else None,
        cache=_reference(cache),
    )


def _reference(cache: Any) -> weakref.ref[Any] | None:
    try:
        return None if cache is None else weakref.ref(cache)
    except TypeError:  # a tuple of tensors, as of old: known by thread and batch only
        return None


def advance(generation: Generation, ids: Tensor) -> tuple[Choice | None, int]:
    """The rows to read of one decode pass ``ids`` ``[batch, 1]``, and the index of its token."""
    policy = generation.draw.policy
    index = generation.index
    generation.index += 1
    stratum = sampling.stratum(index)
    planned = stratum < generation.schedule.shape[1]
    closer = _closer(generation)
    if not planned and not policy.triggers:
        generation.pending.clear()
        return None, index
    tokens = ids.index_select(0, generation.rows)[:, 0].long()
    if generation.history is not None and generation.planned is not None:
        generation.pending.append(ids[:, 0].tolist())
    idle = generation.planned is not None and index not in generation.planned
    if idle and closer is None and not policy.triggers and len(generation.pending) < _MOST_PENDING:
        return None, index
    if generation.history is not None:
        generation.history = torch.cat([generation.history, _written(generation, tokens)], dim=1)[:, -policy.history :]
        generation.pending.clear()
    kinds = _kinds(policy, tokens, generation.history)
    by_key = generation.schedule[:, stratum] == index if planned else torch.zeros_like(kinds, dtype=torch.bool)
    apart: Tensor | int = 1 << stratum
    limit: Tensor | int = policy.generated
    if closer is not None and planned:
        step = max(1, (1 << stratum) // policy.closer)
        by_key = torch.where(closer, (generation.schedule[:, stratum] - index) % step == 0, by_key)
        apart = torch.where(closer, step, apart)
        limit = torch.where(closer, policy.generated * policy.closer, limit)
    by_trigger = (kinds >= FIRST_TRIGGER) & (generation.triggered < policy.trigger_limit)
    valid = ((by_key & (kinds == 0)) | by_trigger) & (generation.taken < limit)
    generation.taken += valid
    generation.triggered += valid & by_trigger
    if generation.draw.thins:
        positions = generation.lengths + index
        valid = valid & (score(policy.seed, SALT_THIN, generation.hashes, positions) < generation.draw.rate)
    if valid.device.type == "cpu" and not bool(valid.any()):
        return None, index
    kinds = torch.where(by_trigger, kinds, RANDOM)
    return _choice(generation, tokens, kinds, valid, torch.where(by_trigger, 1, apart)), index


def _written(generation: Generation, tokens: Tensor) -> Tensor:
    """``[r, n]`` token ids that the history lacks; the newest are ``tokens`` ``[r]``."""
    if generation.planned is None:
        return tokens.unsqueeze(1)
    return torch.tensor(generation.pending, dtype=torch.int64)[:, generation.rows].T


def _closer(generation: Generation) -> Tensor | None:
    """``[r]`` bool: rows whose agent is looked at more closely; None where there are none or nothing is known yet.

    Whose a row is, is found out on our own thread while the generation goes on: known a few tokens into it.
    """
    if generation.closer is None and not generation.judged and generation.owners.known:
        generation.judged = True
        owners = generation.owners.of_row
        marks = [(handle := owners.get(row)) is not None and handle.closer for row in range(len(generation.rows))]
        if any(marks):
            generation.closer = torch.tensor(marks, dtype=torch.bool, device=generation.rows.device)
    return generation.closer


def _kinds(policy: Policy, tokens: Tensor, history: Tensor | None) -> Tensor:
    """``[r]``: entry of the token table, overridden where a longer trigger ends."""
    kinds = policy.kinds(tokens)
    if history is not None:
        for pattern, kind in policy.patterns_on(tokens.device):
            kinds = torch.where((history[:, -len(pattern) :] == pattern).all(dim=1), kind, kinds)
    return kinds


def _choice(generation: Generation, tokens: Tensor, kinds: Tensor, valid: Tensor, drawn_from: Tensor) -> Choice:
    fields = [
        torch.arange(len(tokens), device=tokens.device),
        valid.long(),
        generation.lengths + (generation.index - 1),
        tokens,
        kinds,
        drawn_from,
        generation.pools,
        generation.hashes,
        generation.lengths,
        torch.ones_like(tokens),
    ]
    width = generation.draw.policy.window
    return Choice(
        index=generation.rows,
        meta=torch.stack(fields, dim=1),
        context=generation.history[:, -width:] if generation.history is not None and width else None,
        rows=generation.rows,
        hashes=generation.hashes,
        lengths=generation.lengths,
        pools=generation.pools,
    )
