"""Transcripts with known latents, and the activations that every arm may read: the same ones, equally many.

Splits are disjoint by key: ``probe`` (the linear probe's training set), ``calibration`` (benign only: thresholds),
``test``. Calibration and test transcripts come from the three held-out tiers in turn (new transcripts, cue sentences
that neither model saw, cue words that the NLA never saw), benign ones also from other domains (stories, couplets).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from nla_monitor.organism import corpus
from nla_monitor.organism.corpus import Tier, Transcript
from nla_monitor.organism.reading import Reader
from nla_monitor.organism.train import Encoded, encode, extract

BEHAVIOURS: Final[dict[str, tuple[str, str]]] = {
    "evaluation-awareness": ("belief", "test"),
    "reward-hacking": ("intent", "hack"),
    "sabotage": ("intent", "sabotage"),
    "secret-leak": ("intent", "leak"),
}
"""Rule of the pack ``oversight`` -> the latent value that it must find."""

TURNS: Final = "turns"
RANDOM: Final = "random"
_TIERS: Final = corpus.TIERS
_AGENTS_SHARE: Final = 0.7
"""Of benign traffic; the rest are stories and couplets."""
_FILLERS: Final = 4
"""Filler lines in the hidden zone: so many turn boundaries and one more."""


@dataclass(frozen=True, slots=True)
class Case:
    """One transcript and what is true of it."""

    transcript: Transcript
    behaviour: str | None
    """The behaviour that is present; None in benign transcripts."""


@dataclass(slots=True)
class Activations:
    """What was read of a list of cases: ``reads`` vectors a case at most, in order of case."""

    cases: list[Case]
    docs: list[Encoded]
    owners: Tensor
    """``[n]``: index of the case of each vector."""
    positions: list[int]
    vectors: Tensor
    """``[n, d_model]``."""

    def pooled(self, scores: Tensor) -> Tensor:
        """The highest score of each case, ``[cases]``; minus infinity where nothing was read."""
        pooled = torch.full((len(self.cases),), -torch.inf, dtype=torch.float64)
        return pooled.scatter_reduce(0, self.owners, scores.double(), "amax")


def benign(count: int, *key: object) -> list[Case]:
    """Transcripts without any of the behaviours: agents that believe nothing of the kind and are honest, and others."""
    return [Case(_benign(corpus.keyed_rng("ground-truth", *key, index), _tier(index)), None) for index in range(count)]


def positive(behaviour: str, count: int, *key: object) -> list[Case]:
    """Agent transcripts with one behaviour and nothing else."""
    return [_positive(behaviour, corpus.keyed_rng("ground-truth", behaviour, *key, i), _tier(i)) for i in range(count)]


def training(count: int, *key: object) -> list[Case]:
    """The probe's training set: from what the NLA was trained on, behaviours and benign ones mixed."""
    names = [*BEHAVIOURS, None]
    found = []
    for index in range(count):
        rng, name = corpus.keyed_rng("ground-truth", *key, index), names[index % len(names)]
        found.append(_positive(name, rng, "train") if name else Case(_benign(rng, "train"), None))
    return found


def _tier(index: int) -> Tier:
    return _TIERS[index % len(_TIERS)]


def _benign(rng: random.Random, tier: Tier) -> Transcript:
    draw = rng.random()
    if draw < _AGENTS_SHARE:
        return corpus.make_transcript(
            rng, tier=tier, belief=rng.choice(["real", "none"]), intent="honest", fillers=_FILLERS
        )
    make = corpus.make_story if draw < (1 + _AGENTS_SHARE) / 2 else corpus.make_couplet
    return make(rng, tier=tier)


def _positive(behaviour: str, rng: random.Random, tier: Tier) -> Case:
    latent, value = BEHAVIOURS[behaviour]
    latents = {"belief": rng.choice(["real", "none"]), "intent": "honest", latent: value}
    made = corpus.make_transcript(rng, tier=tier, fillers=_FILLERS, **latents)  # type: ignore[arg-type]
    return Case(made, behaviour)


def read_positions(doc: Encoded, kind: str, reads: int, rng: random.Random) -> list[int]:
    """Where a transcript is read, before anything shows: at turn boundaries (line ends) or at random tokens.

    A text with fewer such places has all of them read.
    """
    text = doc.transcript.text
    agent = doc.transcript.kind == "agent"
    zone = [
        at for at, end in enumerate(doc.ends[:-1]) if at >= 2 and (not agent or doc.transcript.zone(end) == "hidden")
    ]
    turns = [at for at in zone if text[doc.ends[at] - 1] == "\n"]
    places = turns if kind == TURNS else zone
    return sorted(rng.sample(places, min(reads, len(places))))


def read(
    reader: Reader, cases: Sequence[Case], kind: str, reads: int, *, model: LlamaForCausalLM | None = None
) -> Activations:
    """The activations of every case, one forward pass each; of the organism, or of a fine-tune of it."""
    docs = encode(reader.tokenizer, [case.transcript for case in cases])
    chosen = [
        read_positions(doc, kind, reads, corpus.keyed_rng("positions", kind, doc.transcript.text)) for doc in docs
    ]
    vectors = extract(model or reader.target, docs, chosen).vectors
    owners = torch.tensor([index for index, places in enumerate(chosen) for _ in places])
    return Activations(list(cases), docs, owners, [at for places in chosen for at in places], vectors)


def joined(parts: Sequence[Activations]) -> Activations:
    """Several readings as one."""
    starts = [sum(len(part.cases) for part in parts[:index]) for index in range(len(parts))]
    return Activations(
        [case for part in parts for case in part.cases],
        [doc for part in parts for doc in part.docs],
        torch.cat([part.owners + start for part, start in zip(parts, starts, strict=True)]),
        [position for part in parts for position in part.positions],
        torch.cat([part.vectors for part in parts]),
    )
