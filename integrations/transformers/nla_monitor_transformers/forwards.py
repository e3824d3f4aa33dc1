"""Which of a trainer's forward passes is this? Update, rollout, scoring, reference, or evaluation.

A preference or RL trainer calls the policy many times within one step: it generates, scores what was generated under
the weights of before, asks the reference (the same model with its adapter off, where there is one), and then does the
one forward under gradients that the update is made of. That one sees prompt and completion of every sequence, whatever
generated them; it is what is read unless more is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final, Literal, get_args

import torch

from nla_monitor.annotations import Annotations
from nla_monitor.capture.tap import Signals
from nla_monitor.errors import ConfigError
from nla_monitor.records import Scalar

Kind = Literal["update", "rollout", "score", "reference", "eval"]
READ: Final[tuple[Kind, ...]] = ("update", "eval")
_CHOSEN: Final = {"pair": "chosen"}
_REJECTED: Final = {"pair": "rejected"}


class Forwards:
    """Labels the forwards of one model in training; called in the host's thread before each of them.

    ``update``: under gradients. Without gradients inside a step: ``reference`` with the adapter off or the adapter
    ``ref`` on (PEFT), ``score`` where labels are given, else ``rollout``. Without gradients outside a step: ``eval``.

    Args:
        read: which are read; the others are let through.
        pairs: whether a batch under gradients holds chosen sequences and then as many rejected ones (DPO).
        annotations: gets ``pair`` (``chosen``, ``rejected``) of each sequence.

    Raises:
        ConfigError: a name of ``read`` is none of these.
    """

    def __init__(self, read: Collection[str], annotations: Annotations, *, pairs: bool = False) -> None:
        unknown = sorted(set(read) - set(get_args(Kind)))
        if unknown or isinstance(read, str):
            raise ConfigError(f"forwards = {read!r}: give a list of {', '.join(get_args(Kind))}")
        self._read = frozenset(read)
        self._annotations = annotations
        self._adapted: Any = None
        self.pairs = pairs
        self.in_step = False
        """Between the beginning and the end of a training step; evaluation comes outside."""

    def watch(self, model: torch.nn.Module) -> None:
        """Look at this model's adapter, if it has one."""
        # PEFT's layers are known by what they offer, so that PEFT need not be installed.
        self._adapted = next((part for part in model.modules() if _is_adapted(part)), None)

    def __call__(self, signals: Signals) -> Mapping[str, Scalar] | None:
        """The forward's attributes; None: it is not read."""
        name = self._name(signals)
        if name not in self._read:
            return None
        if self.pairs and name in {"update", "eval"}:
            self._tell_pairs(signals)
        return {"forward": name}

    def _name(self, signals: Signals) -> Kind:
        if signals.grad:
            return "update"
        if self._is_reference():
            return "reference"
        if not self.in_step:
            return "eval"
        return "score" if signals.labels is not None else "rollout"

    def _is_reference(self) -> bool:
        adapted = self._adapted
        return adapted is not None and (adapted.disable_adapters or "ref" in adapted.active_adapters)

    def _tell_pairs(self, signals: Signals) -> None:
        ids = signals.ids
        if ids is not None and ids.dim() == 2 and ids.shape[0] % 2 == 0:
            half = ids.shape[0] // 2
            self._annotations.add_rows(ids, signals.mask, [_CHOSEN] * half + [_REJECTED] * half)


def _is_adapted(part: torch.nn.Module) -> bool:
    return hasattr(part, "disable_adapters") and hasattr(part, "active_adapters") and hasattr(part, "base_layer")
