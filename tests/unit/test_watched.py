"""What a config means by its layers and screens, and one monitor over several models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nla_monitor.config import CaptureConfig, load_config
from nla_monitor.errors import AttachError, ConfigError
from nla_monitor.rules.probe import Probe, save_probe
from nla_monitor.sources import TapSource
from nla_monitor.watched import Layers, Watched, layers_of, screens_of


@pytest.mark.parametrize(
    ("config", "trained", "layers"),
    [
        ({}, 12, Layers(12, frozenset())),
        ({"layer": 12}, 12, Layers(12, frozenset())),
        ({"layer": 3}, None, Layers(3, frozenset())),
        ({"layers": [12, 24], "screen_only": [24]}, 12, Layers(12, frozenset({24}))),
        ({"screen_only": [24, 3]}, 12, Layers(12, frozenset({3, 24}))),
        ({"layers": [5, 24], "screen_only": [24]}, None, Layers(5, frozenset({24}))),
    ],
)
def test_layers_are_those_of_the_av_and_those_that_are_only_screened(
    config: dict[str, Any], trained: int | None, layers: Layers
) -> None:
    found = layers_of(CaptureConfig(**config), trained)
    assert found == layers
    assert found.all == tuple(sorted({layers.verbalized, *layers.stored}))


@pytest.mark.parametrize(
    ("config", "trained", "message"),
    [
        ({"layer": 3}, 12, r"capture.layer is 3.*trained on the output of block 12.*hidden_states\[13\].*screen_only"),
        ({"layers": [12, 24]}, 12, r"capture.layers is 24.*trained on the output of block 12"),
        ({"layers": [12, 24]}, None, r"sidecar does not say which.*capture.screen_only"),
        ({"screen_only": [12]}, 12, r"screen_only holds 12, the very layer that the AV reads"),
        ({}, None, r"set capture.layer to the K of your NLA"),
    ],
)
def test_a_layer_without_an_av_is_refused_unless_it_is_only_screened(
    config: dict[str, Any], trained: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        layers_of(CaptureConfig(**config), trained)


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        ({"layer": 1, "layers": [1, 2]}, "layer and layers are both given"),
        ({"layers": [-1]}, "greater than or equal to 0"),
        ({"screens": [{"name": "lies", "kind": "probe"}]}, "kind 'probe' needs a file"),
        ({"screens": [{"name": "odd", "kind": "novelty", "file": "x"}]}, "kind 'novelty' takes no file"),
        ({"screens": [{"name": "Odd one", "kind": "norm"}]}, "capture.screens.0.name"),
        (
            {"screens": [{"name": "a", "kind": "norm", "dim": 3}]},
            "unknown key 'capture.screens.0.dim'; did you mean 'dims'",
        ),
        ({"screens": [{"name": "a", "kind": "norm"}, {"name": "a", "kind": "novelty"}]}, "screens share the name 'a'"),
    ],
)
def test_bad_sections_say_what_is_wrong(capture: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"capture": capture})


def test_a_probe_is_the_file_of_a_rules_probe_relative_to_the_config(tmp_path: Path) -> None:
    save_probe(Probe(np.ones(4), 0.5, "logistic", 2, None, "unit"), tmp_path / "lies.safetensors")
    (tmp_path / "config.yaml").write_text(
        "capture:\n  screens:\n    - {name: lies, kind: probe, file: lies.safetensors}\n    - {name: n, kind: norm}\n"
    )
    config = load_config(tmp_path / "config.yaml").capture
    lies, norm = screens_of(config)._screens
    assert (lies.name, lies.bias, lies.logistic, lies.unit, lies.layer) == ("lies", 0.5, True, True, 2)
    assert norm.name == "n"


def test_a_probe_that_cannot_be_read_is_an_error_of_the_config(tmp_path: Path) -> None:
    config = load_config({"capture": {"screens": [{"name": "lies", "kind": "probe", "file": str(tmp_path / "no")}]}})
    with pytest.raises(ConfigError, match=r"probe of 'lies' cannot be used: .*No such file"):
        screens_of(config.capture)


def test_a_name_is_one_models_and_a_model_has_one_name() -> None:
    watched, policy, reference = Watched(), object(), object()
    capture: Any = object()
    assert not watched.holds(policy, None)
    tap = TapSource(policy)
    tap.capture = capture
    watched.add(tap)
    assert watched.holds(policy, None)
    with pytest.raises(AttachError, match=r"already attached to a object. Give each model a name of its own"):
        watched.holds(reference, None)
    assert not watched.holds(reference, "reference")
    with pytest.raises(AttachError, match="this model is already watched as None"):
        watched.holds(policy, "policy")
    assert watched.first is capture
