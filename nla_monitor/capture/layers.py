"""Finds the decoder blocks of a model by structure, through whatever the model is wrapped in.

The rule, checked on the decoder families of transformers 5 (tests/unit/capture/test_families.py): the block list is
the ``nn.ModuleList`` of ``num_hidden_layers`` composite modules that lies in no other such list and some of whose
blocks mix positions (attention, a state space, a recurrence). Names of families are not needed. Where a model holds
several such lists, as beside a vision tower or an encoder, the model's own ``get_decoder()`` tells them apart; parts of
a path (``vision``, ``audio``...), the distance from the token embeddings and the length break the ties that are left.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import nn

from nla_monitor.errors import AttachError

_MIXING = ("attn", "attention", "mixer", "mamba", "lstm", "recurrent")
_NOT_TEXT = ("vision", "visual", "audio", "image", "speech", "qformer", "ref_model")
_SIZE_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_IDS, _DECODER_IDS = "input_ids", "decoder_input_ids"
_DECODER_SIZE_NAMES = ("num_decoder_layers", "decoder_layers")


@dataclass(frozen=True, slots=True)
class DecoderBlocks:
    """Where the blocks of a model are."""

    path: str
    """Dotted path of the list inside the model that was given, wrappers included."""
    blocks: nn.ModuleList
    stack: nn.Module
    """The innermost module around the blocks that is called with token ids; every path into the model calls it."""
    base: nn.Module
    """The model without wrappers."""
    after_encoder: bool = False
    """Whether the ids that the model is called with are an encoder's, and only the stack sees the decoder's."""

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
    depths = _depths(base)
    found = next(filter(None, (_candidates(model, depth) for depth in depths)), None)
    if found is None:
        raise AttachError(_no_blocks(base, depths))
    path, blocks = _choose(found, base)
    return DecoderBlocks(
        path=path,
        blocks=blocks,
        stack=_stack(model, path),
        base=base,
        after_encoder=_DECODER_IDS in forward_names(base),
    )


def forward_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of the unwrapped model's ``forward``: what positional arguments mean."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(type(unwrap(model)).forward).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)[1:]


def _stack(model: nn.Module, path: str) -> nn.Module:
    """The innermost ancestor of the list that takes token ids; its parent where none does."""
    parts = path.split(".")[:-1]
    around = [model.get_submodule(".".join(parts[:length])) for length in range(len(parts), -1, -1)]
    return next((module for module in around if _IDS in forward_names(module)), around[0])


def _depths(base: nn.Module) -> Sequence[int | None]:
    """Number of decoder blocks as the config says it, the likeliest first; only None where it says nothing.

    A config may say several: one that counts attention layers (for the KV cache) and one that counts blocks.
    """
    config = getattr(base, "config", None)
    after_encoder = getattr(config, "is_encoder_decoder", False)
    said = [getattr(config, name, None) for name in _DECODER_SIZE_NAMES] if after_encoder else []
    text = _text_config(config)
    said += [getattr(text, name, None) for name in _SIZE_NAMES]
    return list(dict.fromkeys(value for value in said if isinstance(value, int))) or [None]


def _text_config(config: Any) -> Any:
    get_text = getattr(config, "get_text_config", None)
    if not callable(get_text):
        return config
    try:
        return get_text(decoder=True)
    except ValueError:  # several decoders (text and speech): the model's own config says what it can
        return config


def _candidates(model: nn.Module, depth: int | None) -> dict[str, nn.ModuleList]:
    """Lists that may be the decoder blocks, by path; none lies inside another."""
    lists: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():  # parents come before what they hold
        inside = any(path.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and _is_block_list(module, depth):
            lists[path] = module
    return lists


def _is_block_list(blocks: nn.ModuleList, depth: int | None) -> bool:
    if len(blocks) == 0 or (depth is not None and len(blocks) != depth):
        return False
    if depth is None and len({type(block) for block in blocks}) > 1:
        return False  # hybrids are told by their config alone
    return all(any(True for _ in block.children()) for block in blocks) and any(map(_mixes, blocks))


def _mixes(block: nn.Module) -> bool:
    """Whether something in the block, by its name or class, lets positions see each other."""
    for name, child in block.named_modules():
        words = {*name.lower().split(".")[-1].split("_"), type(child).__name__.lower()} if child is not block else set()
        if any(mixing in word for word in words for mixing in _MIXING):
            return True
    return False


def _choose(found: dict[str, nn.ModuleList], base: nn.Module) -> tuple[str, nn.ModuleList]:
    for rule in (_in_decoder, _of_text, _near_embeddings, _longest):
        if len(found) > 1:
            found = rule(found, base) or found
    if len(found) > 1:
        raise AttachError(
            f"{type(base).__name__} has several lists of decoder blocks: {', '.join(sorted(found))}. "
            "Attach to the submodule that holds the language model"
        )
    return next(iter(found.items()))


def _in_decoder(found: dict[str, nn.ModuleList], base: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists in what the model calls its decoder, which may itself hold an encoder and a decoder."""
    seen: set[int] = set()
    decoder: nn.Module | None = base
    while decoder is not None and id(decoder) not in seen:
        seen.add(id(decoder))
        innermost, decoder = decoder, _asked(decoder, "get_decoder")
    held = {id(module) for module in innermost.modules()}
    return {path: blocks for path, blocks in found.items() if id(blocks) in held}


def _of_text(found: dict[str, nn.ModuleList], base: nn.Module) -> dict[str, nn.ModuleList]:  # noqa: ARG001 -- a rule
    return {path: blocks for path, blocks in found.items() if not any(word in path.lower() for word in _NOT_TEXT)}


def _longest(found: dict[str, nn.ModuleList], base: nn.Module) -> dict[str, nn.ModuleList]:  # noqa: ARG001 -- a rule
    longest = max(map(len, found.values()))
    return {path: blocks for path, blocks in found.items() if len(blocks) == longest}


def _near_embeddings(found: dict[str, nn.ModuleList], base: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists with the fewest steps in the module tree to the token embeddings."""
    places = {id(module): path.split(".") for path, module in base.named_modules()}
    embeddings = places.get(id(_asked(base, "get_input_embeddings")))
    if embeddings is None:
        return {}
    steps = {path: _steps(places[id(blocks)], embeddings) for path, blocks in found.items() if id(blocks) in places}
    return {path: found[path] for path, number in steps.items() if number == min(steps.values())}


def _asked(base: nn.Module, method: str) -> nn.Module | None:
    """What the model says of itself; None where it cannot."""
    say = getattr(base, method, None)
    try:
        answer = say() if callable(say) else None
    except (NotImplementedError, AttributeError):
        return None
    return answer if isinstance(answer, nn.Module) else None


def _steps(one: list[str], other: list[str]) -> int:
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return len(one) + len(other) - 2 * shared


def _no_blocks(base: nn.Module, depths: Sequence[int | None]) -> str:
    lists = [
        f"{path} ({len(module)} x {type(module[0]).__name__})"
        for path, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    numbers = " or ".join(str(depth) for depth in depths if depth is not None)
    wanted = f"{numbers} blocks (config.num_hidden_layers)" if numbers else "blocks of one class"
    return (
        f"no list of decoder blocks in {type(base).__name__}: looked for an nn.ModuleList of {wanted} that hold "
        f"attention, a state space or a recurrence; found {', '.join(lists) or 'no ModuleList'}. Give a causal "
        "language model, or the submodule that holds one"
    )
