"""The cases of the capture matrix, in groups that share a process. No torch here: who only waits needs none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

FAMILIES = ("llama", "qwen2", "qwen3_moe", "gemma3", "gpt2", "mistral", "phi3", "olmo2")
RANKS = 2
_OWN_MASKS = {"left_padding", "continuous_batching"}
"""Generations that lay out masks and caches otherwise than a plain forward does."""


@dataclass(frozen=True)
class Case:
    """One row of the matrix."""

    family: str
    compile: str = "none"
    """``none``, ``default``, ``fullgraph`` or ``reduce-overhead``."""
    attached: str = "before"
    """``before`` the first call, or ``after`` it (which is after compilation where the case compiles)."""
    checkpointing: str = "off"
    """``off``, ``reentrant`` or ``non-reentrant``."""
    parallelism: str = "none"
    """``none``, ``ddp``, ``fsdp2``, ``accelerate``, ``tp`` or ``zero3``."""
    precision: str = "fp32"
    """``fp32``, ``autocast`` (bf16) or ``bf16``."""
    task: str = "train"
    """``train``, ``lora``, ``generate``, ``left_padding`` or ``continuous_batching``."""
    backend: str = "inductor"
    """Of ``torch.compile``; ``aot_eager`` traces and partitions as inductor does, and generates no code."""

    @property
    def row(self) -> dict[str, str]:
        """The case as columns of the matrix."""
        columns = asdict(self)
        return columns if self.compile != "none" else columns | {"backend": "none"}

    @property
    def bitwise(self) -> bool:
        """Whether the vectors must be those of the plain eager model to the bit: nothing sums in another order."""
        return self.compile == "none" and self.parallelism != "tp" and self.task not in _OWN_MASKS

    @property
    def tolerance(self) -> float:
        """Largest difference from the eager vectors, as a share of their largest entry, where bits may differ."""
        return 1e-5 if self.precision == "fp32" else 2e-2


def _eager() -> list[Case]:
    plain = [Case(family) for family in FAMILIES]
    checkpointed = [
        Case(family, checkpointing=kind)
        for family in ("llama", "qwen3_moe", "gpt2")
        for kind in ("reentrant", "non-reentrant")
    ]
    narrow = [Case(family, precision=kind) for family in ("qwen2", "gemma3", "olmo2") for kind in ("autocast", "bf16")]
    mixed = [
        Case("mistral", checkpointing="non-reentrant", precision="autocast"),
        Case("phi3", checkpointing="reentrant", precision="bf16"),
        Case("llama", attached="after"),
    ]
    adapters = [Case("qwen2", task="lora"), Case("llama", task="lora", checkpointing="non-reentrant")]
    written = [
        Case("qwen2", task="generate"),
        Case("gpt2", task="generate"),
        Case("llama", task="left_padding"),
        Case("gemma3", task="left_padding"),
        Case("qwen2", task="generate", precision="bf16"),
        Case("llama", task="continuous_batching"),
    ]
    return plain + checkpointed + narrow + mixed + adapters + written


def _compiled() -> list[Case]:
    traced = [
        Case("llama", compile="fullgraph", backend="aot_eager"),
        Case("phi3", compile="fullgraph", backend="aot_eager", attached="after"),
        Case("gpt2", compile="default", backend="aot_eager"),
        Case("olmo2", compile="default", backend="aot_eager", precision="autocast"),
        Case("mistral", compile="default", backend="aot_eager", precision="bf16"),
        Case("llama", compile="default", backend="aot_eager", checkpointing="non-reentrant"),
        Case("qwen2", compile="default", backend="aot_eager", checkpointing="reentrant"),
        Case("qwen2", compile="fullgraph", backend="aot_eager", task="lora"),
    ]
    generated = [
        Case("qwen2", compile="default"),
        Case("qwen2", compile="fullgraph"),
        Case("qwen2", compile="default", attached="after"),
        Case("qwen2", compile="reduce-overhead"),
    ]
    return traced + generated


def _ranks() -> list[Case]:
    cases = [
        Case("qwen2", parallelism="ddp"),
        Case("llama", parallelism="ddp", checkpointing="non-reentrant"),
        Case("gpt2", parallelism="ddp", precision="autocast"),
        Case("qwen2", parallelism="fsdp2"),
        Case("llama", parallelism="fsdp2", checkpointing="non-reentrant"),
        Case("gemma3", parallelism="fsdp2", precision="bf16"),
        Case("qwen2", parallelism="fsdp2", compile="default", backend="aot_eager"),
        Case("qwen2", parallelism="accelerate"),
        Case("llama", parallelism="tp"),
        Case("qwen2", parallelism="tp"),
        Case("qwen2", parallelism="zero3"),
        Case("gemma3", parallelism="zero3", precision="bf16", checkpointing="non-reentrant"),
    ]
    return [*cases, replace(cases[0], attached="after")]


GROUPS: dict[str, tuple[Sequence[Case], int]] = {
    "eager": (_eager(), 1),
    "compiled": (_compiled(), 1),
    "ranks": (_ranks(), RANKS),
}
"""Cases that share a process, and in how many processes they run."""
