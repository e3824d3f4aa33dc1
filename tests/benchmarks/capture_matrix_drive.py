"""How the capture matrix takes a training step: by hand, or through DeepSpeed's engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LEARNING_RATE = 1e-3


class Drive:
    """Backward pass and optimizer step of a plain or wrapped module."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.Optimizer | None:
        return torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)

    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss``."""
        loss.backward()

    def gradients(self) -> list[Tensor]:
        """Copies of what ``backward`` gave: of sharded parameters this rank's part."""
        found = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return [(grad.to_local() if hasattr(grad, "to_local") else grad).detach().clone() for grad in found]

    def clear(self) -> None:
        """Forget the gradients."""
        self.model.zero_grad()

    def step(self) -> None:
        """Change the weights, and forget the gradients."""
        if self._optimizer is not None:
            self._optimizer.step()
        self.clear()


class ZeroDrive(Drive):
    """The same through a DeepSpeed engine, which owns optimizer and gradients."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        super().__init__(engine)

    def _make_optimizer(self) -> None:
        return None

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def gradients(self) -> list[Tensor]:
        from deepspeed.utils import safe_get_full_grad

        found = [safe_get_full_grad(parameter) for parameter in self.model.parameters()]
        return [grad.detach().clone() for grad in found if grad is not None]

    def clear(self) -> None:
        """The engine does it at a step."""

    def step(self) -> None:
        self._engine.step()


def drive(model: nn.Module) -> Drive:
    """The one that ``model`` needs."""
    return ZeroDrive(model) if type(model).__name__ == "DeepSpeedEngine" else Drive(model)
