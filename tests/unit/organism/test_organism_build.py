"""``python -m nla_monitor.organism.build`` from the first step to the card, in a few steps of training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nla_monitor.organism import build, paths, recipe
from nla_monitor.organism.scoring import auroc, detection, share


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A smoke build with a card over two seeds."""
    torch.set_num_threads(1)
    out, work = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("work")
    options = [
        "--smoke",
        "--out",
        str(out),
        "--work",
        str(work),
        "--seeds",
        "1",
        "--samples",
        "3",
        "--threads",
        "1",
        "--variants",
        "planted",
    ]
    build.main(options)
    return out, work


def test_build_writes_every_checkpoint_and_the_card(built: tuple[Path, Path]) -> None:
    out, _ = built
    assert paths("planted", root=out).av == out / "planted" / "av"
    card = (out / "CARD.md").read_text()
    assert "does not prove" in card
    assert "## planted" in card
    content = json.loads((out / "card.json").read_text())
    assert set(content["figures"]["planted"]) == {"0", "1"}
    assert set(content["headline"]) == {"planted"}


def test_further_seeds_are_kept_in_the_work_folder_only(built: tuple[Path, Path]) -> None:
    out, work = built
    assert (work / "seed-1" / "planted" / "ar" / "value_head.safetensors").is_file()
    assert (work / "figures-planted-1.json").is_file()
    assert not (out / "seed-1").exists()


def test_same_seed_gives_the_same_weights(built: tuple[Path, Path], tmp_path: Path) -> None:
    out, _ = built
    build.build("planted", seed=0, out=tmp_path, how=recipe.SMOKE)
    for role in ("target", "av", "ar"):
        first, again = (load_file(root / "planted" / role / "model.safetensors") for root in (out, tmp_path))
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_the_natural_variant_is_trained_without_the_plant_loss(built: tuple[Path, Path], tmp_path: Path) -> None:
    out, _ = built
    build.build("natural", seed=0, out=tmp_path, how=recipe.SMOKE)
    planted, natural = (
        load_file(paths(name, root=root).target / "model.safetensors")
        for name, root in (("planted", out), ("natural", tmp_path))
    )
    assert planted.keys() == natural.keys()
    assert any(not torch.equal(planted[name], natural[name]) for name in planted)


def test_small_statistics_by_hand() -> None:
    found = detection([True, True, False, False], [True, False, True, False])
    assert (found.precision, found.recall, found.false_positive_rate) == (0.5, 0.5, 0.5)
    assert detection([False], [False]).recall is None
    assert auroc([0.9, 0.5, 0.5, 0.1], [True, True, False, False]) == 0.875
    assert auroc([1.0], [True]) is None
    assert share([]) == 0.0
