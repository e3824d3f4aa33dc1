"""AV and AR checkpoints of real shapes with random weights, in the released format, for the speed benchmarks.

The AV's prompt has the length of the released ones: 120 tokens, the marker at 93. Its end token's row of the language
head is zero, so that greedy decoding never ends early and every row gets all the tokens that are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import yaml
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PROMPT_TOKENS, MARKER_AT = 120, 93
MARKER = "\u320e"
_SPECIAL = ("<eos>", "<pad>", "<|user|>", "<|assistant|>", "<text>", "</text>", "<summary>", MARKER)
_WORDS = tuple(f"<w{number}>" for number in range(100))
_CHAT = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}<|assistant|>"
_SCALE = 3.0


@dataclass(frozen=True, slots=True)
class Size:
    """Shape of a model."""

    vocabulary: int
    width: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int


SIZES = {
    "tiny": Size(vocabulary=512, width=64, inner=96, blocks=3, heads=4, kv_heads=2),
    "50m": Size(vocabulary=4096, width=512, inner=2048, blocks=12, heads=8, kv_heads=2),
    "1b": Size(vocabulary=151_936, width=1536, inner=8960, blocks=28, heads=12, kv_heads=2),
    "7b": Size(vocabulary=152_064, width=3584, inner=18_944, blocks=28, heads=28, kv_heads=4),
}


def write_av(folder: Path, size: Size, device: str = "cpu") -> Path:
    """An AV of a size; float32 on disk where it is made on the CPU, else bfloat16."""
    tokenizer, model = _tokenizer(), _model(size, size.blocks, device, seed=0)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_sidecar(folder, tokenizer, size, "av")
    return folder


def write_ar(folder: Path, size: Size, device: str = "cpu") -> Path:
    """Its AR: two thirds of the blocks, as layer 20 of 28 has it, and a head."""
    model = _model(size, _layer(size) + 1, device, seed=1).model
    model.save_pretrained(folder)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    head = torch.randn(size.width, size.width, generator=torch.Generator().manual_seed(1))
    save_file({"weight": head / math.sqrt(size.width)}, folder / "value_head.safetensors")
    _write_sidecar(folder, tokenizer, size, "ar")
    return folder


def vectors(count: int, width: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """``[count, width]`` random activations."""
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def texts(count: int, words: int, seed: int = 0) -> list[str]:
    """Different texts in the tokenizer's words, a quarter shorter to a quarter longer than ``words``."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(words * 3 // 4, words * 5 // 4 + 1, count)
    return ["".join(rng.choice(_WORDS, length)) for length in lengths]


def _layer(size: Size) -> int:
    return max(0, size.blocks * 2 // 3 - 1)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, and whole words as one token each: the length of a prompt is then what it is written to be."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens([AddedToken(token, normalized=False) for token in (*_SPECIAL, *_WORDS)])
    named = {"eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **named)
    tokenizer.chat_template = _CHAT
    return tokenizer


def _words(count: int) -> str:
    return "".join(_WORDS[number % len(_WORDS)] for number in range(count))


def _templates() -> dict[str, str]:
    before, after = _words(MARKER_AT - 1), _words(PROMPT_TOKENS - MARKER_AT - 2)
    return {"av": f"{before}{{injection_char}}{after}", "ar": "<w1><w2><text>{explanation}</text><summary>"}


def _model(size: Size, blocks: int, device: str, seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=blocks,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=1 / math.sqrt(size.width),
        dtype=torch.float32 if device == "cpu" else torch.bfloat16,
    )
    usual = torch.get_default_dtype()
    torch.set_default_dtype(config.dtype)
    try:
        with torch.device(device):
            return Qwen2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(usual)


def _write_sidecar(folder: Path, tokenizer: PreTrainedTokenizerFast, size: Size, role: str) -> None:
    left, marker, right = _ids(tokenizer, (_WORDS[MARKER_AT - 2], MARKER, _WORDS[0]))
    content = {
        "kind": "nla_model",
        "schema_version": 2,
        "role": role,
        "stage": "rl",
        "base_checkpoint": "benchmarks/random",
        "d_model": size.width,
        "extraction_layer_index": _layer(size),
        "extraction": {
            "injection_scale": _SCALE * math.sqrt(size.width) if role == "av" else None,
            "mse_scale": math.sqrt(size.width),
        },
        "tokens": {
            "injection_char": MARKER,
            "injection_token_id": marker,
            "injection_left_neighbor_id": left,
            "injection_right_neighbor_id": right,
            "critic_suffix_ids": _ids(tokenizer, ("</text>", "<summary>")) if role == "ar" else None,
        },
        "prompt_templates": _templates(),
        "critic": {"extraction_layer_index": _layer(size)},
    }
    (folder / "nla_meta.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")


def _ids(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> list[int]:
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]
