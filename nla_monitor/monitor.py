"""Monitor: the composition root of the host side.

Capture → spool, a worker beside it, and a watcher thread that brings alerts back. Everything that a training loop or an
agent calls is guarded: it never raises, never waits.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nla_monitor import ranks
from nla_monitor.alerts.responses import Responses, describe
from nla_monitor.annotations import Annotations
from nla_monitor.capture import Capture
from nla_monitor.capture.session import SessionHandle
from nla_monitor.config import MonitorConfig, absolute_database, load_config, overridden
from nla_monitor.errors import AttachError, StoreError
from nla_monitor.guard import Guard
from nla_monitor.nla.sidecar import load_sidecar
from nla_monitor.organism import resolve
from nla_monitor.outlets import SECRET_OUTLETS, sinks_of
from nla_monitor.records import (
    ActivationSample,
    AgentContext,
    Alert,
    AlertState,
    Phase,
    RunInfo,
    Scalar,
    uuid7,
)
from nla_monitor.rules import load_rules
from nla_monitor.scalars import ScalarBoard
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.repository import Repository
from nla_monitor.store.session import open_engine, prepare
from nla_monitor.supervisor import WorkerProcess, current_folder
from nla_monitor.telemetry import Telemetry
from nla_monitor.watched import Watched, layers_of, screens_of
from nla_monitor.worker import Worker, check_pair

logger = logging.getLogger("nla_monitor")

_WATCH_SECONDS = 0.5
_EXIT_SECONDS = 10.0
_MANY = 10_000


@dataclass(frozen=True, slots=True)
class MonitorStats:
    """What became of the activations, so far."""

    sampled: int
    written: int
    """Safely in the spool."""
    dropped: Mapping[str, int]
    """By reason."""
    faults: Mapping[str, int]
    """Swallowed faults of ours, by place."""
    worker_restarts: int


class Monitor:
    """Watches one model in this process.

    Args:
        config: a YAML file, a mapping, a ``MonitorConfig``, or None for the defaults.
        telemetry: OpenTelemetry providers to use; the global ones otherwise.
        overrides: ``av``, ``ar``, ``layer``, ``rules``, ``database``, ``worker`` (``process``, ``thread``,
            ``external``), ``stop_on``, ``run_name``, or whole sections (``capture={...}``).

    Raises:
        NLAMonitorError: config, checkpoint sidecar, rules or database cannot be used. Once attached, nothing is raised.
    """

    def __init__(
        self,
        config: str | Path | Mapping[str, Any] | MonitorConfig | None = None,
        *,
        telemetry: Telemetry | None = None,
        **overrides: Any,
    ) -> None:
        self._folder = current_folder()
        # A host may change its folder later; new connections and the worker must still mean the same file.
        self.config = absolute_database(overridden(load_config(config), overrides), self._folder)
        self._pid = os.getpid()
        self.telemetry = telemetry or Telemetry(config=self.config.telemetry)
        self.guard = Guard(on_fault=self.telemetry.fault)
        self.tokenizer: Any = None
        nla = self.config.nla
        self._sidecar = load_sidecar(resolve(nla.av), "av", revision=nla.revision, config=nla)
        if nla.ar is not None:
            check_pair(self._sidecar, load_sidecar(resolve(nla.ar), "ar", revision=nla.revision, config=nla))
        self._layers = layers_of(self.config.capture, self._sidecar.layer)
        screens_of(self.config.capture)
        alerts = self.config.alerts
        headers = load_rules(self.config.rules).headers
        self._responses = Responses(headers, log=alerts.log, stop_on=alerts.stop_on)
        sinks_of(self.config)
        engine = open_engine(self.config.database, in_process=self.config.worker.mode == "thread")
        prepare(engine)
        self._engine = engine
        self.repository = Repository(engine)
        attempts, head_start = self.config.worker.max_attempts, self.config.queue.priority_seconds
        self.spool = SqlSpool(engine, max_attempts=attempts, head_start=head_start)
        self.run_id = uuid7()
        self.annotations = Annotations()
        self._board = ScalarBoard(engine, headers)
        self._step: int | None = None
        self._watched = Watched()
        self._worker: WorkerProcess | None = None
        self._worker_thread: threading.Thread | None = None
        self._stop_worker, self._finish_worker = threading.Event(), threading.Event()
        self._watcher: threading.Thread | None = None
        self._watch_stop = threading.Event()
        self._listeners: list[Callable[[Alert], None]] = []
        self._states: dict[str, AlertState] = {}
        self._reported_drops: dict[str, int] = {}
        self._stop_alert: Alert | None = None
        self._said: set[str] = set()
        self._store_down = False
        self._worker_lost = False
        self._measured = (0, 0.0)
        self._closed = False

    @classmethod
    def from_config(
        cls, config: str | Path | Mapping[str, Any] | MonitorConfig | None = None, **overrides: Any
    ) -> Self:
        """Same as the constructor; reads better with a file."""
        return cls(config, **overrides)

    # -- life ----------------------------------------------------------------------------------------------------

    @property
    def layer(self) -> int:
        """K whose samples are verbalized."""
        return self._layers.verbalized

    @property
    def capture(self) -> Capture | None:
        """The capture of the model that was attached first; None before."""
        return self._watched.first

    def attach(self, model: Any, tokenizer: Any = None, *, name: str | None = None) -> Self:
        """Put the tap on the model and start the worker.

        Args:
            model: a transformers model (also wrapped by PEFT, DDP, FSDP or torch.compile).
            tokenizer: gives samples their text and triggers their meaning; optional, and of the first model where a
                further one names none.
            name: of the model, for its samples and for rules (``model``); needed from the second model on.

        Raises:
            AttachError: no block list, layer out of range, wrong width, already attached or closed.
            StoreError: the run could not be stored.
            WorkerError: the worker process could not be started.
        """
        if self._closed:
            raise AttachError("this monitor is closed; make a new one")
        if self._watched.holds(model, name):
            return self
        self._check_width(model)
        first = not self._watched
        if first:
            self.tokenizer = tokenizer
            self.run_id = ranks.shared_run_id(self.run_id)
        capture = self._make_capture(self.tokenizer if tokenizer is None else tokenizer, name)
        capture.attach(model)
        try:
            if first and ranks.rank() == 0:
                self._start_run(model)
                self._start_worker()
        except BaseException:
            capture.close(0.0)  # no tap without anybody who reads
            raise
        self._watched.add(model, name, capture)
        if first:
            self._watcher = threading.Thread(target=self._watch, name="nla-monitor-watch", daemon=True)
            self._watcher.start()
            # A host that ends without close() (Ctrl-C, an exception) still hands over what it sampled.
            atexit.register(self.close, timeout=_EXIT_SECONDS)
        return self

    def _make_capture(self, tokenizer: Any, name: str | None) -> Capture:
        return Capture(
            self.config.capture,
            run_id=self.run_id,
            layer=self._layers.all,
            sink=self._spool_samples,
            guard=self.guard,
            queue=self.config.queue,
            tokenizer=tokenizer,
            rank=ranks.rank(),
            name=name,
            sessions=self.capture.sessions if self.capture is not None else None,
            screens=screens_of(self.config.capture),
            on_sampled=self.telemetry.sampled,
            on_dropped=self.telemetry.dropped,
        )

    def _check_width(self, model: Any) -> None:
        config = getattr(model, "config", None)
        config = getattr(config, "get_text_config", lambda: config)()
        width = getattr(config, "hidden_size", None)
        if width is not None and width != self._sidecar.d_model:
            raise AttachError(
                f"the model's residual stream has d_model {width}, but the AV {self.config.nla.av!r} reads "
                f"{self._sidecar.d_model}: this NLA was trained on another model"
            )

    def _start_run(self, model: Any) -> None:
        name = self.config.run_name or time.strftime("%Y-%m-%d %H:%M:%S")
        model_name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        # URLs may hold passwords and tokens.
        settings = self.config.model_dump(mode="json", exclude={"database": True, "alerts": SECRET_OUTLETS})
        self.repository.start_run(RunInfo(self.run_id, name, model_name, self.layer, time.time(), config=settings))

    def _start_worker(self) -> None:
        mode = self.config.worker.mode
        if mode == "process":
            self._worker = WorkerProcess(self.config, folder=self._folder)
            self._worker.start()
        elif mode == "thread":
            self._worker_thread = threading.Thread(target=self._run_worker, name="nla-monitor-worker", daemon=True)
            self._worker_thread.start()

    def _run_worker(self) -> None:
        self._worker_lost = True
        with self.guard("worker"):
            worker = Worker(self.config, telemetry=self.telemetry, engine=self._engine)
            worker.run(self._stop_worker, self._finish_worker)
            self._worker_lost = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, timeout: float = 120.0) -> bool:
        """Hand over what was sampled, let the worker read it, and take the tap off.

        Returns:
            True when everything sampled was read within ``timeout`` seconds. Otherwise what is left stays in the
            database: the worker process goes on by itself, and ``nla-monitor worker`` reads it at any later time.
        """
        if self._closed or os.getpid() != self._pid:  # the child of a fork has nothing to hand over
            return True
        self._closed = True
        atexit.unregister(self.close)
        deadline = time.monotonic() + timeout
        complete = False
        with self.guard("close"):
            complete = self._watched.close(max(0.0, deadline - time.monotonic()))
            complete = self._finish(deadline) and complete
        if not complete:
            logger.warning("nla_monitor: not everything sampled is read; nla-monitor worker reads the rest at any time")
        self._watch_stop.set()
        if self._watcher is not None:
            self._watcher.join(timeout=5.0)
        with self.guard("close"):
            self._look()  # alerts that came with the last batches
            if ranks.rank() == 0 and self._watched:
                self.repository.end_run(self.run_id)
        return complete

    def _finish(self, deadline: float) -> bool:
        self._finish_worker.set()
        if self._worker is not None:
            return self._worker.finish(max(0.0, deadline - time.monotonic()))
        if self._worker_thread is not None:
            self._worker_thread.join(max(0.0, deadline - time.monotonic()))
            return not self._worker_thread.is_alive() and not self._worker_lost
        return True

    # -- what a loop calls ---------------------------------------------------------------------------------------

    def step(self, step: int, **attributes: Scalar) -> None:
        """Say which optimizer step the next forwards belong to; attributes travel with the samples (``meta.*``)."""
        with self.guard("step"):
            self._step = step
            self._watched.step(step, **attributes)
            self._say(self._watched.replaced(), "replaced")

    def check(self) -> str | None:
        """After the first step: what is wrong if the tap has seen nothing; said once in the log, too."""
        with self.guard("check"):
            problem = self._watched.check_fired() if self._watched else "not attached to a model"
            self._say(problem, "check")
            return problem
        return None

    def _say(self, problem: str | None, kind: str) -> None:
        if problem is not None and kind not in self._said:
            self._said.add(kind)
            logger.warning("nla_monitor: %s", problem)

    @contextmanager
    def phase(self, phase: Phase, **attributes: Scalar) -> Iterator[None]:
        """Forwards inside the block belong to this phase, with these attributes."""
        with self._watched.phase(phase, **attributes):
            yield

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Forwards inside the block are not sampled."""
        with self._watched.pause():
            yield

    def open_session(
        self,
        context: AgentContext,
        token_ids: Sequence[int] | None,
        *,
        traceparent: str | None = None,
        attributes: Mapping[str, Scalar] | None = None,
    ) -> SessionHandle | None:
        """A generation is about to start: samples of the forward whose tokens these are belong to ``context``.

        ``token_ids`` None: the next forwards of the calling thread. Returns None when nothing is attached.
        """
        with self.guard("open_session"):
            if self.capture is not None:
                return self.capture.sessions.open(
                    context, token_ids, traceparent=traceparent, attributes=dict(attributes or {})
                )
        return None

    def close_session(self, handle: SessionHandle | None) -> None:
        """The generation is over."""
        with self.guard("close_session"):
            if self.capture is not None and handle is not None:
                self.capture.sessions.close(handle)

    def scalars(self) -> dict[str, float]:
        """The run in a few numbers for a tracker (``nla/alerts_firing``, ``nla/fve_mean``, ...: see ``ScalarBoard``).

        What the watcher saw last: asks no database, waits for nothing. Empty before its first look, and on ranks
        other than 0.
        """
        return self._board.values

    # -- alerts --------------------------------------------------------------------------------------------------

    def on_alert(self, listener: Callable[[Alert], None]) -> None:
        """Call ``listener(alert)`` on the watcher's thread whenever an alert of this run fires or resolves."""
        self._listeners.append(listener)

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    @property
    def stop_alert(self) -> Alert | None:
        """The first alert that asks to stop: at or above ``alerts.stop_on``, or of a rule with ``response: stop``."""
        return self._stop_alert

    @property
    def may_stop(self) -> bool:
        """Whether any alert could ask to stop."""
        return self._responses.may_stop

    def tags(self, agent_run_id: str | None = None) -> tuple[str, ...]:
        """Ids of the rules with ``response: tag`` that fired, in order; only in one agent's run if given."""
        return self._responses.tags(agent_run_id)

    def alerts(self) -> list[Alert]:
        """Alerts of this run, newest first.

        Raises:
            StoreError: the database cannot be read.
        """
        return self.repository.alerts(run_id=self.run_id, limit=_MANY)

    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until everything sampled so far is safely in the spool."""
        with self.guard("flush"):
            return self._watched.flush(timeout)
        return False

    def drain(self, timeout: float = 120.0) -> bool:
        """Wait until the worker has read everything sampled so far; False when the time ran out."""
        deadline = time.monotonic() + timeout
        drained = False
        with self.guard("drain"):
            drained = self.flush(timeout) and self._wait_for_spool(deadline)
            self._look()
        return drained

    def _wait_for_spool(self, deadline: float) -> bool:
        while time.monotonic() < deadline:
            depth = self.spool.depth()
            if depth.waiting == 0 and depth.leased == 0:
                return True
            time.sleep(0.05)
        return False

    @property
    def stats(self) -> MonitorStats:
        """Counters so far."""
        captured = self._watched.stats
        return MonitorStats(
            sampled=captured.sampled,
            written=captured.written,
            dropped=captured.dropped,
            faults=self.guard.faults,
            worker_restarts=self._worker.restarts if self._worker is not None else 0,
        )

    # -- background ----------------------------------------------------------------------------------------------

    def _spool_samples(self, samples: Sequence[ActivationSample]) -> None:
        """Runs on the capture's own thread."""
        with self.telemetry.capture_span(samples):
            self.spool.put(self.annotations.join(samples), unread=self._layers.stored)

    def _watch(self) -> None:
        while not self._watch_stop.wait(_WATCH_SECONDS):
            with self.guard("watch"):
                if self._worker is not None:
                    self._worker.supervise()
                self._look()
                self._measure_capture()

    def _look(self) -> None:
        """Alerts of the run, as the store has them; and our drops, for the store."""
        try:
            first = ranks.rank() == 0
            if first or self.config.capture.burst is not None:
                alerts = self.repository.alerts(run_id=self.run_id, limit=_MANY)
                for alert in alerts:
                    if self._states.get(alert.alert_id) is not alert.state:
                        self._states[alert.alert_id] = alert.state
                        self._notice(alert, first=first)
                if first:
                    self._refresh_scalars(alerts)
            self._store_drops()
            if self.config.capture.max_backlog is not None:
                self._watched.backlog(self.spool.depth().waiting)
            self._store_down = False
        except StoreError as error:
            if not self._store_down:
                logger.warning("nla_monitor: the store cannot be used now, trying on: %s", error)
            self._store_down = True

    def _refresh_scalars(self, alerts: Sequence[Alert]) -> None:
        stats = self.stats
        self._board.refresh(
            self.run_id,
            alerts,
            step=self._step,
            sampled=stats.sampled,
            dropped=stats.dropped,
            faults=stats.faults,
        )

    def _measure_capture(self) -> None:
        """Host time per forward since the last look."""
        stats = self._watched.stats
        forwards, seconds = stats.forwards - self._measured[0], stats.host_seconds - self._measured[1]
        if forwards > 0:
            self._measured = (stats.forwards, stats.host_seconds)
            self.telemetry.capture_duration(seconds / forwards)

    def _store_drops(self) -> None:
        dropped = dict(self.stats.dropped)
        new = {reason: count - self._reported_drops.get(reason, 0) for reason, count in dropped.items()}
        new = {reason: count for reason, count in new.items() if count}
        if new:
            self.repository.add_drops(self.run_id, new)
            self._reported_drops = dropped

    def _notice(self, alert: Alert, *, first: bool) -> None:
        firing = alert.state is AlertState.FIRING
        if firing:
            self._watched.burst()
        if not first:
            return  # every rank looks more closely; one speaks
        if self._responses.logs(alert):
            logger.warning("%s", describe(alert))
        if firing:
            self._responses.tag(alert)
            if self._stop_alert is None and self._responses.stops(alert):
                self._stop_alert = alert
        for listener in self._listeners:
            with self.guard("on_alert"):
                listener(alert)
