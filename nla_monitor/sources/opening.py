"""A source as the config's section ``source`` describes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from nla_monitor.config import SourceConfig
from nla_monitor.errors import CheckpointError, ConfigError
from nla_monitor.sources.base import ActivationSource
from nla_monitor.sources.replay import ReplaySource
from nla_monitor.sources.vllm import CaptureReplica, HiddenStatesFolder


def open_source(config: SourceConfig | None) -> ActivationSource:
    """The source that a config describes; a local copy is loaded.

    Raises:
        ConfigError: there is no such section, or the device cannot be used.
        CheckpointError: the local copy or its tokenizer cannot be loaded.
        MissingExtraError: a replica, and httpx is not installed.
    """
    if config is None:
        raise ConfigError(
            "no source is given, and the config has no section source. Give attach_source() a source, or add, for "
            "instance, source: {kind: replay, model: <folder of a local copy>, proxy: false}"
        )
    tokenizer = None if config.model is None else _tokenizer(config.model)
    proxy = bool(config.proxy)
    if config.kind == "replay":
        model = _model(str(config.model), config)
        return ReplaySource(model, tokenizer, proxy=proxy, max_tokens=config.max_tokens, check_every=config.check_every)
    if config.kind == "vllm_files":
        return HiddenStatesFolder(
            str(config.folder),
            tokenizer,
            layer_ids=config.layer_ids,
            keep_files=config.keep_files,
            timeout=config.timeout_seconds,
        )
    return CaptureReplica(
        str(config.url),
        str(config.folder),
        tokenizer,
        proxy=proxy,
        served_model=config.served_model,
        layer_ids=config.layer_ids,
        keep_files=config.keep_files,
        timeout=config.timeout_seconds,
        max_tokens=config.max_tokens,
        api_key_env=config.api_key_env,
    )


def _model(folder: str, config: SourceConfig) -> nn.Module:
    dtype: Any = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        device = torch.device(config.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"source.device = {config.device!r} cannot be used: {reason}. Use 'cpu'") from error
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(_unusable("local copy", folder, error)) from error
    loaded: nn.Module = model
    return loaded.to(device).eval()


def _tokenizer(folder: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(_unusable("tokenizer", folder, error)) from error


def _unusable(what: str, folder: str, error: Exception) -> str:
    there = "" if Path(folder).is_dir() else " (there is no such folder)"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"source.model: the {what} in {folder!r} cannot be loaded{there}: {reason}. Name a folder with a transformers "
        "checkpoint in safetensors and its tokenizer"
    )
