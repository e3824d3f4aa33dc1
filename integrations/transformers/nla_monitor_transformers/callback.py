"""``NLAMonitorCallback``: one line on any transformers ``Trainer`` (and TRL's, which derive from it)."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nla_monitor import ranks
from nla_monitor.config import MonitorConfig
from nla_monitor.monitor import Monitor

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

    Args:
        config: YAML file, mapping, ``MonitorConfig``, or a ``Monitor`` made before (the caller then closes it).
        close_timeout: seconds to wait at the end of training until everything sampled is read.
        overrides: see ``Monitor``.

    Raises:
        NLAMonitorError: the config, sidecar, rules or database cannot be used (here, before training; not later).
    """

    def __init__(
        self,
        config: str | Path | Mapping[str, Any] | MonitorConfig | Monitor | None = None,
        *,
        close_timeout: float = 120.0,
        **overrides: Any,
    ) -> None:
        self._owned = not isinstance(config, Monitor)
        self._config = config
        self._overrides = overrides
        self.monitor = self._make()
        self._close_timeout = close_timeout
        self._active = False
        self._announced = False
        self._checked = False

    def _make(self) -> Monitor:
        return self._config if isinstance(self._config, Monitor) else Monitor(self._config, **self._overrides)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model that is about to be trained."""
        with self.monitor.guard("callback.attach"):
            if self._active:  # the last training was interrupted: nobody said that it ended
                self._end(kwargs["model"])
            if self.monitor.closed:  # trainer.train() called again: a run of its own
                self.monitor = self._make()
            model = kwargs["model"]
            if model in _watched:
                logger.warning(
                    "nla_monitor: another NLAMonitorCallback watches this model already; this one stays idle"
                )
                return
            self.monitor.attach(model, kwargs.get("processing_class"))
            _watched.add(model)
            self._active = True
            self.monitor.step(state.global_step + 1)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Samples of the coming forwards belong to this step."""
        if self._active:
            self.monitor.step(state.global_step + 1, **_epoch(state))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl | None:
        """Stop the run when an alert that asks for it fired; all ranks at the same step."""
        if not self._active:
            return None
        if not self._checked:
            self._checked = True
            self.monitor.check()
        if not self.monitor.may_stop:
            return None
        with self.monitor.guard("callback.stop"):
            if self._should_stop(state.global_step):
                control.should_training_stop = True
                control.should_save = True
                return control
        return None

    def _should_stop(self, step: int) -> bool:
        alert = self.monitor.stop_alert
        if alert is not None and not self._announced:
            self._announced = True
            ranks.announce_stop(step)
            logger.warning("nla_monitor: stopping at step %d: alert %s (%s)", step, alert.alert_id, alert.rule_id)
        if ranks.alone():
            return alert is not None
        stop_at = ranks.stop_step()
        return stop_at is not None and step >= stop_at

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand over the rest; wait (bounded) until it is read."""
        if self._active:
            with self.monitor.guard("callback.end"):
                self._end(kwargs.get("model"))

    def _end(self, model: Any) -> None:
        self._active = False
        _watched.discard(model)
        if self._owned:
            self.monitor.close(self._close_timeout)


def _epoch(state: TrainerState) -> dict[str, float]:
    return {"epoch": round(state.epoch, 4)} if state.epoch is not None else {}
