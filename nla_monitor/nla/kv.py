"""KV caches for a batch whose rows share a prefix.

The library's dynamic cache concatenates: every token of every block allocates and copies the whole KV. At explanation
lengths that is most of the time on CPU. Here each block has one buffer of the final length, written in place and kept
from batch to batch; the prefix stands in it once and for all.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

KeysAndValues: TypeAlias = tuple[torch.Tensor, torch.Tensor]


class PrefixCache(Protocol):
    """Hands out a cache that holds the prefix for ``batch`` rows."""

    def rows(self, batch: int) -> DynamicCache:
        """A cache for ``batch`` rows, filled with the prefix; the one handed out before is void."""
        ...


def share_prefix(prefix: DynamicCache, *, capacity: int) -> PrefixCache:
    """The way to share a prefix that suits the model's blocks.

    Args:
        prefix: cache after the prefix ran at batch 1.
        capacity: tokens that a row will ever hold, prefix included.
    """
    layers = [layer for layer in prefix.layers if isinstance(layer, DynamicLayer) and layer.keys is not None]
    known = len(layers) == len(prefix.layers) and all(type(layer) in _PLAIN for layer in layers)
    return BufferedPrefix(prefix, layers, capacity) if known else CopiedPrefix(prefix)


class CopiedPrefix:
    """Copies the prefix for every batch: for blocks of kinds that need no long KV, such as linear attention."""

    def __init__(self, prefix: DynamicCache) -> None:
        self._prefix = prefix

    def rows(self, batch: int) -> DynamicCache:
        """A copy of the prefix's cache, repeated ``batch`` times."""
        cache = copy.deepcopy(self._prefix)
        cache.batch_repeat_interleave(batch)
        return cache


class BufferedPrefix:
    """One buffer a block, as many rows as the largest batch so far, reused by every batch."""

    def __init__(self, prefix: DynamicCache, layers: Sequence[DynamicLayer], capacity: int) -> None:
        self._prefix = layers
        self._capacity = capacity
        self._cache = copy.copy(prefix)
        self._layers: list[BufferedLayer | BufferedSlidingLayer] = []
        self._size = 0

    def rows(self, batch: int) -> DynamicCache:
        """The buffers, rewound to the end of the prefix, showing their first ``batch`` rows."""
        if batch > self._size:
            self._allocate(batch)
        for layer in self._layers:
            layer.rewind(batch)
        return self._cache

    def _allocate(self, batch: int) -> None:
        self._layers, self._cache.layers = [], []  # the old buffers go before the new ones come
        self._layers = [_buffered(layer, batch, self._capacity) for layer in self._prefix]
        self._cache.layers = list(self._layers)
        self._size = batch


def _buffered(prefix: DynamicLayer, rows: int, capacity: int) -> BufferedLayer | BufferedSlidingLayer:
    buffer = Buffer(prefix, rows, capacity)
    if isinstance(prefix, DynamicSlidingWindowLayer):
        return BufferedSlidingLayer(buffer, prefix.sliding_window)
    return BufferedLayer(buffer)


class Buffer:
    """Storage of one block: ``[rows, heads, capacity, head_dim]`` for keys and for values, starting with the prefix."""

    def __init__(self, prefix: DynamicLayer, rows: int, capacity: int) -> None:
        self.length = int(prefix.get_seq_length())
        self.keys = self._filled(prefix.keys, rows, capacity)
        self.values = self._filled(prefix.values, rows, capacity)

    def _filled(self, known: torch.Tensor | None, rows: int, capacity: int) -> torch.Tensor:
        """A buffer whose rows all start with the prefix; a sliding block knows only the last part of it."""
        if known is None:
            raise ValueError("a block without KV cannot be buffered")
        _, heads, held, size = known.shape
        buffer = known.new_empty(rows, heads, capacity, size)
        buffer[:, :, self.length - held : self.length] = known
        return buffer

    def write(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> int:
        """Puts new positions after ``start``; returns the new end."""
        end = start + keys.shape[-2]
        self.keys[: len(keys), :, start:end] = keys
        self.values[: len(keys), :, start:end] = values
        return end

    def keep(self, indices: torch.Tensor, end: int) -> None:
        """Moves the rows to be kept to the front; their shared prefix is everywhere already."""
        for part in (self.keys, self.values):
            part[: len(indices), :, self.length : end] = part[indices, :, self.length : end]

    def view(self, batch: int, start: int, end: int) -> KeysAndValues:
        """Keys and values of the first ``batch`` rows at positions ``start`` to ``end``."""
        return self.keys[:batch, :, start:end], self.values[:batch, :, start:end]


class BufferedLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # its __init_subclass__ is untyped
    """Full-attention block over a buffer: ``keys`` and ``values`` are views of what is filled."""

    def __init__(self, buffer: Buffer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers' own gap
        self.dtype, self.device, self.is_initialized = buffer.keys.dtype, buffer.keys.device, True
        self._buffer = buffer
        self._end = buffer.length

    def rewind(self, batch: int) -> None:
        """Back to the end of the prefix, ``batch`` rows wide."""
        self._end = self._buffer.length
        self.keys, self.values = self._buffer.view(batch, 0, self._end)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> KeysAndValues:
        """Writes the new positions in place; returns all keys and values, ``[batch, heads, tokens, head_dim]``."""
        self._end = self._buffer.write(self._end, key_states, value_states)
        self.keys, self.values = self._buffer.view(len(key_states), 0, self._end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps some rows, in order."""
        self._buffer.keep(indices, self._end)
        self.keys, self.values = self._buffer.view(len(indices), 0, self._end)


class BufferedSlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[no-untyped-call]  # the same
    """Sliding-window block over a buffer: sees the last ``sliding_window`` positions."""

    def __init__(self, buffer: Buffer, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.lazy_initialization(buffer.keys, buffer.values)
        self._buffer = buffer

    def rewind(self, batch: int) -> None:
        """Back to the end of the prefix, ``batch`` rows wide."""
        self.cumulative_length = self._buffer.length
        self._show(batch)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> KeysAndValues:
        """Writes the new positions in place; returns what they may look at, as the library's own layer does."""
        first = self._first()
        self.cumulative_length = self._buffer.write(self.cumulative_length, key_states, value_states)
        self._show(len(key_states))
        return self._buffer.view(len(key_states), first, self.cumulative_length)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps some rows, in order."""
        self._buffer.keep(indices, self.cumulative_length)
        self._show(len(indices))

    def _first(self) -> int:
        return max(0, self.cumulative_length - self.sliding_window + 1)

    def _show(self, batch: int) -> None:
        self.keys, self.values = self._buffer.view(batch, self._first(), self.cumulative_length)


_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
"""Kinds of blocks that have a buffered form; subclasses of them keep more state and are copied."""
