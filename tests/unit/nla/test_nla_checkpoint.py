"""Where checkpoints come from, and their content hash."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest

from nla_monitor.errors import CheckpointError
from nla_monitor.nla.checkpoint import content_hash, resolve_checkpoint
from nla_monitor.nla.sidecar import load_sidecar

Copy = Callable[[str], Path]


def test_the_hash_names_weights_config_sidecar_and_tokenizer(damaged: Copy) -> None:
    folder = damaged("llama/av")
    known = content_hash(folder)
    assert known.startswith("sha256:")
    assert len(known) == 71
    for name in ("model.safetensors", "config.json", "nla_meta.yaml", "tokenizer.json", "chat_template.jinja"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before + b" ")
        assert content_hash(folder) != known, name
        (folder / name).write_bytes(before)
    assert content_hash(folder) == known


def test_the_hash_is_of_contents_not_of_place_or_notes(checkpoints: Path, damaged: Copy) -> None:
    folder = damaged("llama/av")
    (folder / "README.md").write_text("notes")
    assert content_hash(folder) == content_hash(checkpoints / "llama/av")
    assert content_hash(folder) != content_hash(checkpoints / "llama/ar")


def test_a_renamed_file_changes_the_hash(damaged: Copy) -> None:
    folder = damaged("llama/av")
    known = content_hash(folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert content_hash(folder) != known


def test_a_path_that_is_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "absent", tmp_path / "file", "one-word", "a//b"):
        with pytest.raises(CheckpointError, match="neither an existing folder nor a hub id"):
            resolve_checkpoint(path)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: Path) -> Path:
    """A hub cache that holds ``someone/nla`` at one commit, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 39 + "1"
    repo = tmp_path / "models--someone--nla"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(commit)
    (repo / "refs/v1").write_text(commit)
    shutil.copytree(checkpoints / "llama", repo / "snapshots" / commit)
    return repo / "snapshots" / commit


def test_a_hub_id_with_folder_and_revision_resolves_to_its_snapshot(hub_cache: Path) -> None:
    assert resolve_checkpoint("someone/nla/av") == hub_cache / "av"
    assert resolve_checkpoint("someone/nla/ar", revision="v1") == hub_cache / "ar"
    assert load_sidecar("someone/nla/av", "av").role == "av"


def test_hub_faults_become_checkpoint_errors_with_a_remedy(hub_cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'someone/absent' \(revision main\) cannot be fetched.*give the folder"):
        resolve_checkpoint("someone/absent")
    with pytest.raises(CheckpointError, match="revision v2"):
        resolve_checkpoint("someone/nla", revision="v2")
    with pytest.raises(CheckpointError, match="has no folder 'actor'"):
        resolve_checkpoint("someone/nla/actor")
