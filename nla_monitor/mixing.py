"""A mixer of 64-bit words, the same for integers, arrays and tensors. A leaf: imports nothing of ours.

It is the finaliser of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_M1 = 0xBF58476D1CE4E5B9
_M2 = 0x94D049BB133111EB
WORD = 1 << 64
"""How many words there are."""


def signed(value: int) -> int:
    """A 64-bit word as the int64 that tensors hold."""
    value %= WORD
    return value - WORD if value >= 1 << 63 else value


def mix_int(value: int) -> int:
    """The mixer for one Python integer; equals ``mix`` on a tensor."""
    value %= WORD
    value = ((value ^ (value >> 30)) * _M1) % WORD
    value = ((value ^ (value >> 27)) * _M2) % WORD
    return signed(value ^ (value >> 31))


def logical_shift(value: Tensor, bits: int) -> Tensor:
    """``value`` as unsigned 64-bit words, shifted right."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix(value: Tensor) -> Tensor:
    """A bijection of int64 that scatters neighbours: the same on every device."""
    if value.device.type == "cpu":  # numpy's calls cost a fifth of torch's, which matters for small batches
        return torch.from_numpy(mix_words(value.numpy()))
    return mix_tensor(value)


def mix_tensor(value: Tensor) -> Tensor:
    """``mix`` where the tensor is."""
    value = (value ^ logical_shift(value, 30)) * signed(_M1)
    value = (value ^ logical_shift(value, 27)) * signed(_M2)
    return value ^ logical_shift(value, 31)


def mix_words(value: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """``mix`` of an array."""
    words = value.astype(np.uint64)
    words ^= words >> np.uint64(30)
    words *= np.uint64(_M1)
    words ^= words >> np.uint64(27)
    words *= np.uint64(_M2)
    words ^= words >> np.uint64(31)
    return words.view(np.int64)
