"""The self-test says what is wrong, in words with numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from nla_checkpoints import CONFIG, WIDTH, edit_sidecar
from safetensors.torch import load_file, save_file

from nla_monitor.config import NLAConfig
from nla_monitor.nla import TransformersReconstructor, TransformersVerbalizer, load_reconstructor, load_verbalizer
from nla_monitor.nla.selftest import cjk_share, run_selftest
from nla_monitor.organism import resolve
from tests.nla_formats import Nla, write_added, write_depth, write_oracle

Copy = Callable[[str], Path]
Vectors = npt.NDArray[np.float32]


def test_a_sound_pair_is_usable(verbalizer: TransformersVerbalizer, reconstructor: TransformersReconstructor) -> None:
    """Random weights write no closing tags and have no denominator: remarks, not faults."""
    report = run_selftest(verbalizer, reconstructor)
    assert report.ok, report.verdict
    assert report.verdict.startswith("Usable: ")
    checks = {check.name: check for check in report.checks}
    assert "once, at position 20 of 44" in checks["marker"].detail
    assert "zero, NaN and Inf" in checks["refuses_unusable_vectors"].detail
    assert not checks["denominator"].ok


def test_without_an_ar_only_the_av_is_checked(verbalizer: TransformersVerbalizer) -> None:
    names = {check.name for check in run_selftest(verbalizer).checks}
    assert "marker" in names
    assert "suffix" not in names


def test_given_activations_add_a_round_trip(
    verbalizer: TransformersVerbalizer, reconstructor: TransformersReconstructor
) -> None:
    vectors = np.random.default_rng(0).standard_normal((6, WIDTH)).astype(np.float32)
    report = run_selftest(verbalizer, reconstructor, activations=vectors)
    assert "6 activations" in next(check.detail for check in report.checks if check.name == "round_trip")


def test_an_av_that_ignores_its_vector_is_found_out(damaged: Copy) -> None:
    """Far too small a scale, in a model that then writes the same for all: the signature of a missed injection."""
    folder = damaged("llama/av")
    edit_sidecar(folder, "extraction.injection_scale", 1e-12)
    report = run_selftest(load_verbalizer(folder, CONFIG))
    assert not report.ok
    assert "Not usable" in report.verdict
    assert "depends_on_vector: all texts are the same" in report.verdict


def test_an_ar_that_ignores_its_text_is_found_out(verbalizer: TransformersVerbalizer, damaged: Copy) -> None:
    folder = damaged("llama/ar")
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if "self_attn.o_proj" in name:
            weights[name].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    report = run_selftest(verbalizer, load_reconstructor(folder, CONFIG))
    assert "depends_on_text: reconstructions of two different texts have cosine 1.0000" in report.verdict


def test_halves_of_different_nlas_are_told_apart(verbalizer: TransformersVerbalizer, damaged: Copy) -> None:
    folder = damaged("llama/ar")
    edit_sidecar(folder, "extraction_layer_index", 2)
    edit_sidecar(folder, "critic", ...)
    report = run_selftest(verbalizer, load_reconstructor(folder, CONFIG))
    assert "pair: AV and AR read (d_model, layer) (32, 1) and (32, 2)" in report.verdict
    depth = next(check for check in report.checks if check.name == "depth")
    assert (depth.ok, depth.advisory) == (False, True)


ORGANISM_AV, ORGANISM_AR = "organism:planted/av", "organism:planted/ar"


def test_the_wrong_dialect_is_found_out() -> None:
    """Read by adding, an AV that was trained by replacing still writes fluent text; its round trip tells."""
    config = NLAConfig()
    reconstructor = load_reconstructor(resolve(ORGANISM_AR), config)
    right = run_selftest(load_verbalizer(resolve(ORGANISM_AV), config), reconstructor)
    assert right.ok, right.verdict
    told = config.model_copy(update={"dialect": "add"})
    wrong = run_selftest(load_verbalizer(resolve(ORGANISM_AV), told), reconstructor)
    assert not wrong.ok
    assert "dialect_reads_best: beyond shuffled texts, reading by add explains" in wrong.verdict
    assert "set nla.dialect to replace" in wrong.verdict


@pytest.mark.parametrize(
    ("write", "changes", "told"),
    [
        (write_added, {}, "at the marker the stream moves by 1 of its norm"),
        (write_depth, {"layer": 2}, "the marker's row enters the first block at norm 20"),
        (write_oracle, {"layer": 2, "placeholders": 2}, "at the marker the stream moves by 1 of its norm"),
    ],
)
def test_what_arrives_is_measured_in_every_dialect(
    write: Callable[[Path, str], Nla], changes: dict[str, object], told: str, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update=changes)
    report = run_selftest(load_verbalizer(write(tmp_path, "qwen2").av, config))
    assert report.ok, report.verdict
    checks = {check.name: check.detail for check in report.checks}
    assert checks["injection"] == told
    assert write.__name__.removeprefix("write_")[:3] in checks["dialect"]


def test_a_vector_that_does_not_arrive_is_found_out(
    verbalizer: TransformersVerbalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a wrapper that drops embeddings."""
    plain = verbalizer.prompt_embeddings

    def dropped(vectors: Vectors) -> torch.Tensor:
        rows = plain(vectors)
        rows[:, verbalizer.prompt.marker] = rows[:, 0]
        return rows

    monkeypatch.setattr(verbalizer, "prompt_embeddings", dropped)
    assert "injection: the marker's row enters the first block at norm" in run_selftest(verbalizer).verdict
    assert "the vector does not arrive" in run_selftest(verbalizer).verdict


def test_norms_that_the_scale_does_not_foretell_are_a_remark(verbalizer: TransformersVerbalizer) -> None:
    scale = verbalizer.contract.injection_scale
    assert scale is not None
    rows = np.random.default_rng(0).standard_normal((6, WIDTH)).astype(np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    for factor, ok in ((0.8, True), (3.0, False)):
        report = run_selftest(verbalizer, activations=unit * np.float32(scale * factor))
        check = next(check for check in report.checks if check.name == "norm_range")
        assert (check.ok, check.advisory) == (ok, True)
        assert f"the 6 given have median {scale * factor:.4g}" in check.detail


def test_two_bos_are_found_out(damaged: Copy) -> None:
    folder = damaged("llama/av")
    template = folder / "chat_template.jinja"
    template.write_text("{{ bos_token }}{{ bos_token }}" + template.read_text())
    assert "av_bos: BOS" in run_selftest(load_verbalizer(folder, CONFIG)).verdict


@pytest.mark.parametrize(("text", "share"), [("", 0.0), ("plain words", 0.0), ("㈎ 符号", 1.0), ("ab가나", 0.5)])
def test_cjk_share(text: str, share: float) -> None:
    assert cjk_share(text) == share
