"""KV caches for a batch whose rows share a prefix.

The library's dynamic cache concatenates: every token of every block allocates and copies the whole KV. At explanation
lengths that is most of the time on CPU. Here each block has one buffer of the final length, written in place and kept
from batch to batch; the prefix stands in it once and for all.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


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
    known = all(type(layer) in _BUFFERED and layer.is_initialized for layer in prefix.layers)
    return BufferedPrefix(prefix, capacity) if known else CopiedPrefix(prefix)


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

    def __init__(self, prefix: DynamicCache, capacity: int) -> None:
        self._prefix = prefix
        self._capacity = capacity
        self._cache: DynamicCache | None = None
        self._size = 0

    def rows(self, batch: int) -> DynamicCache:
        """The buffers, rewound to the end of the prefix, showing their first ``batch`` rows."""
        if self._cache is None or batch > self._size:
            self._cache, self._size = self._allocate(batch), batch
        for layer in self._cache.layers:
            layer.rewind(batch)
        return self._cache

    def _allocate(self, batch: int) -> DynamicCache:
        self._cache = None  # the old buffers go before the new ones come
        cache = copy.copy(self._prefix)
        cache.layers = [_BUFFERED[type(layer)](layer, batch, self._capacity) for layer in self._prefix.layers]
        return cache


class _Buffer:
    """Storage of one block: ``[rows, heads, capacity, head_dim]`` for keys and for values."""

    def __init__(self, prefix: DynamicLayer, rows: int, capacity: int) -> None:
        self.length = int(prefix.get_seq_length())
        self.keys = self._filled(prefix.keys, rows, capacity)
        self.values = self._filled(prefix.values, rows, capacity)

    def _filled(self, known: torch.Tensor, rows: int, capacity: int) -> torch.Tensor:
        """A buffer whose rows all start with the prefix; a sliding block knows only the last part of it."""
        _, heads, held, size = known.shape
        buffer = known.new_empty(rows, heads, capacity, size)
        buffer[:, :, self.length - held : self.length] = known
        return buffer

    def write(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        end = start + keys.shape[-2]
        self.keys[: len(keys), :, start:end] = keys
        self.values[: len(keys), :, start:end] = values

    def keep(self, indices: torch.Tensor, end: int) -> None:
        """Moves the rows to be kept to the front; their shared prefix is everywhere already."""
        count = len(indices)
        for part in (self.keys, self.values):
            part[:count, :, self.length : end] = part[indices, :, self.length : end]

    def view(self, batch: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys[:batch, :, start:end], self.values[:batch, :, start:end]


class BufferedLayer(DynamicLayer):  # type: ignore[misc]  # transformers gives Any
    """Full-attention block over a buffer: ``keys`` and ``values`` are views of what is filled."""

    def __init__(self, prefix: DynamicLayer, rows: int, capacity: int) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = prefix.keys.dtype, prefix.keys.device, True
        self._buffer = _Buffer(prefix, rows, capacity)
        self._end = self._buffer.length

    def rewind(self, batch: int) -> None:
        """Back to the end of the prefix, ``batch`` rows wide."""
        self._end = self._buffer.length
        self.keys, self.values = self._buffer.view(batch, 0, self._end)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new positions in place; returns all keys and values, ``[batch, heads, tokens, head_dim]``."""
        self._buffer.write(self._end, key_states, value_states)
        self._end += key_states.shape[-2]
        self.keys, self.values = self._buffer.view(len(key_states), 0, self._end)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps some rows, in order."""
        self._buffer.keep(indices, self._end)
        self.keys, self.values = self._buffer.view(len(indices), 0, self._end)


class BufferedSlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]  # transformers gives Any
    """Sliding-window block over a buffer: sees the last ``sliding_window`` positions."""

    def __init__(self, prefix: DynamicSlidingWindowLayer, rows: int, capacity: int) -> None:
        super().__init__(sliding_window=prefix.sliding_window)
        self.lazy_initialization(prefix.keys, prefix.values)
        self.is_initialized = True
        self._buffer = _Buffer(prefix, rows, capacity)

    def rewind(self, batch: int) -> None:
        """Back to the end of the prefix, ``batch`` rows wide."""
        self.cumulative_length = self._buffer.length
        self._show(batch)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new positions in place; returns what they may look at, as the library's own layer does."""
        first = self._first()
        self._buffer.write(self.cumulative_length, key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
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


_BUFFERED: dict[type, Any] = {DynamicLayer: BufferedLayer, DynamicSlidingWindowLayer: BufferedSlidingLayer}
