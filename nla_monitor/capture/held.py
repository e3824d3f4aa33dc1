"""Forwards on a CPU: tokens and residual stream are copied as they are, and chosen from on our own thread.

To choose takes some 150 small operations on token ids. On a GPU they are queued and the host goes on; on a CPU the host
would wait for each. There it is cheaper for it to copy all rows of a batch of moderate size: one pass over memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from nla_monitor.capture import sampling
from nla_monitor.capture.assembly import Job, Origin, Owners
from nla_monitor.capture.packing import Borders
from nla_monitor.capture.policy import Draw
from nla_monitor.capture.screens import Screens
from nla_monitor.guard import Guard

MOST_TOKENS: Final = 16_384
"""Below the size from which torch would spread an operation over threads: ours must start none beside the host's."""
MOST_BYTES: Final = 16 << 20
"""Of one layer's rows."""
_IN_FLIGHT: Final = 4


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a forward was called with: ``[batch, seq]`` each, copies that nobody else writes to."""

    ids: Tensor
    mask: Tensor | None
    labels: Tensor | None
    borders: Borders | None

    @classmethod
    def copied(cls, ids: Tensor, mask: Tensor | None, labels: Tensor | None, borders: Borders | None) -> Inputs:
        """Copies of these."""
        copied = ids.clone()
        same = labels is ids  # as a host does that trains on every token
        return cls(
            copied, _copy(mask), copied if same else _copy(labels), None if borders is None else _copies(borders)
        )


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()


def _copies(borders: Borders) -> Borders:
    return Borders(_copy(borders.positions), _copy(borders.sequences), _copy(borders.offsets))


class HeldRows:
    """Persistent buffers for all rows of one forward, one for each layer that is read."""

    def __init__(self, home: HeldPool, layers: int) -> None:
        self._home = home
        self._buffers: list[Tensor | None] = [None] * layers
        self._count = 0

    def gather(self, hidden: Tensor, number: int = 0) -> None:
        """Copy ``hidden.view(-1, d_model)``; allocates only until it has met its dtype and the largest batch."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        buffer = self._buffers[number]
        fits = buffer is not None and buffer.dtype == rows.dtype and buffer.shape[1] == rows.shape[1]
        if buffer is None or not fits or buffer.shape[0] < rows.shape[0]:
            buffer = self._buffers[number] = torch.empty_like(rows, memory_format=torch.contiguous_format)
        self._count = rows.shape[0]
        buffer[: self._count].copy_(rows)

    def rows(self, number: int, index: Tensor) -> Tensor:
        """A copy of the rows ``index`` of a layer, by its number among those that are read."""
        buffer = self._buffers[number]
        if buffer is None:
            raise RuntimeError(f"layer number {number} was tapped and has no buffer")
        return buffer[: self._count].index_select(0, index)

    def give_back(self) -> None:
        """Nobody reads these rows any more."""
        self._home.free.append(self)


class HeldPool:
    """The buffers of all forwards in flight, made when they are needed and used again."""

    def __init__(self, layers: int) -> None:
        self.free: deque[HeldRows] = deque()
        self._layers = layers
        self._made = 0

    def take(self) -> HeldRows | None:
        """Free buffers; None while our thread is that many forwards behind."""
        try:
            return self.free.pop()
        except IndexError:
            pass
        if self._made >= _IN_FLIGHT:
            return None
        self._made += 1
        return HeldRows(self, self._layers)


@dataclass(eq=False, slots=True)
class HeldJob:
    """One forward that is still to be chosen from."""

    rows: HeldRows
    inputs: Inputs
    draw: Draw
    origin: Origin
    pad_id: int | None
    numbers: tuple[int, ...]
    """Of the layers that were read, among all that are."""
    event: torch.cuda.Event | None = field(default=None, init=False)
    """None: on a CPU everything has been copied."""

    @property
    def patient(self) -> bool:
        """Never: there are only so many buffers."""
        return False

    def count(self) -> int:
        """Samples that it may give at most: how many triggers there are is not known yet."""
        per_sequence = self.draw.policy.per_sequence - 1  # no generation's, whose prompt end is read, too
        return min(self.draw.sequences, self.inputs.ids.shape[0]) * per_sequence * len(self.numbers)

    def discard(self) -> None:
        """It is not built: its buffers are free."""
        self.rows.give_back()

    def jobs(self, layers: Sequence[int], screens: Screens, guard: Guard) -> Iterator[Job]:
        """What is chosen of it: one job for each layer, of the same positions."""
        choice = self._choice()
        if choice is None:
            return
        owners = Owners()
        for number in self.numbers:
            vectors, measured = self.rows.rows(number, choice.index), None
            with guard("capture.screen"):  # a screen that fails costs its numbers, not the samples
                measured = screens.measure(layers[number], vectors)
            yield Job(
                vectors=vectors,
                meta=choice.meta,
                context=choice.context,
                event=None,
                origin=self.origin,
                owners=owners,
                layer=layers[number],
                draw=self.draw,
                screens=measured,
            )

    def _choice(self) -> sampling.Choice | None:
        inputs = self.inputs
        return sampling.choose(
            self.draw,
            inputs.ids,
            sampling.real_tokens(inputs.ids, inputs.mask, self.pad_id),
            inputs.labels,
            borders=inputs.borders,
            masked=inputs.mask is not None,
        )
