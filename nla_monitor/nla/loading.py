"""Models and tokenizers from a local checkpoint folder: safe formats only, every weight accounted for, no noise."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from nla_monitor.config import NLAConfig
from nla_monitor.errors import CheckpointError, ConfigError

_UNUSED_WEIGHTS = ("norm.weight", "ln_f.weight", "ln_f.bias", "layer_norm.weight", "layer_norm.bias", "lm_head.weight")


def pick_device(config: NLAConfig) -> torch.device:
    """The torch device named in the config.

    Raises:
        ConfigError: no such device here.
    """
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"nla.device = {config.device!r} cannot be used: {reason}. Use 'cpu', or a device that exists."
        ) from error
    return device


def pick_dtype(config: NLAConfig, device: torch.device) -> torch.dtype:
    """``auto``: float32 on CPU (where bfloat16 is slower), bfloat16 elsewhere, whatever the dtype on disk."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]  # the config allows three names
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, cutting long input on the left (so that an AR's suffix survives).

    Raises:
        CheckpointError: it cannot be loaded.
    """
    with quiet(), checkpoint_errors(folder, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True, truncation_side="left"
        )
    return tokenizer


def load_causal_lm(folder: Path, config: NLAConfig) -> PreTrainedModel:
    """An AV: a causal language model, in evaluation mode, on the configured device.

    Raises:
        CheckpointError: it cannot be loaded, or weights are missing.
    """
    return _load(AutoModelForCausalLM, folder, config, unused=())


def load_backbone(folder: Path, config: NLAConfig) -> PreTrainedModel:
    """An AR's blocks, without language head; a final norm that is not on disk is no fault (it is not used).

    Raises:
        CheckpointError: it cannot be loaded, or other weights are missing.
    """
    return _load(AutoModel, folder, config, unused=_UNUSED_WEIGHTS)


def _load(factory: Any, folder: Path, config: NLAConfig, *, unused: Sequence[str]) -> PreTrainedModel:
    device = pick_device(config)
    with quiet(), checkpoint_errors(folder, "model"):
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model, info = factory.from_pretrained(
            folder,
            config=settings,
            dtype=pick_dtype(config, device),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    missing = sorted(key for key in info["missing_keys"] if not any(_is_final(key, name) for name in unused))
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CheckpointError(
            f"{folder}: weights are missing: {shown}. They would be random: copy the safetensors files again, or "
            "correct num_hidden_layers in config.json."
        )
    loaded: PreTrainedModel = model.eval().requires_grad_(requires_grad=False).to(device)
    return loaded


def _is_final(key: str, name: str) -> bool:
    """Whether a key names the final norm or language head, and no weight inside a block."""
    return key.endswith(name) and not any(part.isdigit() for part in key.split("."))


_LOADING_FAULTS = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    ImportError,
    AttributeError,
    TypeError,
    AssertionError,
    SafetensorError,
    StrictDataclassError,
)
"""What configs, tokenizers and weights that do not fit make the libraries raise."""


@contextmanager
def checkpoint_errors(folder: Path, what: str) -> Iterator[None]:
    """Turns what the loading libraries raise into ``CheckpointError`` with a remedy."""
    try:
        yield
    except _LOADING_FAULTS as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise CheckpointError(
            f"the {what} in {folder} cannot be loaded: {reason}. A checkpoint holds config.json, safetensors weights "
            "and tokenizer files of one release, of an architecture that this version of transformers knows (remote "
            "code and pickled weights are refused)."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars or notes of transformers while the block runs; the host's settings are put back."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own gap
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # the same


def decoder_of(model: torch.nn.Module) -> torch.nn.Module:
    """The text decoder inside a (possibly multimodal) backbone."""
    inner = getattr(model, "language_model", None)
    return decoder_of(inner) if isinstance(inner, torch.nn.Module) else model


def drop_final_norm(model: torch.nn.Module) -> str:
    """Replaces the norm after the last block by the identity, so that the output is the raw residual stream.

    Returns:
        The name of the replaced module.

    Raises:
        CheckpointError: the architecture has no norm under a known name.
    """
    decoder = decoder_of(model)
    for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm"):
        if isinstance(getattr(decoder, name, None), torch.nn.Module):
            setattr(decoder, name, torch.nn.Identity())
            return name
    raise CheckpointError(
        f"{type(decoder).__name__} has no final norm under a known name, and an AR must not apply it. Supported: "
        "architectures whose norm after the blocks is called norm, ln_f, final_layer_norm or final_layernorm."
    )


def embedding_weight(model: PreTrainedModel) -> torch.Tensor:
    """The input embedding's table, ``[vocabulary, d_model]``."""
    weight = model.get_input_embeddings().weight
    if not isinstance(weight, torch.Tensor):
        raise CheckpointError(
            f"{type(model).__name__} has no embedding table; NLA checkpoints are text models with one."
        )
    return weight
