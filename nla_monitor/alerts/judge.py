"""What a batch of readings does to a run's alerts: the same as its readings would do one by one.

A batch is replayed reading by reading against a clock that the readings themselves drive. So its size changes nothing:
an alert fires, goes on or resolves at the same reading, with the same matches, whether the next reading came in the
same batch or an hour later.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from nla_monitor.alerts.lifecycle import UNCALIBRATED, Event, advance, fingerprint, match_of, quiet_from
from nla_monitor.records import ActivationSample, Alert, Match, Reading, RuleHeader, Scalar, WindowVerdict

Change = tuple[Alert, Event]
"""An alert as stored, and what happened to it."""

Exhibition = Callable[[WindowVerdict], tuple[Reading | None, Mapping[str, object]]]
"""For a window about to fire: the reading to show, and the results of controls."""

Refresh = Callable[[Mapping[str, object], WindowVerdict], Mapping[str, object]]
"""The evidence of a firing alert, brought up to what its window shows now."""


class _Windows(Protocol):
    """What is needed of a set of rules."""

    @property
    def headers(self) -> Mapping[str, RuleHeader]: ...
    def window_start(self, rule_id: str, *, step: int | None, now: float) -> tuple[int | None, float | None]: ...
    def window(self, rule_id: str, matches: Sequence[Match], *, step: int | None, now: float) -> WindowVerdict: ...
    def next_change(
        self, rule_id: str, matches: Sequence[Match], *, step: int | None, now: float
    ) -> tuple[float, float]: ...


class Guarantee(Protocol):
    """What calibrations say of a run while its readings are judged."""

    def take(self, reading: Reading) -> None:
        """Count a reading; each is given once, in order."""
        ...

    def decide(self, rule_id: str, verdict: WindowVerdict) -> WindowVerdict:
        """The verdict where a test over the whole run stands in the window's place; any other one as it is."""
        ...

    def say(self, rule_id: str, match: Match) -> Mapping[str, object]:
        """What certifies an alert that fires now and shows this match."""
        ...

    def say_again(self, rule_id: str, before: Mapping[str, object]) -> Mapping[str, object]:
        """The same, of an alert that goes on."""
        ...


class _AlertStore(Protocol):
    """What is needed of the store's transaction."""

    def firing_alerts(self, run_id: str) -> list[Alert]: ...
    def window_matches(
        self,
        rule_id: str,
        rule_version: str,
        run_id: str,
        group: Mapping[str, Scalar],
        *,
        since_step: int | None = None,
        since_time: float | None = None,
    ) -> list[Match]: ...
    def save_alert(self, alert: Alert, matches: Sequence[Match], event: Event) -> Alert: ...


class Clock(NamedTuple):
    """How far a run has come, by its own readings: the same in a replay."""

    step: int | None
    now: float

    def after(self, sample: ActivationSample) -> Clock:
        """The clock once this sample is read; it never goes back."""
        if sample.step == self.step and sample.captured_at <= self.now:
            return self  # what most readings of a batch do
        step = max((step for step in (self.step, sample.step) if step is not None), default=None)
        return Clock(step, max(self.now, sample.captured_at))


@dataclass(slots=True)
class _Condition:
    """One rule and group of the run."""

    header: RuleHeader
    group: Mapping[str, Scalar]
    current: Alert | None
    matches: list[Match]
    """Those that count: the stored ones, and the batch's as far as it is replayed."""
    waiting: bool = False
    """Whether a match came after the last judgement."""
    unsaved: dict[str, Match] | None = None
    """Matches that stood in windows of ``current`` since it was last stored; None: it is stored as it is."""
    holds: bool = False
    """Whether its window held then."""
    judged: Clock | None = None
    """When it was last judged; None: not in this batch, or it has just fired."""
    due: tuple[float, float] | None = None
    """Step and time before which another judgement says the same as the last, unless a match comes; made on demand."""


class Judge:
    """Judges one batch of one run, inside one transaction.

    Args:
        run_id: the run.
        clock: how far the run was before the batch.
        rules: windows and headers.
        store: where alerts and matches are; the batch's matches may be stored already.
        exhibition: what to show when an alert fires.
        refresh: what to say when it goes on.
        guarantee: what calibrations say; without it every alert is uncalibrated.
    """

    def __init__(
        self,
        run_id: str,
        clock: Clock,
        rules: _Windows,
        store: _AlertStore,
        *,
        exhibition: Exhibition,
        refresh: Refresh,
        guarantee: Guarantee | None = None,
    ) -> None:
        self._run_id = run_id
        self._clock = clock
        self._rules = rules
        self._store = store
        self._exhibition = exhibition
        self._refresh = refresh
        self._guarantee = guarantee
        self._conditions: dict[tuple[str, str], _Condition] = {}
        self._firing: set[tuple[str, str]] = set()
        self._changes: list[Change] = []

    def run(self, readings: Sequence[Reading], matches: Iterable[Match]) -> list[Change]:
        """Replay a batch.

        A condition is judged when a match comes and, while its alert fires, when the clock moves. Between two moments
        a match more never turns a window off, so that a firing one may wait for the end of the moment.

        Args:
            readings: of this run, in the order in which they were taken from the spool.
            matches: theirs, without those that a control refuted.
        """
        by_sample: dict[str, list[Match]] = defaultdict(list)
        for match in matches:
            by_sample[match.sample_id].append(match)
        self._load(readings, [match for found in by_sample.values() for match in found])
        for reading in readings:
            self._take(reading, by_sample.get(reading.sample_id, ()))
        self._settle()
        for _, condition in sorted(self._conditions.items(), key=lambda item: item[0]):
            if condition.current is not None and condition.unsaved is not None:
                self._save(condition, condition.current, (), "updated")
        return self._changes

    def _load(self, readings: Sequence[Reading], matches: Sequence[Match]) -> None:
        firing = self._store.firing_alerts(self._run_id)
        wanted = {self._key(alert.rule_id, alert.group): alert.group for alert in firing}
        wanted |= {self._key(match.rule_id, match.group): match.group for match in matches}
        current = {self._key(alert.rule_id, alert.group): alert for alert in firing}
        known = {match.match_id for match in matches}
        samples = [reading.sample for reading in readings]
        steps = (step for step in (self._clock.step, *(sample.step for sample in samples)) if step is not None)
        times = (time for time in (self._clock.now, *(sample.captured_at for sample in samples)) if time > 0.0)
        first = Clock(min(steps, default=None), min(times, default=0.0))
        for key, group in wanted.items():
            header = self._rules.headers.get(key[0])
            if header is not None:  # else the rule was taken away since
                stored = [one for one in self._stored(header, group, first) if one.match_id not in known]
                self._conditions[key] = _Condition(header, dict(group), current.get(key), stored)
        self._firing = {key for key, condition in self._conditions.items() if condition.current is not None}

    def _stored(self, header: RuleHeader, group: Mapping[str, Scalar], first: Clock) -> list[Match]:
        """Matches that any moment of the batch may need; ``first`` is the earliest of them."""
        since_step, since_time = self._rules.window_start(header.rule_id, step=first.step, now=first.now)
        if since_time is None and since_step is not None:  # matches without a step are counted by time
            _, since_time = self._rules.window_start(header.rule_id, step=None, now=first.now)
        return self._store.window_matches(
            header.rule_id, header.version, self._run_id, group, since_step=since_step, since_time=since_time
        )

    def _key(self, rule_id: str, group: Mapping[str, Scalar]) -> tuple[str, str]:
        return rule_id, fingerprint(rule_id, self._run_id, group)

    def _take(self, reading: Reading, matches: Sequence[Match]) -> None:
        clock = self._clock.after(reading.sample)
        moved = clock != self._clock
        if moved:
            self._settle()
            self._clock = clock
        if self._guarantee is not None:
            self._guarantee.take(reading)
        if not matches and not (moved and self._firing):
            return
        new = {self._key(match.rule_id, match.group): match for match in matches}
        for key in sorted((new.keys() | (self._firing if moved else set())) & self._conditions.keys()):
            condition = self._conditions[key]
            self._meet(condition, new.get(key), moved=moved)
            (self._firing.add if condition.current is not None else self._firing.discard)(key)

    def _meet(self, condition: _Condition, match: Match | None, *, moved: bool) -> None:
        if match is None:
            if self._may_change(condition):
                self._judge(condition, self._clock)
            return
        condition.matches.append(match)
        own = Clock(self._clock.step if match.step is None else match.step, match.captured_at)
        if own != self._clock:
            self._judge(condition, own)  # it came late: first as things stood at its own moment
        elif condition.current is not None and not moved:
            condition.waiting = True
            return
        self._judge(condition, self._clock)

    def _may_change(self, condition: _Condition) -> bool:
        """Whether the clock's moving alone may change what was last said of a firing alert."""
        clock, judged, alert = self._clock, condition.judged, condition.current
        if judged is None or alert is None or (judged.step is None) != (clock.step is None):
            return True
        if self._still_certified(alert) is not alert.calibration:
            return True
        if condition.due is None:
            header = condition.header
            step, now = self._rules.next_change(header.rule_id, condition.matches, step=judged.step, now=judged.now)
            quiet = (math.inf, math.inf) if condition.holds else quiet_from(header, alert, judged.step, judged.now)
            condition.due = min(step, quiet[0]), min(now, quiet[1])
        return clock.now >= condition.due[1] or (clock.step is not None and clock.step >= condition.due[0])

    def _settle(self) -> None:
        """Judge what came since the last judgement, at the moment that is about to end."""
        for key in sorted(self._firing):
            if self._conditions[key].waiting:
                self._judge(self._conditions[key], self._clock)
        self._firing = {key for key in self._firing if self._conditions[key].current is not None}

    def _judge(self, condition: _Condition, clock: Clock) -> None:
        condition.waiting = False
        header, current = condition.header, condition.current
        verdict = self._rules.window(header.rule_id, condition.matches, step=clock.step, now=clock.now)
        if self._guarantee is not None:
            verdict = self._guarantee.decide(header.rule_id, verdict)
        condition.judged, condition.due, condition.holds = clock, None, verdict.firing
        fires = current is None and verdict.firing
        exhibit, evidence = self._exhibition(verdict) if fires else (None, {})
        step = advance(
            header,
            condition.group,
            self._run_id,
            verdict,
            current,
            exhibit,
            step=clock.step,
            now=clock.now,
            evidence=evidence,
            calibration=self._certified(verdict, exhibit) if fires else UNCALIBRATED,
        )
        if step.alert is None or step.event is None:
            return
        if step.event == "updated":
            # Stored once, with what comes next or at the end: a busy alert is updated at each of its matches.
            evidence = dict(self._refresh(step.alert.evidence, verdict))
            certified = self._still_certified(step.alert)
            condition.current = dataclasses.replace(step.alert, evidence=evidence, calibration=certified)
            condition.unsaved = (condition.unsaved or {}) | {match.match_id: match for match in verdict.matches}
            return
        condition.judged = None  # what a new alert says is brought up to date once, whatever comes
        self._save(condition, step.alert, verdict.matches, step.event)

    def _certified(self, verdict: WindowVerdict, exhibit: Reading | None) -> Mapping[str, object]:
        match = match_of(verdict.matches, exhibit)
        return UNCALIBRATED if self._guarantee is None else self._guarantee.say(match.rule_id, match)

    def _still_certified(self, alert: Alert) -> Mapping[str, object]:
        if self._guarantee is None:
            return alert.calibration
        return self._guarantee.say_again(alert.rule_id, alert.calibration)

    def _save(self, condition: _Condition, alert: Alert, matches: Sequence[Match], event: Event) -> None:
        linked = (condition.unsaved or {}) | {match.match_id: match for match in matches}
        stored = self._store.save_alert(alert, [*linked.values()], event)
        condition.current = None if event == "resolved" else stored
        condition.unsaved = None
        self._changes.append((stored, event))
