"""Figures and notes of alerts land in the run's own tracker: read back from what the real tracker stored."""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nla_monitor import Alert, NLAMonitorCallback
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


def alerts_of(watch: NLAMonitorCallback) -> list[Alert]:
    """The run's alerts; none of them resolved, and each of a rule of its own."""
    found = watch.monitor.alerts()
    assert found
    assert len({alert.rule_id for alert in found}) == len(found)
    assert {str(alert.state) for alert in found} == {"firing"}
    return found


def without_content(note: str, alert: Alert) -> bool:
    """Whether a note says what its alert is, and not what the model said or read."""
    assert alert.quote
    assert alert.explanation
    return alert.alert_id in note and alert.quote not in note and alert.explanation not in note


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
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "nla"))
    events.Reload()
    alerts = alerts_of(watch)
    assert set(events.Tags()["tensors"]) == {f"nla/alerts/{alert.rule_id}/text_summary" for alert in alerts}
    for alert in alerts:
        (event,) = events.Tensors(f"nla/alerts/{alert.rule_id}/text_summary")
        assert without_content(event.tensor_proto.string_val[0].decode(), alert)


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
    alerts = alerts_of(watch)
    tags = {name: value for name, value in run.data.tags.items() if name.startswith("nla.")}
    assert tags.keys() == {f"nla.alert.{alert.rule_id}" for alert in alerts}
    for alert in alerts:
        assert tags[f"nla.alert.{alert.rule_id}"].startswith("firing: [")
        file = client.download_artifacts(run.info.run_id, f"nla/alerts/{alert.alert_id}.txt", str(tmp_path))
        assert without_content(Path(file).read_text(encoding="utf-8"), alert)


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
    sent = {record.text: record for record in wandb_alerts(tmp_path, len(alerts_of(watch)))}
    for alert in alerts_of(watch):
        assert summary[f"nla/alert/{alert.rule_id}"].startswith("firing: [")
        (text,) = (text for text in sent if alert.alert_id in text)
        assert without_content(text, alert)
        assert sent[text].title.startswith(f"[{alert.severity.value}] {alert.rule_title}"[:62])
        assert len(sent[text].title) < 64, "as W&B asks"
        assert sent[text].level == ("ERROR" if alert.severity.rank >= 3 else "WARN")


def wandb_alerts(folder: Path, number: int) -> list[Any]:
    """Alerts in the file that W&B would upload; its service writes it a little later."""
    deadline = time.monotonic() + 20
    found: list[Any] = []
    while len(found) < number and time.monotonic() < deadline:
        (file,) = folder.glob("wandb/offline-run-*/*.wandb")
        records = list(wandb_records(file.read_bytes()))
        found = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
        time.sleep(0.1)
    return found


def wandb_records(data: bytes) -> Iterator[Any]:
    """W&B's transaction log: LevelDB's format after a header of 7 bytes, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    position, whole = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def test_trackio_while_its_run_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the run that the trainer opened; it closes its run before the last values are known."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    watch = watched(tmp_path, "trackio", run_name="one", project="monitored", trackio_static_space_id=False)
    logs = SQLiteStorage.get_logs("monitored", "one")
    ours = [entry for entry in logs if "nla/sampled" in entry]
    assert ours
    assert ours[-1]["train/global_step"] == 6
    assert any("train/loss" in entry for entry in logs)
    notes = {note["text"]: note for note in SQLiteStorage.get_alerts("monitored", "one")}
    alerts = alerts_of(watch)
    assert len(notes) == len(alerts), "also those that came after the trainer had closed its run"
    for alert in alerts:
        (text,) = (text for text in notes if alert.alert_id in text)
        assert without_content(text, alert)
        assert notes[text]["title"] == f"[{alert.severity.value}] {alert.rule_title}"


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
