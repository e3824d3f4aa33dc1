"""Guarantees at work: which calibration speaks for a rule and a run, what it lets through, what it says of an alert.

``Guarantees`` is made of stored calibrations and changes nothing; ``RunWatch`` counts a batch of one run, reading by
reading, inside the worker's transaction, and raises the run-level alarm or voids a calibration at the very reading
that shows it, so that the size of batches changes nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from nla_monitor.evidence.calibration import Calibration, Promise, unit_of
from nla_monitor.evidence.drift import is_low
from nla_monitor.evidence.statement import Standing, sentence, statement, uncalibrated, voided
from nla_monitor.evidence.tally import Change, RunTests, Tally
from nla_monitor.records import Match, Reading, RunInfo, Support, WindowVerdict
from nla_monitor.rules import Rule, RuleSet
from nla_monitor.store.calibrations import MemoryTallies, Tallies, UnitMatch
from nla_monitor.store.codec import clean

GATE: Final = "calibration"
"""Name under which ``Support.failed`` says that a match stays below its rule's threshold."""

_SAMPLING: Final = (
    "tokens_per_sequence",
    "triggers",
    "role_triggers",
    "text_triggers",
    "text_candidates",
    "triggers_per_sequence",
    "generated_tokens",
    "positions",
    "skip_first",
    "skip_special_tokens",
    "norm_sink_factor",
)
"""Settings of ``capture`` that decide which tokens of a sequence are read."""


def sampling_of(run: RunInfo | None) -> dict[str, Any]:
    """How a run's tokens were sampled, as far as it is stored; calibrations speak of runs sampled alike."""
    if run is None:
        return {}
    capture = run.config.get("capture")
    known = capture if isinstance(capture, Mapping) else {}
    return {"layer": run.layer} | {name: clean(known[name]) for name in _SAMPLING if name in known}


def promise_of(rule: Rule) -> Promise:
    """What a rule asks for; one without ``calibration`` is measured as it stands."""
    spec = rule.spec.calibration
    if spec is None:
        return Promise(gated=False)
    return Promise(spec.alpha, spec.confidence, spec.score, spec.scope, spec.prevalence, spec.recall)


def set_of(rule: Rule) -> str:
    """Name of the calibration set that a rule relies on."""
    return rule.spec.calibration.set if rule.spec.calibration is not None else "default"


def supported(support: Support | None) -> bool:
    """Whether the controls let a match stand, whatever a calibration said of it later."""
    return support is None or support.supported or set(support.failed) == {GATE}


def score_of(promise: Promise, support: Support | None) -> float | None:
    """The score of a supported match; None: the rule's statistic was not measured."""
    if not promise.gated or promise.score == "matches":
        return 1.0
    return support.score if support is not None else None


class Guarantees:
    """The calibrations that stand behind a set of rules. Changes in nothing but what it remembers of runs.

    Args:
        rules: the rules.
        calibrations: by rule id; made for these very versions, with the AV and AR in use.
        reasons: why a rule has none, by rule id, as the end of a sentence.
        run: looks a run up; runs that are sampled otherwise than the set are left alone. None: all are alike.
    """

    def __init__(
        self,
        rules: RuleSet,
        calibrations: Mapping[str, Calibration],
        *,
        reasons: Mapping[str, str] | None = None,
        run: Callable[[str], RunInfo | None] | None = None,
    ) -> None:
        self.rules = rules
        self.calibrations = dict(calibrations)
        self.tests = {rule_id: RunTests.of(calibration) for rule_id, calibration in self.calibrations.items()}
        self.promises = {rule.id: promise_of(rule) for rule in rules.rules}
        self._reasons = dict(reasons or {})
        self._run = run
        self._sampling: dict[str, Mapping[str, Any]] = {}
        self._mismatches: dict[tuple[str, str], str | None] = {}

    def active(self, run_id: str) -> dict[str, Calibration]:
        """The calibrations that speak of a run, by rule id."""
        return {key: one for key, one in self.calibrations.items() if self._mismatch(one, run_id) is None}

    def reason(self, rule_id: str, run_id: str) -> str | None:
        """Why no calibration speaks of a rule in a run."""
        calibration = self.calibrations.get(rule_id)
        return self._reasons.get(rule_id) if calibration is None else self._mismatch(calibration, run_id)

    def _mismatch(self, calibration: Calibration, run_id: str) -> str | None:
        key = (calibration.subject.rule_id, run_id)
        if key not in self._mismatches:
            found = self._compared(calibration, run_id)
            if run_id not in self._sampling:  # the run's row is still to come
                return found
            self._mismatches[key] = found
        return self._mismatches[key]

    def _compared(self, calibration: Calibration, run_id: str) -> str | None:
        name = calibration.subject.set_name
        if run_id in calibration.subject.runs:
            return f"this run is itself part of set {name}"
        theirs, ours = dict(calibration.subject.sampling), self._sampled(run_id)
        if ours is None:
            return None
        other = sorted(key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key))
        if not other:
            return None
        told = ", ".join(f"{key} {ours.get(key)!r} instead of {theirs.get(key)!r}" for key in other)
        return f"this run is not sampled as set {name} was: {told}"

    def _sampled(self, run_id: str) -> Mapping[str, Any] | None:
        if self._run is None:
            return None
        if run_id not in self._sampling:
            run = self._run(run_id)
            if run is None:
                return {}
            self._sampling[run_id] = sampling_of(run)
        return self._sampling[run_id]

    def gate(self, match: Match, support: Support | None) -> Support | None:
        """What stands of a match once its rule's threshold is put on it; without a calibration all of it.

        A match whose score was not measured is let through: nothing is silenced for want of a measurement. So is it
        counted in calibration sets.
        """
        calibration = self.calibrations.get(match.rule_id)
        if calibration is None or not supported(support) or self._mismatch(calibration, match.run_id) is not None:
            return support
        if calibration.hits(score := score_of(self.promises[match.rule_id], support)):
            return support
        if support is None:
            return Support(match.match_id, supported=False, failed=(GATE,), score=score)
        return dataclasses.replace(support, supported=False, failed=(*support.failed, GATE))

    def gated(self, matches: Iterable[Match], supports: Mapping[str, Support]) -> dict[str, Support]:
        """``gate`` for a batch; by match id, matches without any support left out."""
        found = {match.match_id: self.gate(match, supports.get(match.match_id)) for match in matches}
        return {**supports, **{key: support for key, support in found.items() if support is not None}}

    def statement(self, rule_id: str, run_id: str, standing: Standing | None, score: float | None) -> dict[str, Any]:
        """``Alert.calibration`` of a rule in a run.

        Args:
            rule_id: the rule.
            run_id: the run.
            standing: the run against the rule's calibration; None: there is none.
            score: of the exhibited match.
        """
        return uncalibrated(self.reason(rule_id, run_id)) if standing is None else statement(standing, score)


@dataclass(frozen=True, slots=True)
class Voided:
    """A calibration that has just been found void for a run."""

    run_id: str
    rule_id: str
    says: str
    """In one line: since when, and what drifted."""


class RunWatch:
    """One batch of one run against the calibrations of its rules. ``take`` each reading in order, then ``save``.

    Args:
        guarantees: the calibrations.
        run_id: the run.
        store: where counts are kept, inside the transaction that stores the batch.
        readings: of this run; those that were counted before (another AV's, say) are not to be among them.
        matches: theirs, refuted ones too.
        supports: by match id, as far as there are any.
        stored: looks up those of older matches.
    """

    def __init__(
        self,
        guarantees: Guarantees,
        run_id: str,
        store: Tallies | MemoryTallies,
        *,
        readings: Sequence[Reading],
        matches: Sequence[Match],
        supports: Mapping[str, Support],
        stored: Callable[[Sequence[str]], Mapping[str, Support]] | None = None,
    ) -> None:
        self._all = guarantees
        self._run_id = run_id
        self._store = store
        self._supports = supports
        self._older = stored
        self._active = guarantees.active(run_id)
        self.voided: list[Voided] = []
        self._tallies: dict[str, Tally] = {}
        self._units: dict[str, float | None] = {}
        self._found: dict[tuple[str, str, str], UnitMatch] = {}
        self._seen: set[str] = set()
        self._touched: set[tuple[str, str, str]] = set()
        self._matches: dict[str, list[Match]] = defaultdict(list)
        if not self._active:
            return
        for match in matches:
            self._matches[match.sample_id].append(match)
        units = {_key(reading) for reading in readings}
        self._units = store.units(run_id, units)
        self._found = store.unit_matches(run_id, units)
        kept = store.tallies(run_id)
        self._tallies = {
            rule_id: self._resumed(one, kept.get(one.calibration_id)) for rule_id, one in self._active.items()
        }

    def _resumed(self, calibration: Calibration, kept: Mapping[str, Any] | None) -> Tally:
        if kept is not None:
            return Tally(**kept)
        subject = calibration.subject
        threshold = None if math.isinf(calibration.threshold) else calibration.threshold
        rule = (subject.rule_id, subject.rule_version)
        counts: Any = self._store.recount(self._run_id, rule, threshold=threshold, floor=calibration.floor)
        return Tally(**counts)

    # -- counting ------------------------------------------------------------------------------------------------

    def take(self, reading: Reading) -> None:
        """Count a reading and its matches."""
        if not self._active:
            return
        unit = _key(reading)
        new, before = unit not in self._units, self._units.get(unit)
        worst = _worse(before, reading)
        self._units[unit] = worst
        self._seen.add(unit)
        rules = self._grown(unit, self._matches.pop(reading.sample_id, ()))
        if not (new or rules or worst != before):
            return
        for rule_id, calibration in self._active.items():
            change = Change(
                sequences=int(new),
                measured=int(before is None and worst is not None),
                low=int(is_low(calibration, worst) and not is_low(calibration, before)),
                **rules.get(rule_id, {}),
            )
            self._advance(rule_id, change, reading)

    def _advance(self, rule_id: str, change: Change, reading: Reading) -> None:
        before, sample = self._tallies[rule_id], reading.sample
        after = self._all.tests[rule_id].after(before, change, step=sample.step, now=sample.captured_at)
        self._tallies[rule_id] = after
        if after.void and not before.void:
            self.voided.append(Voided(self._run_id, rule_id, sentence(self._standing(rule_id), None)))

    def _grown(self, unit: str, matches: Iterable[Match]) -> dict[str, dict[str, int]]:
        """What the matches of one reading add to the counts of their rules."""
        grown: dict[str, dict[str, int]] = {}
        for match in matches:
            key = (match.rule_id, match.rule_version, unit)
            before = self._found.get(key, UnitMatch())
            after = self._with(before, match)
            if after == before:
                continue
            self._found[key] = after
            self._touched.add(key)
            calibration = self._active.get(match.rule_id)
            if calibration is not None and calibration.subject.rule_version == match.rule_version:
                grown[match.rule_id] = {
                    "matching": int(after.supported and not before.supported),
                    "hits": int(_hit(calibration, after) and not _hit(calibration, before)),
                    "refuted": int(after.refuted and not before.refuted),
                }
        return grown

    def _with(self, before: UnitMatch, match: Match) -> UnitMatch:
        support = self._supports.get(match.match_id)
        if not supported(support):
            return dataclasses.replace(before, refuted=True)
        score = score_of(self._all.promises[match.rule_id], support)
        best = max((one for one in (before.score, score) if one is not None), default=None)
        return dataclasses.replace(before, supported=True, unscored=before.unscored or score is None, score=best)

    def tally(self, rule_id: str) -> Tally:
        """The counts of a rule so far; all zero where no calibration speaks of it."""
        return self._tallies.get(rule_id, Tally())

    def save(self) -> None:
        """Keep the counts, in the transaction."""
        if not self._active:
            return
        self._store.save_units(self._run_id, {unit: self._units[unit] for unit in sorted(self._seen)})
        self._store.save_unit_matches(self._run_id, {key: self._found[key] for key in sorted(self._touched)})
        tallies = {one.calibration_id: asdict(self._tallies[rule_id]) for rule_id, one in self._active.items()}
        self._store.save_tallies(self._run_id, tallies)

    # -- what alerts need (see alerts.judge) ---------------------------------------------------------------------

    def decide(self, rule_id: str, verdict: WindowVerdict) -> WindowVerdict:
        """The verdict of a rule whose alarm is for the whole run: its e-process decides, not its window."""
        if rule_id not in self._active or self._active[rule_id].promise.scope != "run":
            return verdict
        return dataclasses.replace(verdict, firing=self._tallies[rule_id].alarmed and bool(verdict.matches))

    def say(self, rule_id: str, match: Match) -> Mapping[str, object]:
        """What is said of an alert that fires now and shows this match."""
        if rule_id not in self._active:
            return self._all.statement(rule_id, self._run_id, None, None)
        support = self._supports.get(match.match_id)
        if support is None and self._older is not None:
            support = self._older([match.match_id]).get(match.match_id)
        score = score_of(self._all.promises[rule_id], support)
        return self._all.statement(rule_id, self._run_id, self._standing(rule_id), score)

    def say_again(self, rule_id: str, before: Mapping[str, object]) -> Mapping[str, object]:
        """What is said of an alert that goes on: as before, until its calibration is void."""
        mine = self._active.get(rule_id)
        if mine is None or not self._tallies[rule_id].void or before.get("calibration_id") != mine.calibration_id:
            return before
        return before if before.get("status") == "void" else voided(self._standing(rule_id), before)

    def _standing(self, rule_id: str) -> Standing:
        values = {key: self._all.tests[key].log_e(tally) for key, tally in self._tallies.items()}
        return Standing(self._active[rule_id], self._all.tests[rule_id], self._tallies[rule_id], values)


def _key(reading: Reading) -> str:
    key: str = clean(unit_of(reading.sample))
    return key


def _worse(before: float | None, reading: Reading) -> float | None:
    cosine = reading.fidelity.cosine if reading.fidelity is not None else math.nan
    return min((value for value in (before, cosine) if value is not None and math.isfinite(value)), default=None)


def _hit(calibration: Calibration, found: UnitMatch) -> bool:
    if not found.supported:
        return False
    return found.unscored or calibration.hits(found.score)
