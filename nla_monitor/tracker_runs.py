"""Runs that a host has open in W&B, MLflow, Trackio and TensorBoard: how each takes figures and notes of alerts.

A tracker that the host has not imported is never imported here, and a run that it has not opened is never opened.
Figures are as in ``ScalarBoard``. A note is where people look at a run:

- W&B: ``run.alert``, which also mails or posts to Slack as the user has set up there, and the run's summary under
  ``nla/alert/<rule>``;
- MLflow: the run's tag ``nla.alert.<rule>`` and the text artifact ``nla/alerts/<alert id>.txt``;
- Trackio: its alerts, at the run in the dashboard;
- TensorBoard: a text under ``nla/alerts/<rule>``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from nla_monitor.alerts.finding import headline, tidy, told
from nla_monitor.records import Alert, AlertState, Severity

_WANDB_TITLE: Final = 63
"""W&B: "must be less than 64 characters long"."""
_TAG: Final = 1000
"""Characters; MLflow takes 5,000 (8,000 since 2.8)."""


class Note(NamedTuple):
    """An alert, and whether quote and explanation may be written down."""

    alert: Alert
    content: bool

    @property
    def fired(self) -> bool:
        """Or else it has resolved, which only changes what is kept up to date."""
        return self.alert.state is AlertState.FIRING

    @property
    def title(self) -> str:
        """One short line."""
        return f"[{self.alert.severity.value}] {self.alert.rule_title}"

    @property
    def text(self) -> str:
        """The finding in a few lines."""
        return told(self.alert, content=self.content)

    @property
    def level(self) -> str:
        """``INFO``, ``WARN`` or ``ERROR``, as W&B and Trackio have them."""
        rank = self.alert.severity.rank
        return "ERROR" if rank >= Severity.HIGH.rank else "WARN" if rank >= Severity.MEDIUM.rank else "INFO"


class OpenRun(Protocol):
    """A run of one tracker. Its methods may raise, and may take their time."""

    name: str
    """Of the tracker."""
    outlives: bool
    """Whether it takes what comes after the host has ended it."""

    @property
    def key(self) -> object:
        """What tells it from another run of the same tracker."""
        ...

    def log(self, values: Mapping[str, float], step: int) -> object:
        """Take figures."""
        ...

    def note(self, note: Note) -> object:
        """Take an alert that has fired or resolved."""
        ...


class WandbRun:
    """A run of W&B.

    Args:
        run: ``wandb.Run``.
        step_key: under which the step is logged: W&B counts steps itself.
    """

    name = "wandb"
    outlives = False

    def __init__(self, run: Any, step_key: str) -> None:
        self._run = run
        self._step_key = step_key

    @property
    def key(self) -> object:
        """See ``OpenRun``."""
        return self._run

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See ``OpenRun``."""
        self._run.log({**values, self._step_key: step})

    def note(self, note: Note) -> None:
        """See ``OpenRun``."""
        if note.fired:
            self._run.alert(title=tidy(note.title, _WANDB_TITLE), text=note.text, level=note.level)
        self._run.summary[f"nla/alert/{note.alert.rule_id}"] = headline(note.alert)


class MlflowRun:
    """A run of MLflow, by its id: the client can still write to it when the host has ended it.

    Args:
        run_id: MLflow's.
        client: to use; default: one of the tracking URI that is set.
    """

    name = "mlflow"
    outlives = True

    def __init__(self, run_id: str, client: Any = None) -> None:
        self._run_id = run_id
        self._client = client

    @property
    def key(self) -> object:
        """See ``OpenRun``."""
        return self._run_id

    def _connected(self) -> Any:
        self._client = self._client or sys.modules["mlflow"].MlflowClient()
        return self._client

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See ``OpenRun``."""
        now, kind = int(time.time() * 1000), sys.modules["mlflow"].entities.Metric
        metrics = [kind(name, value, now, step) for name, value in values.items()]
        self._connected().log_batch(self._run_id, metrics=metrics, synchronous=False)

    def note(self, note: Note) -> None:
        """See ``OpenRun``."""
        client, alert = self._connected(), note.alert
        client.set_tag(self._run_id, f"nla.alert.{alert.rule_id}", tidy(headline(alert), _TAG))
        if note.fired:
            client.log_text(self._run_id, f"{note.text}\n", f"nla/alerts/{alert.alert_id}.txt")


class TrackioRun:
    """A run of Trackio.

    Args:
        run: ``trackio.Run``.
        step_key: under which the step is logged: Trackio counts steps itself.
    """

    name = "trackio"
    outlives = True

    def __init__(self, run: Any, step_key: str) -> None:
        self._run = run
        self._step_key = step_key

    @property
    def key(self) -> object:
        """See ``OpenRun``."""
        return self._run

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See ``OpenRun``."""
        self._run.log({**values, self._step_key: step})

    def note(self, note: Note) -> None:
        """See ``OpenRun``."""
        if note.fired:
            level = sys.modules["trackio"].AlertLevel[note.level]
            self._run.alert(tidy(note.title, _TAG), note.text, level)


class TensorboardRun:
    """A run of TensorBoard.

    Args:
        writer: a ``SummaryWriter`` of the host's, which stays open; or the folder of a run beside the host's, since two
            writers in one folder would make TensorBoard lose sight of the older file.
    """

    name = "tensorboard"
    outlives = True

    def __init__(self, writer: Any) -> None:
        self._folder = writer if isinstance(writer, Path) else None
        self._writer: Any = None if self._folder is not None else writer
        self._step = 0

    @property
    def key(self) -> object:
        """See ``OpenRun``."""
        return self._folder or self._writer

    def _opened(self) -> Any:
        if self._writer is None:
            # What the host itself uses: transformers falls back to tensorboardX where tensorboard is missing.
            found = "torch.utils.tensorboard" if find_spec("tensorboard") else "tensorboardX"
            # Its own thread writes; an explicit flush would wait for the disk.
            self._writer = import_module(found).SummaryWriter(log_dir=str(self._folder), flush_secs=10)
        return self._writer

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See ``OpenRun``."""
        self._step, writer = step, self._opened()
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def note(self, note: Note) -> None:
        """See ``OpenRun``."""
        if note.fired:
            step = self._step if note.alert.last_step is None else note.alert.last_step
            # TensorBoard reads it as Markdown: an indented block shows it letter by letter.
            text = "\n".join(f"    {line}" for line in note.text.splitlines())
            self._opened().add_text(f"nla/alerts/{note.alert.rule_id}", text, step)

    def close(self) -> None:
        """Write what is buffered in a run of our own."""
        if self._folder is not None and self._writer is not None:
            self._writer.close()
            self._writer = None


def open_runs(step_key: str) -> list[OpenRun]:
    """The runs that the host has open; call it in the thread that trains, where MLflow and Trackio know them.

    Args:
        step_key: for trackers that count steps themselves.
    """
    found: list[OpenRun] = []
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None:
        found.append(WandbRun(run, step_key))
    mlflow = sys.modules.get("mlflow")
    active = None if mlflow is None else mlflow.active_run()
    if active is not None:
        found.append(MlflowRun(active.info.run_id))
    context = getattr(sys.modules.get("trackio"), "context_vars", None)
    current = None if context is None else context.current_run.get()
    if current is not None:
        found.append(TrackioRun(current, step_key))
    return found
