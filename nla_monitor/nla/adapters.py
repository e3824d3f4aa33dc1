"""LoRA weights on a base model, through peft: those of PEFT's own folders, and a reconstructor's ``ar_meta.json``.

Adapters are matched to the model by the names of its blocks, so that weights trained on a causal LM fit its bare
decoder, and those of a text model fit the decoder inside a multimodal one. Every weight is accounted for: one that has
no place, or a place without a weight, is an error, because either would change the output without a sign.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from nla_monitor.errors import CheckpointError, MissingExtraError, SidecarError
from nla_monitor.nla.checkpoint import ADAPTER_NAME, AR_META_NAME, read_json

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
AR_WEIGHTS = "ar_lora_value_head.safetensors"
HEAD_KEY = "value_head.weight"
_BLOCK = re.compile(r"(?:^|\.)((?:layers|h|blocks)\.(\d+)\..*)")
_TOWER = re.compile(r"(?:^|\.)((?:vision|audio)\w*\..*)")
_SHOWN = 3


class Lora(NamedTuple):
    """One set of LoRA weights."""

    source: Path
    config: LoraConfig
    tensors: Mapping[str, torch.Tensor]
    """By name inside the decoder: ``layers.0.self_attn.q_proj.lora_A.default.weight``."""

    @property
    def blocks(self) -> int:
        """How many blocks, counted from the first, are touched."""
        return 1 + max((int(match[2]) for name in self.tensors if (match := _BLOCK.match(name))), default=-1)


def read_adapter(folder: Path) -> Lora:
    """A PEFT folder: ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        CheckpointError: no LoRA, no safetensors, or not readable.
        MissingExtraError: peft is not installed.
    """
    kind = read_json(folder / ADAPTER_NAME).get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{folder} is an adapter of type {kind!r}; LoRA is read. Merge it into its base model with peft and give "
            "the merged folder."
        )
    config = _peft().LoraConfig.from_pretrained(str(folder))
    return Lora(folder, config, _tensors(folder / ADAPTER_WEIGHTS))


class ReconstructorAdapter(NamedTuple):
    """What ``ar_meta.json`` and its weights hold."""

    lora: Lora
    head: torch.Tensor
    blocks: int
    final_norm: bool
    """Whether the norm after the last block was in use in training."""


def read_reconstructor_adapter(folder: Path) -> ReconstructorAdapter:
    """A reconstructor's LoRA and head: ``ar_meta.json`` and ``ar_lora_value_head.safetensors``.

    Fields: ``ar_num_layers``, ``lora_r``, ``lora_alpha``, ``target_modules``, ``use_rslora`` (default true) and
    ``final_norm_stripped`` (or ``strip_final_norm``).

    Raises:
        SidecarError: a field is missing.
        CheckpointError: the weights cannot be read.
        MissingExtraError: peft is not installed.
    """
    file = folder / AR_META_NAME
    meta = read_json(file)
    stripped = meta.get("final_norm_stripped", meta.get("strip_final_norm"))
    needed = {name: meta.get(name) for name in ("ar_num_layers", "lora_r", "lora_alpha", "target_modules")} | {
        "final_norm_stripped": stripped
    }
    missing = [name for name, value in needed.items() if value is None]
    if missing:
        raise SidecarError(
            f"{file}: {', '.join(missing)} missing. They say how the reconstructor was built (whether the norm after "
            "the last block was in use, say) and cannot be guessed: take them from its training."
        )
    tensors = dict(_tensors(folder / AR_WEIGHTS))
    head = tensors.pop(HEAD_KEY, None)
    if head is None:
        raise CheckpointError(f"{folder / AR_WEIGHTS} holds no {HEAD_KEY!r}. Take the file from the release.")
    config = _peft().LoraConfig(
        r=int(meta["lora_r"]),
        lora_alpha=meta["lora_alpha"],
        use_rslora=bool(meta.get("use_rslora", True)),
        target_modules=list(meta["target_modules"]),
        lora_dropout=0.0,
        bias="none",
    )
    return ReconstructorAdapter(Lora(file, config, tensors), head, int(meta["ar_num_layers"]), not stripped)


def apply(model: PreTrainedModel, lora: Lora, *, merge: bool, truncated: bool = False) -> PreTrainedModel:
    """The model with LoRA weights: added to its own for good, or beside them.

    Args:
        model: in evaluation mode, on its device.
        lora: what to add.
        merge: add ``B A`` to each weight once; otherwise both are computed at each step.
        truncated: the model has only the first blocks: weights for later ones are left out.

    Raises:
        CheckpointError: a weight has no place, or a place has no weight.
    """
    try:
        tuner = _peft().LoraModel(model, {"default": lora.config}, "default")
    except ValueError as error:
        raise CheckpointError(
            f"{lora.source} does not fit its base model: {error}. Correct nla.base, or the adapter's target_modules."
        ) from error
    places = {_inside(name): value for name, value in model.named_parameters() if "lora_" in name}
    depth = model.config.get_text_config().num_hidden_layers
    given = {
        name: value
        for name, value in lora.tensors.items()
        if not (truncated and (match := _BLOCK.match(name)) and int(match[2]) >= depth)
    }
    extra = sorted(given.keys() - places.keys())
    # Only blocks of the decoder must be there: a vision tower beside it may have modules of the same names.
    absent = sorted(name for name in places.keys() - given.keys() if _BLOCK.match(name))
    shapes = sorted(name for name in given.keys() & places.keys() if given[name].shape != places[name].shape)
    for names, told in ((extra, "have no place in it"), (absent, "are missing"), (shapes, "have another shape")):
        if names:
            shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
            raise CheckpointError(
                f"{lora.source} does not fit its base model: weights {told}: {shown}. Set nla.base to the model that "
                "the adapter was trained on."
            )
    with torch.no_grad():
        for name, value in given.items():
            places[name].copy_(value)
    if merge:
        tuner.merge_and_unload()
    model.eval()  # type: ignore[no-untyped-call]  # transformers' own gap
    model.requires_grad_(requires_grad=False)
    return model


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}. Adapters are read from safetensors (pickled weights are refused): save "
            "them so with peft's save_pretrained."
        ) from error
    return {_inside(name): value for name, value in tensors.items()}


def _inside(name: str) -> str:
    """A weight's name as inside the text decoder, whatever wraps it; names outside of blocks stay as they are."""
    name = re.sub(r"(lora_[AB])\.weight$", r"\1.default.weight", name)
    match = _TOWER.search(name) or _BLOCK.search(name)
    return match[1] if match is not None else name


def _peft() -> Any:
    try:
        import peft  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise MissingExtraError("peft", "adapters", "reading LoRA adapters") from error
    return peft
