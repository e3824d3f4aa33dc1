"""``NLAMonitorCallback``: one line on any transformers ``Trainer`` (and TRL's, which derive from it)."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nla_monitor.config import MonitorConfig
from nla_monitor.monitor import Monitor
from nla_monitor.stopping import StopAgreement
from nla_monitor.trackers import Trackers
from nla_monitor_transformers.forwards import READ, Forwards

logger = logging.getLogger("nla_monitor")

# Models that a callback watches already: a second callback on the same trainer must not sample twice.
_watched: weakref.WeakSet[Any] = weakref.WeakSet()


class NLAMonitorCallback(TrainerCallback):
    """Reads what the model represents while it trains.

    ``Trainer(..., callbacks=[NLAMonitorCallback("nla-monitor.yaml")])``, or with keywords:
    ``NLAMonitorCallback(av="organism:planted/av", ar="organism:planted/ar", rules="oversight", stop_on="critical")``.

    Losses, gradients and weights are the same with and without it, bit for bit. Nothing that goes wrong in here reaches
    the trainer: it is logged and counted (``callback.monitor.stats``). On several ranks each samples its own data, and
    rank 0 starts the one worker.

    Samples say in ``meta.forward`` which of the trainer's forwards they are of (see ``Forwards``); in DPO also in
    ``meta.pair`` whether the sequence was chosen or rejected. Whenever the trainer logs, figures of the run go to the
    trackers that are open, under ``nla/``; an alert leaves a note there (``alerts.trackers`` of the config).

    Args:
        config: YAML file, mapping, ``MonitorConfig``, or a ``Monitor`` made before (the caller then closes it).
        close_timeout: seconds to wait at the end of training until everything sampled is read.
        forwards: which are read: ``update``, ``eval``; and, where a trainer makes them, ``rollout`` (the
            prompts of generations), ``score`` and ``reference`` (the model with its adapter off).
        reference: a reference model of its own (``ref_model`` of DPO), to be read beside; its samples carry ``model``
            ``reference``.
        overrides: see ``Monitor``.

    Raises:
        NLAMonitorError: the config, sidecar, rules or database cannot be used (here, before training; not later).
    """

    def __init__(
        self,
        config: str | Path | Mapping[str, Any] | MonitorConfig | Monitor | None = None,
        *,
        close_timeout: float = 120.0,
        forwards: Collection[str] = READ,
        reference: Any = None,
        **overrides: Any,
    ) -> None:
        self._owned = not isinstance(config, Monitor)
        self._config = config
        self._overrides = overrides
        self.monitor = self._make()
        self.processing_class: Any = None
        """The trainer's tokenizer or processor, once training has begun."""
        self.reference = reference
        """May also be set until training begins."""
        self._read = forwards
        self._forwards = Forwards(forwards, self.monitor.annotations)
        self._trackers: Trackers | None = None
        self._stop: StopAgreement | None = None
        self._close_timeout = close_timeout
        self._active = False
        self._checked = False

    def _make(self) -> Monitor:
        return self._config if isinstance(self._config, Monitor) else Monitor(self._config, **self._overrides)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model that is about to be trained."""
        with self.monitor.guard("callback.attach"):
            if self._active:  # the last training was interrupted: nobody said that it ended
                self._end(kwargs["model"], state)
            if self.monitor.closed:  # trainer.train() called again: a run of its own
                self.monitor = self._make()
            model = kwargs["model"]
            if model in _watched:
                logger.warning(
                    "nla_monitor: another NLAMonitorCallback watches this model already; this one stays idle"
                )
                return
            self.processing_class = kwargs.get("processing_class")
            self.monitor.attach(model, self.processing_class)
            _watched.add(model)
            if self.reference is not None:
                with self.monitor.guard("callback.reference"):  # the policy is read all the same
                    self.monitor.attach(self.reference, name="reference")
            self._active, self._checked = True, False
            self._stop = StopAgreement(self.monitor)
            self._label(model, args)
            self._trackers = _trackers(self.monitor, args, state)
            if self._trackers is not None:
                self._trackers.watch(self.monitor)
            self.monitor.step(state.global_step + 1)

    def _label(self, model: Any, args: TrainingArguments) -> None:
        # TRL's collator lays chosen before rejected; told by its name, so that TRL is not imported for nothing.
        pairs = any(kind.__name__ == "DPOConfig" for kind in type(args).__mro__)
        self._forwards = Forwards(self._read, self.monitor.annotations, pairs=pairs)
        self._forwards.watch(model)
        if self.monitor.capture is not None:
            self.monitor.capture.labeler = self._forwards

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Samples of the coming forwards belong to this step."""
        if self._active:
            self._forwards.in_step = True
            self.monitor.step(state.global_step + 1, **_epoch(state))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Stop the run when an alert that asks for it fired; all ranks at the same step."""
        if not self._active:
            return None
        self._forwards.in_step = False
        if not self._checked:
            self._checked = True
            self.monitor.check()
        with self.monitor.guard("callback.stop"):
            if self._stop is not None and self._stop.due(state.global_step):
                control.should_training_stop = True
                control.should_save = True
                return control
        return None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Newest figures to the trackers that are open; they stand before us and have taken ``logs`` already."""
        if self._active and self._trackers is not None:
            with self.monitor.guard("callback.log"):
                self._trackers.log(self.monitor.scalars(), state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand over the rest; wait (bounded) until it is read."""
        if self._active:
            with self.monitor.guard("callback.end"):
                self._end(kwargs.get("model"), state)

    def _end(self, model: Any, state: TrainerState) -> None:
        self._active = self._forwards.in_step = False
        _watched.discard(model)
        if self.monitor.capture is not None:  # the monitor may be the caller's, who goes on with it
            self.monitor.capture.labeler = None
        if self._owned:
            self.monitor.close(self._close_timeout)
        if self._trackers is not None:  # what was read meanwhile
            self._trackers.log(self.monitor.scalars(), state.global_step)
            self._trackers.close()


def _trackers(monitor: Monitor, args: TrainingArguments, state: TrainerState) -> Trackers | None:
    if not state.is_world_process_zero:
        return None
    folder = _tensorboard_run(args) if "tensorboard" in (args.report_to or ()) else None
    return Trackers(monitor.guard, step_key="train/global_step", tensorboard=folder)


def _tensorboard_run(args: TrainingArguments) -> Path | None:
    """Folder of the run that the trainer's own callback has just opened."""
    named = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if named:
        return Path(named).expanduser()
    events = Path(args.output_dir or ".").glob("runs/**/events.out.tfevents.*")
    others = (path for path in events if path.parent.name != "nla")  # ours, of an earlier training
    newest = max(others, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else newest.parent


def _epoch(state: TrainerState) -> dict[str, float]:
    return {"epoch": round(state.epoch, 4)} if state.epoch is not None else {}
