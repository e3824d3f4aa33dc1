"""Rules over stored readings: which matches and alerts they give. Changes nothing.

The readings come in the order in which the worker judged them, and go through the worker's own rules, windows and
lifecycle. So the rules that ran give the very alerts that were stored, and other rules give what they would have given.

Controls need models. What they said of a match is stored with it and used again; a match that is new (another rule, or
another version of one) is measured where a checker is given, and otherwise counts unchecked and is counted as such.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from sqlalchemy import Engine

from nla_monitor.alerts.judge import Clock, Judge
from nla_monitor.calibrate import GATE, Guarantees, RunWatch
from nla_monitor.candidates import plan_of
from nla_monitor.evidence import best_shown, collect_evidence, recurred
from nla_monitor.evidence.calibration import unit_of
from nla_monitor.ledger import Ledger
from nla_monitor.records import Alert, AlertState, Match, Reading, Severity, Support, WindowVerdict
from nla_monitor.rules import Rule, RuleSet
from nla_monitor.rules.deferred import ask_ahead, with_unjudged
from nla_monitor.rules.patterns import readable
from nla_monitor.rules.prefilter import Screened
from nla_monitor.rules.screening import ScreeningPool
from nla_monitor.store.calibrations import MemoryTallies
from nla_monitor.store.stream import BATCH, is_reread, stored_runs, stored_supports, stream_readings, vectors_of

_AHEAD: Final = 8
"""Pages that are screened ahead of the one that is judged."""


class Checker(Protocol):
    """Measures controls; ``controls.Controls`` does."""

    def check(self, matches: Sequence[Match], readings: Mapping[str, Reading]) -> Mapping[str, Support]:
        """What the controls say, by ``match_id``."""
        ...


@dataclass(frozen=True, slots=True)
class RuleOutcome:
    """What one rule came to."""

    rule_id: str
    title: str
    version: str
    severity: Severity
    matches: int
    refuted: int
    """Matches that a control or the calibration spoke against: they count in no window."""
    unchecked: int
    """Matches that count although the rule requires a control, because it could not be measured."""
    sequences: int
    """Sequences with a match that counts."""
    alerts: int
    firing: int
    """Alerts that still fire at the end."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What rules make of stored readings."""

    runs: tuple[str, ...]
    av_hash: str | None
    """The AV whose readings these are; None: those made live."""
    readings: int
    shown: Mapping[str, Reading]
    """Readings with a match, by sample."""
    sequences: int
    """Distinct sequences among them; see ``evidence.calibration.unit_of``."""
    matches: tuple[Match, ...]
    """All matches, refuted ones included, in the order of the readings."""
    supports: Mapping[str, Support]
    """What controls said, by ``match_id``, as far as it is known."""
    alerts: tuple[Alert, ...]
    """In the order in which they fired, each as it is at the end."""
    rules: tuple[RuleOutcome, ...]
    """In the order of the rules."""
    seconds: float

    def counts(self, match: Match) -> bool:
        """Whether nothing refuted the match."""
        return _counts(self.supports.get(match.match_id))


@contextmanager
def _uncollected() -> Iterator[None]:
    """No cyclic garbage collection meanwhile: records hold no cycles, and scanning the many that live costs a third."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def replay(
    rules: RuleSet,
    engine: Engine,
    run_ids: Sequence[str] | None = None,
    *,
    av_hash: str | None = None,
    controls: Checker | None = None,
    guarantees: Guarantees | None = None,
    progress: Callable[[int], None] | None = None,
    batch: int = BATCH,
    processes: int = 1,
) -> Replay:
    """Rules over the stored readings of runs. The same store and rules give the same replay, to the last id.

    Args:
        rules: any rules, in any version.
        engine: from ``store.session.open_engine``.
        run_ids: these runs; None: all, oldest first.
        av_hash: readings by this AV, one that read the vectors again for instance; None: those made live.
        controls: measures matches that have no stored verdict; without it they count unchecked.
        guarantees: gates matches by these calibrations; without it by those that held when they were stored.
        progress: told the number of readings done after each batch.
        batch: readings at a time; changes nothing but memory and time.
        processes: with two or more, regular expressions are screened in processes of their own; changes nothing but
            time, and pays from some ten thousand readings on.

    Raises:
        StoreUnavailableError: the database cannot be read.
    """
    started = time.perf_counter()
    runs = tuple(stored_runs(engine) if run_ids is None else run_ids)
    ledger, tally = Ledger(), _Tally(rules)
    with ExitStack() as stack:
        stack.enter_context(_uncollected())
        pool = None
        if processes > 1 and rules.regexes:
            pool = stack.enter_context(ScreeningPool(rules.regexes, processes - 1))
        for run_id in runs:
            player = _Player(run_id, rules, engine, ledger, tally, av_hash, controls, guarantees)
            stream = stream_readings(
                engine, run_ids=[run_id], av_hash=av_hash, vectors=player.needs_vectors, batch=batch
            )
            for readings, screened in _ahead(stream, pool):
                player.play(readings, screened)
                if progress is not None:
                    progress(len(readings))
    alerts = tuple(ledger.alerts.values())
    return Replay(
        runs,
        av_hash,
        tally.readings,
        tally.shown,
        len(tally.sequences),
        tuple(tally.matches),
        tally.supports,
        alerts,
        tally.outcomes(alerts),
        time.perf_counter() - started,
    )


def _ahead(
    stream: Iterable[list[Reading]], pool: ScreeningPool | None
) -> Iterator[tuple[list[Reading], Sequence[Screened] | None]]:
    """Pages with what the pool says of them, asked ``_AHEAD`` pages before it is needed."""
    if pool is None:
        yield from ((readings, None) for readings in stream)
        return
    waiting: deque[tuple[list[Reading], Future[list[Screened]]]] = deque()
    for readings in stream:
        waiting.append((readings, pool.submit([readable(reading.explanation.text) for reading in readings])))
        if len(waiting) > _AHEAD:
            first, screened = waiting.popleft()
            yield first, screened.result()
    for readings, screened in waiting:
        yield readings, screened.result()


class _Tally:
    """What is counted on the way, over all runs."""

    def __init__(self, rules: RuleSet) -> None:
        self._rules = rules
        self.readings = 0
        self.sequences: set[tuple[str, str]] = set()
        self.shown: dict[str, Reading] = {}
        """Readings with a match, by sample."""
        self.matches: list[Match] = []
        self.supports: dict[str, Support] = {}

    def outcomes(self, alerts: Sequence[Alert]) -> tuple[RuleOutcome, ...]:
        """Per rule."""
        by_rule: dict[str, list[Match]] = {rule.id: [] for rule in self._rules.rules}
        for match in self.matches:
            by_rule[match.rule_id].append(match)
        fired = Counter(alert.rule_id for alert in alerts)
        firing = Counter(alert.rule_id for alert in alerts if alert.state is AlertState.FIRING)
        return tuple(
            self._outcome(rule, by_rule[rule.id], fired[rule.id], firing[rule.id]) for rule in self._rules.rules
        )

    def _outcome(self, rule: Rule, matches: Sequence[Match], alerts: int, firing: int) -> RuleOutcome:
        counting = [match for match in matches if _counts(self.supports.get(match.match_id))]
        unchecked = sum(_unchecked(rule, self.supports.get(match.match_id)) for match in counting)
        return RuleOutcome(
            rule_id=rule.id,
            title=rule.header.title,
            version=rule.header.version,
            severity=rule.header.severity,
            matches=len(matches),
            refuted=len(matches) - len(counting),
            unchecked=unchecked,
            sequences=len({_sequence(self.shown[match.sample_id]) for match in counting}),
            alerts=alerts,
            firing=firing,
        )


class _Player:
    """Plays one run."""

    def __init__(  # noqa: PLR0917 -- the replay's own arguments, split by run
        self,
        run_id: str,
        rules: RuleSet,
        engine: Engine,
        ledger: Ledger,
        tally: _Tally,
        av_hash: str | None,
        controls: Checker | None,
        guarantees: Guarantees | None,
    ) -> None:
        self._run_id = run_id
        self._rules = rules
        self._engine = engine
        self._ledger = ledger
        self._tally = tally
        self._controls = controls
        self._guarantees = guarantees
        self._tallies = MemoryTallies()
        self._clock = Clock(None, 0.0)
        self._demanding = {rule.id for rule in rules.rules if _required(rule) or rule.spec.calibration is not None}
        self._asking = any(rule.questions for rule in rules.rules)
        self.needs_vectors = any(rule.probes for rule in rules.rules)
        versions = {(rule.id, rule.header.version) for rule in rules.rules}
        again = av_hash is not None and is_reread(engine, run_id, av_hash)
        # Another AV's words on the same sample make a match of the same id, of which nothing was measured.
        self._stored = {} if again else stored_supports(engine, run_id, versions)

    def play(self, readings: Sequence[Reading], screened: Sequence[Screened] | None) -> None:
        """Match, check and judge a batch, as the worker does."""
        if self._asking:
            ask_ahead(self._rules.rules, readings)
        matches = self._rules.evaluate(readings, screened)
        supports = with_unjudged(matches, self._supports(matches, readings))
        self._note(readings, matches, supports)
        counting = [match for match in matches if _counts(supports.get(match.match_id))]
        watch = None
        if self._guarantees is not None:
            watch = RunWatch(
                self._guarantees,
                self._run_id,
                self._tallies,
                readings=readings,
                matches=matches,
                supports=supports,
                stored=self._known,
            )
        Judge(
            self._run_id,
            self._clock,
            self._rules,
            self._ledger,
            exhibition=self._exhibit,
            refresh=recurred,
            guarantee=watch,
        ).run(readings, counting)
        if watch is not None:
            watch.save()
        self._ledger.add_matches(counting)
        for reading in readings:
            self._clock = self._clock.after(reading.sample)

    def _note(self, readings: Sequence[Reading], matches: Sequence[Match], supports: Mapping[str, Support]) -> None:
        tally = self._tally
        tally.readings += len(readings)
        tally.sequences.update(map(_sequence, readings))
        tally.matches += matches
        tally.supports |= supports
        if matches:
            matched = {match.sample_id for match in matches}
            tally.shown |= {reading.sample_id: reading for reading in readings if reading.sample_id in matched}

    def _supports(self, matches: Sequence[Match], readings: Sequence[Reading]) -> dict[str, Support]:
        found = {match.match_id: self._stored[match.match_id] for match in matches if match.match_id in self._stored}
        missing = [match for match in matches if match.rule_id in self._demanding and match.match_id not in found]
        if missing and self._controls is not None:
            found |= self._controls.check(missing, self._with_vectors(missing, readings))
        if self._guarantees is None:
            return found
        return self._guarantees.gated(matches, {key: _ungated(support) for key, support in found.items()})

    def _known(self, match_ids: Sequence[str]) -> dict[str, Support]:
        supports = self._tally.supports
        return {match_id: supports[match_id] for match_id in match_ids if match_id in supports}

    def _with_vectors(self, matches: Sequence[Match], readings: Sequence[Reading]) -> dict[str, Reading]:
        """The batch's readings, those of the matches with their vectors."""
        by_id = {reading.sample_id: reading for reading in readings}
        for sample_id, vector in vectors_of(self._engine, sorted({match.sample_id for match in matches})).items():
            reading = by_id[sample_id]
            by_id[sample_id] = dataclasses.replace(reading, sample=dataclasses.replace(reading.sample, vector=vector))
        return by_id

    def _exhibit(self, verdict: WindowVerdict) -> tuple[Reading | None, Mapping[str, object]]:
        shown, match = best_shown([(self._tally.shown[match.sample_id], match) for match in verdict.matches])
        supports = self._known([one.match_id for one in verdict.matches])
        bounds = plan_of(self._rules.get(match.rule_id)).bounds
        return shown, collect_evidence(verdict, shown, match, supports, bounds)


def _sequence(reading: Reading) -> tuple[str, str]:
    return reading.sample.run_id, unit_of(reading.sample)


def _counts(support: Support | None) -> bool:
    return support is None or support.supported


def _unchecked(rule: Rule, support: Support | None) -> bool:
    """Whether a control that the rule requires was not measured."""
    return bool(_required(rule) - (set(support.controls) if support is not None else set()))


def _required(rule: Rule) -> set[str]:
    """Controls that a match of the rule must pass."""
    return set(plan_of(rule).bounds)


def _ungated(support: Support) -> Support:
    """Without the verdict of a calibration that held when it was stored."""
    failed = tuple(name for name in support.failed if name != GATE)
    return dataclasses.replace(support, failed=failed, supported=not failed)
