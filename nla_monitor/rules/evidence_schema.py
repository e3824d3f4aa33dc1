"""``evidence`` of a rule: which controls a match must pass before it counts, with their thresholds.

Controls run on matches only. One that a rule names is required; all that can be measured without further model calls
are shown with every alert anyway.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, BeforeValidator, Field, StrictInt

from nla_monitor.rules.section import Section, one_is_a_list

Alternatives = Annotated[tuple[str, ...], BeforeValidator(one_is_a_list)]


class SwapMargin(Section):
    """The claim must reconstruct the activation better than what else could stand in its place."""

    min: float = Field(0.02, ge=-2, le=2, description="least cosine lead over the best alternative")
    alternatives: Alternatives = Field(
        (), max_length=32, description="sentences that replace the one with the quote; made by negation when none"
    )


class ClaimProbability(Section):
    """The AV's own probability of the claim against its alternatives."""

    min: float = Field(0.5, ge=0, le=1)
    alternatives: Alternatives = Field((), max_length=32, description="as in swap_margin, whose list is the default")


class Echo(Section):
    """Share of the quote's content words that stand in the text that the model saw or wrote."""

    max: float = Field(0.5, ge=0, le=1)


class PredictionEcho(Section):
    """Share of the quote's content words that the model writes next: a forecast of its text, not a thought."""

    max: float = Field(0.8, ge=0, le=1)


class Agreement(Section):
    """Share of resampled explanations that meet the rule, too."""

    min: float = Field(0.5, ge=0, le=1)
    resamples: StrictInt = Field(5, ge=1, le=64)
    temperature: float = Field(1.0, gt=0, le=5)


class Neighbours(Section):
    """Share of the readings at positions close by, in the same sequence, that meet the rule, too."""

    min: float = Field(0.5, ge=0, le=1)
    within: StrictInt = Field(8, ge=1, le=1000, description="tokens to either side")


class Ablation(Section):
    """Rank of the claim when each sentence is dropped in turn: 1 costs the most cosine. A rank, no proof."""

    max_rank: StrictInt = Field(2, ge=1, le=32)


class NullPercentile(Section):
    """Share of null readings (shuffled, random, mean, wrong layer) whose fidelity is lower."""

    min: float = Field(0.95, ge=0, le=1)


class Norm(Section):
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
    "norm": Norm,
}
"""Section by name of the control."""
