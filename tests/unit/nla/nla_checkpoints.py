"""Makes small random AV and AR checkpoints in the released format, and computes by hand what they must give.

Three shapes: ``qwen2`` (no BOS, tags are plain text that merges in BPE), ``llama`` (BOS, tags are single tokens) and
``gemma3`` (BOS, scaled embedding, sliding-window blocks).
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nla_monitor.config import NLAConfig

CONFIG = NLAConfig(max_new_tokens=24, batch_size=8)
FAMILIES = ("qwen2", "llama", "gemma3")
WIDTH = 32
BLOCKS = 4
LAYER = 1
SCALES = {"qwen2": 3.0, "llama": 1.5, "gemma3": 40.0}
END_BIAS = {"qwen2": 2.2, "llama": 1.4, "gemma3": 1.6}
MARKER = "\u320e"
TAGS = ("<explanation>", "</explanation>", "<text>", "</text>", "<summary>")
AV_TEMPLATE = "Here is a vector: <concept>{injection_char}</concept>. Explain it."
AR_TEMPLATE = "Summary of the text: <text>{explanation}</text> <summary>"
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_CORPUS = [
    "Here is a vector: <concept>x</concept>. Explain it.",
    "Summary of the text: <text>A log of failing tests.</text> <summary>",
    "<explanation>Agent transcript. The model suspects a test.</explanation>",
] * 20


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE; for llama and gemma3 the tags are single tokens and a BOS is put first."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([part for text in _CORPUS for part in (text, *text.split())], trainer)
    core.add_special_tokens([AddedToken(token, normalized=False) for token in ("<pad>", "<eos>", "<bos>", "<|end|>")])
    core.add_tokens([AddedToken(tag, normalized=False) for tag in (() if family == "qwen2" else TAGS)])
    core.add_tokens([AddedToken(MARKER, normalized=False)])
    with_bos = family != "qwen2"
    if with_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
        )
    special = {"pad_token": "<pad>", "eos_token": "<eos>"} | ({"bos_token": "<bos>"} if with_bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    tokenizer.chat_template = CHAT
    return tokenizer


def _model(family: str, seed: int, blocks: int) -> PreTrainedModel:
    tokenizer = tokenizer_of(family)
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 5,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**common))
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**common))
    # A window shorter than the prompt and two kinds of blocks, as in the real ones.
    return Gemma3ForCausalLM(
        Gemma3TextConfig(**common, head_dim=8, query_pre_attn_scalar=1, sliding_window=16, sliding_window_pattern=2)
    )


def write_av(folder: Path, family: str, *, seed: int = 0) -> Path:
    """An AV whose random head is biased towards its end tokens, so that rows end at different lengths."""
    tokenizer, model = tokenizer_of(family), _model(family, seed, BLOCKS)
    ends = {token for token in (tokenizer.eos_token_id, closing_id(family)) if token is not None}
    with torch.no_grad():
        model.lm_head.weight[sorted(ends)] *= END_BIAS[family]
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_sidecar(folder, sidecar(family, "av"))
    return folder


def write_ar(folder: Path, family: str, *, seed: int = 1) -> Path:
    """An AR: the first K + 1 blocks, a value head, the sidecar."""
    model = _model(family, seed, LAYER + 1).model
    model.save_pretrained(folder)
    tokenizer_of(family).save_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    save_file({"weight": torch.randn(WIDTH, WIDTH, generator=generator)}, folder / "value_head.safetensors")
    write_sidecar(folder, sidecar(family, "ar"))
    return folder


def closing_id(family: str) -> int | None:
    """The closing tag's id where it is one token."""
    ids = tokenizer_of(family).encode("</explanation>", add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None


def prompt_ids(family: str) -> list[int]:
    """The AV prompt by hand: the chat template written out, then ids without special tokens."""
    content = AV_TEMPLATE.replace("{injection_char}", MARKER)
    text = f"<|user|>\n{content}<|end|>\n<|assistant|>\n"
    return list(tokenizer_of(family).encode(text, add_special_tokens=False))


def marker_position(family: str) -> int:
    """Where the marker stands in ``prompt_ids``."""
    return prompt_ids(family).index(tokenizer_of(family).convert_tokens_to_ids(MARKER))


def sidecar(family: str, role: str) -> dict[str, Any]:
    """``nla_meta.yaml`` in the released format, schema 2."""
    ids, at = prompt_ids(family), marker_position(family)
    suffix = tokenizer_of(family).encode("</text> <summary>", add_special_tokens=False)
    return {
        "kind": "nla_model",
        "schema_version": 2,
        "role": role,
        "stage": "rl",
        "base_checkpoint": f"tests/{family}",
        "d_model": WIDTH,
        "extraction_layer_index": LAYER,
        "extraction": {"injection_scale": SCALES[family] if role == "av" else None, "mse_scale": math.sqrt(WIDTH)},
        "tokens": {
            "injection_char": MARKER,
            "injection_token_id": ids[at],
            "injection_left_neighbor_id": ids[at - 1],
            "injection_right_neighbor_id": ids[at + 1],
            "critic_suffix_ids": list(suffix) if role == "ar" else None,
        },
        "prompt_templates": {"av": AV_TEMPLATE, "ar": AR_TEMPLATE},
        "critic": {"extraction_layer_index": LAYER},
    }


def write_sidecar(folder: Path, content: object) -> None:
    (folder / "nla_meta.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")


def edit_sidecar(folder: Path, path: str, value: object) -> None:
    """Sets (or, with ``...``, removes) one dotted field."""
    content = yaml.safe_load((folder / "nla_meta.yaml").read_text(encoding="utf-8"))
    *parents, last = path.split(".")
    part = content
    for key in parents:
        part = part.setdefault(key, {})
    if value is ...:
        part.pop(last, None)
    else:
        part[last] = value
    write_sidecar(folder, content)


def plain_blocks(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Llama / Qwen2 blocks in plain PyTorch, ``[tokens, d] -> [tokens, d]``: no final norm, no cache, one sequence."""
    backbone = getattr(model, "model", model)
    weights = {name: value.float() for name, value in backbone.state_dict().items()}
    config = model.config
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    theta = config.rope_parameters["rope_theta"]
    angles = torch.outer(torch.arange(len(hidden)).float(), theta ** -(torch.arange(0, size, 2).float() / size))
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * weights[name]

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def rotate(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-right, left], -1) * sin

    mask = torch.full((len(hidden), len(hidden)), -torch.inf).triu(1)
    for block in range(config.num_hidden_layers):
        at = f"layers.{block}"
        x = norm(hidden, f"{at}.input_layernorm.weight")
        query, key, value = (
            linear(x, f"{at}.self_attn.{name}_proj").view(len(x), -1, size).transpose(0, 1) for name in "qkv"
        )
        key, value = (part.repeat_interleave(heads // groups, dim=0) for part in (rotate(key), value))
        scores = rotate(query) @ key.transpose(1, 2) / math.sqrt(size) + mask
        mixed = (scores.softmax(-1) @ value).transpose(0, 1).reshape(len(x), -1)
        hidden = hidden + linear(mixed, f"{at}.self_attn.o_proj")
        x = norm(hidden, f"{at}.post_attention_layernorm.weight")
        gated = functional.silu(linear(x, f"{at}.mlp.gate_proj")) * linear(x, f"{at}.mlp.up_proj")
        hidden = hidden + linear(gated, f"{at}.mlp.down_proj")
    return hidden


def plain_prompt(model: PreTrainedModel, family: str, vector: Tensor) -> Tensor:
    """Prompt embeddings with the injected row, ``[tokens, d]``, from the documented rule."""
    table = model.get_input_embeddings().weight.detach()
    rows = table[torch.tensor(prompt_ids(family))]
    if family == "gemma3":
        rows = rows * torch.tensor(math.sqrt(WIDTH))
    rows[marker_position(family)] = vector * SCALES[family] / vector.norm()
    return rows


@torch.no_grad()
def plain_greedy(model: PreTrainedModel, family: str, vector: Tensor, limit: int, stop: set[int]) -> list[int]:
    """Greedy tokens for one vector: no batch, no cache, everything computed anew for every token."""
    rows, tokens = plain_prompt(model, family, vector), list[int]()
    table = model.get_input_embeddings().weight
    while len(tokens) < limit and not (tokens and tokens[-1] in stop):
        if family == "gemma3":
            logits = model(inputs_embeds=rows[None], use_cache=False).logits[0, -1]
        else:
            last = plain_blocks(model, rows)[-1]
            normed = last * torch.rsqrt(last.pow(2).mean() + model.config.rms_norm_eps) * model.model.norm.weight
            logits = model.lm_head(normed)
        tokens.append(int(logits.argmax()))
        added = table[tokens[-1]] * (math.sqrt(WIDTH) if family == "gemma3" else 1.0)
        rows = torch.cat([rows, added[None]])
    return tokens
