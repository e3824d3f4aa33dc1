"""Which adapter a forward runs with: told from the layers that PEFT put into the model, without touching a tensor."""

from __future__ import annotations

from typing import Any

from torch import nn


class AdapterState:
    """Reads the switch of the first adapter layer of a model; PEFT sets those of all layers together.

    Read where a forward is planned, which is outside of any compiled graph: passes under ``disable_adapter()`` (the
    reference passes of DPO and GRPO) are told apart from the policy's, compiled or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layer: Any = None
        self.refresh()

    def refresh(self) -> None:
        """Look again: adapters may be put into a model after it was attached."""
        if self._layer is None:
            self._layer = next((module for module in self._model.modules() if _is_adapter_layer(module)), None)

    @property
    def active(self) -> str | None:
        """Name of the active adapter, several joined with ``+``; None without one, or with all switched off."""
        layer = self._layer
        if layer is None or layer.disable_adapters:
            return None
        return "+".join(layer.active_adapters) or None


def _is_adapter_layer(module: nn.Module) -> bool:
    """Whether this is a ``BaseTunerLayer`` of PEFT; models have methods of these names, layers have properties."""
    kind = type(module)
    return all(isinstance(getattr(kind, name, None), property) for name in ("disable_adapters", "active_adapters"))
