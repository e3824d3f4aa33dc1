"""The hooks on the model: three opaque ops and the little Python that calls them.

``ResidualTap`` puts a pre-hook and a hook on the model (and on the module that runs its blocks, which is called even
where a wrapper steps over the model's own ``__call__``) and one hook on each block K that is read. All are installed
once, return None, and are gated by data: whether a forward is read is decided behind the op, never by adding or
removing a hook.

Why ops: under ``torch.compile`` a ``torch.library.custom_op`` that mutates a tensor is one opaque node: no graph break,
no recompilation, not removed as dead code, its Python runs at every call. The mutated tensor is a counter, ``fires``,
which also orders plan, gather and hand-over in the graph. The gather's own buffers stay out of the signature on
purpose: each thread in flight has its own, so that two generations on one model cannot mix; a functionalised graph
would work on a copy of them.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nla_monitor.capture.layers import DecoderBlocks, forward_names
from nla_monitor.capture.packing import Borders, borders_of
from nla_monitor.guard import Guard

_READ = ("input_ids", "attention_mask", "labels", "position_ids", "seq_idx", "cu_seq_lens_q")
"""Arguments of a forward that say what is in it."""
_MAX_IN_FLIGHT = 64
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
    borders: Borders | None = None
    """What was said of sequences packed into one row."""


class Receiver(Protocol):
    """Who is told of forwards (the capture)."""

    guard: Guard

    def planned(self, level: int | None = None) -> bool:
        """Whether a forward is under way in this thread; opened by the hook of ``level``, if given."""
        ...

    def passes(self, kwargs: Mapping[str, Any], level: int) -> bool:
        """Whether nothing is read of the forward that starts with ``kwargs``, told at once; then it is counted."""
        ...

    def wants(self, number: int) -> bool:
        """Whether something of ``layers[number]`` is to be read in the forward under way."""
        ...

    def begin(self, signals: Signals, level: int) -> None:
        """A forward starts in this thread: plan it."""
        ...

    def tap(self, hidden: Tensor, number: int, *, partial: bool) -> None:
        """The block of layer ``layers[number]`` gave ``hidden`` ``[batch, seq, d_model]``: gather what was planned.

        ``partial``: it is only this rank's part of a residual stream that is sharded over ranks.
        """
        ...

    def end(self, level: int) -> None:
        """The forward is over (also by an exception): hand over."""
        ...


_receivers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_handles = itertools.count(1)


# Their Python must run at every call: a CUDA graph would record it once. Tagged, they stay out of one.
_TAGS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op(
    "nla_monitor::begin",
    mutates_args={"fires"},
    **_TAGS,
    schema=(
        "(Tensor(a!) fires, int handle, int level, Tensor? ids, Tensor? mask, Tensor? labels, bool grad, bool training,"
        " Tensor? positions, Tensor? sequences, Tensor? offsets) -> ()"
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
    positions: Tensor | None,
    sequences: Tensor | None,
    offsets: Tensor | None,
) -> None:
    receiver = _receivers.get(handle)
    if receiver is not None:
        with receiver.guard("capture.plan"):
            borders = borders_of(positions, sequences, offsets)
            signals = Signals(ids=ids, mask=mask, labels=labels, grad=grad, training=training, borders=borders)
            receiver.begin(signals, level)


@torch.library.custom_op(
    "nla_monitor::tap",
    mutates_args={"fires"},
    **_TAGS,
    schema="(Tensor hidden, Tensor(a!) fires, int handle, int number, bool partial) -> ()",
)
def _tap_op(hidden: Tensor, fires: Tensor, handle: int, number: int, partial: bool) -> None:
    receiver = _receivers.get(handle)
    if receiver is not None:
        with receiver.guard("capture.tap"):
            fires.add_(1)
            receiver.tap(hidden, number, partial=partial)


@torch.library.custom_op(
    "nla_monitor::end", mutates_args={"fires"}, schema="(Tensor(a!) fires, int handle, int level) -> ()", **_TAGS
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
        """Of the model's hooks: ``OUTER`` or ``INNER``. Of a block's: its place among the layers that are read."""

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
                given["position_ids"],
                given["seq_idx"],
                given["cu_seq_lens_q"],
            )
            return
        if self.level != OUTER and self.receiver.planned():
            return  # by the model's own hook, which saw labels
        with self.receiver.guard("capture.plan"):
            if self.receiver.passes(kwargs, self.level):
                return
            given = self.bind(args, kwargs)
            signals = Signals(
                ids=given["input_ids"],
                mask=given["attention_mask"],
                labels=given["labels"],
                grad=torch.is_grad_enabled(),
                training=module.training,
                cache=kwargs.get("past_key_values"),
                borders=borders_of(given["position_ids"], given["seq_idx"], given["cu_seq_lens_q"]),
            )
            self.receiver.begin(signals, self.level)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor | None]:
        given: dict[str, Tensor | None] = dict.fromkeys(_READ)
        if args:
            for name, value in zip(self.names, args, strict=False):
                if name in given and isinstance(value, torch.Tensor):
                    given[name] = value
        for name, value in kwargs.items():
            if name in given and isinstance(value, torch.Tensor):
                given[name] = value
        return given


def _hidden_of(output: Any) -> Any:
    """What the next block gets: blocks return it alone, or first in a tuple (in a list, of old)."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _local(hidden: Any) -> tuple[Tensor, bool]:
    """The plain tensor of a residual stream, and whether it is this rank's part only.

    A ``DTensor`` (tensor parallelism) that is replicated is read through its local copy. It is known by its placements:
    importing ``torch.distributed.tensor`` only to name the class takes most of a second.
    """
    if type(hidden) is Tensor or not hasattr(hidden, "placements"):
        return hidden, False
    partial = not all(placement.is_replicate() for placement in hidden.placements)
    return hidden.to_local(), partial


class _TapHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002 -- torch's signature
        if torch.compiler.is_compiling():
            hidden, partial = _local(_hidden_of(output).detach())
            _tap_op(hidden, self.fires, self.handle, self.level, partial)
            return
        if not self.receiver.wants(self.level):
            return
        with self.receiver.guard("capture.tap"):
            hidden, partial = _local(_hidden_of(output).detach())
            self.receiver.tap(hidden, self.level, partial=partial)


class _EndHook(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG002 -- torch's signature
        if torch.compiler.is_compiling():
            _end_op(self.fires, self.handle, self.level)
            return
        if not self.receiver.planned(self.level):
            return
        with self.receiver.guard("capture.stage"):
            self.receiver.end(self.level)


class ResidualTap:
    """The hooks of one capture on one model.

    Args:
        receiver: is told of every forward; held by the hooks.
        model: the module that the host calls.
        found: its decoder blocks.
        layers: each K of which the output of block K is read.

    Raises:
        AttachError: a layer is out of range.
    """

    def __init__(self, receiver: Receiver, model: nn.Module, found: DecoderBlocks, layers: Sequence[int]) -> None:
        self.blocks = {f"{found.path}.{layer}": found.block(layer) for layer in layers}
        """The hooked blocks, by their path in the model, in the order of the layers."""
        self._model = model
        self._links = {path: _links(model, path) for path in self.blocks}
        self.device = _device_of(next(iter(self.blocks.values())))
        self.fires = torch.zeros(1, dtype=torch.int64, device=self.device)
        handle = next(_handles)
        _receivers[handle] = receiver
        self._handle = handle
        self._removable: list[RemovableHandle] = []
        if not found.after_encoder:  # there the model is called with the encoder's ids; only the stack sees ours
            self._bracket(receiver, model, OUTER)
        if found.stack is not model:
            self._bracket(receiver, found.stack, INNER)
        for number, block in enumerate(self.blocks.values()):
            self._removable.append(block.register_forward_hook(_TapHook(receiver, self.fires, handle, number)))
        self._renewed = [_Renewed(module) for module in (found.base, found.stack, *self.blocks.values())]

    def replaced(self) -> list[str]:
        """Paths where another module stands now than the one that was hooked; a wrapper around that one is none."""
        return [
            path
            for path, block in self.blocks.items()
            if not _unchanged(self._links[path]) and not _stands(self._model, path, block)
        ]

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
        for renewed in self._renewed:
            renewed.undo()
        self._renewed.clear()


class _Renewed:
    """A module that graphs compiled so far no longer fit, so that they are compiled anew, with our hooks.

    Dynamo guards no module's hooks (``skip_nnmodule_hook_guards``), so a graph from before attach would run on without
    them. It does guard that a module has no ``forward`` of its own: the module gets its class's as its own. One graph
    is compiled again, once; ``undo`` gives the old one back. Nothing is done where nothing was ever compiled.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._forward: Any = None
        if "torch._dynamo" in sys.modules and "forward" not in module.__dict__:
            self._forward = module.__dict__["forward"] = module.forward

    def undo(self) -> None:
        if self._forward is not None and self._module.__dict__.get("forward") is self._forward:
            del self._module.__dict__["forward"]


_Link = tuple[Mapping[str, nn.Module | None], str, nn.Module]
"""The submodules of a module, a name among them, and what stood there when the tap was put on."""


def _links(model: nn.Module, path: str) -> list[_Link]:
    """The way from the model to a block; asked at every step, so without ``getattr`` on modules, which is slow."""
    links: list[_Link] = []
    module = model
    for name in path.split("."):
        submodules = module._modules  # noqa: SLF001 -- what nn.Module.__getattr__ itself looks into
        child = submodules.get(name)
        if child is None:
            return []  # reached in another way, by a property say: only a search tells
        links.append((submodules, name, child))
        module = child
    return links


def _unchanged(links: Sequence[_Link]) -> bool:
    return bool(links) and all(submodules.get(name) is child for submodules, name, child in links)


def _stands(model: nn.Module, path: str, block: nn.Module) -> bool:
    module: Any = model
    for name in path.split("."):
        module = getattr(module, name, None)
    return module is block or (isinstance(module, nn.Module) and any(inner is block for inner in module.modules()))


def _device_of(block: nn.Module) -> torch.device:
    parameter = next(block.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    return torch.device("cpu") if device.type == "meta" else device


class Slots:
    """The persistent index of one forward in flight, ``size`` rows, and a buffer for each layer that is read."""

    def __init__(self, size: int, device: torch.device, layers: int = 1, home: deque[Slots] | None = None) -> None:
        self._home = home
        self.index = torch.zeros(size, dtype=torch.int64, device=device)
        self.buffers: list[Tensor | None] = [None] * layers
        self.count = 0
        self.ready: dict[torch.device, torch.cuda.Event] = {}
        """After the last copy out of the buffers on a device."""
        self._elsewhere: dict[torch.device, Tensor] = {}
        """Copies of the index for layers that a device map put on other devices."""
        self._current: set[torch.device] = set()

    def give_back(self) -> None:
        """The forward is over."""
        if self._home is not None:
            self._home.append(self)

    def plan(self, index: Tensor) -> None:
        """Write which rows will be gathered; row 0, harmless, fills the rest."""
        for event in self.ready.values():
            # Another stream may still copy out of a buffer; the device waits, the host does not.
            torch.cuda.current_stream(self.index.device).wait_event(event)
        self.count = index.shape[0]
        self.index[: self.count].copy_(index, non_blocking=True)
        self.index[self.count :].zero_()
        self._current = {self.index.device}

    def gather(self, hidden: Tensor, number: int = 0) -> None:
        """``buffers[number][i] = hidden.view(-1, d_model)[index[i]]``; allocates only until it has met its dtype."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        if not any(buffer is not None for buffer in self.buffers) and self.index.device != rows.device:
            self.index = self.index.to(rows.device)  # the model was moved since it was attached
            self._current = {rows.device}
        index = self._index_on(rows.device)
        buffer = self.buffers[number]
        if (
            buffer is None
            or buffer.dtype != rows.dtype
            or buffer.shape[1] != rows.shape[1]
            or buffer.device != rows.device
        ):
            shape = (self.index.shape[0], rows.shape[1])
            buffer = self.buffers[number] = torch.zeros(shape, dtype=rows.dtype, device=rows.device)
        torch.index_select(rows, 0, index, out=buffer)

    def _index_on(self, device: torch.device) -> Tensor:
        if device == self.index.device:
            return self.index
        index = self._elsewhere.get(device)
        if index is None:
            index = self._elsewhere[device] = torch.zeros_like(self.index, device=device)
        if device not in self._current:
            if device in self.ready:
                torch.cuda.current_stream(device).wait_event(self.ready[device])
            index.copy_(self.index, non_blocking=True)
            self._current.add(device)
        return index


class SlotPool:
    """The slots of all forwards in flight, made when they are needed and used again.

    Args:
        size: rows of each.
        device: of the residual stream.
        layers: how many are read.
    """

    def __init__(self, size: int, device: torch.device, layers: int) -> None:
        self._size, self._device, self._layers = size, device, layers
        self._free: deque[Slots] = deque()
        self._made = 0

    def take(self) -> Slots | None:
        """Free slots; None with that many forwards in flight."""
        try:
            return self._free.pop()
        except IndexError:
            pass
        if self._made >= _MAX_IN_FLIGHT:
            return None
        self._made += 1
        return Slots(self._size, self._device, self._layers, self._free)
