"""The sidecar: every spelling that is in use loads, every contradiction is an error that says what to do."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from nla_checkpoints import AR_TEMPLATE, AV_TEMPLATE, LAYER, WIDTH, edit_sidecar, sidecar, write_sidecar

from nla_monitor.errors import CheckpointError, SidecarError
from nla_monitor.nla.sidecar import Role, Sidecar, load_sidecar, parse_sidecar

Copy = Callable[[str], Path]


def test_the_released_format_loads(checkpoints: Path) -> None:
    av = load_sidecar(checkpoints / "llama/av", "av")
    contract = av.verbalizer_contract()
    assert (av.role, av.layer, av.d_model) == (Role.AV, LAYER, WIDTH)
    assert (contract.template, contract.injection_scale) == (AV_TEMPLATE, 1.5)
    ar = load_sidecar(checkpoints / "llama/ar", Role.AR)
    assert ar.reconstructor_contract().template == AR_TEMPLATE
    assert load_sidecar(checkpoints / "llama/av/nla_meta.yaml", "actor") == av


@pytest.mark.parametrize(
    ("spelling", "role"), [("av", "av"), ("actor", "av"), ("Actor", "av"), ("ar", "ar"), ("critic", "ar")]
)
def test_role_spellings(spelling: str, role: str, damaged: Copy) -> None:
    folder = damaged(f"llama/{role}")
    edit_sidecar(folder, "role", spelling)
    assert load_sidecar(folder, role).role == role


@pytest.mark.parametrize(
    "place",
    [
        "extraction_layer_index",
        "critic.extraction_layer_index",
        "critic.num_hidden_layers",
        "ar.num_hidden_layers",
        "ar.extraction_layer_index",
        "extraction.layer_index",
        "extraction.extraction_layer_index",
    ],
)
def test_every_spelling_of_the_layer_index(place: str, damaged: Copy) -> None:
    folder = damaged("llama/av")
    for known in ("extraction_layer_index", "critic"):
        edit_sidecar(folder, known, ...)
    assert load_sidecar(folder, "av").layer is None
    edit_sidecar(folder, place, 17)
    assert load_sidecar(folder, "av").layer == 17


def test_an_explicit_layer_index_beats_the_block_count(damaged: Copy) -> None:
    folder = damaged("llama/ar")
    edit_sidecar(folder, "critic", {"num_hidden_layers": LAYER + 1})
    assert load_sidecar(folder, "ar").layer == LAYER


def test_layer_indices_that_differ_are_refused(damaged: Copy) -> None:
    folder = damaged("llama/av")
    edit_sidecar(folder, "critic.extraction_layer_index", LAYER + 1)
    with pytest.raises(SidecarError, match=rf"extraction_layer_index = {LAYER}, critic.* = {LAYER + 1}"):
        load_sidecar(folder, "av")


def test_older_template_names(damaged: Copy) -> None:
    for role in ("av", "ar"):
        folder = damaged(f"llama/{role}")
        edit_sidecar(folder, "prompt_templates", {"actor": AV_TEMPLATE, "critic": AR_TEMPLATE})
        load_sidecar(folder, role)


@pytest.mark.parametrize(
    ("written", "scale"),
    [(150, 150.0), (80000.5, 80000.5), ("60000", 60000.0), ("1e3", 1000.0), ("sqrt_d_model", math.sqrt(WIDTH))],
)
def test_injection_scale_spellings(written: object, scale: float, damaged: Copy) -> None:
    folder = damaged("llama/av")
    edit_sidecar(folder, "extraction.injection_scale", written)
    assert load_sidecar(folder, "av").verbalizer_contract().injection_scale == scale


@pytest.mark.parametrize("written", ["raw", "none"])
def test_raw_injection_means_no_scale(written: str, damaged: Copy) -> None:
    folder = damaged("llama/av")
    edit_sidecar(folder, "extraction.injection_scale", written)
    assert load_sidecar(folder, "av").verbalizer_contract().injection_scale is None


@pytest.mark.parametrize("written", [..., None])
def test_an_absent_injection_scale_is_an_error_that_says_what_to_do(written: object, damaged: Copy) -> None:
    folder = damaged("llama/av")
    edit_sidecar(folder, "extraction.injection_scale", written)
    with pytest.raises(SidecarError, match=r"injection_scale is missing.*sqrt_d_model.*raw"):
        load_sidecar(folder, "av")


@pytest.mark.parametrize("written", [0, -3.0, "large", float("nan"), float("inf"), True])
def test_an_impossible_injection_scale_is_refused(written: object, damaged: Copy) -> None:
    folder = damaged("llama/av")
    edit_sidecar(folder, "extraction.injection_scale", written)
    with pytest.raises(SidecarError, match="injection_scale"):
        load_sidecar(folder, "av")


@pytest.mark.parametrize(
    ("role", "field"),
    [
        ("av", "role"),
        ("av", "d_model"),
        ("av", "tokens.injection_char"),
        ("av", "tokens.injection_token_id"),
        ("av", "tokens.injection_left_neighbor_id"),
        ("av", "tokens.injection_right_neighbor_id"),
        ("av", "prompt_templates.av"),
        ("ar", "prompt_templates.ar"),
    ],
)
def test_a_missing_field_is_named(role: str, field: str, damaged: Copy) -> None:
    folder = damaged(f"llama/{role}")
    edit_sidecar(folder, field, ...)
    with pytest.raises(SidecarError, match=rf"nla_meta.yaml: {field} is missing"):
        load_sidecar(folder, role)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("d_model", "wide", "d_model.*integer.*'wide'"),
        ("d_model", 0, "d_model.*greater than 0.*0"),
        ("tokens", "none", "tokens"),
        ("tokens.injection_token_id", "149705", "tokens.injection_token_id.*integer.*'149705'"),
        ("tokens.critic_suffix_ids", "1 2", "critic_suffix_ids"),
        ("extraction_layer_index", -1, "extraction_layer_index.*-1"),
        ("role", "judge", "role: expected one of av, actor, ar, critic, found 'judge'"),
        ("kind", "nla_dataset", "describes a dataset"),
        ("kind", "something", "kind: expected 'nla_model', found 'something'"),
        ("schema_version", 3, "schema_version: expected at most 2, found 3. Upgrade"),
        ("prompt_templates.av", "no place for it", "placeholder .* exactly once"),
    ],
)
def test_wrong_values_are_named_with_what_was_found(field: str, value: object, told: str, damaged: Copy) -> None:
    folder = damaged("llama/av")
    edit_sidecar(folder, field, value)
    with pytest.raises(SidecarError, match=told):
        load_sidecar(folder, "av")


def test_an_ar_template_without_place_for_the_text_is_refused(damaged: Copy) -> None:
    folder = damaged("llama/ar")
    edit_sidecar(folder, "prompt_templates.ar", "Summary:")
    with pytest.raises(SidecarError, match="explanation"):
        load_sidecar(folder, "ar")


def test_the_other_role_is_refused(checkpoints: Path) -> None:
    with pytest.raises(SidecarError, match=r"role: expected 'av', found 'ar'.*exchange nla.av and nla.ar"):
        load_sidecar(checkpoints / "llama/ar", "av")


def test_d_model_that_contradicts_the_config_is_refused(damaged: Copy) -> None:
    folder = damaged("llama/av")
    edit_sidecar(folder, "d_model", WIDTH * 2)
    with pytest.raises(
        SidecarError, match=rf"d_model: expected {WIDTH} \(hidden size in config.json\), found {WIDTH * 2}"
    ):
        load_sidecar(folder, "av")


def test_d_model_of_a_multimodal_config_is_the_text_part(damaged: Copy) -> None:
    folder = damaged("llama/av")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"hidden_size": 7, "text_config": config}))
    assert load_sidecar(folder, "av").d_model == WIDTH


@pytest.mark.parametrize(
    ("text", "told"),
    [("role: [av", "not valid YAML"), ("just words", "must hold a mapping, found str"), ("", "must hold a mapping")],
)
def test_a_malformed_file_is_named(text: str, told: str, damaged: Copy) -> None:
    folder = damaged("llama/av")
    (folder / "nla_meta.yaml").write_text(text)
    with pytest.raises(SidecarError, match=told):
        load_sidecar(folder, "av")


def test_a_plain_model_without_sidecar_is_told_apart(damaged: Copy) -> None:
    folder = damaged("llama/av")
    (folder / "nla_meta.yaml").unlink()
    with pytest.raises(SidecarError, match=r"has no nla_meta.yaml.*plain language model"):
        load_sidecar(folder, "av")


def test_a_missing_or_broken_config_is_named(damaged: Copy) -> None:
    folder = damaged("llama/av")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        load_sidecar(folder, "av")
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="Point to a model folder"):
        load_sidecar(folder, "av")
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"LoRA adapter and names no base model. Set nla.base"):
        load_sidecar(folder, "av")


def test_unknown_fields_are_kept() -> None:
    meta = parse_sidecar({**sidecar("llama", "av"), "created_by": "somebody", "tokens": {"extra": 1}})
    assert meta.model_extra == {"created_by": "somebody"}
    assert isinstance(meta, Sidecar)


def test_null_sections_count_as_absent(damaged: Copy) -> None:
    folder = damaged("llama/ar")
    write_sidecar(folder, {**sidecar("llama", "ar"), "training": None, "extraction": None, "critic": None})
    assert load_sidecar(folder, "ar").layer == LAYER


def test_reading_a_sidecar_needs_no_torch() -> None:
    code = (
        "import sys, nla_monitor.nla, nla_monitor.nla.base, nla_monitor.nla.sidecar, nla_monitor.nla.checkpoint;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_heavy_names_come_when_asked_for_and_unknown_ones_are_refused() -> None:
    import nla_monitor.nla as package

    assert all(hasattr(package, name) for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load_actor'"):
        _ = package.load_actor
