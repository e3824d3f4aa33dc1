"""Scalars into the trackers that a run has open: W&B, MLflow, Trackio, TensorBoard.

For hosts whose own logging cannot be joined. transformers' ``Trainer`` is one: its trackers are callbacks that stand
before the user's, so that what a callback adds to ``logs`` comes too late for them. A tracker that the host has not
imported is never imported here, and a run that the host has not opened is never opened. W&B and Trackio queue on
threads of their own; MLflow is asked to; TensorBoard writes behind a queue, to a local file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from nla_monitor.guard import Guard

STEP_KEY: Final = "nla/step"


class Trackers:
    """Logs to whichever tracker has a run open at that moment.

    Args:
        guard: takes what a tracker raises: one that is broken harms neither the host nor the others.
        step_key: the name under which the step is logged beside the values, for trackers that count steps themselves.
        tensorboard: folder of the host's TensorBoard run; values go to ``nla`` inside it, a run beside the host's.
            (Two writers in one folder would make TensorBoard lose sight of the older file.)
    """

    def __init__(self, guard: Guard, *, step_key: str = STEP_KEY, tensorboard: Path | None = None) -> None:
        self._guard = guard
        self._step_key = step_key
        self._tensorboard = tensorboard
        self._writer: Any = None
        self._mlflow_run: str | None = None

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log ``values`` at ``step``; call it in the thread that runs the training."""
        if not values:
            return
        for name, log in (
            ("wandb", self._wandb),
            ("mlflow", self._mlflow),
            ("trackio", self._trackio),
            ("tensorboard", self._to_tensorboard),
        ):
            with self._guard(f"tracker.{name}"):
                log(values, step)

    def close(self) -> None:
        """Write what is buffered here; the host's own runs stay open."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._guard("tracker.tensorboard"):
                writer.close()

    def _wandb(self, values: Mapping[str, float], step: int) -> None:
        run = getattr(sys.modules.get("wandb"), "run", None)
        if run is not None:
            run.log({**values, self._step_key: step})

    def _mlflow(self, values: Mapping[str, float], step: int) -> None:
        mlflow = sys.modules.get("mlflow")
        if mlflow is None:
            return
        active = mlflow.active_run()
        # The trainer ends its run before the last values are known; the client can still write to it by its id.
        self._mlflow_run = active.info.run_id if active is not None else self._mlflow_run
        if self._mlflow_run is None:
            return
        now = int(time.time() * 1000)
        metrics = [mlflow.entities.Metric(name, value, now, step) for name, value in values.items()]
        mlflow.MlflowClient().log_batch(self._mlflow_run, metrics=metrics, synchronous=False)

    def _trackio(self, values: Mapping[str, float], step: int) -> None:
        trackio = sys.modules.get("trackio")
        if trackio is not None and trackio.context_vars.current_run.get() is not None:
            trackio.log({**values, self._step_key: step})

    def _to_tensorboard(self, values: Mapping[str, float], step: int) -> None:
        if self._tensorboard is None:
            return
        if self._writer is None:
            self._writer = _writer(self._tensorboard / "nla")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


def _writer(folder: Path) -> Any:
    # What the host itself uses: transformers falls back to tensorboardX where tensorboard is missing.
    found = "torch.utils.tensorboard" if find_spec("tensorboard") else "tensorboardX"
    # Its own thread writes; an explicit flush would make the training wait for the disk.
    return import_module(found).SummaryWriter(log_dir=str(folder), flush_secs=10)
