"""What a rule asks of its controls, and one match while they are measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from nla_monitor.evidence.bounds import Bound, decide
from nla_monitor.records import Match, Reading, Support
from nla_monitor.rules.calibration_schema import CalibrationSpec
from nla_monitor.rules.evidence_schema import CONTROLS
from nla_monitor.rules.rule import Rule

logger = logging.getLogger("nla_monitor.controls")

ALWAYS: Final = frozenset({"echo", "swap_margin"})
"""Measured on every match: the one is free, the other the best single sign of a made-up claim."""
DEAR: Final = frozenset({"claim_probability", "agreement", "null_percentile", "null_match_rate"})
"""Need the AV again."""

Measured: TypeAlias = float | str
"""A result, or in words why there is none."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one rule asks of its controls."""

    rule: Rule
    bounds: Mapping[str, Bound]
    """What it requires, by name of the control."""
    wanted: frozenset[str]
    """What is measured on every match of it."""
    score: str
    """What calibration ranks."""

    def section(self, name: str) -> Any:
        """The rule's settings for a control, or the defaults where it names none."""
        named = getattr(self.rule.spec.evidence, name)
        return named if named is not None else CONTROLS[name]()

    @property
    def alternatives(self) -> tuple[str, ...]:
        """What else could stand in the claim's place; empty: to be made from the claim."""
        return tuple(self.section("swap_margin").alternatives)

    @property
    def options(self) -> tuple[str, ...]:
        """What competes with the claim in probability."""
        return tuple(self.section("claim_probability").alternatives) or self.alternatives


def plan_of(rule: Rule) -> Plan:
    """What a rule asks of its controls."""
    required = {name: section for name in CONTROLS if (section := getattr(rule.spec.evidence, name)) is not None}
    score = (rule.spec.calibration or CalibrationSpec()).score
    wanted = ALWAYS | required.keys() | ({score} & CONTROLS.keys())
    return Plan(rule, {name: _bound(section) for name, section in required.items()}, wanted, score)


def _bound(section: Any) -> Bound:
    """Every control is bounded below, above, or both."""
    most = getattr(section, "max", getattr(section, "max_rank", None))
    return Bound(getattr(section, "min", None), most, refute_missing=section.missing == "refute")


@dataclass(slots=True)
class Candidate:
    """One match while it is examined."""

    match: Match
    reading: Reading
    plan: Plan
    wanted: frozenset[str]
    results: dict[str, float] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)

    def lacks(self, name: str) -> bool:
        """Whether a control is wanted and still to be measured."""
        return name in self.wanted and name not in self.results and name not in self.not_run

    def note(self, name: str, found: Measured) -> None:
        """Keep a result, or the reason why there is none."""
        if isinstance(found, str):
            self.not_run[name] = found
        else:
            self.results[name] = float(found)

    def attempt(self, name: str, measure: Callable[[], Measured]) -> None:
        """Measure one control, if it is lacking; what that raises costs this control of this match only."""
        if not self.lacks(name):
            return
        try:
            self.note(name, measure())
        except Exception as error:
            logger.exception("control %s of match %s failed", name, self.match.match_id)
            self.not_run[name] = f"{type(error).__name__}: {error}"

    def verdict(self) -> Support:
        """What has been measured so far, and what follows."""
        return decide(self.match.match_id, self.results, self.not_run, self.plan.bounds, self._score())

    def _score(self) -> float | None:
        if self.plan.score == "matches":
            return 1.0
        if self.plan.score == "probe":
            return self.plan.rule.probe_value(self.reading)
        return self.results.get(self.plan.score)


@dataclass(frozen=True, slots=True)
class Job:
    """One control of one candidate, to be measured in one model call together with others."""

    candidate: Candidate
    name: str
    inputs: Sequence[Any]
    """What the model is given for it."""
    finish: Callable[[Sequence[Any]], Measured]
    """The result from what the model says, in the order of ``inputs``."""


def prepare(candidate: Candidate, name: str, make: Callable[[Candidate], Job | str]) -> list[Job]:
    """The job of a lacking control, or none; why there is none is noted."""
    if not candidate.lacks(name):
        return []
    try:
        made = make(candidate)
    except Exception as error:
        logger.exception("control %s of match %s cannot be prepared", name, candidate.match.match_id)
        made = f"{type(error).__name__}: {error}"
    if isinstance(made, str):
        candidate.note(name, made)
        return []
    return [made]


def run_together(jobs: Sequence[Job], run: Callable[[Sequence[Job]], Sequence[Measured]]) -> None:
    """Run jobs in one call; when it fails each alone, so that one bad match costs only itself."""
    if not jobs:
        return
    try:
        found = run(jobs)
    except Exception:
        logger.exception("a control failed on %d matches together; each is tried alone", len(jobs))
        for job in jobs:
            job.candidate.attempt(job.name, lambda job=job: run([job])[0])  # type: ignore[misc]  # bound now, not later
        return
    for job, value in zip(jobs, found, strict=True):
        job.candidate.note(job.name, value)
