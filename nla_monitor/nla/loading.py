"""Models and tokenizers from a local checkpoint folder: safe formats only, every weight accounted for, no noise."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
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
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from nla_monitor.config import NLAConfig
from nla_monitor.errors import CheckpointError, ConfigError, MissingExtraError
from nla_monitor.nla.adapters import apply, read_adapter
from nla_monitor.nla.checkpoint import Checkpoint

_SAME_SCALE = 0.01
_UNUSED_HEADS = ("lm_head.weight",)
_UNUSED_WEIGHTS = ("norm.weight", "ln_f.weight", "ln_f.bias", "layer_norm.weight", "layer_norm.bias", *_UNUSED_HEADS)


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


def load_causal_lm(checkpoint: Checkpoint, config: NLAConfig) -> PreTrainedModel:
    """An AV: a causal language model with its adapters, in evaluation mode, on the configured device.

    Raises:
        CheckpointError: it cannot be loaded, or weights are missing.
        ConfigError: the device or 4-bit weights cannot be used here.
        MissingExtraError: an adapter, and peft is not installed; 4-bit weights, and bitsandbytes is not.
    """
    return _with_adapters(checkpoint, config, lambda folder: _load(AutoModelForCausalLM, folder, config, unused=()))


def load_backbone(
    checkpoint: Checkpoint, config: NLAConfig, *, blocks: int | None = None, final_norm: bool = False
) -> PreTrainedModel:
    """An AR's blocks, without language head; a final norm that is not on disk is no fault (it is not used).

    Args:
        checkpoint: a full model, or an adapter.
        config: where and in which precision.
        blocks: only so many, where the checkpoint is not cut to them already.
        final_norm: whether the norm after the last block is used, and so must be on disk.

    Raises:
        CheckpointError: it cannot be loaded, or other weights are missing.
        ConfigError: the device or 4-bit weights cannot be used here.
        MissingExtraError: an adapter, and peft is not installed; 4-bit weights, and bitsandbytes is not.
    """
    unused = _UNUSED_HEADS if final_norm else _UNUSED_WEIGHTS

    def load(folder: Path) -> PreTrainedModel:
        return _load(AutoModel, folder, config, unused=unused, blocks=blocks)

    return _with_adapters(checkpoint, config, load, truncated=blocks is not None)


def _with_adapters(
    checkpoint: Checkpoint, config: NLAConfig, load: Callable[[Path], PreTrainedModel], *, truncated: bool = False
) -> PreTrainedModel:
    """The base, then its adapters from the innermost on; an inner one is merged, so that the next sees its sum."""
    if checkpoint.base is None:
        return load(checkpoint.folder)
    inner = config.model_copy(update={"merge_adapter": True})
    model = _with_adapters(checkpoint.base, inner, load, truncated=truncated)
    merge = config.merge_adapter and config.quantization == "none"
    return apply(model, read_adapter(checkpoint.folder), merge=merge, truncated=truncated)


def _load(
    factory: Any, folder: Path, config: NLAConfig, *, unused: Sequence[str], blocks: int | None = None
) -> PreTrainedModel:
    device = pick_device(config)
    with quiet(), checkpoint_errors(folder, "model"):
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if blocks is not None:
            _cut(settings.get_text_config(), blocks)
        model, info = factory.from_pretrained(
            folder,
            config=settings,
            dtype=pick_dtype(config, device),
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **_quantized(config, device),
        )
    missing = sorted(key for key in info["missing_keys"] if not any(_is_final(key, name) for name in unused))
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CheckpointError(
            f"{folder}: weights are missing: {shown}. They would be random: copy the safetensors files again, or "
            "correct num_hidden_layers in config.json."
        )
    if config.quantization == "none":
        model.to(device)
    loaded: PreTrainedModel = model.eval().requires_grad_(requires_grad=False)
    return loaded


def _cut(config: Any, blocks: int) -> None:
    """A config with only the first blocks; lists that hold one entry a block are cut with it."""
    if blocks > config.num_hidden_layers:
        raise ValueError(f"{blocks} blocks are wanted and it has {config.num_hidden_layers}")
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]


def _quantized(config: NLAConfig, device: torch.device) -> dict[str, Any]:
    """Arguments for 4-bit NF4 weights, in which published adapters were trained; none for full precision."""
    if config.quantization == "none":
        return {}
    if device.type != "cuda":
        raise ConfigError(
            f"nla.quantization = '4bit' needs a GPU and nla.device is {config.device!r}. Set nla.device to cuda, or "
            "nla.quantization to none."
        )
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "quantized", "nla.quantization = '4bit'")
    settings = BitsAndBytesConfig(  # type: ignore[no-untyped-call]  # transformers' own gap
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=pick_dtype(config, device),
    )
    return {"quantization_config": settings, "device_map": {"": device}}


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


def blocks_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The decoder's blocks, first to last.

    Raises:
        CheckpointError: they are not one list of ``num_hidden_layers`` modules.
    """
    depth = model.config.get_text_config().num_hidden_layers
    decoder = decoder_of(model.get_decoder())  # type: ignore[no-untyped-call]  # the same
    for module in decoder.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return list(module)
    raise CheckpointError(
        f"{type(model).__name__} does not keep its {depth} blocks in one list, so that none can be found. Verbalizers "
        "are read on decoder-only architectures."
    )


class _Seen(Exception):  # noqa: N818 - no fault: it ends a forward pass that has shown what was wanted
    """Holds what the first block was given."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


@torch.no_grad()
def stream_scale(model: PreTrainedModel) -> float:
    """By what a row of ``inputs_embeds`` is multiplied before the first block: 1 for most, measured.

    Gemma multiplies in its embedding module; some others (Granite, RecurrentGemma) only after it, so that a row
    put in at a given norm would enter the stream at another.

    Raises:
        CheckpointError: the row is changed in another way, or the model looks up a second embedding by token.
    """
    if getattr(model.config.get_text_config(), "hidden_size_per_layer_input", 0):
        raise CheckpointError(
            f"{type(model).__name__} has a second embedding that is looked up by token in every block "
            "(hidden_size_per_layer_input), which a prompt of embeddings does not have. No verbalizer of this "
            "architecture can be read."
        )
    rows = torch.zeros(2, 1, embedding_weight(model).shape[1], dtype=model.dtype, device=model.device)
    rows[1] = torch.linspace(0.5, 1.5, rows.shape[-1])
    zero, moved = _entering(model, rows)
    change, row = (moved - zero).double().flatten(), rows[1].double().flatten()
    scale = float(change @ row / (row @ row))
    if not torch.allclose(change, row * scale, rtol=0.02, atol=0.02 * abs(scale)):
        raise CheckpointError(
            f"{type(model).__name__} changes its embeddings before the first block by more than a factor, so a vector "
            "cannot be put in at the norm of training. Verbalizers that replace an embedding row are not read on it."
        )
    return 1.0 if abs(scale - 1) < _SAME_SCALE else scale


def _entering(model: PreTrainedModel, rows: torch.Tensor) -> torch.Tensor:
    """What the first block is given for ``rows``, ``[batch, 1, d_model]``."""

    def stop(_block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Seen(args[0] if args else kwargs["hidden_states"])

    handle = blocks_of(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(inputs_embeds=rows, use_cache=False)
    except _Seen as seen:
        return seen.hidden
    finally:
        handle.remove()
    raise CheckpointError(f"{type(model).__name__} did not run its first block. Its embeddings cannot be measured.")
