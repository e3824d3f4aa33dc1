"""``NLALightningCallback`` on a real Lightning ``Trainer``: steps, phases, loggers; and the training cannot tell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from nla_monitor import Monitor, Phase
from nla_monitor.errors import AttachError
from nla_monitor.guard import STRICT_VARIABLE
from nla_monitor.tracker_runs import Note
from tests.integration import trainers_kit as kit
from tests.store_support import alert, sample

lightning = pytest.importorskip("lightning.pytorch", reason="the extra lightning is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Finetuning(lightning.LightningModule):
    """What a user writes."""

    def __init__(self, *, broken_at: int | None = None) -> None:
        super().__init__()
        self.policy, self.tokenizer = kit.fresh_model()
        self.broken_at = broken_at
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if index == self.broken_at:
            raise RuntimeError("the user's own")
        loss = self.policy(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.policy(**batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.policy.parameters(), lr=3e-4)


def fit(folder: Path, callbacks: Sequence[Any] = (), module: Finetuning | None = None, **arguments: Any) -> Finetuning:
    from lightning.pytorch.loggers import TensorBoardLogger

    module = module or Finetuning()
    data = kit.rows(module.tokenizer, kit.STEPS * kit.BATCH * arguments.get("accumulate_grad_batches", 1))
    loader = DataLoader(data, batch_size=kit.BATCH, collate_fn=DataCollatorForSeq2Seq(module.tokenizer))  # type: ignore[arg-type]
    torch.manual_seed(0)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=1,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=TensorBoardLogger(str(folder), name="run", version=""),
        default_root_dir=str(folder),
        callbacks=list(callbacks),
        **{"limit_val_batches": 1, **arguments},
    )
    trainer.fit(module, loader, loader)
    return module


def callback(folder: Path, **overrides: Any) -> Any:
    from nla_monitor_lightning import NLALightningCallback

    return NLALightningCallback(**kit.settings(folder, **overrides))


def test_one_line_reads_training_and_validation_and_changes_no_bit(tmp_path: Path) -> None:
    """Each batch is read under its step; validation is eval, the sanity check is nothing; bits stay; scalars arrive."""
    bare = fit(tmp_path / "bare")
    watch = callback(tmp_path)
    watched = fit(tmp_path, [watch])
    assert watched.losses == bare.losses
    kit.assert_same_bits(kit.weights(watched.policy), kit.weights(bare.policy))
    samples = kit.stored(watch.monitor)
    trained = Counter(sample.step for sample in samples if sample.phase is Phase.TRAIN)
    assert trained == dict.fromkeys(range(1, kit.STEPS + 1), 2 * kit.BATCH)
    evaluated = [sample for sample in samples if sample.phase is Phase.EVAL]
    assert len(evaluated) == 2 * kit.BATCH
    assert {sample.attributes["epoch"] for sample in samples} == {0}
    written = scalars_of(tmp_path / "run")
    assert written["nla/sampled"][-1] == (kit.STEPS, len(samples))
    assert written["nla/dropped"][-1][1] == 0


@pytest.mark.slow
def test_accumulated_batches_share_their_step(tmp_path: Path) -> None:
    """Two batches, one optimizer step, one number."""
    watch = callback(tmp_path)
    fit(tmp_path, [watch], accumulate_grad_batches=2, limit_val_batches=0)
    steps = Counter(sample.step for sample in kit.stored(watch.monitor))
    assert steps == dict.fromkeys(range(1, kit.STEPS + 1), 4 * kit.BATCH)


def test_an_alert_is_noted_at_the_run_of_the_logger(tmp_path: Path) -> None:
    """While the training goes on, in the logger's own run."""
    watch, one = callback(tmp_path), alert(sample(1))

    class Alarm(lightning.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            for listener in watch.monitor._alerts.listeners:
                listener(one)

    fit(tmp_path, [watch, Alarm()])
    assert texts_of(tmp_path / "run") == {f"nla/alerts/{one.rule_id}/text_summary"}
    assert "nla/sampled" in scalars_of(tmp_path / "run")


def test_loggers_of_lightning_lead_to_their_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger
    from nla_monitor_lightning.callback import runs_of

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri, one = (tmp_path / "mlruns").as_uri(), alert(sample(1))
    board, flow = TensorBoardLogger(str(tmp_path), name="run", version=""), MLFlowLogger(tracking_uri=uri)
    runs = runs_of([board, flow, CSVLogger(str(tmp_path))])
    assert [run.name for run in runs] == ["tensorboard", "mlflow"]
    for run in runs:
        run.note(Note(one, content=False))
    board.finalize("success")
    assert texts_of(tmp_path / "run") == {f"nla/alerts/{one.rule_id}/text_summary"}
    tags = mlflow.MlflowClient(uri).get_run(flow.run_id).data.tags
    assert tags[f"nla.alert.{one.rule_id}"].startswith("firing: [high] Plans to hack")


def test_a_training_that_breaks_leaves_what_was_read(tmp_path: Path) -> None:
    """The user's exception is raised as it is; the samples until then are stored, the tap is off."""
    watch = callback(tmp_path)
    module = Finetuning(broken_at=1)
    with pytest.raises(RuntimeError, match="the user's own"):
        fit(tmp_path, [watch], module)
    assert {sample.step for sample in kit.stored(watch.monitor)} == {1}
    assert watch.monitor.closed


@pytest.mark.slow
def test_a_module_without_a_language_model_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing to watch: said with the remedy and counted, and the training goes its way."""
    from nla_monitor_lightning.callback import language_model

    monkeypatch.setenv(STRICT_VARIABLE, "0")
    with pytest.raises(AttachError, match="model=lambda module"):
        language_model(torch.nn.Linear(2, 2))

    def missing(_: Any) -> Any:
        raise AttachError("no language model")

    watch = callback(tmp_path, model=missing)
    module = fit(tmp_path, [watch], limit_val_batches=0)
    assert len(module.losses) == kit.STEPS
    assert watch.monitor.stats.faults == {"callback.attach": 1}


@pytest.mark.slow
def test_stops_when_an_alert_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``stop_on`` ends the fit at the end of the step."""
    watch = callback(tmp_path, stop_on="high")
    monkeypatch.setattr(Monitor, "stop_alert", property(lambda _: _StopAlert()))
    module = fit(tmp_path, [watch], limit_val_batches=0)
    assert len(module.losses) == 1


class _StopAlert:
    alert_id, rule_id = "an alert", "a rule"


def texts_of(folder: Path) -> set[str]:
    """Names of the texts in the event files of a TensorBoard run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name for name in events.Tags()["tensors"] if name.startswith("nla/")}


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """``(step, value)`` by name, from the event files of a TensorBoard run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
