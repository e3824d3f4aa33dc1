"""Tiny models and batches of the capture matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3MoeConfig,
)

from tests.benchmarks.capture_matrix_data import Case

VOCAB, WIDTH, BLOCKS, LAYER = 64, 32, 2, 0
ROWS, LENGTH, TOKENS, STEPS = 2, 10, 3, 3
FIRST_WORD, PAD = 3, 2

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": PAD,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": WIDTH,
    "n_layer": BLOCKS,
    "n_head": 2,
    "n_positions": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": PAD,
    # Without dropout the reference forward sees what the training forward sees.
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_SIZES, **_EXPERTS),
    "gemma3": lambda: Gemma3TextConfig(**_SIZES, head_dim=16),
    "gpt2": lambda: GPT2Config(**_GPT2),
    "mistral": lambda: MistralConfig(**_SIZES),
    "phi3": lambda: Phi3Config(**_SIZES),
    "olmo2": lambda: Olmo2Config(**_SIZES),
}


def make_model(case: Case) -> Any:
    """The family's tiny model, always with the same weights, with checkpointing and adapters as the case wants."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[case.family](), attn_implementation="eager")
    if case.precision == "bf16":
        model = model.to(torch.bfloat16)
    if case.checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing == "reentrant"})
        model.enable_input_require_grads()
    if case.task == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0))
    return model


def batch(step: int, rank: int = 0) -> Tensor:
    """``[ROWS, LENGTH]`` token ids of one step of one rank."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randint(FIRST_WORD, VOCAB, (ROWS, LENGTH), generator=generator)
