"""Keys: identities of sequences and scores of positions, the same on every rank, device and resume.

All arithmetic is on integer tensors where they are (int64, wrapping), so that a CUDA batch is hashed without one device
synchronisation and a CPU batch by the same code. The hash of a sequence is a sum of mixed ``(token, position)`` pairs:
order-free, hence exact under any reduction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nla_monitor.mixing import WORD, logical_shift, mix, mix_int, signed

_TOKEN = 0x9E3779B97F4A7C15
_POSITION = 0xD1B54A32D192ED03
_LENGTH = 0x8CB92BA72F3D8DD7

SALT_SEQUENCE, SALT_RANDOM, SALT_TRIGGER, SALT_GENERATED, SALT_CANDIDATE, SALT_THIN, SALT_FORWARD = range(1, 8)

FULL = 1 << 62
"""Scores lie in ``[0, FULL)``; a threshold of FULL keeps everything."""


def token_terms(ids: Tensor, real: Tensor, positions: Tensor) -> Tensor:
    """What each token adds to the hash of its sequence; 0 at padding. All ``[batch, seq]``."""
    return torch.where(real, mix(ids.long() * signed(_TOKEN) + positions * signed(_POSITION) + 1), 0)


def hash_from(total: Tensor, lengths: Tensor) -> Tensor:
    """Identity of sequences from the sum of their ``token_terms`` and their lengths, same shape."""
    return mix(total + lengths * signed(_LENGTH))


def sequence_hash(ids: Tensor, real: Tensor, positions: Tensor) -> Tensor:
    """Identity of each sequence, ``[batch]`` int64. All arguments ``[batch, seq]``; ``real`` is False at padding."""
    return hash_from(token_terms(ids, real, positions).sum(dim=1), real.sum(dim=1))


def hash_of(token_ids: list[int]) -> int:
    """``sequence_hash`` of one unpadded sequence."""
    ids = torch.tensor([token_ids], dtype=torch.int64, device="cpu")
    positions = torch.arange(len(token_ids), device="cpu").unsqueeze(0)
    return int(sequence_hash(ids, torch.ones_like(ids, dtype=torch.bool), positions)[0])


def hex_of(sequence: int) -> str:
    """A hash as it is written in ``ActivationSample.sequence_id``: 16 hexadecimal digits."""
    return f"{sequence % WORD:016x}"


def score(seed: int, salt: int, sequences: Tensor, positions: Tensor | None = None) -> Tensor:
    """Keyed scores, uniform over ``[0, FULL)``; broadcast of ``sequences`` and ``positions``."""
    keyed = mix(sequences ^ mix_int(seed * 0x10001 + salt))
    if positions is not None:
        keyed = mix(keyed + positions * signed(_POSITION))
    return logical_shift(keyed, 2)


def score_int(seed: int, salt: int, sequence: int, position: int) -> int:
    """``score`` of one position in Python integers."""
    keyed = mix_int(mix_int(sequence ^ mix_int(seed * 0x10001 + salt)) + position * signed(_POSITION))
    return (keyed % WORD) >> 2


def thinning_score(seed: int, sequence_id: str, position: int) -> float:
    """In ``[0, 1)``: budget and reservoir keep a sample while this is below their threshold.

    A function of what a stored sample says of itself, so that the samples of several ranks, or of a run and its
    resumption, can be reduced to the ``N`` smallest of an epoch: its reservoir.
    """
    return score_int(seed, SALT_THIN, int(sequence_id, 16), position) / FULL


def positions_of(real: Tensor) -> Tensor:
    """0-based position of each token in its sequence, padding not counted: ``[batch, seq]``; meaningless at padding."""
    return real.long().cumsum(dim=1) - 1
