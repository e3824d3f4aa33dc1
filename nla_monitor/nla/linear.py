"""Linear layers of a CPU model through oneDNN.

PyTorch sends float32 products on the CPU to MKL, which does not use AVX-512 on processors of every maker; oneDNN, which
is linked into PyTorch too, does. It reads the weights where they lie: nothing is copied, and modules keep their names,
parameters and type.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import nn

_ATTRIBUTES: Final[tuple[str, list[float], str]] = ("none", [], "")
"""No operation fused behind the product."""
_ONE_ROW: Final = 1 << 17
"""Weights from which a product of one row pays: oneDNN reads them faster, and costs some microseconds more to call."""


class OneDnnLinear(nn.Linear):
    """``nn.Linear`` whose inference product is oneDNN's; any other call goes the usual way."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name that nn.Linear gives it
        """``input @ weight.T + bias``, ``[..., in_features] -> [..., out_features]``."""
        small = input.numel() <= self.in_features and self.weight.numel() < _ONE_ROW
        if small or input.dtype != torch.float32 or _differentiates(input, self.weight):
            return super().forward(input)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, *_ATTRIBUTES)  # noqa: SLF001 - the only name it has
        return product


def _differentiates(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def use_onednn(model: nn.Module) -> int:
    """Switches a model's plain float32 linear layers to oneDNN, where that is faster; subclasses are left alone.

    Returns:
        How many were switched: 0 on other devices, dtypes, processors and builds.
    """
    if not faster_here():
        return 0
    layers = [module for module in model.modules() if type(module) is nn.Linear and _fits(module.weight)]
    for layer in layers:
        layer.__class__ = OneDnnLinear
    return len(layers)


def _fits(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()


def faster_here() -> bool:
    """Whether processor and build are those on which it pays: AVX-512, and a PyTorch with the product."""
    linked = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]  # torch's own gap
    return (
        linked
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )
