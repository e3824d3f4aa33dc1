"""The hooks on the model: three opaque ops and the little Python that calls them.

``ResidualTap`` puts a pre-hook and a hook on the model (and on the module that runs its blocks, which is called even
where a wrapper steps over the model's own ``__call__``) and one hook on block K. All are installed once, return None,
and are gated by data: whether a forward is read is decided behind the op, never by adding or removing a hook.

Why ops: under ``torch.compile`` a ``torch.library.custom_op`` that mutates a tensor is one opaque node: no graph break,
no recompilation, not removed as dead code, its Python runs at every call. The mutated tensor is a counter, ``fires``,
which also orders plan, gather and hand-over in the graph. The gather's own buffers stay out of the signature on
purpose: each thread in flight has its own, so that two generations on one model cannot mix; a functionalised graph
would work on a copy of them.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nla_monitor.capture.layers import DecoderBlocks, forward_names
from nla_monitor.guard import Guard

OUTER, INNER = 0, 1
"""Hook levels: the model that was attached, and the module that runs its blocks."""


@dataclass(frozen=True, slots=True)
class Signals:
    """What a forward pass was called with, as far as sampling is concerned."""

    ids: Tensor | None
    mask: Tensor | None
    labels: Tensor | None
    grad: bool
    training: bool
    cache: Any = None
    """The KV cache; never known inside a compiled graph."""


class Receiver(Protocol):
    """Who is told of forwards (the capture)."""

    guard: Guard

    def begin(self, signals: Signals, level: int) -> None:
        """A forward starts in this thread: plan it."""
        ...

    def tap(self, hidden: Tensor) -> None:
        """Block K gave ``hidden`` ``[batch, seq, d_model]``, detached: gather what was planned."""
        ...

    def end(self, level: int) -> None:
        """The forward is over (also by an exception): hand over."""
        ...


_receivers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_handles = itertools.count(1)


@torch.library.custom_op(
    "nla_monitor::begin",
    mutates_args={"fires"},
    schema=(
        "(Tensor(a!) fires, int handle, int level, Tensor? ids, Tensor? mask, Tensor? labels, bool grad, bool training)"
        " -> ()"
    ),
)
def _begin_op(  # noqa: PLR0917 -- the op's schema is positional
    fires: Tensor,  # noqa: ARG001 -- orders the ops in a graph
    handle: int,
    level: int,
    ids: Tensor | None,
    mask: Tensor | None,
    labels: Tensor | None,
    grad: bool,
    training: bool,
) -> None:
    receiver = _receivers.get(handle)
    if receiver is not None:
        with receiver.guard("capture.plan"):
            receiver.begin(Signals(ids=ids, mask=mask, labels=labels, grad=grad, training=training), level)


@torch.library.custom_op(
    "nla_monitor::tap", mutates_args={"fires"}, schema="(Tensor hidden, Tensor(a!) fires, int handle) -> ()"
)
def _tap_op(hidden: Tensor, fires: Tensor, handle: int) -> None:
    receiver = _receivers.get(handle)
    if receiver is not None:
        with receiver.guard("capture.tap"):
            fires.add_(1)
            receiver.tap(hidden)


@torch.library.custom_op(
    "nla_monitor::end", mutates_args={"fires"}, schema="(Tensor(a!) fires, int handle, int level) -> ()"
)
def _end_op(fires: Tensor, handle: int, level: int) -> None:  # noqa: ARG001 -- orders the ops in a graph
    receiver = _receivers.get(handle)
    if receiver is not None:
        with receiver.guard("capture.stage"):
            receiver.end(level)


def _inert(*_: object) -> None:
    """What a hook becomes in a copied or pickled model: the copy is not monitored."""


def _make_inert() -> Any:
    return _inert


class _Hook:
    """A hook that leaves the model copyable: locks and threads of ours must not make ``deepcopy(model)`` fail."""

    def __init__(self, receiver: Receiver, fires: Tensor, handle: int, level: int = OUTER) -> None:
        self.receiver = receiver
        self.fires = fires
        self.handle = handle
        self.level = level

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _inert

    def __reduce__(self) -> Any:
        return _make_inert, ()


class _BeginHook(_Hook):
    names: tuple[str, ...] = ()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            given = self.bind(args, kwargs)
            _begin_op(
                self.fires,
                self.handle,
                self.level,
                given["input_ids"],
                given["attention_mask"],
                given["labels"],
                torch.is_grad_enabled(),
                module.training,
            )
            return
        with self.receiver.guard("capture.plan"):
            given = self.bind(args, kwargs)
            signals = Signals(
                ids=given["input_ids"],
                mask=given["attention_mask"],
                labels=given["labels"],
                grad=torch.is_grad_enabled(),
                training=module.training,
                cache=kwargs.get("past_key_values"),
            )
            self.receiver.begin(signals, self.level)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor | None]:
        given: dict[str, Tensor | None] = {"input_ids": None, "attention_mask": None, "labels": None}
        for name, value in zip(self.names, args, strict=False):
            if name in given and isinstance(value, torch.Tensor):
                given[name] = value
        for name in given:
            value = kwargs.get(name)
            if isinstance(value, torch.Tensor):
                given[name] = value
        return given


class _TapHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002 -- torch's signature
        if torch.compiler.is_compiling():
            hidden = output[0] if isinstance(output, tuple) else output
            _tap_op(hidden.detach(), self.fires, self.handle)
            return
        with self.receiver.guard("capture.tap"):
            hidden = output[0] if isinstance(output, tuple) else output
            _tap_op(hidden.detach(), self.fires, self.handle)


class _EndHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002 -- torch's signature
        if torch.compiler.is_compiling():
            _end_op(self.fires, self.handle, self.level)
            return
        with self.receiver.guard("capture.stage"):
            self.receiver.end(self.level)


class ResidualTap:
    """The hooks of one capture on one model.

    Args:
        receiver: is told of every forward; held by the hooks.
        model: the module that the host calls.
        found: its decoder blocks.
        layer: K; the output of block K is read.

    Raises:
        AttachError: the layer is out of range.
    """

    def __init__(self, receiver: Receiver, model: nn.Module, found: DecoderBlocks, layer: int) -> None:
        block = found.block(layer)
        self.path = f"{found.path}.{layer}"
        self.device = _device_of(block)
        self.fires = torch.zeros(1, dtype=torch.int64, device=self.device)
        handle = next(_handles)
        _receivers[handle] = receiver
        self._handle = handle
        self._removable: list[RemovableHandle] = []
        self._bracket(receiver, model, OUTER)
        if found.stack is not model:
            self._bracket(receiver, found.stack, INNER)
        self._removable.append(block.register_forward_hook(_TapHook(receiver, self.fires, handle)))

    def _bracket(self, receiver: Receiver, module: nn.Module, level: int) -> None:
        begin = _BeginHook(receiver, self.fires, self._handle, level)
        begin.names = forward_names(module)
        end = _EndHook(receiver, self.fires, self._handle, level)
        self._removable.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        # always_call: a forward that raises must not leave its plan behind in the thread.
        self._removable.append(module.register_forward_hook(end, always_call=True))

    def remove(self) -> None:
        """Take the hooks off; graphs compiled with them keep calling ops that then do nothing."""
        _receivers.pop(self._handle, None)
        for handle in self._removable:
            handle.remove()
        self._removable.clear()


def _device_of(block: nn.Module) -> torch.device:
    parameter = next(block.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    return torch.device("cpu") if device.type == "meta" else device


class Slots:
    """The persistent index and buffer of one forward in flight; ``size`` rows."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.index = torch.zeros(size, dtype=torch.int64, device=device)
        self.buffer: Tensor | None = None
        self.count = 0
        self.ready: torch.cuda.Event | None = None
        """After the last copy out of the buffer."""

    def plan(self, index: Tensor) -> None:
        """Write which rows will be gathered; row 0, harmless, fills the rest."""
        if self.ready is not None:
            # Another stream may still copy out of the buffer; the device waits, the host does not.
            torch.cuda.current_stream(self.index.device).wait_event(self.ready)
        self.count = index.shape[0]
        self.index[: self.count].copy_(index, non_blocking=True)
        self.index[self.count :].zero_()

    def gather(self, hidden: Tensor) -> None:
        """``buffer[i] = hidden.view(-1, d_model)[index[i]]``; no allocation once the buffer has met its dtype."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self.index.device != hidden.device:
            self.index = self.index.to(hidden.device)
        buffer = self.buffer
        if (
            buffer is None
            or buffer.dtype != rows.dtype
            or buffer.shape[1] != rows.shape[1]
            or buffer.device != rows.device
        ):
            shape = (self.index.shape[0], rows.shape[1])
            buffer = self.buffer = torch.zeros(shape, dtype=rows.dtype, device=rows.device)
        torch.index_select(rows, 0, self.index, out=buffer)
