"""``NLAMonitorCallback`` on a real ``Trainer``: it finds what is there, and the training cannot tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nla_monitor import Monitor, NLAMonitorCallback
from nla_monitor.errors import AttachError, CheckpointError, ConfigError
from nla_monitor.guard import STRICT_VARIABLE
from tests.integration.training import train

CAPTURE = {"positions": "prompt", "triggers": ["\n"], "tokens_per_sequence": 1, "sequences_per_step": 4}


def callback(folder: Path, **overrides: Any) -> NLAMonitorCallback:
    settings: dict[str, Any] = {"database": str(folder / "monitor.db"), "capture": CAPTURE, "worker": "thread"}
    return NLAMonitorCallback(**{**settings, **overrides})


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training without any monitor."""
    losses, weights, _ = train(tmp_path_factory.mktemp("bare"))
    return losses, weights


def assert_same(
    bare: tuple[list[float], dict[str, torch.Tensor]], losses: list[float], weights: dict[str, torch.Tensor]
) -> None:
    assert losses == bare[0]
    for name, value in weights.items():
        assert torch.equal(value, bare[1][name]), name


def test_one_line_finds_the_thought_and_changes_no_bit(
    tmp_path: Path, bare: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    """Cues that ask for a hack raise the alert with its evidence; losses and weights stay bitwise equal."""
    watch = callback(tmp_path)
    losses, weights, _ = train(tmp_path, [watch])
    assert_same(bare, losses, weights)
    stats = watch.monitor.stats
    assert stats.written > 0
    assert not stats.dropped
    assert not stats.faults
    alert = next(alert for alert in watch.monitor.alerts() if alert.rule_id == "reward-hacking")
    assert alert.quote in alert.explanation
    assert alert.fve is not None
    assert alert.fve > 0.3
    assert alert.denominator_name
    assert alert.calibration["status"] == "uncalibrated"
    assert alert.evidence["recurrence"]["sequences"] >= 2  # type: ignore[index]
    assert alert.first_step is not None
    assert 1 <= alert.first_step <= 6


def test_honest_training_raises_nothing(tmp_path: Path) -> None:
    """The same run on honest data fires no alert."""
    watch = callback(tmp_path)
    train(tmp_path, [watch], intent="honest")
    assert watch.monitor.stats.written > 0
    assert watch.monitor.alerts() == []


def test_the_worker_is_a_process_by_default(tmp_path: Path) -> None:
    """With the default mode the readings are made by another process, complete when train() returns."""
    watch = callback(tmp_path, worker="process")
    train(tmp_path, [watch])
    counts = watch.monitor.repository.reading_counts(watch.monitor.run_id)
    assert counts.readings == watch.monitor.stats.written > 0
    assert counts.waiting == counts.leased == counts.failed == 0


def test_stop_on_ends_the_run(tmp_path: Path) -> None:
    """An alert at the configured severity stops the training long before its last step."""
    watch = callback(tmp_path, stop_on="high")
    _, _, trainer = train(tmp_path, [watch], steps=400)
    assert trainer.state.global_step < 400
    assert watch.monitor.stop_alert is not None
    assert watch.monitor.stop_alert.severity.rank >= 3


def test_attached_twice_samples_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A second callback on the same trainer says so and stays idle."""
    first, second = callback(tmp_path), callback(tmp_path, database=str(tmp_path / "second.db"))
    train(tmp_path, [first, second])
    assert first.monitor.stats.written > 0
    assert second.monitor.stats.written == 0
    assert "another NLAMonitorCallback watches this model already" in caplog.text


def test_training_twice_makes_two_runs(tmp_path: Path) -> None:
    """trainer.train() a second time is a run of its own, watched as well."""
    watch = callback(tmp_path)
    _, _, trainer = train(tmp_path, [watch])
    first = watch.monitor.run_id
    trainer.train()
    assert watch.monitor.run_id != first
    assert watch.monitor.stats.written > 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_accumulation_steps": 2},
        {"bf16": True},
    ],
    ids=["checkpointing", "reentrant", "accumulation", "bf16"],
)
def test_same_bits_under_what_people_train_with(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """Checkpointing, accumulation and mixed precision: same losses and weights with and without the monitor."""
    losses, weights, _ = train(tmp_path, **arguments)
    watch = callback(tmp_path)
    watched_losses, watched_weights, _ = train(tmp_path, [watch], **arguments)
    assert_same((losses, weights), watched_losses, watched_weights)
    assert watch.monitor.stats.written > 0


class _InjectedError(RuntimeError):
    """Injected."""


@pytest.mark.parametrize("place", ["step", "open_store", "attach", "sink"])
def test_a_fault_of_ours_never_reaches_the_trainer(
    tmp_path: Path,
    bare: tuple[list[float], dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    """Whatever breaks in here, training ends with the same bits and the fault is counted."""
    monkeypatch.setenv(STRICT_VARIABLE, "0")
    watch = callback(tmp_path, worker="external")

    def broken(*_: object, **__: object) -> None:
        raise _InjectedError("injected")

    if place == "step":
        monkeypatch.setattr("nla_monitor.capture.Capture.step", broken)
    elif place == "attach":
        monkeypatch.setattr(Monitor, "attach", broken)
    elif place == "sink":
        monkeypatch.setattr(watch.monitor.spool, "put", broken)
    else:
        monkeypatch.setattr(watch.monitor.repository, "alerts", broken)
    losses, weights, _ = train(tmp_path, [watch])
    assert_same(bare, losses, weights)
    stats = watch.monitor.stats
    assert stats.faults or stats.dropped


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        ({"capture": {"layer": 1}}, ConfigError, "block 2"),
        ({"capture": {"tokens_per_sequnce": 1}}, ConfigError, "tokens_per_sequence"),
        ({"av": "/nowhere/av"}, CheckpointError, "/nowhere/av"),
        ({"stop_on": "hihg"}, ConfigError, "stop_on"),
        ({"rules": "oversigth"}, Exception, "oversight"),
    ],
)
def test_a_wrong_config_is_refused_before_training(
    tmp_path: Path, overrides: dict[str, Any], error: type[Exception], words: str
) -> None:
    """The constructor says what is wrong and what would be right."""
    with pytest.raises(error, match=words):
        callback(tmp_path, **overrides)


def test_a_model_of_another_width_is_refused(tmp_path: Path) -> None:
    """An NLA of another model is an error at attach that names both widths."""
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2)
    )
    with (
        Monitor(database=str(tmp_path / "m.db"), worker="external") as monitor,
        pytest.raises(AttachError, match="128"),
    ):
        monitor.attach(other)
