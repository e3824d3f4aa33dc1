"""What a machine allows: bytes that greedy decoding must move, arithmetic that it must do, and measured rates."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from nla_monitor.nla.linear import use_onednn
from nla_monitor.nla.verbalizer_transformers import TransformersVerbalizer

_COPIED = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
_SIDE = {"cpu": 1536, "cuda": 8192}
_REPEATS = 9


@dataclass(frozen=True, slots=True)
class Work:
    """The least that one batch needs."""

    bytes: float
    flops: float


@dataclass(frozen=True, slots=True)
class Limits:
    """Measured rates of a device in a model's dtype."""

    bandwidth: float
    """Bytes per second of a large copy, reads and writes both counted."""
    arithmetic: float
    """Floating-point operations per second of a large matrix product."""


def least_work(av: TransformersVerbalizer, batch: int, tokens: int) -> Work:
    """Of one batch: what follows the prefix once, then a step for each further token.

    Weights are read once a forward pass (the embedding table is not), each row's KV once a step.
    """
    config: Any = av.model.config.get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head = config.hidden_size * config.vocab_size
    table = av.model.get_input_embeddings().weight.numel()
    total = sum(weight.numel() for weight in av.model.parameters())
    blocks = total - table - (0 if config.tie_word_embeddings else head)
    tail, prompt = len(av.prompt.ids) - av.prompt.marker, len(av.prompt.ids)
    seen = sum(range(prompt + 1, prompt + tokens))
    looked = seen + sum(range(av.prompt.marker + 1, prompt + 1))
    kept = 2 * config.num_key_value_heads * size * config.num_hidden_layers
    attention = 4 * config.num_attention_heads * size * config.num_hidden_layers * looked
    return Work(
        bytes=av.model.dtype.itemsize * (tokens * (blocks + head) + batch * kept * seen),
        flops=batch * (2.0 * blocks * (tail + tokens - 1) + 2.0 * head * tokens + attention),
    )


def measured_limits(model: torch.nn.Module) -> Limits:
    """Rates of the device that holds a model, in its dtype, with the threads that are set."""
    weight = next(model.parameters())
    kind = weight.device.type
    source = torch.ones(_COPIED[kind], dtype=torch.uint8, device=weight.device)
    target = torch.empty_like(source)
    left = torch.randn(_SIDE[kind], _SIDE[kind], dtype=weight.dtype, device=weight.device)
    square = torch.nn.Linear(_SIDE[kind], _SIDE[kind], bias=False, dtype=weight.dtype, device=weight.device)
    use_onednn(square)
    with torch.inference_mode():
        copy = _seconds(lambda: target.copy_(source), kind)
        multiply = _seconds(lambda: square(left), kind)
    return Limits(bandwidth=2 * _COPIED[kind] / copy, arithmetic=2.0 * _SIDE[kind] ** 3 / multiply)


def _seconds(work: Any, kind: str) -> float:
    taken = []
    for _ in range(_REPEATS):
        if kind == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if kind == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
