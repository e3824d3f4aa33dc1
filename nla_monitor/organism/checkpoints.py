"""Writes an organism's checkpoints in the layout of the released NLAs.

``target/``: model, tokenizer, and ``plant_heads.safetensors`` (the linear readers of the plant loss, keys
``readers.<latent>.weight|bias``; classes in ``train.LABELS``).
``av/``: model, tokenizer, ``nla_meta.yaml``.
``ar/``: the truncated model (its final norm is saved but is to be replaced by the identity), tokenizer,
``nla_meta.yaml``,
``value_head.safetensors`` (key ``weight``, ``[d_model, d_model]``, no bias) and ``activation_stats.safetensors``:

- ``mean`` ``[d_model]``: mean of the unit-normalised training activations,
- ``mean_raw`` ``[d_model]``: mean of the raw ones,
- ``norm_quantiles`` ``[5]``: raw norms at 0.5, 25, 50, 75 and 99.5 %,
- ``cosine_quantiles`` ``[3]``: cosine of the AR on true captions of the training activations at 1, 5 and 50 %.

The FVE denominator (variance of the unit-normalised training activations about their mean) stands in the sidecar's
``training`` map as ``fve_denominator`` with ``fve_denominator_name: training``.
Weights are float16 on disk; ``config.json`` says float32, so that an ordinary load computes in float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nla_monitor.organism import recipe
from nla_monitor.organism.recipe import LAYER
from nla_monitor.organism.train import PlantHeads, Reconstruct, av_prompt

AV_MAX_NEW_TOKENS = 112


def round_to_disk(model: torch.nn.Module) -> None:
    """Rounds all weights to what float16 files will hold, so that later stages see the model that ships."""
    model.half().float()


def write_target(folder: Path, model: LlamaForCausalLM, heads: PlantHeads, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes the target model, its tokenizer and the plant heads."""
    _write_model(folder, model, tokenizer)
    save_file(
        {name: value.half().contiguous() for name, value in heads.state_dict().items()},
        folder / "plant_heads.safetensors",
    )


def write_av(
    folder: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    injection_scale: float,
    training: Mapping[str, object],
) -> None:
    """Writes the AV with its sidecar."""
    close = tokenizer.convert_tokens_to_ids(recipe.EXPLANATION_CLOSE)
    generation = GenerationConfig(  # type: ignore[no-untyped-call] # transformers leaves it untyped
        do_sample=False,
        max_new_tokens=AV_MAX_NEW_TOKENS,
        eos_token_id=[tokenizer.eos_token_id, close],
        pad_token_id=tokenizer.pad_token_id,
    )
    _write_model(folder, model, tokenizer, generation)
    _write_sidecar(folder, _sidecar("av", model, tokenizer, injection_scale, training))


def write_ar(
    folder: Path,
    model: Reconstruct,
    tokenizer: PreTrainedTokenizerFast,
    *,
    statistics: Mapping[str, Tensor],
    training: Mapping[str, object],
) -> None:
    """Writes the AR with value head, activation statistics and sidecar."""
    _write_model(folder, model.trunk, tokenizer)
    save_file({"weight": model.value_head.weight.detach().half().contiguous()}, folder / "value_head.safetensors")
    save_file(
        {name: value.float().contiguous() for name, value in statistics.items()},
        folder / "activation_stats.safetensors",
    )
    _write_sidecar(folder, _sidecar("ar", model.trunk, tokenizer, None, training))


def activation_statistics(vectors: Tensor) -> tuple[dict[str, Tensor], float]:
    """Statistics of raw activations ``[n, d_model]``, and the FVE denominator.

    The denominator is the mean of ``||v/|v| - mean||^2`` with ``mean`` over the same unit vectors.
    """
    unit = functional.normalize(vectors, dim=-1)
    mean = unit.mean(0)
    denominator = float((unit - mean).pow(2).sum(-1).mean())
    norms = vectors.norm(dim=-1).quantile(torch.tensor([0.005, 0.25, 0.5, 0.75, 0.995]))
    return {"mean": mean, "mean_raw": vectors.mean(0), "norm_quantiles": norms}, denominator


def _write_model(
    folder: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    generation: GenerationConfig | None = None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.half().contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_diff_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
        "num_hidden_layers": model.config.num_hidden_layers,
    }
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    generation = generation or GenerationConfig(**ends)  # type: ignore[no-untyped-call] # transformers leaves it untyped
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sidecar(
    role: str,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    injection_scale: float | None,
    training: Mapping[str, object],
) -> dict[str, object]:
    prompt, marker = av_prompt(tokenizer)
    width = int(model.config.hidden_size)
    suffix = tokenizer(recipe.AR_SUFFIX, add_special_tokens=False)["input_ids"]
    return {
        "kind": "nla_model",
        "schema_version": 2,
        "role": role,
        "stage": "sft",
        "created_by": "nla_monitor.organism.build",
        "d_model": width,
        "extraction_layer_index": LAYER,
        "extraction": {"injection_scale": injection_scale, "mse_scale": math.sqrt(width)},
        "tokens": {
            "injection_char": recipe.MARKER,
            "injection_token_id": prompt[marker],
            "injection_left_neighbor_id": prompt[marker - 1],
            "injection_right_neighbor_id": prompt[marker + 1],
            "critic_suffix_ids": suffix if role == "ar" else None,
        },
        "prompt_templates": {"av": recipe.AV_TEMPLATE, "ar": recipe.AR_TEMPLATE},
        "critic": {"extraction_layer_index": LAYER},
        "training": dict(training),
    }


def _write_sidecar(folder: Path, content: Mapping[str, object]) -> None:
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    (folder / "nla_meta.yaml").write_text(text, encoding="utf-8")
