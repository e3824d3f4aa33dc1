"""``NLALightningCallback``: one line on a Lightning ``Trainer``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from nla_monitor.config import MonitorConfig
from nla_monitor.errors import AttachError
from nla_monitor.monitor import Monitor
from nla_monitor.stopping import StopAgreement
from nla_monitor.tracker_runs import MlflowRun, OpenRun, TensorboardRun, WandbRun
from nla_monitor.trackers import STEP_KEY, Trackers

logger = logging.getLogger("nla_monitor")

_CRASH_SECONDS = 10.0


class NLALightningCallback(Callback):
    """Reads what the language model inside a ``LightningModule`` represents while it trains.

    ``Trainer(callbacks=[NLALightningCallback("nla-monitor.yaml")])``, or with the keywords of ``Monitor``.

    The validation of the sanity check is not read. Every ``log_every_n_steps``, figures of the run go to the trainer's
    loggers under ``nla/``; an alert leaves a note at the runs of its W&B, MLflow and TensorBoard loggers
    (``alerts.trackers`` of the config). Losses, gradients and weights are the same with and without it, bit for bit.
    Nothing that goes wrong in here reaches the trainer: it is logged and counted (``callback.monitor.stats``).

    Args:
        config: YAML file, mapping, ``MonitorConfig``, or a ``Monitor`` made before (the caller then closes it).
        model: finds the language model, ``lambda module: module.policy``; default: the first submodule whose config has
            decoder blocks.
        tokenizer: gives samples their text and triggers their meaning; default: ``module.tokenizer``, if there is one.
        close_timeout: seconds to wait at the end of training until everything sampled is read.
        overrides: see ``Monitor``.

    Raises:
        NLAMonitorError: the config, sidecar, rules or database cannot be used (here, before training; not later).
    """

    def __init__(
        self,
        config: str | Path | Mapping[str, Any] | MonitorConfig | Monitor | None = None,
        *,
        model: Callable[[LightningModule], nn.Module] | None = None,
        tokenizer: Any = None,
        close_timeout: float = 120.0,
        **overrides: Any,
    ) -> None:
        super().__init__()
        self._owned = not isinstance(config, Monitor)
        self._config = config
        self._overrides = overrides
        self.monitor = self._make()
        self._find = model or language_model
        self._tokenizer = tokenizer
        self._close_timeout = close_timeout
        self._active = False
        self._checked = False
        self._stop = StopAgreement(self.monitor)
        self._trackers: Trackers | None = None
        self._paused = ExitStack()

    def _make(self) -> Monitor:
        return self._config if isinstance(self._config, Monitor) else Monitor(self._config, **self._overrides)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: the strategy has moved and wrapped the model, and nothing of it has run yet."""
        with self.monitor.guard("callback.attach"):
            if self.monitor.closed:  # trainer.fit() called again: a run of its own
                self.monitor = self._make()
                self._stop = StopAgreement(self.monitor)
            tokenizer = self._tokenizer if self._tokenizer is not None else getattr(pl_module, "tokenizer", None)
            self.monitor.attach(self._find(pl_module), tokenizer)
            self._active, self._checked = True, False
            self._trackers = self._note_takers(trainer)
            self.monitor.step(trainer.global_step + 1)

    def _note_takers(self, trainer: Trainer) -> Trackers | None:
        if not trainer.is_global_zero:
            return None
        trackers = Trackers(self.monitor.guard, runs=runs_of(trainer.loggers))
        trackers.watch(self.monitor)
        return trackers

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the untrained loop is tried out with is no evaluation."""
        if self._active:
            self._paused.enter_context(self.monitor.pause())

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on everything counts."""
        self._paused.close()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Samples of the coming forwards belong to this optimizer step; accumulated batches share it."""
        if self._active:
            self.monitor.step(trainer.global_step + 1, epoch=trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log when Lightning does; stop when an alert asks for it."""
        if not self._active:
            return
        if not self._checked:
            self._checked = True
            self.monitor.check()
        step = trainer.global_step
        with self.monitor.guard("callback.log"):
            every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by its logger connector
            if every and step and step % every == 0:
                self._log(trainer)
        with self.monitor.guard("callback.stop"):
            if self._stop.due(step):
                trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand over the rest; wait (bounded) until it is read."""
        self._end(trainer, self._close_timeout)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The training broke: hand over what there is, without keeping anybody waiting."""
        self._end(trainer, min(self._close_timeout, _CRASH_SECONDS))

    def _end(self, trainer: Trainer, timeout: float) -> None:
        if not self._active:
            return
        self._active = False
        self._paused.close()
        with self.monitor.guard("callback.end"):
            if self._owned:
                self.monitor.close(timeout)
            self._log(trainer)  # what was read meanwhile
            if self._trackers is not None:
                self._trackers.close(timeout)

    def _log(self, trainer: Trainer) -> None:
        values = self.monitor.scalars()
        for target in trainer.loggers if values else ():
            with self.monitor.guard("callback.log"):
                target.log_metrics(values, step=trainer.global_step)


def runs_of(loggers: Iterable[Any]) -> list[OpenRun]:
    """Runs of Lightning's loggers that can take a note; told by their names, so that no tracker is imported."""
    found: list[OpenRun] = []
    for logger in loggers:
        names = {kind.__name__ for kind in type(logger).__mro__}
        if "WandbLogger" in names:
            found.append(WandbRun(logger.experiment, STEP_KEY))
        elif "MLFlowLogger" in names:
            found.append(MlflowRun(logger.run_id, logger.experiment))
        elif "TensorBoardLogger" in names:
            found.append(TensorboardRun(logger.experiment))
    return found


def language_model(module: nn.Module) -> nn.Module:
    """The outermost part of ``module`` whose config tells of decoder blocks.

    Raises:
        AttachError: there is none.
    """
    for part in module.modules():
        config = getattr(part, "config", None)
        text = getattr(config, "get_text_config", lambda: None)()
        if part is not module and getattr(text, "num_hidden_layers", None):
            return part
    raise AttachError(
        f"no language model found in {type(module).__name__}: none of its parts has a config with num_hidden_layers. "
        "Say where it is: NLALightningCallback(model=lambda module: module.my_model)"
    )
