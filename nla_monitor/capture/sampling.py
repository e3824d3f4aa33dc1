"""Keyed sampling: which sequences and which positions of a forward pass are read.

Every choice is a function of ``(seed, token ids of the sequence, position)``: the same seed and sequence give the same
positions whatever the rank layout, batch, packing, padding side or resume. Everything is planned on the device where
the ids are, without one synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nla_monitor.capture import keys, packing
from nla_monitor.capture.keys import SALT_CANDIDATE, SALT_RANDOM, SALT_SEQUENCE, SALT_THIN, SALT_TRIGGER, score
from nla_monitor.capture.packing import Borders
from nla_monitor.capture.policy import CANDIDATE, FIRST_TRIGGER, PROMPT_END, RANDOM, SPECIAL, Draw, Policy
from nla_monitor.mixing import logical_shift

# Columns of Choice.meta.
ROW, VALID, POSITION, TOKEN, KIND, DRAWN_FROM, SEQUENCES, HASH, LENGTH, COMPLETION = range(10)


@dataclass(frozen=True, slots=True)
class Choice:
    """The sampled positions of one forward pass; ``n`` candidates, those with ``meta[:, VALID] == 0`` are void."""

    index: Tensor
    """``[n]`` int64: row of ``hidden.view(-1, d_model)``."""
    meta: Tensor
    """``[n, 10]`` int64, columns ``ROW`` to ``COMPLETION``."""
    context: Tensor | None
    """``[n, window]`` int64 token ids up to and including the sampled one; -1 before the sequence began."""
    rows: Tensor
    """``[r]`` int64: batch rows of the chosen sequences, best score first; a packed row may come several times."""
    hashes: Tensor
    """``[r]`` int64: their identities."""
    lengths: Tensor
    """``[r]`` int64: their real tokens."""
    pools: Tensor
    """``[r]`` int64: how many sequences each was chosen from; 0: not known."""


def real_tokens(ids: Tensor, mask: Tensor | None, pad_id: int | None) -> Tensor:
    """``[batch, seq]`` bool, True where a token is not padding. A mask of another shape (4-D, wider) is not used."""
    if mask is not None and mask.shape == ids.shape:
        return mask != 0
    if pad_id is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return ids != pad_id


def choose(
    draw: Draw,
    ids: Tensor,
    real: Tensor,
    labels: Tensor | None = None,
    *,
    wanted: Tensor | None = None,
    agent: bool = False,
    borders: Borders | None = None,
    masked: bool = False,
) -> Choice | None:
    """The positions to read of a batch ``ids`` ``[batch, seq]``.

    Args:
        draw: what to sample.
        ids: token ids.
        real: ``[batch, seq]`` bool, False at padding.
        labels: ``[batch, seq]``; -100 marks the prompt. None: every position counts as wanted.
        wanted: ``[m]`` int64 hashes of sequences that go before all others (open agent sessions).
        agent: also take the last prompt token, and read ``positions`` as prompt / generated.
        borders: what the forward was told of the sequences in its rows; None: each row is one.
        masked: ``real`` comes from a mask, not from the ids alone.

    Returns:
        None where nothing can be chosen because a dimension is empty.
    """
    if draw.sequences <= 0 or ids.numel() == 0:
        return None
    policy = draw.policy
    told = packing.begins(borders, ids, masked=masked) if borders is not None else None
    batch = _Batch(ids, real, None if labels is None else labels != -100)
    if told is None:
        rows = _choose_rows(draw, batch, wanted)
    else:
        rows = _choose_packed(draw, batch, packing.split(ids, real, *told, masked=masked), wanted)
    parts = _choose_columns(policy, rows, agent=agent)
    columns, kinds, valid, drawn_from = (torch.cat(group, dim=1) for group in zip(*parts, strict=True))
    positions = rows.positions.gather(1, columns)
    if draw.thins:
        valid = valid & _kept(draw, rows.hashes.unsqueeze(1), positions, kinds)
    return Choice(
        index=(rows.numbers.unsqueeze(1) * ids.shape[1] + columns).flatten(),
        meta=_meta(rows, columns, positions, (kinds, valid, drawn_from)),
        context=_context(rows, columns, policy.window),
        rows=rows.numbers,
        hashes=rows.hashes,
        lengths=rows.lengths,
        pools=rows.pools,
    )


@dataclass(frozen=True, slots=True)
class _Batch:
    """What a forward was called with, ``[batch, seq]`` each."""

    ids: Tensor
    real: Tensor
    completion: Tensor | None


@dataclass(frozen=True, slots=True)
class _Rows:
    """The chosen sequences: ``[r, seq]``, or ``[r]`` from ``hashes`` on."""

    ids: Tensor
    real: Tensor
    positions: Tensor
    completion: Tensor | None
    hashes: Tensor
    lengths: Tensor
    numbers: Tensor
    """Batch row of each."""
    pools: Tensor
    """How many sequences each was chosen from; 0: not known."""


def _choose_rows(draw: Draw, batch: _Batch, wanted: Tensor | None) -> _Rows:
    """Of a batch with one sequence in each row."""
    ids, real, completion = batch.ids, batch.real, batch.completion
    positions = keys.positions_of(real)
    lengths = real.sum(dim=1)
    hashes = keys.hash_from(keys.token_terms(ids, real, positions).sum(dim=1), lengths)
    filled = lengths > 0
    numbers = _ranked(draw, hashes, filled, wanted).topk(min(ids.shape[0], draw.sequences)).indices
    return _Rows(
        ids=ids[numbers],
        real=real[numbers],
        positions=positions[numbers],
        completion=None if completion is None else completion[numbers],
        hashes=hashes[numbers],
        lengths=lengths[numbers],
        numbers=numbers,
        pools=_pools(hashes, filled, numbers, wanted),
    )


def _choose_packed(draw: Draw, batch: _Batch, found: packing.Sequences, wanted: Tensor | None) -> _Rows:
    """Of a batch whose rows may hold several sequences: each chosen one becomes a row with the rest masked out."""
    ids, completion = batch.ids, batch.completion
    seq = ids.shape[1]
    hashes, last = found.hashes.flatten(), found.last.flatten()
    best = _ranked(draw, hashes, last, wanted).topk(min(ids.numel(), draw.sequences))
    ends = best.indices
    numbers, begin = ends // seq, found.first.flatten()[ends]
    columns = torch.arange(seq, device=ids.device)
    if completion is not None:
        # Collators mark the first label of a packed sequence, which is never predicted, as they mark a prompt.
        following = completion.roll(-1, dims=1)
        completion = torch.where(found.first == columns, following, completion)[numbers]
    chosen = (columns >= begin.unsqueeze(1)) & (columns <= (ends % seq).unsqueeze(1)) & (best.values >= 0).unsqueeze(1)
    mine = batch.real[numbers] & chosen
    return _Rows(
        ids=ids[numbers],
        real=mine,
        positions=found.positions[numbers],
        completion=completion,
        hashes=hashes[ends],
        lengths=mine.sum(dim=1),
        numbers=numbers,
        pools=_pools(hashes, last, ends, wanted),
    )


def _ranked(draw: Draw, hashes: Tensor, filled: Tensor, wanted: Tensor | None) -> Tensor:
    """Keyed scores of sequences, -1 where there is none."""
    keyed = logical_shift(score(draw.policy.seed, SALT_SEQUENCE, hashes), 2)
    if wanted is not None:
        keyed = keyed + _is_open(hashes, wanted).long() * (1 << 61)
    return torch.where(filled, keyed, -1)


def _is_open(hashes: Tensor, wanted: Tensor) -> Tensor:
    return (hashes.unsqueeze(1) == wanted).any(dim=1)


def _pools(hashes: Tensor, filled: Tensor, chosen: Tensor, wanted: Tensor | None) -> Tensor:
    """Sequences that each chosen one was drawn from: those that go first among themselves, of the rest not known."""
    if wanted is None:
        return filled.sum().expand_as(chosen)
    first = _is_open(hashes, wanted)
    before = (first & filled).sum()
    return torch.where(first[chosen], before, torch.where(before == 0, filled.sum(), 0))


_Part = tuple[Tensor, Tensor, Tensor, Tensor]
"""Columns, kinds, validity, and how many positions they were drawn from: ``[r, slots]`` each."""


def _choose_columns(policy: Policy, rows: _Rows, *, agent: bool) -> list[_Part]:
    """The positions of each chosen sequence, by kind. Kinds draw from disjoint positions, but for candidates."""
    token_kinds = _token_kinds(policy, rows)
    eligible = _eligible(policy, rows, agent=agent)
    parts: list[_Part] = []
    if policy.triggers:
        pool = eligible & (token_kinds >= FIRST_TRIGGER)
        newest = _last_triggers(policy, pool, token_kinds) if agent else None
        parts.append(newest or _draw_triggers(policy, rows, pool, token_kinds))
    if agent:
        parts.append(_draw_end(rows))
    if policy.candidates:
        pool, key = eligible & (token_kinds != SPECIAL), (policy.seed, SALT_CANDIDATE)
        parts.append(_draw_pool(rows, pool, policy.candidates, key=key, kind=CANDIDATE))
    if policy.random:
        pool = eligible & (token_kinds == 0)
        if policy.skip_first:
            late = pool & (rows.positions >= policy.skip_first)
            # A sequence that has nothing later is read all the same: rather a poor reading than none.
            pool = torch.where(late.any(dim=1, keepdim=True), late, pool)
        parts.append(_draw_pool(rows, pool, policy.random, key=(policy.seed, SALT_RANDOM), kind=RANDOM))
    return parts


def _token_kinds(policy: Policy, rows: _Rows) -> Tensor:
    """``[r, seq]``: entry of the token table, overridden at the last token of a longer trigger."""
    kinds = policy.kinds(rows.ids)
    for tokens, kind in policy.patterns_on(rows.ids.device):
        width = len(tokens)
        if width <= rows.ids.shape[1]:
            ends = kinds[:, width - 1 :]
            # Far enough into the sequence: what stands before it in a packed row is another's.
            hit = (rows.ids.unfold(1, width, 1) == tokens).all(dim=2) & (rows.positions[:, width - 1 :] >= width - 1)
            ends.copy_(torch.where(hit, kind, ends))
    return kinds


def _eligible(policy: Policy, rows: _Rows, *, agent: bool) -> Tensor:
    if policy.positions == "all":
        return rows.real
    if rows.completion is not None:
        return rows.real & (rows.completion if policy.positions == "completion" else ~rows.completion)
    # The prompt of a generation holds no completion token; without labels in training everything counts.
    return rows.real & False if agent and policy.positions == "completion" else rows.real


def _draw_pool(rows: _Rows, pool: Tensor, count: int, *, key: tuple[int, int], kind: int) -> _Part:
    keyed = score(*key, rows.hashes.unsqueeze(1), rows.positions)
    best = torch.where(pool, keyed, -1).topk(min(count, pool.shape[1]), dim=1)
    kinds = torch.full_like(best.indices, kind)
    return best.indices, kinds, best.values >= 0, pool.sum(dim=1, keepdim=True).expand_as(best.indices)


def _draw_triggers(policy: Policy, rows: _Rows, pool: Tensor, token_kinds: Tensor) -> _Part:
    key = policy.seed, SALT_TRIGGER
    columns, _, valid, drawn_from = _draw_pool(rows, pool, policy.trigger_limit, key=key, kind=FIRST_TRIGGER)
    return columns, token_kinds.gather(1, columns), valid, drawn_from


def _last_triggers(policy: Policy, pool: Tensor, token_kinds: Tensor) -> _Part:
    """Of an agent's prompt, which holds all that was said before: the newest place of each trigger, then what is left.

    Its older places were the newest of an earlier call. All of these are taken for sure, so each was drawn from as many
    as are taken.
    """
    seq = pool.shape[1]
    columns = torch.arange(seq, device=pool.device).expand_as(pool)
    order = torch.where(pool, columns, -1)
    for number in range(len(policy.triggers)):
        of_kind = pool & (token_kinds == FIRST_TRIGGER + number)
        newest = torch.where(of_kind, columns, -1).amax(dim=1, keepdim=True)
        order = torch.where(of_kind & (columns == newest), columns + seq, order)
    best = order.topk(min(policy.trigger_limit, seq), dim=1)
    taken = torch.full_like(best.indices, policy.trigger_limit)
    return best.indices, token_kinds.gather(1, best.indices), best.values >= 0, taken


def _draw_end(rows: _Rows) -> _Part:
    """The last token of each sequence."""
    columns = torch.arange(rows.ids.shape[1], device=rows.ids.device)
    ends = torch.where(rows.real, columns, -1).amax(dim=1, keepdim=True)
    return ends.clamp(min=0), torch.full_like(ends, PROMPT_END), ends >= 0, torch.ones_like(ends)


def _kept(draw: Draw, hashes: Tensor, positions: Tensor, kinds: Tensor) -> Tensor:
    """Whether budget and reservoir leave a sample in; shapes broadcast."""
    keyed = score(draw.policy.seed, SALT_THIN, hashes, positions)
    return (keyed < draw.rate) & ((keyed < draw.reservoir) | (kinds != RANDOM))


def _meta(rows: _Rows, columns: Tensor, positions: Tensor, numbers: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """``[r * slots, 10]``; see the column names."""
    kinds, valid, drawn_from = numbers

    def spread(per_row: Tensor) -> Tensor:
        return per_row.unsqueeze(1).expand_as(columns)

    number = torch.arange(columns.shape[0], device=columns.device)
    completion = torch.full_like(columns, -1) if rows.completion is None else rows.completion.gather(1, columns).long()
    fields = [
        spread(number),
        valid.long(),
        positions,
        rows.ids.gather(1, columns).long(),
        kinds,
        drawn_from,
        spread(rows.pools),
        spread(rows.hashes),
        spread(rows.lengths),
        completion,
    ]
    return torch.stack(fields, dim=2).flatten(0, 1)


def _context(rows: _Rows, columns: Tensor, width: int) -> Tensor | None:
    """``[r * slots, width]`` token ids that end at each sampled column."""
    if width == 0:
        return None
    offsets = torch.arange(1 - width, 1, device=columns.device)
    wanted = columns.unsqueeze(2) + offsets  # [r, slots, width]
    inside = wanted.clamp(min=0).flatten(1)
    ids = rows.ids.long().gather(1, inside)
    keep = rows.real.gather(1, inside) & (wanted.flatten(1) >= 0)
    return torch.where(keep, ids, -1).view(-1, width)


def last_tokens(ids: Tensor, real: Tensor, width: int) -> Tensor:
    """``[r, width]`` the last ``width`` real tokens of each row, -1 in front: a generation's first context."""
    seq = ids.shape[1]
    ends = torch.where(real, torch.arange(seq, device=ids.device), -1).amax(dim=1, keepdim=True)
    wanted = ends + torch.arange(1 - width, 1, device=ids.device)
    inside = wanted.clamp(min=0)
    return torch.where(real.gather(1, inside) & (wanted >= 0), ids.long().gather(1, inside), -1)


def schedule(policy: Policy, hashes: Tensor) -> Tensor:
    """Which generated tokens are read, ``[r, generated]``: one keyed index in each stratum [2^k - 1, 2^(k+1) - 1).

    The length of a generation is not known beforehand; doubling strata read its start closely, its rest ever more
    thinly, and need no length. The probability of an index in stratum k is ``2 ** -k``.
    """
    strata = torch.arange(min(policy.generated, 31), device=hashes.device)
    width = torch.ones_like(strata) << strata
    keyed = score(policy.seed, keys.SALT_GENERATED, hashes.unsqueeze(1), strata.unsqueeze(0))
    return width - 1 + keyed % width


def stratum(index: int) -> int:
    """The stratum of ``schedule`` that holds generated token ``index``."""
    return (index + 1).bit_length() - 1
