"""Several layers, several models and screens, through the monitor, the spool and a worker."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nla_monitor import Monitor
from nla_monitor.errors import AttachError, ConfigError
from nla_monitor.organism import LAYER, load_target
from nla_monitor.rules.probe import Probe, save_probe
from nla_monitor.store.stream import stream_readings
from nla_monitor.testing import FakeVerbalizer
from nla_monitor.worker import Worker

STEPS, ROWS, LENGTH = 12, 8, 16


@pytest.fixture
def target() -> Any:
    """A fresh copy of the organism's target model: each test hooks its own."""
    return load_target("planted")[0]


def _batch(seed: int, rows: int = ROWS) -> torch.Tensor:
    return torch.randint(8, 60, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def _monitor(folder: Path, **changes: Any) -> Monitor:
    capture = {"tokens_per_sequence": 1, "skip_first": 0, "norm_sink_factor": None} | changes.pop("capture", {})
    settings = {"database": str(folder / "m.db"), "worker": "external", "capture": capture, "ar": None}
    return Monitor({"nla": {"ar": None}}, **settings | changes)


def _read_all(monitor: Monitor, width: int, batch: int) -> FakeVerbalizer:
    """A worker that reads ``batch`` samples at a time, until nothing waits."""
    fake = FakeVerbalizer(d_model=width, layer=LAYER)
    config = monitor.config.model_copy(update={"nla": monitor.config.nla.model_copy(update={"batch_size": batch})})
    worker = Worker(config, verbalizer=fake, sinks=[])
    while worker.run_once():
        pass
    return fake


def test_samples_with_a_planted_direction_are_verbalized_before_the_others(tmp_path: Path, target: Any) -> None:
    """The worker is slower than the training: everything waits when it begins. One sequence in eight is planted."""
    width = target.config.hidden_size
    direction = torch.nn.functional.normalize(torch.randn(width, generator=torch.Generator().manual_seed(1)), dim=0)
    save_probe(Probe(direction.double().numpy(), layer=LAYER), tmp_path / "plan.safetensors")

    def plant(_: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        hidden[3] += 40 * hidden.norm(dim=-1).mean() * direction
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    target.get_submodule("model.layers")[LAYER].register_forward_hook(plant)
    screens = [{"name": "plan", "kind": "probe", "file": str(tmp_path / "plan.safetensors")}]
    with _monitor(tmp_path, capture={"screens": screens}, queue={"priority_seconds": 1e6}) as monitor:
        monitor.attach(target)
        with torch.no_grad():
            for step in range(STEPS):
                monitor.step(step)
                target(_batch(step))
        assert monitor.flush(60)
        fake = _read_all(monitor, width, batch=4)
        views = monitor.repository.samples(limit=1000)
    planted = [bool(vector @ direction.numpy() > 0.5 * np.linalg.norm(vector)) for vector in fake.vectors]
    assert planted == [True] * STEPS + [False] * (STEPS * (ROWS - 1))
    assert all("plan" in view.screens for view in views)
    assert {view.priority > 0.87 for view in views if view.screens["plan"] > 30} == {True}


def test_without_screens_samples_are_verbalized_as_they_came(tmp_path: Path, target: Any) -> None:
    with _monitor(tmp_path) as monitor:
        monitor.attach(target)
        with torch.no_grad():
            for step in range(4):
                monitor.step(step)
                target(_batch(step))
                assert monitor.flush(60)
        _read_all(monitor, target.config.hidden_size, batch=4)
        read = [one for page in stream_readings(monitor.repository.engine) for one in page]
    assert [one.sample.step for one in read] == sorted([*range(4)] * ROWS)


def test_layers_that_the_av_does_not_read_are_stored_and_never_verbalized(tmp_path: Path, target: Any) -> None:
    other = LAYER - 1
    config = {"screen_only": [other], "screens": [{"name": "size", "kind": "norm"}]}
    with _monitor(tmp_path, capture=config) as monitor:
        assert monitor.layer == LAYER
        monitor.attach(target)
        with torch.no_grad():
            target(_batch(0))
        assert monitor.flush(60)
        fake = _read_all(monitor, target.config.hidden_size, batch=64)
        views = monitor.repository.samples(limit=100)
    assert len(fake.vectors) == ROWS
    assert {(view.layer, view.state) for view in views} == {(LAYER, "read"), (other, "stored")}
    places = {layer: {(v.sequence_id, v.position) for v in views if v.layer == layer} for layer in (LAYER, other)}
    assert places[LAYER] == places[other]
    assert all(view.screens["size"] > 0 for view in views)


def test_a_layer_without_an_av_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"capture.layers is 0.*name such layers in capture.screen_only"):
        _monitor(tmp_path, capture={"layers": [0, LAYER]})


def test_one_monitor_watches_policy_and_reference(tmp_path: Path, target: Any) -> None:
    reference = load_target("planted")[0]
    with _monitor(tmp_path) as monitor:
        monitor.attach(target, name="policy").attach(target, name="policy")
        with pytest.raises(AttachError, match="Give each model a name of its own"):
            monitor.attach(reference, name="policy")
        monitor.attach(reference, name="reference")
        monitor.step(7)
        target(_batch(0)).logits.sum().backward()
        with torch.no_grad():
            reference(_batch(0))
        with monitor.pause(), torch.no_grad():
            target(_batch(1))
            reference(_batch(1))
        assert monitor.flush(60)
        assert monitor.check() is None
        assert monitor.stats.written == 2 * ROWS
        views = monitor.repository.samples(limit=100)
        policy = {(v.sequence_id, v.position) for v in views if v.model == "policy"}
        assert policy == {(v.sequence_id, v.position) for v in views if v.model == "reference"}
        assert {(v.model, v.phase.value, v.step) for v in views} == {("policy", "train", 7), ("reference", "eval", 7)}
    assert not any(module._forward_hooks for model in (target, reference) for module in model.modules())


def test_a_second_model_of_another_width_is_refused(tmp_path: Path, target: Any) -> None:
    with _monitor(tmp_path) as monitor:
        monitor.attach(target, name="policy")
        target.config.hidden_size += 1
        with pytest.raises(AttachError, match="d_model"):
            monitor.attach(load_other(target), name="other")


def load_other(model: Any) -> Any:
    """Another model object with the same config."""
    other = load_target("planted")[0]
    other.config = model.config
    return other


def test_a_replaced_block_is_said_at_the_next_step_once(
    tmp_path: Path, target: Any, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = target.get_submodule("model.layers")
    with _monitor(tmp_path) as monitor, caplog.at_level(logging.WARNING), torch.no_grad():
        monitor.attach(target, name="policy")
        target(_batch(0))
        monitor.step(1)
        assert not caplog.records
        blocks[LAYER] = load_target("planted")[0].get_submodule("model.layers")[LAYER]
        monitor.step(2)
        monitor.step(3)
        assert "model 'policy': model.layers" in (monitor.check() or "")
        said = [record.getMessage() for record in caplog.records if "was replaced after" in record.getMessage()]
    assert said[0].startswith(f"nla_monitor: model 'policy': model.layers.{LAYER} was replaced after the monitor")
    assert len(said) == 2  # by step and by check, once each
