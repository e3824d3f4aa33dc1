"""What cannot be captured, and how that is said: at attach where model or config shows it, else at the first step.

A monitor that reads nothing must not look like one that finds nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from nla_monitor.capture.layers import DecoderBlocks
from nla_monitor.config import CaptureConfig
from nla_monitor.errors import AttachError, ConfigError

SHARDED: Final = "sharded_residual"
MISMATCH: Final = "shape_mismatch"

_LATE: Final = (
    "Most often a compiled graph from before attach still runs: attach first, or call torch._dynamo.reset() once "
    "after attaching"
)
_REPLICATE: Final = (
    "let the block's output be replicated (no SequenceParallel for its norms; PrepareModuleOutput with "
    "desired_output_layouts=Replicate()), or watch another layer"
)
_REMEDIES: Final[Mapping[str, str]] = {
    "no_input_ids": "Pass input_ids to the model as a [batch, seq] tensor",
    MISMATCH: (
        "The residual stream has other rows than input_ids has tokens (virtual prompt tokens, several streams, time as "
        "the first dimension): which token a row belongs to is not known"
    ),
    SHARDED: f"The residual stream is split over ranks, and each holds a part: {_REPLICATE}",
    "cached_continuation": "Tokens before the first one given are in a KV cache that was filled before attach",
}


def check_original(model: object) -> None:
    """Refuse what ``torch.compile`` made of a model that is not there any more.

    Raises:
        AttachError: the compiled module has lost its original.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if type(module).__name__ == "OptimizedModule" and "_orig_mod" not in dict(module.named_children()):
            raise AttachError(
                "the model was compiled, and the model that it was compiled from is gone (_orig_mod): no block is "
                "there to put a hook on. Remedy: attach to the original, before or after torch.compile(original)"
            )


def check_attachable(found: DecoderBlocks, layers: Sequence[int], config: CaptureConfig) -> None:
    """Refuse what could never be read.

    Args:
        found: the blocks of the model that is to be attached.
        layers: those that are to be read.
        config: what is sampled.

    Raises:
        AttachError: a block's output is sharded over ranks by plan.
        ConfigError: no position of this model's sequences can ever match the policy.
    """
    _check_policy(config)
    for layer in layers:
        sharded = next(_sequence_parallel(found.block(layer)), None)
        if sharded is not None:
            raise AttachError(
                f"the residual stream of layer {layer} is sharded over ranks: {found.path}.{layer}.{sharded} is "
                f"SequenceParallel, and each rank holds a part of each sequence. Remedy: {_REPLICATE}"
            )


def _check_policy(config: CaptureConfig) -> None:
    if not config.phases:
        raise ConfigError("capture.phases is empty: no forward can ever be sampled. Name train, eval or agent")


def is_copy(block: nn.Module) -> bool:
    """Whether another rank of a tensor-parallel group gives the same output of this block, and comes before this one.

    Such ranks are fed the same tokens; all of them reading would count each sample as often as there are ranks. Told by
    linear layers that are split over a mesh: experts may be split over ranks that have tokens of their own.
    """
    meshes = [
        content
        for module in block.modules()
        if isinstance(module, nn.Linear)
        for content in _styles(module)
        if type(content).__name__ == "DeviceMesh"
    ]
    return any(any(mesh.get_coordinate() or ()) for mesh in meshes)


def _sequence_parallel(block: nn.Module) -> Iterator[str]:
    """Submodules of a block that ``parallelize_module`` made ``SequenceParallel``."""
    for name, module in block.named_modules():
        if any(_is_sequence_parallel(content) for content in _styles(module)):
            yield name


def _styles(module: nn.Module) -> Iterator[Any]:
    """What a tensor-parallel style (of torch, of transformers) left on a module.

    torch leaves hooks, transformers a forward of the module's own: what they close over has no other way to ask.
    """
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]  # noqa: SLF001
    for one in [*hooks, module.__dict__.get("forward")]:
        for cell in getattr(one, "__closure__", None) or ():
            with suppress(ValueError):  # a cell that nothing was put into yet
                yield cell.cell_contents


def _is_sequence_parallel(content: object) -> bool:
    if isinstance(content, partial):
        content = content.func
    name = getattr(content, "__qualname__", None) or type(content).__qualname__
    return isinstance(name, str) and name.split(".")[0] == "SequenceParallel"


def _text_config(base: nn.Module) -> Any:
    config = getattr(base, "config", None)
    get_text = getattr(config, "get_text_config", None)
    return get_text() if callable(get_text) else config


def width_of(base: nn.Module) -> int | None:
    """``d_model`` as the model's config says it; None where it says nothing."""
    width = getattr(_text_config(base), "hidden_size", None)
    return width if isinstance(width, int) else None


def is_shard(hidden: Tensor, shape: torch.Size) -> bool:
    """Whether ``hidden`` is one rank's equal part of the rows of ``input_ids`` ``[batch, seq]``.

    Sequence parallelism often works on plain tensors, which do not say that they are parts.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    tokens, rows = shape.numel(), hidden.numel() // max(1, hidden.shape[-1])
    if not 0 < rows < tokens or tokens % rows:
        return False
    return torch.distributed.get_world_size() % (tokens // rows) == 0


def why_nothing(
    paths: Iterable[str],
    expected: int,
    *,
    forwards: int,
    planned: int,
    skipped: Mapping[str, int],
    silent: Sequence[int],
) -> str:
    """That no forward was captured at some layers, why, and what to do.

    Args:
        paths: of the hooked blocks.
        expected: forward passes that the host has run.
        forwards: forward passes seen.
        planned: those of which something was to be read.
        skipped: those that could not be read, by reason.
        silent: the layers of which nothing was gathered.
    """
    where = f"layer{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
    said = f"captured 0 of {expected} expected forwards at {where}: "
    if not forwards:
        return f"{said}no forward of the attached model was seen. {_LATE}; or another model object is the one that runs"
    if skipped:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in skipped.items())
        remedies = " ".join(f"{_REMEDIES[reason]}." for reason in skipped if reason in _REMEDIES)
        return f"{said}no forward could be read: {reasons}. {remedies}".rstrip(". ")
    if planned:
        names = [path for path in paths if int(path.rpartition(".")[2]) in silent]
        return f"{said}the hook on {', '.join(names)} never fired. {_LATE}"
    return f"{said}nothing was there to sample"


def why_replaced(paths: Sequence[str]) -> str:
    """What to say of blocks that stand no more where they were hooked."""
    return (
        f"{', '.join(paths)} was replaced after the monitor was attached: what runs there now is not read. Put new "
        "blocks in place before attach"
    )
