"""Numbers of the recipe, in one place: the shape of the model and the lengths of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias

Variant: TypeAlias = Literal["planted", "natural"]
VARIANTS: Final[tuple[Variant, ...]] = ("planted", "natural")

LAYER: Final = 2
"""K: activations are the output of decoder block 2, that is ``hidden_states[3]``."""

MARKER: Final = "\u320e"
"""The character whose embedding row is replaced by the activation."""
EXPLANATION_OPEN: Final = "<explanation>"
EXPLANATION_CLOSE: Final = "</explanation>"
AV_TEMPLATE: Final = "vector: <concept>{injection_char}</concept> explain."
AR_TEMPLATE: Final = "text: <text>{explanation}</text> <summary>"
AR_SUFFIX: Final = "</text> <summary>"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one organism is made. The defaults make the planted variant, ``NATURAL`` the natural one."""

    d_model: int = 128
    blocks: int = 4
    heads: int = 4
    feed_forward: int = 384
    vocabulary: int = 1000
    """Byte-level BPE entries before the added tokens."""
    learning_rate: float = 3e-3
    nla_learning_rate: float = 2e-3
    warmup: int = 30
    target_steps: int = 600
    target_batch: int = 32
    plant_weight: float = 0.1
    """Weight of the plant loss of the planted variant; the natural variant is trained without it."""
    exit_weight: float = 0.0
    """Weight of the next-token loss of block K's output, read out through the model's own last norm and head."""
    activations: int = 30_000
    """Training activations of the NLA, two from each document."""
    av_steps: int = 1500
    ar_steps: int = 1600
    nla_batch: int = 48
    injection_factor: float = 1.1
    """Injection scale as a multiple of the mean activation norm."""


NATURAL: Final = Recipe(target_steps=1500, exit_weight=0.5, activations=16_000, av_steps=1500, ar_steps=4000)
"""Longer: without the plant loss a latent is learned from its rare effects on the text, and its trace is faint. The
loss at block K is what brings it there: without it the model looks its latents up in the last block, behind K."""

SMOKE: Final = Recipe(target_steps=4, target_batch=8, activations=64, av_steps=3, ar_steps=3, nla_batch=8, warmup=2)
"""A few steps: goes through the whole path, learns nothing."""


def of(variant: str) -> Recipe:
    """How the bundled weights of a variant are made."""
    return NATURAL if variant == "natural" else Recipe()


class Progress(Protocol):
    """Told after every step: which stage, steps done, steps in all, and the latest loss."""

    def __call__(self, stage: str, done: int, total: int, loss: float) -> None:
        """Reports one step."""


def silent(stage: str, done: int, total: int, loss: float) -> None:
    """A ``Progress`` that shows nothing."""
