"""The self-test says what is wrong, in words with numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nla_checkpoints import CONFIG, WIDTH, edit_sidecar
from safetensors.torch import load_file, save_file

from nla_monitor.nla import TransformersReconstructor, TransformersVerbalizer, load_reconstructor, load_verbalizer
from nla_monitor.nla.selftest import cjk_share, run_selftest

Copy = Callable[[str], Path]


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


@pytest.mark.parametrize(("text", "share"), [("", 0.0), ("plain words", 0.0), ("㈎ 符号", 1.0), ("ab가나", 0.5)])
def test_cjk_share(text: str, share: float) -> None:
    assert cjk_share(text) == share
