"""What an alert says of its guarantee: numbers for programs, one plain sentence for the person who is paged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from nla_monitor.evidence.calibration import Calibration, interval
from nla_monitor.evidence.drift import LEVEL
from nla_monitor.evidence.eprocess import e_bh
from nla_monitor.evidence.promise import percent
from nla_monitor.evidence.tally import FIDELITY, RunTests, Tally, shown

_CONFIDENCE: Final = 0.95
_NORMAL_975: Final = 1.959963984540054
"""97.5 % quantile of the standard normal distribution."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One run against one calibration, with what the other calibrated rules of the run say."""

    calibration: Calibration
    tests: RunTests
    tally: Tally
    log_e_values: Mapping[str, float] = field(default_factory=dict)
    """Of all calibrated rules of the run, by rule id."""

    @property
    def status(self) -> str:
        """``certified``, ``uncertified`` or ``void``."""
        if self.tally.void:
            return "void"
        return "certified" if self.calibration.certified else "uncertified"


def lift(hits: int, sequences: int, base_hits: int, base_sequences: int) -> dict[str, float]:
    """How many times the benign rate this run's rate is, with an approximate 95 % interval.

    Ratio of two binomial rates, normal on the log scale (Katz et al. 1978), 1/2 added to each count (Walter 1975), so
    that a benign rate of zero gives a finite figure.
    """
    ours, total, theirs, base = (count + 0.5 for count in (hits, sequences, base_hits, base_sequences))
    middle = math.log(ours / total) - math.log(theirs / base)
    spread = _NORMAL_975 * math.sqrt(max(1 / ours - 1 / total + 1 / theirs - 1 / base, 0.0))
    names = {"value": middle, "low": middle - spread, "high": middle + spread}
    return {name: _digits(math.exp(value)) for name, value in names.items()}


def predictive_value(prevalence: float, recall: float, fpr: float) -> float:
    """Chance that a hit sequence is a true one, by Bayes' rule, at a stated prevalence and recall."""
    true = prevalence * recall
    return true / (true + (1 - prevalence) * fpr)


def uncalibrated(why: str | None = None) -> dict[str, Any]:
    """Said of an alert that no calibration stands behind.

    Args:
        why: the reason, as the end of a sentence; None: nobody has calibrated the rule.
    """
    why = why or "nobody has run `nla-monitor rules calibrate` for this rule on benign traffic"
    return {"status": "uncalibrated", "says": f"uncalibrated: the false-alarm rate is not known; {why}"}


def statement(standing: Standing, score: float | None) -> dict[str, Any]:
    """What a calibration says of an alert; keys as in ``Alert.calibration``, plain JSON values.

    Args:
        standing: the run against the calibration, at the moment of the alert.
        score: statistic of the exhibited match; None: it was not measured.
    """
    calibration, tally = standing.calibration, standing.tally
    promise, subject = calibration.promise, calibration.subject
    p_value = calibration.p_value(score)
    fpr = calibration.fpr_upper()
    ppv = predictive_value(promise.prevalence, promise.recall, fpr)
    threshold = calibration.threshold
    found: dict[str, Any] = {
        "status": standing.status,
        "set": subject.set_name,
        "calibration_id": calibration.calibration_id,
        "alpha": promise.alpha,
        "score": promise.score if promise.gated else "matches",
        "sequences": calibration.sequences,
        "exceedances": calibration.exceedances,
        "threshold": None if math.isinf(threshold) else _digits(threshold),
        "p_value": None if p_value is None else _digits(p_value),
        "fpr_upper": _digits(fpr),
        "confidence": promise.confidence,
        "more_needed": calibration.more_needed,
        "base_rate": base_rate(calibration),
        "lift": lift(tally.hits, tally.sequences, calibration.exceedances, calibration.sequences),
        "ppv": {"prevalence": promise.prevalence, "recall": promise.recall, "value": _digits(ppv)},
        "run": run_figures(standing),
        "e_bh": e_bh_figures(standing.log_e_values, promise.alpha, subject.rule_id),
        "drift": drift_figures(standing),
    }
    return found | {"says": sentence(standing, p_value)}


def voided(standing: Standing, before: Mapping[str, object]) -> dict[str, object]:
    """The statement of a firing alert after drift has voided its calibration; its figures stay as they were."""
    changed = {"status": standing.status, "drift": drift_figures(standing), "says": sentence(standing, None)}
    return {**before, **changed}


def base_rate(calibration: Calibration) -> dict[str, Any]:
    """Share of benign sequences that match at all, before any threshold, with its exact 95 % interval."""
    low, high = interval(calibration.matching, calibration.sequences, _CONFIDENCE)
    share = calibration.matching / calibration.sequences if calibration.sequences else 0.0
    figures = {"value": _digits(share), "low": _digits(low), "high": _digits(high)}
    return {**figures, "matching": calibration.matching, "sequences": calibration.sequences}


def run_figures(standing: Standing) -> dict[str, Any]:
    """The run-level test so far."""
    tests, tally = standing.tests, standing.tally
    return {
        "e_value": shown(tests.log_e(tally)),
        "e_threshold": shown(tests.hits.log_limit),
        "null": _digits(tests.hits.null),
        "sequences": tally.sequences,
        "hits": tally.hits,
        "alarmed": tally.alarmed,
        "alarm_step": tally.alarm_step,
    }


def e_bh_figures(log_e_values: Mapping[str, float], level: float, rule_id: str) -> dict[str, Any]:
    """Whether the rule survives e-BH among all calibrated rules of the run."""
    kept = e_bh(log_e_values, level)
    return {"rules": len(log_e_values), "level": level, "survives": rule_id in kept, "surviving": sorted(kept)}


def drift_figures(standing: Standing) -> dict[str, Any]:
    """The drift tests so far."""
    tests, tally = standing.tests, standing.tally
    return {
        "void": tally.void,
        "by": tally.void_by,
        "since_step": tally.void_step,
        "since": tally.void_at,
        "level": LEVEL,
        "e_threshold": shown(tests.drift.refuted.log_limit),
        "e_values": {name: shown(value) for name, value in tests.log_drift(tally).items()},
        "low_fidelity": {"sequences": tally.low, "of": tally.measured, "floor": standing.calibration.floor},
        "refuted": {"sequences": tally.refuted, "of": tally.sequences},
    }


def sentence(standing: Standing, p_value: float | None) -> str:
    """The guarantee in one line.

    Args:
        standing: the run against the calibration.
        p_value: conformal p-value to add; None: say nothing of it.
    """
    calibration, tally = standing.calibration, standing.tally
    promise = calibration.promise
    what = f"at most {percent(calibration.fpr_upper())} of benign sequences {_hit(calibration)}"
    confidence, name = f"{100 * promise.confidence:.4g} % confidence", calibration.subject.set_name
    basis = f"{confidence}, {calibration.sequences} sequences, set {name}"
    tail = "" if p_value is None else f"; p = {p_value:.2g}"
    if tally.void:
        since = f"since step {tally.void_step}" if tally.void_step is not None else "for this run"
        return (
            f"void {since}: {_drifted(standing)}. The set's promise ({what}) no longer holds; calibrate again on "
            "benign traffic of the model as it is now"
        )
    if calibration.certified:
        return f"certified: {what} ({basis}){tail}"
    return f"uncertified: {missing(calibration)}; so far {what} ({basis}){tail}"


def missing(calibration: Calibration) -> str:
    """What an uncertified rule needs."""
    more, alpha = calibration.more_needed, percent(calibration.promise.alpha)
    if calibration.bounded > calibration.promise.alpha * calibration.sequences and calibration.bounded:
        share = f"{calibration.bounded} of {calibration.sequences} benign sequences"
        return f"{share} match, which is no less than {alpha}; make the rule stricter, or give it a calibration score"
    return f"{more:,} more benign sequences needed for {alpha}"


def run_sentence(standing: Standing) -> str:
    """What the run-level test says, in one line; of chance only while the set's promise holds."""
    tests, tally = standing.tests, standing.tally
    value, limit = shown(tests.log_e(tally)), shown(tests.hits.log_limit)
    counts = f"{tally.hits} of {tally.sequences} sequences hit, e = {value:.3g}, alarm at {limit:.3g}"
    if not tally.alarmed:
        return f"no alarm ({counts})"
    if tally.void:
        return f"ALARM ({counts})"
    return f"ALARM ({counts}): on a benign run, ever, with a chance of {percent(tests.hits.level)} at most"


def _hit(calibration: Calibration) -> str:
    return "match" if math.isinf(calibration.threshold) else "match above its threshold"


def _drifted(standing: Standing) -> str:
    calibration, tally, name = standing.calibration, standing.tally, standing.calibration.subject.set_name
    if tally.void_by == FIDELITY:
        share = f"{tally.low} of {tally.measured} sequences are read worse than {calibration.floor:.2f}"
        before = f"where {calibration.floor_rank} of {calibration.measured} were"
        return f"fidelity has drifted from set {name} ({share}, {before})"
    share = f"{tally.refuted} of {tally.sequences} sequences"
    before = f"where {calibration.refuted} of {calibration.sequences} were"
    return f"the share of refuted matches has drifted from set {name} ({share}, {before})"


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
