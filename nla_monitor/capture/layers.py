"""Finds the decoder blocks of a model by structure, through whatever the model is wrapped in.

The rule, checked on 18 families of transformers 5: the block list is the ``nn.ModuleList`` of ``num_hidden_layers``
modules of one class, each of which has a child whose name speaks of attention. Names of families are not needed;
parts of a path (``vision``, ``encoder``...) only break ties in models that hold several such lists.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from nla_monitor.errors import AttachError

_ATTENTION = ("attn", "attention", "mixer")
_NOT_TEXT = ("vision", "visual", "audio", "image", "encoder", "speech", "qformer", "ref_model")
_SIZE_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True, slots=True)
class DecoderBlocks:
    """Where the blocks of a model are."""

    path: str
    """Dotted path of the list inside the model that was given, wrappers included."""
    blocks: nn.ModuleList
    stack: nn.Module
    """The module that runs the blocks; it is called by every path into the model, whatever wraps it."""
    base: nn.Module
    """The model without wrappers."""

    def block(self, layer: int) -> nn.Module:
        """Block ``layer``, whose output is ``hidden_states[layer + 1]``.

        Raises:
            AttachError: there is no such block.
        """
        if not 0 <= layer < len(self.blocks):
            raise AttachError(
                f"layer {layer} is out of range: {type(self.base).__name__} has {len(self.blocks)} decoder blocks at "
                f"{self.path!r}. Choose 0 to {len(self.blocks) - 1} (layer K is the output of block K, "
                "hidden_states[K + 1]), or use an AV trained for this model"
            )
        return self.blocks[layer]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, DDP, FSDP, DataParallel, DeepSpeed and PEFT wrappers."""
    seen: set[int] = set()
    while id(model) not in seen:
        seen.add(id(model))
        model = _inner(model)
    return model


def _inner(model: nn.Module) -> nn.Module:
    for name in ("_orig_mod", "_fsdp_wrapped_module", "module"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return inner
    get_base = getattr(model, "get_base_model", None)
    if hasattr(model, "peft_config") and callable(get_base):
        base = get_base()
        return base if isinstance(base, nn.Module) else model
    return model


def find_blocks(model: nn.Module) -> DecoderBlocks:
    """The list of decoder blocks of ``model``.

    Raises:
        AttachError: not a torch module, no block list, or several that cannot be told apart.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(
            f"cannot attach to {type(model).__name__}: a torch.nn.Module is needed. Where a compiled function or a "
            "pipeline is at hand, give the model inside it (pipeline.model)"
        )
    base = unwrap(model)
    depth = _depth(base)
    found = {path: module for path, module in model.named_modules() if _is_block_list(module, depth)}
    if not found:
        raise AttachError(_no_blocks(base, depth))
    path, blocks = _choose(found, base)
    parent = path.rpartition(".")[0]
    return DecoderBlocks(path=path, blocks=blocks, stack=model.get_submodule(parent), base=base)


def forward_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of the unwrapped model's ``forward``: what positional arguments mean."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(type(unwrap(model)).forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)[1:]


def _text_config(base: nn.Module) -> Any:
    config = getattr(base, "config", None)
    get_text = getattr(config, "get_text_config", None)
    return get_text(decoder=True) if callable(get_text) else config


def _depth(base: nn.Module) -> int | None:
    config = _text_config(base)
    values = (getattr(config, name, None) for name in _SIZE_NAMES)
    return next((value for value in values if isinstance(value, int)), None)


def _is_block_list(module: nn.Module, depth: int | None) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) == 0 or (depth is not None and len(module) != depth):
        return False
    return len({type(child) for child in module}) == 1 and _has_attention(module[0])


def _has_attention(block: nn.Module) -> bool:
    return any(word in name.lower() for name, _ in block.named_children() for word in _ATTENTION)


def _choose(found: dict[str, nn.Module], base: nn.Module) -> tuple[str, nn.ModuleList]:
    candidates = found
    if len(candidates) > 1:
        candidates = {path: module for path, module in found.items() if not _speaks_of(path, _NOT_TEXT)} or found
    if len(candidates) > 1 and _depth(base) is None:
        longest = max(len(module) for module in candidates.values() if isinstance(module, nn.ModuleList))
        candidates = {p: m for p, m in candidates.items() if isinstance(m, nn.ModuleList) and len(m) == longest}
    if len(candidates) > 1:
        raise AttachError(
            f"{type(base).__name__} has several lists of decoder blocks: {', '.join(sorted(candidates))}. "
            "Attach to the submodule that holds the language model"
        )
    path, blocks = next(iter(candidates.items()))
    if not isinstance(blocks, nn.ModuleList):  # narrows the type; the search only finds lists
        raise AttachError(f"{path!r} is no ModuleList")
    return path, blocks


def _speaks_of(path: str, words: tuple[str, ...]) -> bool:
    return any(word in part for part in path.lower().split(".") for word in words)


def _no_blocks(base: nn.Module, depth: int | None) -> str:
    lists = [
        f"{path} ({len(module)} x {type(module[0]).__name__})"
        for path, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    wanted = f"{depth} blocks (config.num_hidden_layers)" if depth is not None else "blocks of one class"
    return (
        f"no list of decoder blocks in {type(base).__name__}: looked for an nn.ModuleList of {wanted} with an "
        f"attention child; found {', '.join(lists) or 'no ModuleList'}. Give a causal language model, or the submodule "
        "that holds one"
    )
