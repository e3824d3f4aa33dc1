"""Calibration sets: made from stored runs that are known to be benign, kept, and loaded for the rules in use.

What a baseline's readings match is evaluated anew, because a rule version that found nothing leaves no trace. What the
controls said is taken from the store where the match was checked then, and measured again where it was not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from sqlalchemy import Engine

from nla_monitor.calibrate import Guarantees, promise_of, sampling_of, score_of, set_of, supported
from nla_monitor.errors import ConfigError
from nla_monitor.evidence.calibration import (
    NO_MATCH,
    Calibration,
    Promise,
    SequenceScore,
    Subject,
    calibrate,
    pooled,
    unit_of,
)
from nla_monitor.records import Match, Reading, RunInfo, Support, TriageState
from nla_monitor.rules import Rule, RuleSet
from nla_monitor.store.calibrations import (
    CalibrationRecord,
    calibration_stamp,
    calibrations,
    readers_of,
    save_calibrations,
    stored_supports,
)
from nla_monitor.store.repository import Repository
from nla_monitor.store.stream import count_readings, stream_readings

_SHOWN: Final = 12


class Checker(Protocol):
    """What measures controls; ``controls.Controls`` does."""

    def check(self, matches: Sequence[Match], readings: Mapping[str, Reading]) -> dict[str, Support]:
        """The verdict on each match, by match id."""
        ...


@dataclass(frozen=True, slots=True)
class Baseline:
    """Runs that may stand for benign traffic together: read by one NLA, sampled alike."""

    runs: tuple[str, ...]
    av_hash: str
    ar_hash: str | None
    sampling: Mapping[str, Any]
    readings: int


def survey(repository: Repository, run_ids: Sequence[str], *, force: bool = False) -> Baseline:
    """Whether runs may serve as a baseline.

    Args:
        repository: the store.
        run_ids: full ids of the runs.
        force: take runs that hold alerts labelled ``true_positive``, or that are not read to the end.

    Raises:
        ConfigError: nothing was read, the runs were read by different AVs or ARs or sampled differently, or a person
            has said that one of them was not benign.
    """
    runs = tuple(dict.fromkeys(run_ids))
    for run_id in () if force else runs:
        _require_benign(repository, run_id)
    found = readers_of(repository.engine, runs)
    empty = [run_id for run_id in runs if not any(reader.run_id == run_id for reader in found)]
    if empty or not runs:
        raise ConfigError(f"baseline {', '.join(empty) or '(none)'} holds no reading; name runs that a worker has read")
    pairs = {(reader.av_hash, reader.ar_hash) for reader in found}
    if len(pairs) > 1:
        told = "; ".join(
            f"{one.run_id}: AV {one.av_hash[:_SHOWN]}, AR {(one.ar_hash or 'none')[:_SHOWN]}" for one in found
        )
        raise ConfigError(f"the baseline was read by different AVs or ARs, whose scores do not compare: {told}")
    sampling = [_sampling(repository, run_id) for run_id in runs]
    other = next((at for at, one in enumerate(sampling) if one != sampling[0]), None)
    if other is not None:
        raise ConfigError(
            f"runs {runs[0]} and {runs[other]} were sampled differently ({sampling[0]} and {sampling[other]}); "
            "more tokens of a sequence make a higher maximum, so that they cannot stand in one set"
        )
    ((av_hash, ar_hash),) = pairs
    return Baseline(
        runs, av_hash, ar_hash, sampling[0], count_readings(repository.engine, run_ids=runs, av_hash=av_hash)
    )


def _require_benign(repository: Repository, run_id: str) -> None:
    bad = repository.alerts(run_id, triage=TriageState.TRUE_POSITIVE, limit=1)
    if bad:
        raise ConfigError(
            f"run {run_id} holds an alert labelled true_positive ({bad[0].alert_id}), so it is no benign baseline; "
            "leave it out, or take it anyway with --force"
        )
    counts = repository.reading_counts(run_id)
    if counts.waiting + counts.leased:
        raise ConfigError(
            f"run {run_id} still has {counts.waiting + counts.leased} samples to be read, so its sequences are not "
            "complete; wait for the worker, or take it as it is with --force"
        )


def _sampling(repository: Repository, run_id: str) -> dict[str, Any]:
    run = repository.run(run_id)
    return sampling_of(run.info if run is not None else None)


@dataclass(slots=True)
class _Pool:
    """One rule's matches in one sequence, while the stream goes on."""

    scores: list[float | None] = field(default_factory=list)
    refuted: bool = False


def make_sets(
    engine: Engine,
    rules: RuleSet,
    baseline: Baseline,
    *,
    set_name: str | None = None,
    alpha: float | None = None,
    checker: Callable[[], Checker] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Calibration]:
    """A calibration for each rule. Stores nothing; the same data make the same sets, their ids included.

    Args:
        engine: the database.
        rules: what to calibrate.
        baseline: the benign runs.
        set_name: instead of the set that each rule names.
        alpha: instead of the rule's own.
        checker: makes what measures controls, when a match turns up that was never checked.
        progress: told how many readings are done.

    Raises:
        ConfigError: a match was never checked, and there is no ``checker``.
    """
    sequences = collect(engine, rules, baseline, checker=checker, progress=progress)
    now = time.time()
    made = []
    for rule in rules.rules:
        promise = promise_of(rule)
        promise = promise if alpha is None else dataclasses.replace(promise, alpha=alpha)
        subject = Subject(
            rule.id,
            rule.header.version,
            set_name or set_of(rule),
            baseline.runs,
            baseline.av_hash,
            baseline.ar_hash,
            dict(baseline.sampling),
        )
        made.append(identified(calibrate(subject, promise, sequences[rule.id], created_at=now)))
    return made


def identified(calibration: Calibration) -> Calibration:
    """The calibration with the id that its content gives it: 32 hex digits over all but the time."""
    content = dataclasses.asdict(dataclasses.replace(to_record(calibration), calibration_id="", created_at=0.0))
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return dataclasses.replace(calibration, calibration_id=hashlib.sha256(text.encode()).hexdigest()[:32])


def collect(
    engine: Engine,
    rules: RuleSet,
    baseline: Baseline,
    *,
    checker: Callable[[], Checker] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[SequenceScore]]:
    """What each sequence of a baseline says of each rule, by rule id. See ``make_sets``."""
    gather = Gather(rules)
    controls: Checker | None = None
    done = 0
    stream = stream_readings(engine, run_ids=list(baseline.runs), av_hash=baseline.av_hash)
    for readings in stream:
        matches = rules.evaluate(readings)
        supports = stored_supports(engine, [match.match_id for match in matches])
        unchecked = [match for match in matches if match.match_id not in supports and gather.needs(match.rule_id)]
        if unchecked:
            if checker is None:
                raise _unchecked(unchecked)
            controls = controls or checker()
            supports |= controls.check(unchecked, {reading.sample_id: reading for reading in readings})
        gather.add(readings, matches, supports)
        done += len(readings)
        if progress is not None:
            progress(done)
    return gather.sequences()


def _unchecked(matches: Sequence[Match]) -> ConfigError:
    names = ", ".join(sorted({match.rule_id for match in matches}))
    return ConfigError(
        f"the baseline holds matches of {names} that no control has checked (this rule version did not run then); "
        "name the AR that read the baseline with --ar, so that they can be checked now"
    )


class Gather:
    """Reduces readings and matches to one statistic per sequence and rule; takes batches in any order."""

    def __init__(self, rules: RuleSet) -> None:
        self._rules: dict[str, tuple[Rule, Promise]] = {rule.id: (rule, promise_of(rule)) for rule in rules.rules}
        self._worst: dict[str, float | None] = {}
        self._pools: dict[tuple[str, str], _Pool] = defaultdict(_Pool)

    def needs(self, rule_id: str) -> bool:
        """Whether a match of the rule says nothing before its controls are measured."""
        rule, promise = self._rules[rule_id]
        scored = promise.gated and promise.score != "matches"
        return scored or any(value is not None for _, value in rule.spec.evidence)

    def add(self, readings: Iterable[Reading], matches: Iterable[Match], supports: Mapping[str, Support]) -> None:
        """Take a batch."""
        units: dict[str, str] = {}
        for reading in readings:
            unit = units[reading.sample_id] = f"{reading.sample.run_id} {unit_of(reading.sample)}"
            cosine = reading.fidelity.cosine if reading.fidelity is not None else math.nan
            known = (self._worst.get(unit), None if math.isnan(cosine) else cosine)
            self._worst[unit] = min((value for value in known if value is not None), default=None)
        for match in matches:
            pool, support = self._pools[match.rule_id, units[match.sample_id]], supports.get(match.match_id)
            if supported(support):
                pool.scores.append(score_of(self._rules[match.rule_id][1], support))
            else:
                pool.refuted = True

    def sequences(self) -> dict[str, list[SequenceScore]]:
        """One entry a sequence, by rule id."""
        return {rule_id: [self._one(rule_id, unit) for unit in sorted(self._worst)] for rule_id in self._rules}

    def _one(self, rule_id: str, unit: str) -> SequenceScore:
        pool = self._pools.get((rule_id, unit))
        if pool is None:
            return SequenceScore(unit, NO_MATCH, refuted=False, worst_cosine=self._worst[unit])
        return SequenceScore(unit, pooled(pool.scores), pool.refuted, self._worst[unit])


def store_sets(engine: Engine, made: Iterable[Calibration]) -> None:
    """Keep calibrations; workers take them up with their next batch.

    Raises:
        StoreUnavailableError: the database cannot be written.
    """
    save_calibrations(engine, [to_record(calibration) for calibration in made])


def to_record(calibration: Calibration) -> CalibrationRecord:
    """The row of a calibration."""
    subject = calibration.subject
    figures = {
        "promise": dataclasses.asdict(calibration.promise),
        "scores": list(calibration.scores),
        "unscored": calibration.unscored,
        "refuted": calibration.refuted,
        "measured": calibration.measured,
        "floor": calibration.floor,
        "floor_rank": calibration.floor_rank,
    }
    return CalibrationRecord(
        calibration_id=calibration.calibration_id,
        rule_id=subject.rule_id,
        rule_version=subject.rule_version,
        set_name=subject.set_name,
        baseline_runs=list(subject.runs),
        av_hash=subject.av_hash,
        ar_hash=subject.ar_hash,
        sequences=calibration.sequences,
        sampling=dict(subject.sampling),
        figures=figures,
        created_at=calibration.created_at,
    )


def from_record(record: CalibrationRecord) -> Calibration:
    """The calibration of a row."""
    figures = dict(record.figures)
    promise = Promise(**figures.pop("promise"))
    subject = Subject(
        record.rule_id,
        record.rule_version,
        record.set_name,
        tuple(record.baseline_runs),
        record.av_hash,
        record.ar_hash,
        record.sampling,
    )
    scores = tuple(figures.pop("scores"))
    made = {"sequences": record.sequences, "scores": scores, "created_at": record.created_at, **figures}
    return Calibration(record.calibration_id, subject, promise, **made)


class LiveGuarantees:
    """The stored calibrations that fit the rules, AV and AR in use; read again when new ones were stored.

    Args:
        engine: the database.
        rules: the rules.
        av_hash, ar_hash: content hashes of what reads; None: no AR.
        run: looks a run up.
    """

    def __init__(
        self,
        engine: Engine,
        rules: RuleSet,
        av_hash: str,
        ar_hash: str | None,
        *,
        run: Callable[[str], RunInfo | None],
    ) -> None:
        self._engine = engine
        self._rules = rules
        self._hashes = av_hash, ar_hash
        self._run = run
        self._stamp: tuple[int, float] | None = None
        self._current = Guarantees(rules, {}, run=run)

    def current(self) -> Guarantees:
        """Costs one small query where nothing changed.

        Raises:
            StoreUnavailableError: the database cannot be read.
        """
        stamp = calibration_stamp(self._engine)
        if stamp != self._stamp:
            self._current = self._load()
            self._stamp = stamp
        return self._current

    def _load(self) -> Guarantees:
        stored: dict[str, list[CalibrationRecord]] = defaultdict(list)
        for record in calibrations(self._engine, rule_ids=list(self._rules.headers)):
            stored[record.rule_id].append(record)
        found, reasons = {}, {}
        for rule in self._rules.rules:
            fit = next((one for one in stored[rule.id] if self._misfit(rule, one) is None), None)
            if fit is not None:
                found[rule.id] = from_record(fit)
            elif stored[rule.id] and (why := self._misfit(rule, stored[rule.id][0])) is not None:
                reasons[rule.id] = why
        return Guarantees(self._rules, found, reasons=reasons, run=self._run)

    def _misfit(self, rule: Rule, record: CalibrationRecord) -> str | None:
        av_hash, ar_hash = self._hashes
        name = f"set {record.set_name}"
        if record.set_name != set_of(rule):
            return f"the rule relies on set {set_of(rule)}, and only {name} is there"
        if record.rule_version != rule.header.version:
            return f"{name} was made for version {record.rule_version} of this rule; calibrate it again"
        if record.av_hash != av_hash:
            return f"{name} was made with another AV ({record.av_hash[:12]}); calibrate it again"
        if record.ar_hash != ar_hash:
            return f"{name} was made with another AR, or without one; calibrate it again"
        return None
