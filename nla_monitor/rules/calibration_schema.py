"""``calibration`` of a rule: which false-alarm rate it promises, and what that promise rests on."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from nla_monitor.rules.section import Section

Score = Literal["swap_margin", "claim_probability", "probe", "matches"]


class CalibrationSpec(Section):
    """The guarantee that a rule asks for. The set is made by ``nla-monitor rules calibrate``."""

    alpha: float = Field(0.01, gt=0, lt=1, description="highest share of benign sequences that may match")
    set: str = Field("default", min_length=1, max_length=100, description="name of the calibration set")
    score: Score = Field(
        "swap_margin", description="statistic of a match; a sequence has the largest of its supported matches"
    )
    scope: Literal["sequence", "run"] = Field(
        "sequence",
        description="run: one alarm for a whole run, whose false-alarm probability stays below alpha at any time",
    )
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of the certified upper bound")
    prevalence: float = Field(0.01, gt=0, lt=1, description="share of sequences that are true, for the stated PPV")
    recall: float = Field(0.8, gt=0, le=1, description="share of true sequences that match, for the stated PPV")
