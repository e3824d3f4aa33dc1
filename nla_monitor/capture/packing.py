"""Packed rows: several sequences in one row, told apart by what the forward was given.

transformers' ``DataCollatorWithFlattening`` and TRL's ``padding_free`` and ``packing`` lay sequences end to end and say
where each begins: positions that restart (``position_ids``), a number for each sequence (``seq_idx``), or offsets
(``cu_seq_lens_q``). What is found here stays on the device: how many sequences a row holds is never asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nla_monitor.capture import keys

_TEXT_AXIS = 4
"""Multimodal models give four rows of positions; the first are those of the text."""


@dataclass(frozen=True, slots=True)
class Borders:
    """What a forward said of the sequences in its rows."""

    positions: Tensor | None = None
    """``position_ids``: ``[batch, seq]``, ``[1, seq]`` or ``[4, batch, seq]``."""
    sequences: Tensor | None = None
    """``seq_idx``: ``[batch, seq]``, a number that is the same for the tokens of one sequence."""
    offsets: Tensor | None = None
    """``cu_seq_lens_q``: ``[sequences + 1]`` where each begins and the last one ends, of a batch of one row."""


def borders_of(positions: Tensor | None, sequences: Tensor | None, offsets: Tensor | None) -> Borders | None:
    """What a forward said of its sequences; None: nothing, as most do."""
    said = positions is not None or sequences is not None or offsets is not None
    return Borders(positions, sequences, offsets) if said else None


@dataclass(frozen=True, slots=True)
class Sequences:
    """The sequences in the rows of a batch, all ``[batch, seq]``; true of real tokens only."""

    first: Tensor
    """int64: column at which the sequence of a token begins."""
    positions: Tensor
    """int64: position of a token in its sequence."""
    hashes: Tensor
    """int64: identity of the sequence, at its last token only."""
    last: Tensor
    """bool: the last token of a sequence that can be sampled."""


def begins(borders: Borders, ids: Tensor, *, masked: bool) -> tuple[Tensor, Tensor | None] | None:
    """Where sequences begin, ``[batch, seq]`` bool (the first column says nothing), by what the forward was given.

    Beside it the positions that the model was told, ``[batch, seq]``, if it was told any. None: rows are not packed.
    Without a mask a sequence begins wherever positions do not go on by one, as transformers itself reads them; where a
    mask says what is padding (``masked``), only where they fall back.
    """
    told = _laid_beside(_of_text(borders.positions), ids)
    numbers = _laid_beside(borders.sequences, ids)
    if numbers is not None:
        return _changes(numbers), told
    if told is not None:
        step = told.diff(dim=1)
        return torch.nn.functional.pad(step <= 0 if masked else step != 1, (1, 0)), told
    offsets = borders.offsets
    if offsets is None or offsets.dim() != 1 or ids.shape[0] != 1 or offsets.device != ids.device:
        return None
    # One column more: where nothing follows the last sequence, its end lies behind the row.
    begin = torch.zeros(ids.shape[1] + 1, dtype=torch.bool, device=ids.device)
    begin.index_fill_(0, offsets.long().clamp(0, ids.shape[1]), 1)
    return begin[:-1].unsqueeze(0), None


def _of_text(positions: Tensor | None) -> Tensor | None:
    return (
        positions[0] if positions is not None and positions.dim() == 3 and len(positions) == _TEXT_AXIS else positions
    )


def _laid_beside(values: Tensor | None, ids: Tensor) -> Tensor | None:
    if values is None or values.dim() != 2 or values.device != ids.device or values.shape[1] != ids.shape[1]:
        return None
    return values.expand_as(ids) if values.shape[0] in {1, ids.shape[0]} else None


def _changes(numbers: Tensor) -> Tensor:
    return torch.nn.functional.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0))


def split(ids: Tensor, real: Tensor, begin: Tensor, told: Tensor | None, *, masked: bool) -> Sequences:
    """The sequences of a batch ``ids`` ``[batch, seq]``.

    Args:
        ids: token ids.
        real: ``[batch, seq]`` bool, False at padding.
        begin: from ``begins``.
        told: from ``begins``.
        masked: a mask said what is real. Where none did, a sequence of one token is taken for padding, and one that
            does not begin at position 0 for the rest of one whose beginning is in a cache; neither can be sampled.
    """
    seq = ids.shape[1]
    columns = torch.arange(seq, device=ids.device)
    count = real.long().cumsum(dim=1)
    begin = real & (begin | (count == 1))
    first = torch.where(begin, columns, -1).cummax(dim=1).values.clamp(min=0)
    positions = count - count.gather(1, first)
    last = real & _begins_next(real, begin, columns)
    if not masked:
        last = last & (positions > 0)
        if told is not None:
            last = last & (told.gather(1, first) == 0)
    terms = keys.token_terms(ids, real, positions)
    running = terms.cumsum(dim=1)  # wraps around, as the sum does: differences stay exact
    total = running - (running - terms).gather(1, first)
    return Sequences(first, positions, keys.hash_from(total, positions + 1), last)


def _begins_next(real: Tensor, begin: Tensor, columns: Tensor) -> Tensor:
    """Whether the next real token of the row, if there is one, begins a sequence: ``[batch, seq]`` bool."""
    seq = len(columns)
    nearest = torch.where(real, columns, seq).flip(1).cummin(dim=1).values.flip(1)
    following = torch.nn.functional.pad(nearest[:, 1:], (0, 1), value=seq)
    return torch.nn.functional.pad(begin, (0, 1), value=True).gather(1, following)
