"""Worker: the composition root of the reading side.

One batch, top to bottom: lease → verbalize (AV) → reconstruct (AR) → match rules → one transaction with readings,
matches, alerts and the outbox, and the acknowledgement in that same transaction → deliver the outbox. Killed at any
instant, the batch is leased again; a batch that another worker finished meanwhile is thrown away, not stored twice.
Delivery has a thread of its own while the worker runs: a receiver that hangs holds up no reading.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

import numpy as np
from sqlalchemy import Engine

from nla_monitor.alerts.judge import Clock, Judge
from nla_monitor.alerts.lifecycle import Event
from nla_monitor.alerts.sinks import Sink
from nla_monitor.baseline import LiveGuarantees
from nla_monitor.calibrate import Guarantees, RunWatch, Voided
from nla_monitor.config import MonitorConfig
from nla_monitor.controls import Controls
from nla_monitor.courier import Courier
from nla_monitor.errors import (
    ConfigError,
    EngineError,
    EngineUnavailableError,
    ForeignDatabaseError,
    SchemaVersionError,
    StoreUnavailableError,
)
from nla_monitor.evidence import AWAITED, awaiting, best_shown, collect_evidence, completed, recurred
from nla_monitor.leaving import busy
from nla_monitor.nla import load_reconstructor
from nla_monitor.nla.base import PartialReadError, Reconstructor, Verbalization, Verbalizer
from nla_monitor.nla.domains import denominators_for
from nla_monitor.nla.engines import greet, open_verbalizer, release
from nla_monitor.nla.fidelity import record_of
from nla_monitor.nla.injection import bad_rows
from nla_monitor.organism import resolve
from nla_monitor.outlets import sinks_of
from nla_monitor.records import (
    ActivationSample,
    Alert,
    Explanation,
    Fidelity,
    Match,
    Reading,
    RunInfo,
    StageFailure,
    Support,
    WindowVerdict,
    uuid7,
)
from nla_monitor.rules import RuleSet, load_rules
from nla_monitor.rules.deferred import ask_ahead, connect, with_unjudged
from nla_monitor.rules.evidence_schema import CONTROLS
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.judgements import SqlJudgements
from nla_monitor.store.repository import Repository
from nla_monitor.store.session import open_engine, prepare
from nla_monitor.store.surroundings import Surroundings
from nla_monitor.store.transaction import WorkerTransaction
from nla_monitor.telemetry import Telemetry
from nla_monitor.telling import Telling
from nla_monitor.untraced import untraced
from nla_monitor.vitals import Vitals

logger = logging.getLogger("nla_monitor.worker")

_LONGEST_PAUSE: Final = 30.0
_LAST_PATIENCE: Final = 300.0
"""Seconds for which a worker whose host is gone waits for a database that cannot be used."""
_FAULTS_IN_A_ROW: Final = 5


@dataclass(frozen=True, slots=True)
class _Exhibit:
    """The reading that an alert shows, its match, and what is known of it."""

    reading: Reading
    match: Match
    support: Support | None


@dataclass(slots=True)
class _Batch:
    """Working memory of one lease; becomes rows in one transaction."""

    owner: str
    guarantees: Guarantees
    samples: tuple[ActivationSample, ...]
    readings: list[Reading] = field(default_factory=list)
    failures: list[StageFailure] = field(default_factory=list)
    matches: list[Match] = field(default_factory=list)
    supports: dict[str, Support] = field(default_factory=dict)
    changed: list[tuple[Alert, Event]] = field(default_factory=list)
    voided: list[Voided] = field(default_factory=list)
    exhibits: dict[tuple[str, str], _Exhibit] = field(default_factory=dict)
    """What new alerts show, by sample and rule."""
    certified: dict[str, Mapping[str, object]] = field(default_factory=dict)
    """What stands behind each match that counts, by match id."""
    shown: dict[str, Reading] = field(default_factory=dict)
    """What alerts that fired or resolved show, by alert id."""

    def counts(self, match: Match) -> bool:
        """Whether no control refuted the match."""
        support = self.supports.get(match.match_id)
        return support is None or support.supported


class Worker:
    """Reads what the spool holds.

    Args:
        config: the same config as the host's.
        verbalizer, reconstructor: ready-made halves; loaded from ``config.nla`` otherwise.
        telemetry: where spans and metrics go; the global OpenTelemetry providers otherwise.
        sinks: where fired and resolved alerts go, besides the database.
        engine: the database, where the host's own must be shared (in memory); opened from ``config`` otherwise.

    Raises:
        NLAMonitorError: a checkpoint, rule or the database cannot be used (construction only).
    """

    @untraced()
    def __init__(
        self,
        config: MonitorConfig,
        *,
        verbalizer: Verbalizer | None = None,
        reconstructor: Reconstructor | None = None,
        telemetry: Telemetry | None = None,
        sinks: Sequence[Sink] | None = None,
        engine: Engine | None = None,
    ) -> None:
        self.config = config
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid7()[-12:]}"
        self.rules: RuleSet = load_rules(config.rules)
        engine = engine or open_engine(config.database)
        prepare(engine)
        self.repository = Repository(engine)
        self.repository.save_rules((rule.header, rule.spec.source()) for rule in self.rules.rules)
        self.spool = SqlSpool(engine, max_attempts=config.worker.max_attempts)
        self._closes = verbalizer is None
        self.verbalizer = verbalizer or open_verbalizer(resolve(config.nla.av), config.nla)
        greet(self.verbalizer)
        self.reconstructor = reconstructor
        if reconstructor is None and verbalizer is None and config.nla.ar is not None:
            self.reconstructor = load_reconstructor(resolve(config.nla.ar), config.nla)
        if self.reconstructor is not None:
            check_pair(self.verbalizer, self.reconstructor)
        layer = getattr(self.verbalizer, "layer", None)
        self._denominators = denominators_for(config.nla.denominator, self.verbalizer.d_model, layer)
        connect(self.rules.rules, SqlJudgements(engine), d_model=self.verbalizer.d_model, layer=layer)
        around = Surroundings(engine, self.verbalizer.content_hash)
        self.controls = Controls(self.rules, self.verbalizer, self.reconstructor, neighbourhood=around)
        ar_hash = self.reconstructor.content_hash if self.reconstructor is not None else None
        self._calibrated = LiveGuarantees(engine, self.rules, self.verbalizer.content_hash, ar_hash, run=self._run_info)
        self.telemetry = telemetry or Telemetry(config=config.telemetry)
        self.telemetry.expect_rules(self.rules.headers.values())
        self._telling = Telling(self.telemetry, self.rules)
        headers, silence = self.rules.headers, config.alerts.stale_seconds
        self._vitals = Vitals(engine, self.telemetry, headers.values(), silence)
        self.sinks = list(sinks) if sinks is not None else sinks_of(config)
        self._courier = Courier(self.repository, self.sinks, headers, telemetry=self.telemetry, silence=silence)
        self._catching_up = True

    def run(self, stop: threading.Event, drain_and_stop: threading.Event | None = None) -> None:
        """Work until ``stop`` is set, or until the spool is empty once ``drain_and_stop`` is set.

        A database that is locked, full or away is waited for, and so is a server that runs the AV; nothing is lost,
        since nothing was acknowledged. Only a worker whose host is gone (``drain_and_stop``) gives up on them in the
        end, and leaves the rest to the next one.
        Any other fault costs its batch (leased again later); several in a row end the worker.

        Raises:
            NLAMonitorError: the database is no longer one that this version can use.
            Exception: what went wrong ``_FAULTS_IN_A_ROW`` times in a row.
        """
        with self._courier.at_work():
            self._run(stop, drain_and_stop)

    def _run(self, stop: threading.Event, drain_and_stop: threading.Event | None) -> None:
        pause, faults, away_since = self.config.worker.poll_seconds, 0, 0.0
        while not stop.is_set():
            finishing = drain_and_stop is not None and drain_and_stop.is_set()
            try:
                with busy():
                    worked = self.run_once()
                faults, away_since, pause = 0, 0.0, self.config.worker.poll_seconds
            except (StoreUnavailableError, EngineError) as error:
                who = "store" if isinstance(error, StoreUnavailableError) else "AV's server"
                worked, away_since = 0, away_since or time.monotonic()
                if finishing and time.monotonic() - away_since > _LAST_PATIENCE:
                    logger.error("%s unavailable for too long; what is left stays in the spool: %s", who, error)  # noqa: TRY400 -- no fault of ours
                    return
                pause = min(pause * 2, _LONGEST_PAUSE)
                logger.warning("%s unavailable, trying again in %.1f s: %s", who, pause, error)
            except (SchemaVersionError, ForeignDatabaseError):
                raise
            except Exception:
                worked, faults = 0, faults + 1
                if faults >= _FAULTS_IN_A_ROW:
                    raise
                logger.exception("fault %d in a row; the batch is leased again when its lease runs out", faults)
            if worked:
                continue
            if finishing and self._empty():
                self._courier.finish()
                return
            stop.wait(pause)

    def _run_info(self, run_id: str) -> RunInfo | None:
        found = self.repository.run(run_id)
        return found.info if found is not None else None

    def _empty(self) -> bool:
        try:
            depth = self.spool.depth()
        except StoreUnavailableError:
            return False
        return depth.waiting == 0 and depth.leased == 0

    @untraced()
    def run_once(self) -> int:
        """Read one leased batch; returns how many samples it held.

        Raises:
            StoreUnavailableError: the database could not be written; the lease will expire and be taken again.
            EngineError: the AV's server is away or cannot be used; the samples are back in the queue, and this does
                not count as an attempt.
        """
        lease = self.spool.lease(self.owner, self.config.nla.batch_size, self.config.worker.lease_seconds)
        if not lease.samples:
            self._vitals.tick()
            self._catch_up()
            self._deliver()
            return 0
        batch = _Batch(self.owner, self._calibrated.current(), lease.samples)
        try:
            self._read(batch)
        except EngineError:
            self.spool.release(self.owner, [sample.sample_id for sample in lease.samples])
            raise
        with self.telemetry.evaluate_span(batch.readings):
            self._match(batch)
            batch.supports = self.controls.check(batch.matches, {item.sample_id: item for item in batch.readings})
            batch.supports = with_unjudged(batch.matches, batch.supports)
            batch.supports = batch.guarantees.gated(batch.matches, batch.supports)
        self._commit(batch)
        self._complete(batch)
        self._report(batch)
        self._deliver()
        return len(lease.samples)

    # -- verbalize and reconstruct -------------------------------------------------------------------------------

    def _read(self, batch: _Batch) -> None:
        bad = bad_rows((sample.vector for sample in batch.samples), self.verbalizer.d_model)
        batch.failures += [
            StageFailure(batch.samples[row].sample_id, "verbalize", why, retryable=False) for row, why in bad.items()
        ]
        good = [row for row in range(len(batch.samples)) if row not in bad]
        if not good:
            return
        started = time.perf_counter()
        samples = [batch.samples[row] for row in good]
        with self.telemetry.verbalize_span(samples, av_hash=self.verbalizer.content_hash):
            self._verbalize(batch, samples, np.stack([sample.vector for sample in samples]))
        if batch.readings:
            self.telemetry.verbalized(len(batch.readings), "ok", time.perf_counter() - started)

    def _verbalize(
        self,
        batch: _Batch,
        samples: Sequence[ActivationSample],
        vectors: np.ndarray,
        texts: Sequence[Verbalization] | None = None,
    ) -> None:
        """A batch that fails as a whole is tried again in halves, so that one poisonous row harms only itself."""
        try:
            batch.readings += self._readings(samples, vectors, texts)
        except EngineError:  # no fault of a sample
            raise
        except PartialReadError as error:
            self._partly(batch, samples, vectors, error)
        except Exception as error:  # noqa: BLE001 -- whatever a model's libraries raise costs one sample, not the worker
            if len(samples) == 1:
                self._unread(batch, samples[0], error, retryable=True)
                return
            half = len(samples) // 2
            for part in (slice(None, half), slice(half, None)):
                self._verbalize(batch, samples[part], vectors[part], None if texts is None else texts[part])

    def _partly(
        self, batch: _Batch, samples: Sequence[ActivationSample], vectors: np.ndarray, error: PartialReadError
    ) -> None:
        """The AV says which rows failed: only those do. A server that refuses a row will refuse it again."""
        for row, why in error.failed.items():
            self._unread(batch, samples[row], why, retryable=isinstance(why, EngineUnavailableError))
        done = sorted(error.done)
        if done:
            self._verbalize(batch, [samples[row] for row in done], vectors[done], [error.done[row] for row in done])

    def _unread(self, batch: _Batch, sample: ActivationSample, error: Exception, *, retryable: bool) -> None:
        logger.warning("sample %s cannot be read: %s", sample.sample_id, _said(error))
        batch.failures.append(StageFailure(sample.sample_id, "verbalize", _said(error), retryable=retryable))
        self.telemetry.verbalized(1, "error", 0.0)

    def _readings(
        self, samples: Sequence[ActivationSample], vectors: np.ndarray, texts: Sequence[Verbalization] | None
    ) -> list[Reading]:
        texts = self.verbalizer.verbalize(vectors) if texts is None else texts
        explanations = [self._explanation(sample, text) for sample, text in zip(samples, texts, strict=True)]
        fidelities = self._fidelities(samples, vectors, texts)
        return [Reading(*parts) for parts in zip(samples, explanations, fidelities, strict=True)]

    def _explanation(self, sample: ActivationSample, text: Verbalization) -> Explanation:
        return Explanation(sample.sample_id, text.text, text.truncated, text.tokens, self.verbalizer.content_hash)

    def _fidelities(
        self, samples: Sequence[ActivationSample], vectors: np.ndarray, texts: Sequence[Verbalization]
    ) -> list[Fidelity | None]:
        if self.reconstructor is None:
            return [None] * len(samples)
        scores = self.reconstructor.score(vectors, [text.text for text in texts])
        if self._denominators is not None:
            scores = self._denominators.rescored_samples(scores, samples)
        ar_hash = self.reconstructor.content_hash
        return [record_of(sample.sample_id, score, ar_hash) for sample, score in zip(samples, scores, strict=True)]

    # -- rules, and evidence on candidates -----------------------------------------------------------------------

    def _match(self, batch: _Batch) -> None:
        try:
            ask_ahead(self.rules.rules, batch.readings)
        except Exception:  # each reading is then judged, and fails, by itself
            logger.exception("a model that rules ask failed on a batch")
        for reading in batch.readings:
            try:
                batch.matches += self.rules.evaluate([reading])
            except Exception as error:
                logger.exception("the rules cannot judge sample %s", reading.sample_id)
                batch.failures.append(StageFailure(reading.sample_id, "evaluate", _said(error), retryable=False))

    # -- one transaction -----------------------------------------------------------------------------------------

    def _commit(self, batch: _Batch) -> None:
        runs = sorted({sample.run_id for sample in batch.samples})
        with self.repository.transaction(runs) as tx:
            owned = tx.still_owned(batch.owner, [sample.sample_id for sample in batch.samples])
            batch.readings = [reading for reading in batch.readings if reading.sample_id in owned]
            batch.matches = [match for match in batch.matches if match.sample_id in owned]
            batch.failures = [failure for failure in batch.failures if failure.sample_id in owned]
            clocks = {run_id: Clock(*tx.progress(run_id)) for run_id in runs}
            tx.add_readings(batch.readings)
            tx.add_matches(batch.matches, batch.supports)
            retrying = tx.add_failures(batch.failures, self.config.worker.max_attempts)
            batch.changed = [change for item in clocks.items() for change in self._judge(tx, batch, *item)]
            tx.ack(batch.owner, sorted(owned - retrying))

    def _judge(self, tx: WorkerTransaction, batch: _Batch, run_id: str, clock: Clock) -> list[tuple[Alert, Event]]:
        readings = [reading for reading in batch.readings if reading.sample.run_id == run_id]
        counting = [match for match in batch.matches if match.run_id == run_id and batch.counts(match)]
        watch = RunWatch(
            batch.guarantees,
            run_id,
            tx.tallies,
            readings=readings,
            matches=[match for match in batch.matches if match.run_id == run_id],
            supports=batch.supports,
            stored=tx.supports,
        )
        show = partial(self._exhibit, tx, batch)
        judge = Judge(run_id, clock, self.rules, tx, exhibition=show, refresh=recurred, guarantee=watch)
        changes = judge.run(readings, counting)
        watch.save()
        batch.voided += watch.voided
        batch.certified |= {match.match_id: watch.say(match.rule_id, match) for match in counting}
        news = (alert for alert, event in changes if event != "updated")
        found = {alert.alert_id: tx.reading(alert.sample_id) for alert in news}
        batch.shown |= {alert_id: reading for alert_id, reading in found.items() if reading is not None}
        return changes

    def _exhibit(
        self, tx: WorkerTransaction, batch: _Batch, verdict: WindowVerdict
    ) -> tuple[Reading | None, dict[str, object]]:
        """What a new alert shows, and what speaks for it."""
        found = [(reading, match) for match in verdict.matches if (reading := tx.reading(match.sample_id)) is not None]
        if not found:
            return None, {}
        shown, match = best_shown(found)
        supports = tx.supports([one.match_id for one in verdict.matches])
        batch.exhibits[match.sample_id, match.rule_id] = _Exhibit(shown, match, supports.get(match.match_id))
        evidence = collect_evidence(verdict, shown, match, supports, self.controls.bounds(match.rule_id))
        return shown, awaiting(evidence, CONTROLS)

    # -- after the commit ----------------------------------------------------------------------------------------

    def _complete(self, batch: _Batch) -> None:
        """The dear controls of what new alerts show: outside the transaction, where nobody waits for the AV.

        An alert whose worker is killed before this has been stored, and says that they are to come.
        """
        for number, (alert, event) in enumerate(batch.changed):
            exhibit = batch.exhibits.get((alert.sample_id, alert.rule_id))
            if event == "fired" and exhibit is not None:
                batch.changed[number] = (self._completed(alert, exhibit), event)

    def _completed(self, alert: Alert, exhibit: _Exhibit) -> Alert:
        support = self.controls.complete(exhibit.match, exhibit.reading, exhibit.support)
        evidence = completed(alert.evidence, support, self.controls.bounds(alert.rule_id))
        # Recurrence may have grown meanwhile; what was to come has come, also when nothing else is missing.
        changes = {"not_run": {}} | {name: value for name, value in evidence.items() if name != "recurrence"}
        try:
            return self.repository.add_evidence(alert, changes)
        except StoreUnavailableError as error:  # the batch is acknowledged: the alert stays as it was stored
            logger.warning("the controls of alert %s could not be stored yet: %s", alert.alert_id, error)
            self._catching_up = True
            return alert

    def _catch_up(self) -> None:
        """Complete what other workers left when they were killed; once, and only when nothing waits to be read.

        Another live worker may be at the same alert: both measure the same.
        """
        if not self._catching_up:
            return
        left = self.repository.alerts_saying(AWAITED)
        self._catching_up = False  # what goes wrong below does so once, not whenever the queue is empty
        for alert in left:
            exhibit = self._stored_exhibit(alert)
            if exhibit is not None:
                self._completed(alert, exhibit)

    def _stored_exhibit(self, alert: Alert) -> _Exhibit | None:
        """What an alert shows, if it is stored still, and was read and judged by what this worker has."""
        header = self.rules.headers.get(alert.rule_id)
        found = (match for match in self.repository.alert_matches(alert.alert_id) if match.sample_id == alert.sample_id)
        match = next(found, None)
        if match is None or header is None or header.version != alert.rule_version:
            return None
        with self.repository.transaction() as tx:
            reading, supports = tx.reading(match.sample_id), tx.supports([match.match_id])
        if reading is None or reading.explanation.av_hash != self.verbalizer.content_hash:
            return None
        return _Exhibit(reading, match, supports.get(match.match_id))

    def _report(self, batch: _Batch) -> None:
        self._telling.tell(batch)
        self._vitals.tick()

    def _deliver(self) -> None:
        self._courier.nudge()

    def untold(self) -> str:
        """Outside ``run``: try once more what is to be told; how many messages wait, empty for none."""
        return self._courier.left()

    def close(self) -> None:
        """Give connections back: the database's, and those to a server that runs the AV."""
        self.repository.dispose()
        if self._closes:
            release(self.verbalizer)


class _Half(Protocol):
    """An AV or AR, or the sidecar of one."""

    @property
    def d_model(self) -> int: ...


def check_pair(av: _Half, ar: _Half) -> None:
    """Refuse an AV and an AR that are not of one NLA.

    Raises:
        ConfigError: they read vectors of different width, or from different layers.
    """
    if av.d_model != ar.d_model:
        raise ConfigError(f"the AV reads d_model {av.d_model}, the AR {ar.d_model}: nla.av and nla.ar are no pair")
    layers = getattr(av, "layer", None), getattr(ar, "layer", None)
    if None not in layers and layers[0] != layers[1]:
        raise ConfigError(f"the AV reads block {layers[0]}, the AR block {layers[1]}: nla.av and nla.ar are no pair")


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
