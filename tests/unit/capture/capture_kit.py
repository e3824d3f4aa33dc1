"""What the capture tests share: tiny models, a capture with a list for a sink, a word tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from nla_monitor.capture import Capture
from nla_monitor.capture.screens import Screens
from nla_monitor.config import CaptureConfig, QueueConfig
from nla_monitor.guard import Guard
from nla_monitor.records import ActivationSample

VOCAB = 64
BLOCKS = 3
D_MODEL = 32
BOS, EOS, PAD = 0, 1, 2
FIRST_WORD = 3

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
_PLAIN = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": D_MODEL,
    "n_layer": BLOCKS,
    "n_head": 2,
    "n_positions": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "qwen3": lambda: Qwen3Config(**_SIZES, head_dim=16),
    "mistral": lambda: MistralConfig(**_SIZES),
    "gemma2": lambda: Gemma2Config(**_SIZES, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(**_SIZES, head_dim=16),
    "gpt2": lambda: GPT2Config(**_GPT2),
    "gpt_neox": lambda: GPTNeoXConfig(**_PLAIN),
}


def make_model(family: str = "qwen2", *, seed: int = 0) -> Any:
    """A tiny random causal language model in eval mode; attention without dropout, eager kernels."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation="eager").eval()


def token_batch(rows: int = 3, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    """``[rows, length]`` ordinary token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, VOCAB, (rows, length), generator=generator)


def left_pad(sequences: Sequence[torch.Tensor], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of sequences of different lengths."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), PAD)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        where = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[row, where], mask[row, where] = sequence, 1
    return ids, mask


def word_tokenizer() -> PreTrainedTokenizerFast:
    """``<bos> <eos> <pad> w3 w4 ...``: one token a word."""
    words = ["<bos>", "<eos>", "<pad>", *(f"w{index}" for index in range(FIRST_WORD, VOCAB))]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[PAD]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=words[BOS],
        eos_token=words[EOS],
        pad_token=words[PAD],
        unk_token=words[PAD],
    )


class Captured:
    """A capture on a model, and what came out of it."""

    def __init__(
        self,
        model: nn.Module | None,
        *,
        layer: int | Sequence[int] = 1,
        sink: Callable[[Sequence[ActivationSample]], None] | None = None,
        queue: QueueConfig | None = None,
        tokenizer: Any = None,
        screens: Screens | None = None,
        **config: Any,
    ) -> None:
        self.got: list[ActivationSample] = []
        self.guard = Guard()
        self.drops: list[tuple[str, int]] = []
        self.capture = Capture(
            CaptureConfig(**{"skip_first": 0} | config),  # these sequences are short
            run_id="run",
            layer=layer,
            sink=sink or self.got.extend,
            guard=self.guard,
            queue=queue or QueueConfig(write_interval_seconds=0.01),
            tokenizer=tokenizer,
            screens=screens,
            on_dropped=lambda reason, number: self.drops.append((reason, number)),
        )
        if model is not None:
            self.capture.attach(model)

    def samples(self) -> list[ActivationSample]:
        """Everything captured so far, taken out."""
        assert self.capture.flush(10.0)
        got, self.got[:] = list(self.got), []
        return got


@contextmanager
def capturing(model: nn.Module | None, **arguments: Any) -> Iterator[Captured]:
    """A capture that is closed at the end of the block."""
    captured = Captured(model, **arguments)
    try:
        yield captured
    finally:
        captured.capture.close(5.0)


def places(samples: Sequence[ActivationSample]) -> set[tuple[str, int, str]]:
    """Which positions were read, without what was read there."""
    return {(sample.sequence_id, sample.position, sample.trigger) for sample in samples}
