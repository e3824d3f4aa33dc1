"""What a rule's matches on benign sequences allow to promise: thresholds, p-values, and certified bounds.

Unit of account is the *sequence*, never the token: neighbouring tokens depend on each other, so each sequence is
reduced to one statistic first, the largest score among its matches that no control refuted (none: minus infinity).
Two guarantees follow from ``n`` such statistics, and they say different things:

* **Conformal** (Vovk et al. 2005): ``p = (1 + #{calibration >= s}) / (n + 1)`` is a p-value for a new sequence that is
  exchangeable with the set, ties included. It averages over calibration sets.
* **Certificate**: with the confidence asked for, *this* threshold's false-alarm rate is below the bound. The threshold
  is an order statistic whose rank ``k`` depends on ``n``, alpha and the confidence alone, never on the scores. Its
  tail probability is at most a Beta(k + 1, n - k) variable, whose quantile is the bound of Clopper and Pearson (1934)
  for ``k`` exceedances (Wilks 1941, non-parametric tolerance limits). So all sequences serve both to choose the
  threshold and to certify it; no half is held back. Ties only make it safer, because a hit must *exceed* the threshold.

Where fewer than ``k`` sequences matched at all there is no threshold: every match is a hit, and the bound is the one
for the exceedances that were seen. The two cases together keep the confidence: with V the refined tail of the
(k + 1)-th statistic, c the bound for k, and p the share of sequences that match at all, a false bound means, if p > c,
that at most k of n fell into the upper tail of mass c; if p <= c, that the Clopper-Pearson bound of p itself failed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from scipy.special import betaincinv

from nla_monitor.records import ActivationSample

NO_MATCH: Final = -math.inf
"""Statistic of a sequence without a match that counts."""
UNSCORED: Final = math.inf
"""Statistic of a sequence with a match whose score could not be measured: it is never silenced, so it ranks highest."""
_UP_TO_ONE: Final = frozenset({"matches", "claim_probability"})
"""Scores that are 1 at most."""
FLOOR_SHARE: Final = 0.1
"""The drift test counts sequences whose worst fidelity is below this quantile of the calibration set's."""


def unit_of(sample: ActivationSample) -> str:
    """Key of the sequence that a sample belongs to, within its run: one text at one step, or one call of an agent."""
    if sample.agent is not None:
        return f"agent:{sample.agent.agent_run_id}"
    return f"{'-' if sample.step is None else sample.step}:{sample.sequence_id}"


# -- bounds on a rate -----------------------------------------------------------------------------------------------


def upper_bound(count: int, total: int, confidence: float) -> float:
    """One-sided upper bound of a rate (Clopper and Pearson 1934, exact): below 1 unless all or nothing was seen.

    Args:
        count: how often it happened.
        total: of how many independent sequences.
        confidence: chance that the true rate is at most the bound, at least.
    """
    return 1.0 if count >= total else float(betaincinv(count + 1, total - count, confidence))


def lower_bound(count: int, total: int, confidence: float) -> float:
    """One-sided lower bound of a rate; see ``upper_bound``."""
    return 0.0 if count <= 0 else float(betaincinv(count, total - count + 1, 1 - confidence))


def interval(count: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided exact interval of a rate: both bounds with half of the error each; (0, 1) for no sequence."""
    if total <= 0:
        return 0.0, 1.0
    one_sided = (1 + confidence) / 2
    return lower_bound(count, total, one_sided), upper_bound(count, total, one_sided)


@cache
def rank_for(sequences: int, alpha: float, confidence: float) -> int | None:
    """The most exceedances that still certify ``alpha``; None: too few sequences for any threshold."""
    if upper_bound(0, sequences, confidence) > alpha:
        return None
    low, high = 0, int(alpha * sequences) + 1  # at a rate of alpha itself the bound lies above alpha
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if upper_bound(middle, sequences, confidence) <= alpha else (low, middle)
    return low


def more_needed(exceedances: int, sequences: int, alpha: float, confidence: float) -> int:
    """How many more benign sequences, without one exceedance, bring the bound down to ``alpha``; 0: it is there.

    From nothing: 299 for 1 % and 2,995 for 0.1 % at 95 % confidence.
    """
    if sequences and upper_bound(exceedances, sequences, confidence) <= alpha:
        return 0
    low, high = sequences, max(2 * sequences, 1)
    while upper_bound(exceedances, high, confidence) > alpha:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if upper_bound(exceedances, middle, confidence) <= alpha else (middle, high)
    return high - sequences


# -- one rule's calibration -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SequenceScore:
    """What one benign sequence says of one rule."""

    unit: str
    statistic: float
    """Largest score of its supported matches; ``NO_MATCH`` without any, ``UNSCORED`` where one has no score."""
    refuted: bool
    """Whether a control refuted a match in it."""
    worst_cosine: float | None
    """Its lowest fidelity; None without an AR."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What a rule asks for."""

    alpha: float = 0.01
    confidence: float = 0.95
    score: str = "matches"
    scope: str = "sequence"
    prevalence: float = 0.01
    recall: float = 0.8
    gated: bool = True
    """False: the rule names no calibration. It is measured as it stands, and no threshold is put on its matches."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What was calibrated, and on what: a calibration speaks of nothing else."""

    rule_id: str
    rule_version: str
    set_name: str
    runs: tuple[str, ...]
    av_hash: str
    ar_hash: str | None
    sampling: Mapping[str, object]
    """How tokens were sampled: more of them make a higher maximum."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """One rule's statistics on benign sequences."""

    calibration_id: str
    subject: Subject
    promise: Promise
    sequences: int
    scores: tuple[float, ...]
    """Finite statistics of the sequences that match, ascending; the others match not at all, or are ``unscored``."""
    unscored: int
    refuted: int
    """Sequences with a refuted match."""
    measured: int
    """Sequences with fidelity."""
    floor: float | None
    """Cosine below which a sequence's worst fidelity counts as low; None without an AR."""
    floor_rank: int
    """How many of the measured sequences are below it, were there no ties."""
    created_at: float = 0.0

    @property
    def matching(self) -> int:
        """Sequences with a match that no control refuted."""
        return len(self.scores) + self.unscored

    @property
    def threshold(self) -> float:
        """A hit must exceed it; minus infinity: every match is a hit."""
        rank = rank_for(self.sequences, self.promise.alpha, self.promise.confidence) or 0
        if not self.promise.gated or rank >= self.matching:
            return NO_MATCH
        above = min(rank - self.unscored, len(self.scores) - 1)
        if above >= 0:
            return self.scores[-1 - above]
        return self.scores[-1] if self.scores else NO_MATCH

    @property
    def exceedances(self) -> int:
        """Benign sequences of the set that the rule hits with this threshold."""
        return self.matching - self._at_most(self.threshold)

    @property
    def bounded(self) -> int:
        """The count that the bound is for: the rank of the threshold, or what was seen where there is none."""
        rank = rank_for(self.sequences, self.promise.alpha, self.promise.confidence) or 0
        return self.exceedances if self.threshold == NO_MATCH else max(rank, self.unscored)

    def fpr_upper(self, confidence: float | None = None) -> float:
        """Upper bound of the share of benign sequences that are hit; at the rule's confidence by default."""
        return upper_bound(self.bounded, self.sequences, confidence or self.promise.confidence)

    @property
    def certified(self) -> bool:
        """Whether the bound keeps the alpha asked for."""
        return self.sequences > 0 and self.fpr_upper() <= self.promise.alpha

    @property
    def more_needed(self) -> int:
        """Benign sequences without a hit that are still missing for alpha; 0: certified."""
        return more_needed(self.bounded, self.sequences, self.promise.alpha, self.promise.confidence)

    @property
    def mute(self) -> bool:
        """Whether nothing can exceed the threshold: benign sequences reach the highest score that there is."""
        return self.promise.score in _UP_TO_ONE and self.threshold >= 1.0

    def hits(self, score: float | None) -> bool:
        """Whether a supported match of this score is a hit; one that could not be scored always is."""
        return score is None or score > self.threshold

    def p_value(self, score: float | None) -> float | None:
        """Conformal p-value of a sequence with this statistic; None where it was not measured."""
        if not self.promise.gated or self.promise.score == "matches":
            return (1 + self.matching) / (self.sequences + 1)  # all matches rank alike
        if score is None:
            return None
        at_least = self.matching - bisect_left(self.scores, score)
        return (1 + at_least) / (self.sequences + 1)

    def _at_most(self, threshold: float) -> int:
        """Statistics among those of matching sequences that do not exceed the threshold."""
        return 0 if threshold == NO_MATCH else sum(score <= threshold for score in self.scores)


def calibrate(subject: Subject, promise: Promise, found: Sequence[SequenceScore], **about: object) -> Calibration:
    """A rule's calibration from its benign sequences; the order does not matter.

    Args:
        subject: what it is about.
        promise: what the rule asks for.
        found: one entry a sequence.
        about: ``calibration_id`` and ``created_at``.
    """
    cosines = sorted(one.worst_cosine for one in found if one.worst_cosine is not None)
    rank = int(FLOOR_SHARE * len(cosines))
    return Calibration(
        calibration_id=str(about.get("calibration_id", "")),
        subject=subject,
        promise=promise,
        sequences=len(found),
        scores=tuple(sorted(one.statistic for one in found if math.isfinite(one.statistic))),
        unscored=sum(one.statistic == UNSCORED for one in found),
        refuted=sum(one.refuted for one in found),
        measured=len(cosines),
        floor=cosines[rank] if cosines else None,
        floor_rank=rank,
        created_at=float(str(about.get("created_at", 0.0))),
    )


def pooled(scores: Iterable[float | None]) -> float:
    """The statistic of a sequence from the scores of its supported matches (None: not measured)."""
    return max((UNSCORED if score is None else score for score in scores), default=NO_MATCH)
