"""Worker: the composition root of the reading side.

One batch, top to bottom: lease → verbalize (AV) → reconstruct (AR) → match rules → one transaction with readings,
matches, alerts and the outbox, and the acknowledgement in that same transaction → deliver the outbox. Killed at any
instant, the batch is leased again; a batch that another worker finished meanwhile is thrown away, not stored twice.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from nla_monitor.alerts import lifecycle
from nla_monitor.alerts.sinks import LogSink, Sink, WebhookSink, drain
from nla_monitor.config import MonitorConfig
from nla_monitor.errors import ActivationError, StoreUnavailableError
from nla_monitor.evidence import SwapRule, check_swaps, collect_evidence
from nla_monitor.nla import load_reconstructor, load_verbalizer
from nla_monitor.nla.base import Reconstructor, Verbalization, Verbalizer
from nla_monitor.nla.injection import bad_rows
from nla_monitor.organism import resolve
from nla_monitor.records import (
    ActivationSample,
    Alert,
    Explanation,
    Fidelity,
    Match,
    Reading,
    RuleHeader,
    Scalar,
    StageFailure,
    Support,
    WindowVerdict,
)
from nla_monitor.rules import RuleSet, load_rules
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.repository import Repository
from nla_monitor.store.session import open_engine, prepare
from nla_monitor.store.transaction import WorkerTransaction
from nla_monitor.telemetry import Telemetry

logger = logging.getLogger("nla_monitor.worker")


@dataclass(slots=True)
class _Batch:
    """Working memory of one lease; becomes rows in one transaction."""

    owner: str
    samples: tuple[ActivationSample, ...]
    readings: list[Reading] = field(default_factory=list)
    failures: list[StageFailure] = field(default_factory=list)
    matches: list[Match] = field(default_factory=list)
    supports: dict[str, Support] = field(default_factory=dict)
    changed: list[tuple[Alert, str]] = field(default_factory=list)


class _Clock(NamedTuple):
    """How far a run has come, by its own readings: the same in a replay."""

    run_id: str
    step: int | None
    now: float


class Worker:
    """Reads what the spool holds.

    Args:
        config: the same config as the host's.
        verbalizer, reconstructor: ready-made halves; loaded from ``config.nla`` otherwise.
        telemetry: where spans and metrics go; the global OpenTelemetry providers otherwise.
        sinks: where fired and resolved alerts go, besides the database.

    Raises:
        NLAMonitorError: a checkpoint, rule or the database cannot be used (construction only).
    """

    def __init__(
        self,
        config: MonitorConfig,
        *,
        verbalizer: Verbalizer | None = None,
        reconstructor: Reconstructor | None = None,
        telemetry: Telemetry | None = None,
        sinks: Sequence[Sink] | None = None,
    ) -> None:
        self.config = config
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{threading.get_ident()}"
        self.rules: RuleSet = load_rules(config.rules)
        self._swap_rules = _swap_rules(self.rules)
        engine = open_engine(config.database)
        prepare(engine)
        self.repository = Repository(engine)
        self.repository.save_rules((rule.header, rule.spec.model_dump_json()) for rule in self.rules.rules)
        self.spool = SqlSpool(engine, max_attempts=config.worker.max_attempts)
        self.verbalizer = verbalizer or load_verbalizer(resolve(config.nla.av), config.nla)
        self.reconstructor = reconstructor
        if reconstructor is None and verbalizer is None and config.nla.ar is not None:
            self.reconstructor = load_reconstructor(resolve(config.nla.ar), config.nla)
        self.telemetry = telemetry or Telemetry(config=config.telemetry)
        self.telemetry.expect_rules(self.rules.headers.values())
        self.sinks = list(sinks) if sinks is not None else _sinks(config)

    def run(self, stop: threading.Event, drain_and_stop: threading.Event | None = None) -> None:
        """Work until ``stop`` is set, or until the spool is empty once ``drain_and_stop`` is set.

        A database that is locked, full or away is waited for; nothing is lost, since nothing was acknowledged.
        """
        pause = self.config.worker.poll_seconds
        while not stop.is_set():
            try:
                worked = self.run_once()
            except StoreUnavailableError as error:
                logger.warning("store unavailable, trying again in %.1f s: %s", pause, error)
                worked = 0
                pause = min(pause * 2, 30.0)
            else:
                pause = self.config.worker.poll_seconds
            if worked:
                continue
            if drain_and_stop is not None and drain_and_stop.is_set() and self._empty():
                return
            stop.wait(pause)

    def _empty(self) -> bool:
        try:
            depth = self.spool.depth()
        except StoreUnavailableError:
            return False
        return depth.waiting == 0 and depth.leased == 0

    def run_once(self) -> int:
        """Read one leased batch; returns how many samples it held.

        Raises:
            StoreUnavailableError: the database could not be written; the lease will expire and be taken again.
        """
        lease = self.spool.lease(self.owner, self.config.nla.batch_size, self.config.worker.lease_seconds)
        if not lease.samples:
            self._deliver()
            return 0
        batch = _Batch(owner=self.owner, samples=lease.samples)
        self._read(batch)
        with self.telemetry.evaluate_span(len(batch.readings)):
            batch.matches = self.rules.evaluate(batch.readings)
            batch.supports = self._check(batch)
        self._commit(batch)
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
        self.telemetry.verbalized(len(good), "ok", time.perf_counter() - started)

    def _verbalize(self, batch: _Batch, samples: Sequence[ActivationSample], vectors: np.ndarray) -> None:
        """A batch that fails as a whole is tried again row by row, so that one poisonous row harms only itself."""
        try:
            batch.readings += self._readings(samples, vectors)
        except (RuntimeError, ActivationError) as error:
            if len(samples) == 1:
                text = f"{type(error).__name__}: {error}"
                batch.failures.append(StageFailure(samples[0].sample_id, "verbalize", text, retryable=True))
                self.telemetry.verbalized(1, "error", 0.0)
                return
            half = len(samples) // 2
            self._verbalize(batch, samples[:half], vectors[:half])
            self._verbalize(batch, samples[half:], vectors[half:])

    def _readings(self, samples: Sequence[ActivationSample], vectors: np.ndarray) -> list[Reading]:
        texts = self.verbalizer.verbalize(vectors)
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
        return [
            Fidelity(
                sample.sample_id,
                score.cosine,
                score.mse_nrm,
                score.fve,
                score.denominator,
                score.denominator_name,
                self.reconstructor.content_hash,
            )
            for sample, score in zip(samples, scores, strict=True)
        ]

    # -- evidence on candidates ----------------------------------------------------------------------------------

    def _check(self, batch: _Batch) -> dict[str, Support]:
        """The controls that the matched rules require; without an AR there are none, and the alert says so."""
        if self.reconstructor is None:
            return {}
        ar = self.reconstructor
        readings = {reading.sample_id: reading for reading in batch.readings}
        return check_swaps(
            batch.matches,
            readings,
            self._swap_rules,
            lambda vectors, texts: [score.cosine for score in ar.score(vectors, texts)],
        )

    # -- one transaction -----------------------------------------------------------------------------------------

    def _commit(self, batch: _Batch) -> None:
        runs = sorted({sample.run_id for sample in batch.samples})
        with self.repository.transaction(runs) as tx:
            owned = tx.still_owned(batch.owner, [sample.sample_id for sample in batch.samples])
            batch.readings = [reading for reading in batch.readings if reading.sample_id in owned]
            batch.matches = [match for match in batch.matches if match.sample_id in owned]
            batch.failures = [failure for failure in batch.failures if failure.sample_id in owned]
            tx.add_readings(batch.readings)
            tx.add_matches(batch.matches, batch.supports)
            retrying = tx.add_failures(batch.failures, self.config.worker.max_attempts)
            batch.changed = self._alerts(tx, runs, batch.matches)
            tx.ack(batch.owner, sorted(owned - retrying))

    def _alerts(self, tx: WorkerTransaction, runs: Sequence[str], matches: Sequence[Match]) -> list[tuple[Alert, str]]:
        changed: list[tuple[Alert, str]] = []
        for run_id in runs:
            clock = _Clock(run_id, *tx.progress(run_id))
            for rule_id, group in _touched(run_id, matches, tx.firing_alerts(run_id)):
                header = self.rules.headers.get(rule_id)
                if header is not None:
                    changed += self._window(tx, header, group, matches, clock)
        return changed

    def _window(
        self, tx: WorkerTransaction, header: RuleHeader, group: dict[str, Scalar], new: Sequence[Match], clock: _Clock
    ) -> list[tuple[Alert, str]]:
        """Judge one group at each moment at which the batch brought a match, so that batch sizes change nothing."""
        key = lifecycle.fingerprint(header.rule_id, clock.run_id, group)
        mine = [match for match in new if _fingerprint(match) == key]
        moments = self.rules.moments(mine, step=clock.step, now=clock.now)
        since_step, since_time = self.rules.window_start(header.rule_id, step=moments[0][0], now=moments[0][1])
        stored = tx.window_matches(
            header.rule_id, header.version, clock.run_id, group, since_step=since_step, since_time=since_time
        )
        changed: list[tuple[Alert, str]] = []
        for step, now in moments:
            verdict = self.rules.window(header.rule_id, stored, step=step, now=now)
            changed += self._advance(tx, header, group, verdict, clock._replace(step=step, now=now))
        return changed

    def _advance(
        self,
        tx: WorkerTransaction,
        header: RuleHeader,
        group: dict[str, Scalar],
        verdict: WindowVerdict,
        clock: _Clock,
    ) -> list[tuple[Alert, str]]:
        current = tx.current_alert(lifecycle.fingerprint(header.rule_id, clock.run_id, group))
        exhibit = _exhibit(tx, verdict.matches) if verdict.firing and current is None else None
        transition = lifecycle.advance(
            header,
            group,
            clock.run_id,
            verdict,
            current,
            exhibit[0] if exhibit is not None else None,
            step=clock.step,
            now=clock.now,
            evidence=self._evidence(tx, verdict, *exhibit) if exhibit is not None else {},
        )
        if transition.alert is None or transition.event is None:
            return []
        return [(tx.save_alert(transition.alert, verdict.matches, transition.event), transition.event)]

    def _evidence(
        self, tx: WorkerTransaction, verdict: WindowVerdict, exhibit: Reading, match: Match
    ) -> dict[str, object]:
        margins = tx.margins([match.match_id for match in verdict.matches])
        evidence = collect_evidence(verdict, exhibit, match, margins)
        rule = self._swap_rules.get(match.rule_id)
        if rule is not None and not margins:
            evidence["not_run"] = ["swap_margin: no AR is configured"]
        elif rule is not None:
            evidence["swap_margin_required"] = rule.least
        return evidence

    # -- after the commit ----------------------------------------------------------------------------------------

    def _report(self, batch: _Batch) -> None:
        by_id = {reading.sample_id: reading for reading in batch.readings}
        for match in batch.matches:
            if match.match_id in batch.supports and not batch.supports[match.match_id].supported:
                continue
            self.telemetry.evaluation_event(match, by_id[match.sample_id])
        for reading in batch.readings:
            self.telemetry.fidelity(reading)
        for alert, event in batch.changed:
            self.telemetry.alert(alert, event, delay=time.time() - alert.fired_at)
        depth = self.spool.depth()
        self.telemetry.queue_size(depth.waiting + depth.leased)

    def _deliver(self) -> None:
        drain(self.repository, self.sinks)

    def close(self) -> None:
        """Give the database connections back."""
        self.repository.dispose()


def _sinks(config: MonitorConfig) -> list[Sink]:
    sinks: list[Sink] = [LogSink()]
    if config.alerts.webhook is not None:
        sinks.append(WebhookSink(config.alerts.webhook))
    return sinks


def _touched(run_id: str, matches: Iterable[Match], firing: Iterable[Alert]) -> list[tuple[str, dict[str, Scalar]]]:
    """Groups whose window may have changed: those with a new match, and those of firing alerts (they may resolve)."""
    seen: dict[str, dict[str, dict[str, Scalar]]] = defaultdict(dict)
    for rule_id, group in [
        *((match.rule_id, match.group) for match in matches if match.run_id == run_id),
        *((alert.rule_id, alert.group) for alert in firing),
    ]:
        seen[rule_id][lifecycle.fingerprint(rule_id, run_id, group)] = dict(group)
    return [(rule_id, group) for rule_id in sorted(seen) for _, group in sorted(seen[rule_id].items())]


def _fingerprint(match: Match) -> str:
    return lifecycle.fingerprint(match.rule_id, match.run_id, match.group)


def _swap_rules(rules: RuleSet) -> dict[str, SwapRule]:
    required = {rule.id: rule.spec.evidence.swap_margin for rule in rules.rules}
    return {key: SwapRule(swap.min, swap.alternatives) for key, swap in required.items() if swap is not None}


def _exhibit(tx: WorkerTransaction, matches: Sequence[Match]) -> tuple[Reading, Match] | None:
    """The match whose explanation reconstructs best, as the reading to show; ties go to the earliest."""
    found = [(reading, match) for match in matches if (reading := tx.reading(match.sample_id)) is not None]
    if not found:
        return None
    return max(found, key=lambda pair: pair[0].fidelity.cosine if pair[0].fidelity is not None else 0.0)
