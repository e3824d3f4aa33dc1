"""Keyed sampling: which sequences and which positions of a forward pass are read.

Every choice is a function of ``(seed, token ids of the sequence, position)``: the same seed and sequence give the same
positions whatever the rank layout, batch, padding side or resume. All arithmetic is on integer tensors where they are
(int64, wrapping), so a CUDA batch is planned without one device synchronisation and a CPU batch by the same code.

The hash of a sequence is a sum of mixed ``(token, position)`` pairs: order-free, hence exact under any reduction.
The mixer is the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nla_monitor.config import CaptureConfig, Positions
from nla_monitor.errors import ConfigError

_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB
_TOKEN = 0x9E3779B97F4A7C15
_POSITION = 0xD1B54A32D192ED03
_LENGTH = 0x8CB92BA72F3D8DD7
_WORD = 1 << 64

SALT_SEQUENCE, SALT_RANDOM, SALT_TRIGGER, SALT_GENERATED = 1, 2, 3, 4

# Kinds of a sampled position; codes from FIRST_TRIGGER on are indices into Policy.triggers.
RANDOM, PROMPT_END, FIRST_TRIGGER = 0, 1, 2
_SPECIAL = 1  # in the token table only

# Columns of Choice.meta.
ROW, VALID, POSITION, TOKEN, KIND, DRAWN_FROM, SEQUENCES, HASH, LENGTH, COMPLETION = range(10)


def signed(value: int) -> int:
    """A 64-bit word as the int64 that tensors hold."""
    value %= _WORD
    return value - _WORD if value >= 1 << 63 else value


def mix_int(value: int) -> int:
    """The mixer for one Python integer; equals ``mix`` on a tensor."""
    value %= _WORD
    value = ((value ^ (value >> 30)) * _M1) % _WORD
    value = ((value ^ (value >> 27)) * _M2) % _WORD
    return signed(value ^ (value >> 31))


def _logical_shift(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix(value: Tensor) -> Tensor:
    """A bijection of int64 that scatters neighbours: the same on every device."""
    value = (value ^ _logical_shift(value, 30)) * signed(_M1)
    value = (value ^ _logical_shift(value, 27)) * signed(_M2)
    return value ^ _logical_shift(value, 31)


def sequence_hash(ids: Tensor, real: Tensor, positions: Tensor) -> Tensor:
    """Identity of each sequence, ``[batch]`` int64. All arguments ``[batch, seq]``; ``real`` is False at padding."""
    mixed = mix(ids.long() * signed(_TOKEN) + positions * signed(_POSITION) + 1)
    total = torch.where(real, mixed, 0).sum(dim=1)
    return mix(total + real.sum(dim=1) * signed(_LENGTH))


def hash_of(token_ids: list[int]) -> int:
    """``sequence_hash`` of one unpadded sequence."""
    ids = torch.tensor([token_ids], dtype=torch.int64, device="cpu")
    positions = torch.arange(len(token_ids), device="cpu").unsqueeze(0)
    return int(sequence_hash(ids, torch.ones_like(ids, dtype=torch.bool), positions)[0])


def hex_of(sequence: int) -> str:
    """A hash as it is written in ``ActivationSample.sequence_id``: 16 hexadecimal digits."""
    return f"{sequence % _WORD:016x}"


def score(seed: int, salt: int, sequences: Tensor, positions: Tensor | None = None) -> Tensor:
    """Keyed scores, uniform over ``[0, 2**62)``; broadcast of ``sequences`` and ``positions``."""
    keyed = mix(sequences ^ mix_int(seed * 0x10001 + salt))
    if positions is not None:
        keyed = mix(keyed + positions * signed(_POSITION))
    return _logical_shift(keyed, 2)


def positions_of(real: Tensor) -> Tensor:
    """0-based position of each token in its sequence, padding not counted: ``[batch, seq]``; meaningless at padding."""
    return real.long().cumsum(dim=1) - 1


@dataclass(frozen=True, slots=True)
class Policy:
    """What of ``CaptureConfig`` concerns one forward pass, resolved against a tokenizer."""

    seed: int
    sequences: int
    random: int
    trigger_limit: int
    generated: int
    skip_first: int
    positions: Positions
    context: int
    """Tokens of context kept with a sample; 0: none."""
    triggers: tuple[str, ...]
    tables: dict[torch.device, Tensor]
    """Per device ``[max known id + 2]`` uint8: 0 ordinary, 1 special, ``FIRST_TRIGGER + i`` trigger i; last entry 0."""
    pad_id: int | None

    @property
    def per_sequence(self) -> int:
        """Slots that one sequence of a forward may take."""
        return self.random + (self.trigger_limit if self.triggers else 0) + 1

    @property
    def slots(self) -> int:
        """Rows of the tap's buffer."""
        return self.sequences * self.per_sequence

    def kinds(self, ids: Tensor) -> Tensor:
        """Table entry of each token id, same shape; ids beyond the table are ordinary."""
        table = self.tables.get(ids.device)
        if table is None:
            # Once per device; a pageable copy of a few bytes is stream-ordered and does not wait for the device.
            table = self.tables[ids.device] = self.tables[torch.device("cpu")].to(ids.device)
        return table[ids.clamp(0, table.numel() - 1)].long()

    def name(self, kind: int) -> str:
        """Name of a kind of position, as it is written in ``ActivationSample.trigger``."""
        if kind >= FIRST_TRIGGER:
            return self.triggers[kind - FIRST_TRIGGER]
        return "prompt_end" if kind == PROMPT_END else "random"


def build_policy(config: CaptureConfig, tokenizer: Any = None, model_config: Any = None) -> Policy:
    """The policy for a model and its tokenizer.

    Raises:
        ConfigError: a trigger is not one token of this tokenizer, or nothing could ever be sampled.
    """
    if config.tokens_per_sequence == 0 and not (config.triggers and config.triggers_per_sequence):
        raise ConfigError(
            "nothing can ever be sampled: capture.tokens_per_sequence is 0 and there is no trigger. "
            "Set capture.tokens_per_sequence to 1 or more, or name capture.triggers"
        )
    triggers = {_trigger_id(text, tokenizer): text for text in config.triggers}
    special = _special_ids(tokenizer, model_config) if config.skip_special_tokens else set()
    size = max([*special, *triggers], default=-1) + 2
    table = torch.zeros(size, dtype=torch.uint8, device="cpu")
    table[sorted(special)] = _SPECIAL
    names = tuple(dict.fromkeys(triggers.values()))
    if len(names) > 253:
        raise ConfigError(f"capture.triggers names {len(names)} tokens; at most 253 are possible")
    for token, text in triggers.items():
        table[token] = FIRST_TRIGGER + names.index(text)
    return Policy(
        seed=config.seed,
        sequences=config.sequences_per_step,
        random=config.tokens_per_sequence,
        trigger_limit=config.triggers_per_sequence,
        generated=config.generated_tokens,
        skip_first=config.skip_first,
        positions=config.positions,
        context=config.context_tokens if config.store_text else 0,
        triggers=names if config.triggers_per_sequence else (),
        tables={table.device: table},
        pad_id=_pad_id(tokenizer, model_config),
    )


def _trigger_id(text: str, tokenizer: Any) -> int:
    if tokenizer is not None:
        known = tokenizer.get_vocab().get(text)
        if known is not None:
            return int(known)
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1 and ids[0] != getattr(tokenizer, "unk_token_id", None):
            return int(ids[0])
        if not text.isdecimal():
            raise ConfigError(
                f"capture.triggers: {text!r} is {len(ids)} tokens for this tokenizer, a trigger must be one. "
                "Use a single token (for instance the turn-end token of the chat template), or its id"
            )
    if not text.isdecimal():
        raise ConfigError(
            f"capture.triggers: {text!r} cannot be resolved without a tokenizer. Give the tokenizer to attach(), "
            "or write the token id"
        )
    return int(text)


def _special_ids(tokenizer: Any, model_config: Any) -> set[int]:
    found = set(getattr(tokenizer, "all_special_ids", None) or ())
    if not found:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(model_config, name, None)
            found.update(value if isinstance(value, (list, tuple)) else [value])
    return {int(token) for token in found if token is not None and int(token) >= 0}


def _pad_id(tokenizer: Any, model_config: Any) -> int | None:
    """Id that marks padding where no mask says so; None when an ordinary token shares it."""
    for source in (tokenizer, model_config):
        pad = getattr(source, "pad_token_id", None)
        if pad is not None:
            eos = getattr(source, "eos_token_id", None)
            shared = pad in (eos if isinstance(eos, (list, tuple)) else [eos])
            return None if shared else int(pad)
    return None


@dataclass(frozen=True, slots=True)
class Choice:
    """The sampled positions of one forward pass; ``n`` candidates, those with ``meta[:, VALID] == 0`` are void."""

    index: Tensor
    """``[n]`` int64: row of ``hidden.view(-1, d_model)``."""
    meta: Tensor
    """``[n, 10]`` int64, columns ``ROW`` to ``COMPLETION``."""
    context: Tensor | None
    """``[n, context]`` int64 token ids up to and including the sampled one; -1 before the sequence began."""
    rows: Tensor
    """``[r]`` int64: batch rows of the chosen sequences, best score first."""
    hashes: Tensor
    """``[r]`` int64: their identities."""
    lengths: Tensor
    """``[r]`` int64: their real tokens."""


def real_tokens(ids: Tensor, mask: Tensor | None, pad_id: int | None) -> Tensor:
    """``[batch, seq]`` bool, True where a token is not padding. A mask of another shape (4-D, wider) is not used."""
    if mask is not None and mask.shape == ids.shape:
        return mask != 0
    if pad_id is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return ids != pad_id


def choose(
    policy: Policy,
    ids: Tensor,
    real: Tensor,
    labels: Tensor | None = None,
    *,
    limit: int | None = None,
    wanted: Tensor | None = None,
    agent: bool = False,
) -> Choice | None:
    """The positions to read of a batch ``ids`` ``[batch, seq]``.

    Args:
        policy: what to sample.
        ids: token ids.
        real: ``[batch, seq]`` bool, False at padding.
        labels: ``[batch, seq]``; -100 marks the prompt. None: every position counts as wanted.
        limit: at most so many sequences, if lower than the policy's.
        wanted: ``[m]`` int64 hashes of sequences that go before all others (open agent sessions).
        agent: also take the last prompt token, and read ``positions`` as prompt / generated.

    Returns:
        None where nothing can be chosen because a dimension is empty.
    """
    batch, seq = ids.shape
    count = min(batch, policy.sequences if limit is None else min(limit, policy.sequences))
    if count <= 0 or seq == 0:
        return None
    positions = positions_of(real)
    hashes = sequence_hash(ids, real, positions)
    rows = _choose_rows(policy, hashes, real.any(dim=1), count, wanted)
    picked = _Rows(
        ids=ids[rows],
        real=real[rows],
        positions=positions[rows],
        hashes=hashes[rows],
        completion=None if labels is None else labels[rows] != -100,
    )
    columns, kinds, valid, drawn_from = _choose_columns(policy, picked, agent=agent)
    numbers = _Numbers(kinds=kinds, valid=valid, drawn_from=drawn_from, sequences=real.any(dim=1).sum())
    return Choice(
        index=(rows.unsqueeze(1) * seq + columns).flatten(),
        meta=_meta(picked, columns, numbers),
        context=_context(picked, columns, policy.context),
        rows=rows,
        hashes=picked.hashes,
        lengths=picked.real.sum(dim=1),
    )


@dataclass(frozen=True, slots=True)
class _Rows:
    """The chosen sequences, ``[r, seq]`` each, ``hashes`` ``[r]``."""

    ids: Tensor
    real: Tensor
    positions: Tensor
    hashes: Tensor
    completion: Tensor | None


def _choose_rows(policy: Policy, hashes: Tensor, filled: Tensor, count: int, wanted: Tensor | None) -> Tensor:
    keyed = _logical_shift(score(policy.seed, SALT_SEQUENCE, hashes), 2)
    if wanted is not None:
        keyed = keyed + (hashes.unsqueeze(1) == wanted).any(dim=1).long() * (1 << 61)
    return torch.where(filled, keyed, -1).topk(count).indices


def _choose_columns(policy: Policy, rows: _Rows, *, agent: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Columns, kinds and validity, ``[r, slots]`` each, and ``[r]`` how many positions the random part drew from."""
    seq = rows.ids.shape[1]
    token_kinds = policy.kinds(rows.ids)
    eligible = _eligible(policy, rows, agent=agent)
    ordinary = eligible & (token_kinds != _SPECIAL)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    if policy.triggers and policy.trigger_limit:
        keyed = score(policy.seed, SALT_TRIGGER, rows.hashes.unsqueeze(1), rows.positions)
        triggered = eligible & (token_kinds >= FIRST_TRIGGER)
        columns, valid = _top(keyed, triggered, min(policy.trigger_limit, seq))
        parts.append((columns, token_kinds.gather(1, columns), valid))
        # The random part draws from the rest, so that no position comes twice and its probability is known.
        ordinary = ordinary & ~_hit(columns, valid, seq)
    if agent:
        ends = torch.where(rows.real, torch.arange(seq, device=rows.ids.device), -1).amax(dim=1, keepdim=True)
        parts.append((ends.clamp(min=0), torch.full_like(ends, PROMPT_END), ends >= 0))
    if policy.random:
        keyed = score(policy.seed, SALT_RANDOM, rows.hashes.unsqueeze(1), rows.positions)
        columns, valid = _top(keyed, ordinary, min(policy.random, seq))
        parts.append((columns, torch.full_like(columns, RANDOM), valid))
    columns, kinds, valid = (torch.cat(group, dim=1) for group in zip(*parts, strict=True))
    return columns, kinds, valid, ordinary.sum(dim=1)


def _eligible(policy: Policy, rows: _Rows, *, agent: bool) -> Tensor:
    eligible = rows.real & (rows.positions >= policy.skip_first)
    if policy.positions == "all":
        return eligible
    if rows.completion is not None:
        return eligible & (rows.completion if policy.positions == "completion" else ~rows.completion)
    # The prompt of a generation holds no completion token; without labels in training everything counts.
    return eligible & False if agent and policy.positions == "completion" else eligible


def _top(keyed: Tensor, allowed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    best = torch.where(allowed, keyed, -1).topk(count, dim=1)
    return best.indices, best.values >= 0


def _hit(columns: Tensor, valid: Tensor, seq: int) -> Tensor:
    grid = torch.arange(seq, device=columns.device)
    return ((columns.unsqueeze(2) == grid) & valid.unsqueeze(2)).any(dim=1)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """What ``_choose_columns`` found (``[r, slots]``, the same, ``[r]``), and the number of non-empty sequences."""

    kinds: Tensor
    valid: Tensor
    drawn_from: Tensor
    sequences: Tensor


def _meta(rows: _Rows, columns: Tensor, numbers: _Numbers) -> Tensor:
    """``[r * slots, 10]``; see the column names."""

    def spread(per_row: Tensor) -> Tensor:
        return per_row.unsqueeze(1).expand_as(columns)

    number = torch.arange(columns.shape[0], device=columns.device)
    completion = torch.full_like(columns, -1) if rows.completion is None else rows.completion.gather(1, columns).long()
    fields = [
        spread(number),
        numbers.valid.long(),
        rows.positions.gather(1, columns),
        rows.ids.gather(1, columns).long(),
        numbers.kinds,
        spread(numbers.drawn_from),
        numbers.sequences.expand_as(columns),
        spread(rows.hashes),
        spread(rows.real.sum(dim=1)),
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
    keyed = score(policy.seed, SALT_GENERATED, hashes.unsqueeze(1), strata.unsqueeze(0))
    return width - 1 + keyed % width


def stratum(index: int) -> int:
    """The stratum of ``schedule`` that holds generated token ``index``."""
    return (index + 1).bit_length() - 1
