"""An AR's blocks and head, however they are packed.

    full folder            blocks cut to size, ``value_head.safetensors``
    ``ar_meta.json``       LoRA weights and head in one file; how many blocks of the base, and whether its norm stays
    PEFT folder            LoRA weights, ``value_head.safetensors``; as many blocks as the adapter touches
    PEFT folder, no head   the template ends in a marker whose own state after block K is the reconstruction

How many blocks there are is read, not computed: most have K + 1, some more.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from nla_monitor.config import NLAConfig
from nla_monitor.errors import CheckpointError, NonFiniteWeightsError, SidecarError
from nla_monitor.nla.adapters import AR_WEIGHTS, apply, read_adapter, read_reconstructor_adapter
from nla_monitor.nla.checkpoint import ADAPTER_NAME, AR_META_NAME, HEAD_NAME, Checkpoint, read_json
from nla_monitor.nla.contract import READOUT_PLACEHOLDERS, Sidecar
from nla_monitor.nla.loading import load_backbone

ABSURD_WEIGHT = 1e18
"""Beyond this a weight's square overflows float32: damaged exports hold values near 3e38 beside NaN."""


class ReconstructorParts(NamedTuple):
    """What an AR computes with."""

    model: PreTrainedModel
    head: torch.Tensor
    """``[d_model, d_model]``, float32."""
    final_norm: bool
    """Whether the norm after the last block is used (adapters of early training code were trained with it)."""


def load_parts(checkpoint: Checkpoint, sidecar: Sidecar, config: NLAConfig) -> ReconstructorParts:
    """Blocks and head of an AR.

    Raises:
        CheckpointError: they cannot be read or do not fit; the subclass says more.
        ConfigError: the configured device is not there.
        MissingExtraError: an adapter, and peft is not installed.
    """
    folder, width = checkpoint.folder, sidecar.d_model
    if checkpoint.base is None:
        head, final_norm = load_value_head(folder, width), _keeps_norm(folder)
        return ReconstructorParts(load_backbone(checkpoint, config, final_norm=final_norm), head, final_norm)
    if not (folder / ADAPTER_NAME).exists():
        return _described_adapter(checkpoint, checkpoint.base, width, config)
    if (folder / HEAD_NAME).exists() or not _reads_marker(sidecar):
        head = load_value_head(folder, width)
        model = load_backbone(checkpoint, config, blocks=read_adapter(folder).blocks)
        return ReconstructorParts(model, head, final_norm=False)
    model = load_backbone(checkpoint, config, blocks=_layer_of_marker(sidecar) + 1)
    return ReconstructorParts(model, torch.eye(width), final_norm=False)


def _described_adapter(checkpoint: Checkpoint, base: Checkpoint, width: int, config: NLAConfig) -> ReconstructorParts:
    adapter = read_reconstructor_adapter(checkpoint.folder)
    head = checked_head(adapter.head, width, checkpoint.folder / AR_WEIGHTS)
    model = load_backbone(base, config, blocks=adapter.blocks, final_norm=adapter.final_norm)
    merge = config.merge_adapter and config.quantization == "none"
    return ReconstructorParts(apply(model, adapter.lora, merge=merge), head, adapter.final_norm)


def _keeps_norm(folder: Path) -> bool:
    file = folder / AR_META_NAME
    if not file.exists():
        return False
    meta = read_json(file)
    return not meta.get("final_norm_stripped", meta.get("strip_final_norm", True))


def _reads_marker(sidecar: Sidecar) -> bool:
    return any((sidecar.prompt_templates.ar or "").endswith(placeholder) for placeholder in READOUT_PLACEHOLDERS)


def _layer_of_marker(sidecar: Sidecar) -> int:
    if sidecar.layer is None:
        raise SidecarError(
            f"{sidecar.source} names no layer: this AR reconstructs any. Set nla.layer to the block captured."
        )
    if sidecar.training.get("mean_subtract"):
        raise SidecarError(
            f"{sidecar.source}: training.mean_subtract is set: this AR predicts the difference from a mean that is "
            "released as a pickle, which is not read. Use an AR trained without it."
        )
    return sidecar.layer


def load_value_head(folder: Path, d_model: int) -> torch.Tensor:
    """``weight`` of ``value_head.safetensors``, ``[d_model, d_model]``, float32.

    Raises:
        CheckpointError: missing, unreadable or of another shape.
        NonFiniteWeightsError: it holds NaN, Inf or absurd values.
    """
    file = folder / HEAD_NAME
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read: {error}. An AR is released with this file beside its blocks; copy it there."
        ) from error
    if "weight" not in tensors:
        raise CheckpointError(
            f"{file}: expected the key 'weight', found {sorted(tensors)}. Take the file from the release."
        )
    return checked_head(tensors["weight"], d_model, file)


def checked_head(weight: torch.Tensor, d_model: int, file: Path) -> torch.Tensor:
    """A value head in float32.

    Raises:
        CheckpointError: it is of another shape than ``[d_model, d_model]``.
        NonFiniteWeightsError: it holds NaN, Inf or absurd values.
    """
    weight = weight.float()
    if weight.shape != (d_model, d_model):
        raise CheckpointError(
            f"{file}: expected shape {(d_model, d_model)} (d_model of the sidecar), found {tuple(weight.shape)}. Take "
            "head, blocks and sidecar from one release."
        )
    sound = (torch.isfinite(weight) & (weight.abs() < ABSURD_WEIGHT)).all(dim=1)
    if not bool(sound.all()):
        raise NonFiniteWeightsError(
            f"{file}: {int((~sound).sum())} of {d_model} rows hold NaN, Inf or values beyond {ABSURD_WEIGHT:g}. The "
            "export is damaged and every score would be noise: use another export of this AR (its SFT stage, say)."
        )
    return weight
