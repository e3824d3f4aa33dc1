"""``evidence`` of a rule: which controls a match must pass before it counts, with their thresholds.

Controls run on matches only. One that a rule names is required; the others are measured for the reading that an alert
shows, and shown with it.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, Field, StrictInt

from nla_monitor.rules.section import Section, Texts

Alternatives = Texts


class Control(Section):
    """A required control."""

    missing: Literal["keep", "refute"] = Field(
        "keep", description="what becomes of a match whose control cannot be measured: it counts, or it is refuted"
    )


class SwapMargin(Control):
    """The claim must reconstruct the activation better than what else could stand in its place."""

    min: float = Field(0.02, ge=-2, le=2, description="least cosine lead over the best alternative")
    alternatives: Alternatives = Field(
        (),
        max_length=32,
        description="sentences that replace the one with the quote; when none: omission, stock sentences, negation",
    )


class ClaimProbability(Control):
    """The AV's own probability of the claim against its alternatives; not measured where a rule names none."""

    min: float = Field(0.5, ge=0, le=1)
    alternatives: Alternatives = Field((), max_length=32, description="as in swap_margin, whose list is the default")


class Echo(Control):
    """Share of the quote's content words that stand in the text that the model saw or wrote."""

    max: float = Field(0.5, ge=0, le=1)


class PredictionEcho(Control):
    """Share of the quote's content words that the model writes next: a forecast of its text, not a thought."""

    max: float = Field(0.8, ge=0, le=1)


class Agreement(Control):
    """Share of resampled explanations that meet the rule, too."""

    min: float = Field(0.5, ge=0, le=1)
    resamples: StrictInt = Field(5, ge=1, le=64)
    temperature: float = Field(1.0, gt=0, le=5)


class Neighbours(Control):
    """Share of the sampled tokens close by, in the same pass over the same sequence, that meet the rule, too."""

    min: float = Field(0.5, ge=0, le=1)
    within: StrictInt = Field(8, ge=1, le=1000, description="tokens to either side")


class Ablation(Control):
    """Rank of the claim when each sentence is dropped in turn: 1 costs the most cosine. A rank, no proof."""

    max_rank: StrictInt = Field(2, ge=1, le=32)


class NullPercentile(Control):
    """Share of null readings (shuffled, random, mean, wrong layer) whose fidelity is lower."""

    min: float = Field(0.95, ge=0, le=1)


class NullMatchRate(Control):
    """Share of null readings (random directions) that meet the rule: an AV says something of any vector."""

    max: float = Field(0.2, ge=0, le=1)


class Norm(Control):
    """Raw norm over the run's median: sinks are far above it."""

    max: float = Field(4.0, gt=0)
    min: float = Field(0.25, ge=0)


class Evidence(Section):
    """Controls that a match must pass before it counts."""

    swap_margin: SwapMargin | None = None
    claim_probability: ClaimProbability | None = None
    echo: Echo | None = None
    prediction_echo: PredictionEcho | None = None
    agreement: Agreement | None = None
    neighbours: Neighbours | None = None
    ablation: Ablation | None = None
    null_percentile: NullPercentile | None = None
    null_match_rate: NullMatchRate | None = None
    norm: Norm | None = None


CONTROLS: Final[dict[str, type[BaseModel]]] = {
    "swap_margin": SwapMargin,
    "claim_probability": ClaimProbability,
    "echo": Echo,
    "prediction_echo": PredictionEcho,
    "agreement": Agreement,
    "neighbours": Neighbours,
    "ablation": Ablation,
    "null_percentile": NullPercentile,
    "null_match_rate": NullMatchRate,
    "norm": Norm,
}
"""Section by name of the control."""
