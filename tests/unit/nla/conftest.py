"""Random checkpoints, made once a run and copied where a test damages one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from nla_checkpoints import CONFIG, FAMILIES, WIDTH, write_ar, write_av

from nla_monitor.nla import TransformersReconstructor, TransformersVerbalizer, load_reconstructor, load_verbalizer


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``<family>/av`` and ``<family>/ar``; not to be written to."""
    root = tmp_path_factory.mktemp("checkpoints")
    for family in FAMILIES:
        write_av(root / family / "av", family)
        write_ar(root / family / "ar", family)
    return root


@pytest.fixture
def damaged(checkpoints: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of ``<family>/<role>`` that the test may change."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(checkpoints / name, tmp_path / name))

    return copy


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def verbalizer(checkpoints: Path, family: str) -> TransformersVerbalizer:
    return load_verbalizer(checkpoints / family / "av", CONFIG)


@pytest.fixture(scope="session")
def reconstructor(checkpoints: Path, family: str) -> TransformersReconstructor:
    return load_reconstructor(checkpoints / family / "ar", CONFIG)


@pytest.fixture(scope="session")
def vectors() -> npt.NDArray[np.float32]:
    """``[20, WIDTH]`` random activations of very different norms."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((20, WIDTH)) * rng.uniform(0.01, 1000, (20, 1))
    return rows.astype(np.float32)
