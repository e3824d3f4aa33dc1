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
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from nla_monitor import ranks
from nla_monitor.alert_watch import MANY, AlertWatch
from nla_monitor.alerts.responses import Responses
from nla_monitor.annotations import Annotations
from nla_monitor.attached import announce, withdraw
from nla_monitor.capture import Capture
from nla_monitor.config import SECRET_OUTLETS, MonitorConfig, absolute_database, load_config, overridden
from nla_monitor.errors import AttachError, StoreError
from nla_monitor.guard import Guard
from nla_monitor.nla.sidecar import load_sidecar
from nla_monitor.organism import resolve
from nla_monitor.outlets import sinks_of
from nla_monitor.reading_side import ReadingSide
from nla_monitor.records import (
    ActivationSample,
    AgentContext,
    Alert,
    Completion,
    Phase,
    RunInfo,
    Scalar,
    uuid7,
)
from nla_monitor.rules import load_rules
from nla_monitor.scalars import ScalarBoard
from nla_monitor.sources import ActivationSource, TapSource, open_source
from nla_monitor.sources.base import Handle, SourceContext
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.repository import Repository
from nla_monitor.store.session import open_engine, prepare
from nla_monitor.supervisor import current_folder
from nla_monitor.telemetry import Telemetry
from nla_monitor.transcripts import Transcripts
from nla_monitor.untraced import untraced
from nla_monitor.watched import Watched, layers_of, screens_of
from nla_monitor.worker import check_pair

logger = logging.getLogger("nla_monitor")

_WATCH_SECONDS = 1.0
_FIRST_WATCH_SECONDS = 0.125
"""Doubled from look to look: a run of a second is seen, too, and one of a day is looked at once a second."""
_EXIT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class MonitorStats:
    """What became of the activations, so far."""

    sampled: int
    written: int
    """Safely in the spool."""
    dropped: Mapping[str, int]
    """By reason."""
    skipped: Mapping[str, int]
    """Forward passes and model calls that could not be read, and samples left out (``norm_sink``), by reason."""
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
        if self.config.worker.mode != "external":  # whose machine has the keys and extras that they need
            sinks_of(self.config)
        engine = open_engine(self.config.database, in_process=self.config.worker.mode == "thread")
        prepare(engine)
        self._engine = engine
        self.repository = Repository(engine)
        attempts, head_start = self.config.worker.max_attempts, self.config.queue.priority_seconds
        self.spool = SqlSpool(engine, max_attempts=attempts, head_start=head_start)
        self.run_id = uuid7()
        self.annotations = Annotations()
        keep = self.config.capture.store_transcript
        self.transcripts = Transcripts(engine, lambda: self.run_id, self.guard, enabled=keep)
        self._board = ScalarBoard(engine, headers)
        self._step: int | None = None
        self._watched = Watched()
        self._reader = ReadingSide(
            self.config, folder=self._folder, engine=engine, telemetry=self.telemetry, guard=self.guard
        )
        self._watcher: threading.Thread | None = None
        self._watch_stop = threading.Event()
        self._alerts = AlertWatch(
            self.repository,
            self.spool,
            self.config.capture,
            responses=self._responses,
            board=self._board,
            watched=self._watched,
            guard=self.guard,
        )
        self._said: set[str] = set()
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

    @property
    def source(self) -> ActivationSource | None:
        """What reads calls that are answered elsewhere; None without any."""
        return self._watched.source

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
        self._check_open()
        if self._watched.holds(model, name):
            return self
        self._check_width(model)
        self._join_run(tokenizer)
        sessions = None if self.capture is None else self.capture.sessions
        tap = TapSource(model, self.tokenizer if tokenizer is None else tokenizer, name=name, sessions=sessions)
        self._start(tap)
        self._watched.add(tap)
        return self

    def attach_source(self, source: ActivationSource | None = None) -> Self:
        """Read model calls that are answered elsewhere: by a server, by an API, in another process.

        Args:
            source: a ``ReplaySource``, ``HiddenStatesFolder`` or ``CaptureReplica``; None: what the section ``source``
                of the config says. Beside an attached model it reads the calls that the tap has not seen.

        Raises:
            AttachError: another source is there already, or the model that is read does not fit the AV.
            ConfigError: the config names no source, or its settings contradict the model.
            StoreError, WorkerError: as ``attach``.
        """
        self._check_open()
        source = open_source(self.config.source) if source is None else source
        self._watched.check_source(source)
        self._join_run(source.tokenizer)
        self._start(source)
        self._watched.add_source(source)
        return self

    def _check_open(self) -> None:
        if self._closed:
            raise AttachError("this monitor is closed; make a new one")

    def _join_run(self, tokenizer: Any) -> None:
        """Before the first model or source: which run it is, on all ranks the same."""
        if not self._watched:
            self.tokenizer = tokenizer
            self.run_id = ranks.shared_run_id(self.run_id)

    def _start(self, source: TapSource | ActivationSource) -> None:
        """Start a source; with the first one the run, the worker and the watcher begin."""
        source.start(self._source_context())
        if self._watched:
            return
        try:
            if ranks.rank() == 0:
                self._start_run(source.model_name)
                self._reader.start()
        except BaseException:
            source.close(0.0)  # no tap without anybody who reads
            raise
        self._watcher = threading.Thread(target=self._watch, name="nla-monitor-watch", daemon=True)
        self._watcher.start()
        # A host that ends without close() (Ctrl-C, an exception) still hands over what it sampled.
        atexit.register(self.close, timeout=_EXIT_SECONDS)
        announce(self)

    def _source_context(self) -> SourceContext:
        return SourceContext(
            run_id=self.run_id,
            layers=self._layers.all,
            width=self._sidecar.d_model,
            capture=self.config.capture,
            queue=self.config.queue,
            sink=self._spool_samples,
            guard=self.guard,
            screens=screens_of(self.config.capture),
            rank=ranks.rank(),
            on_sampled=self.telemetry.sampled,
            on_dropped=self.telemetry.dropped,
            flush_taps=self._watched.flush_taps,
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

    def _start_run(self, model_name: str) -> None:
        name = self.config.run_name or time.strftime("%Y-%m-%d %H:%M:%S")
        # URLs may hold passwords and tokens.
        secrets: dict[str, Any] = {"database": True, "alerts": SECRET_OUTLETS, "source": {"url"}}
        settings = self.config.model_dump(mode="json", exclude=secrets)
        self.repository.start_run(RunInfo(self.run_id, name, model_name, self.layer, time.time(), config=settings))

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
        withdraw(self)
        deadline = time.monotonic() + timeout
        complete = False
        with self.guard("close"):
            complete = self._watched.close(max(0.0, deadline - time.monotonic()))
            complete = self._reader.finish(deadline) and complete
        if not complete:
            logger.warning("nla_monitor: not everything sampled is read; nla-monitor worker reads the rest at any time")
        self._watch_stop.set()
        if self._watcher is not None:
            self._watcher.join(timeout=5.0)
        with self.guard("close"):
            self.transcripts.close()
            self._look()  # alerts that came with the last batches
            if ranks.rank() == 0 and self._watched:
                self._end_run()
        return complete

    def _end_run(self) -> None:
        try:
            self.repository.end_run(self.run_id)
        except StoreError as error:  # a full disk, say: no fault of ours
            logger.warning("nla_monitor: the end of the run could not be stored: %s", error)

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
    ) -> Handle | None:
        """A generation is about to start: samples of the forward whose tokens these are belong to ``context``.

        ``token_ids`` None: the next forwards of the calling thread. Returns None when nothing is attached.
        """
        with self.guard("open_session"):
            return self._watched.open_session(
                context, token_ids, traceparent=traceparent, attributes=dict(attributes or {})
            )
        return None

    def close_session(self, handle: Handle | None, *, completion: Completion | None = None) -> None:
        """The generation is over; ``completion`` is what the model answered, for sources that run it again."""
        with self.guard("close_session"):
            if handle is not None:
                self._watched.close_session(handle, completion=completion)

    def langchain(self, *, llm: Any = None, tokenizer: Any = None) -> AbstractContextManager[Any]:
        """Watch every LangChain and LangGraph run that begins inside the block, without touching its ``config``.

        Yields the ``NLACallbackHandler``, which takes the same arguments. ``NLA_MONITOR_LANGCHAIN=1`` in the
        environment does the same for all runs of the process, from ``attach`` on.

        Raises:
            MissingExtraError: langchain-core is not installed.
            ConfigError: ``llm`` has no local pipeline or tokenizer.
        """
        manager: AbstractContextManager[Any] = import_module("nla_monitor_langchain").watching(
            self, llm=llm, tokenizer=tokenizer
        )
        return manager

    def scalars(self) -> dict[str, float]:
        """The run in a few numbers for a tracker (``nla/alerts_firing``, ``nla/fve_mean``, ...: see ``ScalarBoard``).

        What the watcher saw last: asks no database, waits for nothing. Empty before its first look, and on ranks
        other than 0.
        """
        return self._board.values

    # -- alerts --------------------------------------------------------------------------------------------------

    def on_alert(self, listener: Callable[[Alert], None]) -> None:
        """Call ``listener(alert)`` on the watcher's thread whenever an alert of this run fires or resolves."""
        self._alerts.listeners.append(listener)

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    @property
    def stop_alert(self) -> Alert | None:
        """The first alert that asks to stop: at or above ``alerts.stop_on``, or of a rule with ``response: stop``."""
        return self._alerts.stop_alert

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
        return self.repository.alerts(run_id=self.run_id, limit=MANY)

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
            drained = self.flush(timeout) and self._wait_for_spool(deadline) and self.transcripts.flush()
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
            skipped=captured.skipped,
            faults=self.guard.faults,
            worker_restarts=self._reader.restarts,
        )

    # -- background ----------------------------------------------------------------------------------------------

    def _spool_samples(self, samples: Sequence[ActivationSample]) -> None:
        """Runs on the capture's own thread."""
        with untraced(), self.telemetry.capture_span(samples):
            self.spool.put(self.annotations.join(samples), unread=self._layers.stored)

    def _watch(self) -> None:
        pause = _FIRST_WATCH_SECONDS
        while not self._watch_stop.wait(pause):
            pause = min(2 * pause, _WATCH_SECONDS)
            with self.guard("watch"):
                self._reader.supervise()
                self._look()
                self._measure_capture()

    def _look(self) -> None:
        self._alerts.look(self.run_id, self._step, self.stats)

    def _measure_capture(self) -> None:
        """Host time per forward since the last look."""
        stats = self._watched.stats
        forwards, seconds = stats.forwards - self._measured[0], stats.host_seconds - self._measured[1]
        if forwards > 0:
            self._measured = (stats.forwards, stats.host_seconds)
            self.telemetry.capture_duration(seconds / forwards)
