"""The bundled model organism: a small causal LM whose latent states are known, and its NLA pair.

Two variants ship with the package. ``planted``: every latent is present at every token, and the AV reads it.
``natural``: trained on text alone; it knows its latents at line ends only and its AV states them everywhere, which
makes it the negative control of whatever claims to be trustworthy. ``CARD.md`` beside this file holds what was measured
and what such a small model does not prove.

A checkpoint has a short name, ``organism:planted/av``, which ``resolve`` turns into a folder. Importing this package
does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nla_monitor.errors import CheckpointError, ConfigError
from nla_monitor.organism.corpus import (
    Transcript,
    Visible,
    agent_prompt,
    grade,
    keyed_rng,
    make_transcript,
    mentions_evaluation,
    parse_tool_call,
    tool_result,
)
from nla_monitor.organism.recipe import LAYER, VARIANTS

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "LAYER",
    "PREFIX",
    "VARIANTS",
    "WEIGHTS",
    "OrganismPaths",
    "Transcript",
    "Visible",
    "agent_prompt",
    "grade",
    "keyed_rng",
    "load_target",
    "make_transcript",
    "mentions_evaluation",
    "parse_tool_call",
    "paths",
    "resolve",
    "tool_result",
]

PREFIX: Final = "organism:"
WEIGHTS: Final = Path(__file__).parent / "weights"
_ROLES: Final = ("target", "av", "ar")


@dataclass(frozen=True, slots=True)
class OrganismPaths:
    """Checkpoint folders of one variant."""

    target: Path
    av: Path
    ar: Path


def paths(variant: str = "planted", *, root: Path | None = None) -> OrganismPaths:
    """The folders of a variant.

    Args:
        variant: ``planted`` or ``natural``.
        root: Folder of a rebuilt organism (``organism.build --out``); the bundled weights by default.

    Raises:
        ConfigError: there is no such variant.
        CheckpointError: its weights are not there.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"organism variant {variant!r} is not one of {', '.join(VARIANTS)}")
    base = (root or WEIGHTS) / variant
    found = OrganismPaths(*(base / role for role in _ROLES))
    for folder in (found.target, found.av, found.ar):
        if not (folder / "model.safetensors").is_file():
            raise CheckpointError(f"no weights in {folder}. Rebuild them: python -m nla_monitor.organism.build")
    return found


def resolve(name: str) -> Path:
    """The folder of ``organism:planted/av`` and the like; any other name is taken as a path.

    ``organism:planted`` alone is the target model.

    Raises:
        ConfigError: the name starts with ``organism:`` but names no variant and role.
        CheckpointError: its weights are not there.
    """
    if not name.startswith(PREFIX):
        return Path(name)
    variant, _, role = name.removeprefix(PREFIX).partition("/")
    role = role or "target"
    if role not in _ROLES:
        raise ConfigError(f"{name!r}: the part after the slash must be one of {', '.join(_ROLES)}")
    folder: Path = getattr(paths(variant), role)
    return folder


def load_target(
    variant: str = "planted", *, root: Path | None = None
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The target model (float32, evaluation mode) and its tokenizer.

    Raises:
        ConfigError: there is no such variant.
        CheckpointError: its weights are not there.
    """
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: PLC0415 - importing this package must stay light

    folder = paths(variant, root=root).target
    model = LlamaForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    return model, PreTrainedTokenizerFast.from_pretrained(folder)
