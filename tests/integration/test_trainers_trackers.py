"""Scalars land in the run's own tracker under ``nla/``: read back from what the real tracker stored."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nla_monitor import NLAMonitorCallback
from nla_monitor.guard import STRICT_VARIABLE, Guard
from nla_monitor.trackers import Trackers
from tests.integration import trainers_kit as kit
from tests.integration.training import train

pytestmark = pytest.mark.filterwarnings("ignore")  # the trackers' own


def watched(folder: Path, tracker: str, **arguments: Any) -> NLAMonitorCallback:
    """A training that reports to ``tracker``, with a monitor that reads."""
    watch = NLAMonitorCallback(
        database=str(folder / "monitor.db"),
        capture={"positions": "prompt", "triggers": ["\n"], "tokens_per_sequence": 1},
        worker="thread",
    )
    train(folder, [watch], report_to=tracker, **arguments)
    return watch


def assert_last(values: dict[str, float], watch: NLAMonitorCallback) -> None:
    """The last values are those of the finished run."""
    stats = watch.monitor.stats
    counts = watch.monitor.repository.reading_counts(watch.monitor.run_id)
    assert values["nla/sampled"] == stats.sampled == counts.readings == values["nla/read"] > 0
    assert values["nla/dropped"] == values["nla/faults"] == 0
    assert values["nla/lag_steps"] == 0
    assert 0 < values["nla/fve_mean"] <= 1
    firing = [alert for alert in watch.monitor.alerts() if alert.state == "firing"]
    assert values["nla/alerts_firing"] == len(firing) > 0
    for alert in firing:
        assert values[f"nla/matches/{alert.rule_id}"] >= alert.matches
    assert any(name.startswith("nla/matches/") and not value for name, value in values.items())


def test_tensorboard_beside_the_trainers_own_run(tmp_path: Path) -> None:
    """Under ``nla`` in the run's folder: TensorBoard shows both, and loses neither."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tests.integration.test_trainers_lightning import scalars_of

    watch = watched(tmp_path, "tensorboard")
    (run,) = (tmp_path / "trainer" / "runs").iterdir()
    found = scalars_of(run / "nla")
    assert_last({name: values[-1][1] for name, values in found.items()}, watch)
    assert {step for step, _ in found["nla/sampled"]} <= set(range(1, 7))
    assert "train/loss" in scalars_of(run)


def test_mlflow_by_the_id_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values until the end arrive, also after the trainer has ended its MLflow run."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    watch = watched(tmp_path, "mlflow")
    mlflow.flush_async_logging()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    assert_last({name: value for name, value in run.data.metrics.items() if name.startswith("nla/")}, watch)
    assert "loss" in run.data.metrics


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the run that the trainer opened, over its own global step."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    watch = watched(tmp_path, "wandb")
    summary = dict(wandb.run.summary)
    wandb.finish()
    assert_last({name: value for name, value in summary.items() if name.startswith("nla/")}, watch)
    assert summary["train/global_step"] == 6
    assert "train/loss" in summary


def test_trackio_while_its_run_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the run that the trainer opened; it closes its run before the last values are known."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    watched(tmp_path, "trackio", run_name="one", project="monitored", trackio_static_space_id=False)
    logs = SQLiteStorage.get_logs("monitored", "one")
    ours = [entry for entry in logs if "nla/sampled" in entry]
    assert ours
    assert ours[-1]["train/global_step"] == 6
    assert any("train/loss" in entry for entry in logs)


def test_a_broken_tracker_harms_neither_training_nor_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its fault is counted by name; the next tracker still gets its values."""
    monkeypatch.setenv(STRICT_VARIABLE, "0")

    class BrokenRun:
        def log(self, *_: Any) -> None:
            raise OSError("no network")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(run=BrokenRun()))
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tests.integration.test_trainers_lightning import scalars_of

    guard = Guard()
    trackers = Trackers(guard, tensorboard=tmp_path)
    trackers.log({"nla/sampled": 3.0}, step=1)
    trackers.close()
    assert guard.faults == {"tracker.wandb": 1}
    assert scalars_of(tmp_path / "nla")["nla/sampled"] == [(1, 3.0)]


@pytest.mark.slow
def test_nothing_is_opened_for_a_run_without_a_tracker(tmp_path: Path) -> None:
    """No tracker of the host, none of ours."""
    watch = kit.callback(tmp_path)
    train(tmp_path, [watch])
    assert not (tmp_path / "trainer" / "runs").exists()
    assert not list(tmp_path.rglob("events.out.tfevents.*"))
