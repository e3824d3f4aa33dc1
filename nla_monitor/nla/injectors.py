"""How a vector gets into the model: by its embedding row, or by a hook on an early block.

``ReplaceRow`` is the released rule: the marker's embedding row becomes the (rescaled) vector. ``AddAfterBlock`` is
that of the LoRA-trained verbalizers and of activation oracles: the prompt's embeddings stay as they are, and the output
of an early block is moved at the marker's position, ``h' = h + c * |h| * v / |v|``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from nla_monitor.errors import CheckpointError
from nla_monitor.nla.contract import VerbalizerContract
from nla_monitor.nla.loading import blocks_of, stream_scale


class Injector(Protocol):
    """Brings rows into a forward pass. Not for use from several threads at once."""

    def tail(self, rows: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """What the model reads from the first marker on, ``[batch, tokens, d_model]``.

        Args:
            rows: ``[batch, d_model]``, one vector for each prompt.
            plain: ``[1, tokens, d_model]``, the embeddings of the marker and of what follows it.
        """
        ...

    def during(self, rows: torch.Tensor, at: int) -> AbstractContextManager[None]:
        """To be open around the one forward pass that reads ``tail(rows, ...)``, and around no later one.

        Args:
            rows: as for ``tail``.
            at: position of the first marker in that forward's input (0 where the prefix is in the cache).
        """
        ...


class ReplaceRow:
    """The marker's embedding row is replaced by the vector.

    Args:
        stream_scale: by what the model multiplies embeddings before its first block; rows are divided by it, so that
            they enter the stream at the norm at which they came.
    """

    def __init__(self, stream_scale: float = 1.0) -> None:
        self._stream_scale = stream_scale

    def tail(self, rows: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """The vector, then the embeddings of what follows the marker."""
        if self._stream_scale != 1.0:
            rows = rows / self._stream_scale
        return torch.cat([rows.to(plain).unsqueeze(1), plain[:, 1:].expand(len(rows), -1, -1)], dim=1)

    def during(self, rows: torch.Tensor, at: int) -> AbstractContextManager[None]:  # noqa: ARG002 - the interface
        """Nothing: the vector is in the input."""
        return nullcontext()


class AddAfterBlock:
    """The vector's direction is added to the output of a block, at the norm that stands there.

    ``h' = h + coefficient * |h| * v / |v|`` in the stream's dtype, at every marker.

    Args:
        block: the decoder block whose output is changed.
        offsets: positions of the markers, counted from the first.
        coefficient: how many norms of the stream are added.
    """

    def __init__(self, block: torch.nn.Module, *, offsets: Sequence[int] = (0,), coefficient: float = 1.0) -> None:
        self._block = block
        self._offsets = tuple(offsets)
        self._coefficient = coefficient

    def tail(self, rows: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
        """The embeddings as they are, once for each row."""
        return plain.expand(len(rows), -1, -1)

    @contextmanager
    def during(self, rows: torch.Tensor, at: int) -> Iterator[None]:
        """A hook on the block; it is gone afterwards, so that cached decoding steps are left alone."""
        positions = [at + offset for offset in self._offsets]
        handle = self._block.register_forward_hook(lambda _block, _inputs, output: self._added(output, rows, positions))
        try:
            yield
        finally:
            handle.remove()

    def _added(self, output: Any, rows: torch.Tensor, positions: list[int]) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        moved = hidden.clone()
        there = hidden[:, positions]
        unit = torch.nn.functional.normalize(rows.to(device=there.device, dtype=torch.float32), dim=-1)
        norms = there.float().norm(dim=-1, keepdim=True)
        moved[:, positions] = there + (self._coefficient * norms * unit.unsqueeze(1)).to(there)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved


def injector_for(model: PreTrainedModel, contract: VerbalizerContract, offsets: Sequence[int]) -> Injector:
    """What puts vectors into this AV, as its contract says.

    Args:
        model: the AV.
        contract: of its sidecar.
        offsets: positions of the markers in the prompt, counted from the first.

    Raises:
        CheckpointError: the model has no such block, or does something to embeddings that cannot be undone.
    """
    scale = stream_scale(model)
    if contract.dialect.by_row:
        return ReplaceRow(scale)
    blocks = blocks_of(model)
    if contract.block >= len(blocks):
        raise CheckpointError(
            f"vectors are to be added after block {contract.block}, and the model has {len(blocks)} (0 to "
            f"{len(blocks) - 1}). Correct hook_onto_layer, or nla.base."
        )
    return AddAfterBlock(blocks[contract.block], offsets=offsets, coefficient=contract.coefficient)
