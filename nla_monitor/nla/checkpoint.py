"""Where a checkpoint is (folder or hub id), how it is packed, and what exactly it is (content hash). No torch here.

A half of an NLA is a full model folder, a LoRA adapter of a base model that lies elsewhere, or a reconstructor's
adapter with a description of its own (``ar_meta.json``). Several releases keep both halves in one repository (``av/``,
``ar/``, ``critic/``), with the sidecar in the half or in the root.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nla_monitor.errors import CheckpointError, SidecarError

SIDECAR_NAME = "nla_meta.yaml"
CONFIG_NAME = "config.json"
HEAD_NAME = "value_head.safetensors"
ADAPTER_NAME = "adapter_config.json"
AR_META_NAME = "ar_meta.json"
ORACLE_NAME = "ao_config.json"
METADATA_FILES = (f"*{SIDECAR_NAME}", CONFIG_NAME, ADAPTER_NAME, AR_META_NAME, ORACLE_NAME)
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.yaml", "*.jinja", "*.model", "*.txt")
"""What is downloaded and hashed: weights, config, sidecar, tokenizer. Safe formats only; pickles are left out."""

_PACKAGES = (CONFIG_NAME, ADAPTER_NAME, AR_META_NAME, ORACLE_NAME)
"""A folder that holds one of these is a model of some kind."""
_HALVES = {"av": ("av", "actor"), "ar": ("ar", "critic")}
_OTHER_HALVES = {"av": ("av*", "actor*"), "ar": ("ar*", "critic*", "*_critic")}
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?P<folder>[\w./-]+))?")
_HASHES: dict[tuple[tuple[str, int, int], ...], str] = {}
_HASHES_LOCK = threading.Lock()


def resolve_checkpoint(
    path: str | Path, *, revision: str | None = None, patterns: Sequence[str] = CHECKPOINT_FILES
) -> Path:
    """The local folder of a checkpoint; a hub id ``owner/name[/folder]`` is fetched at ``revision``.

    Raises:
        CheckpointError: no such folder, no such repository or revision, or the hub cannot be reached.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    match = _HUB_ID.fullmatch(str(path))
    if local.exists() or match is None:
        raise CheckpointError(
            f"checkpoint {str(path)!r} is neither an existing folder nor a hub id 'owner/name'. Correct the path in "
            "the config."
        )
    folder = match["folder"] or ""
    return _download(match["repo"], folder, revision, patterns)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One half of an NLA on disk."""

    folder: Path
    """Weights, and usually everything else."""
    base: Checkpoint | None = None
    """The model that an adapter changes (it may be an adapter, too); None for a full model."""

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer: an adapter may leave it to its base."""
        own = any((self.folder / name).exists() for name in ("tokenizer_config.json", "tokenizer.json"))
        return self.folder if own or self.base is None else self.base.tokenizer

    @property
    def root(self) -> Path:
        """Folder of the full model under all adapters: its ``config.json`` says what kind of model this is."""
        return self.folder if self.base is None else self.base.root

    def content_hash(self, sidecar: Path | None = None, settings: str = "") -> str:
        """Provenance: the hash of all files, of the base too, of a sidecar that lies elsewhere, and of settings.

        Args:
            sidecar: the sidecar in use.
            settings: what else decides the output (a question that is asked, say); empty for none.
        """
        parts = [content_hash(self.folder)]
        if self.base is not None:
            parts.append(self.base.content_hash())
        if sidecar is not None and sidecar.parent != self.folder:
            parts.append(hashlib.sha256(sidecar.read_bytes()).hexdigest())
        if settings:
            parts.append(settings)
        return parts[0] if len(parts) == 1 else f"sha256:{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()}"


def open_checkpoint(
    path: str | Path,
    role: Literal["av", "ar"],
    *,
    revision: str | None = None,
    base: str | None = None,
    patterns: Sequence[str] = CHECKPOINT_FILES,
) -> Checkpoint:
    """A half of an NLA: the folder itself or its half of a common root, and the base model of an adapter.

    Args:
        path: folder or hub id.
        role: which half, where one root holds both.
        revision: pinned hub revision of ``path``.
        base: base model of an adapter (folder or hub id); what the adapter names by default.
        patterns: what is needed of both folders.

    Raises:
        CheckpointError: nothing is there, several halves could be meant, or an adapter's base cannot be found.
    """
    folder = find_half(resolve_checkpoint(path, revision=revision, patterns=patterns), role)
    return Checkpoint(folder, _base_of(folder, role, base, patterns) if is_adapter(folder) else None)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds LoRA weights for a base model that lies elsewhere."""
    if (folder / ADAPTER_NAME).exists():
        return not any(folder.glob("model*.safetensors"))
    return (folder / AR_META_NAME).exists() and not (folder / CONFIG_NAME).exists()


def find_half(root: Path, role: Literal["av", "ar"]) -> Path:
    """The folder of one half: ``root`` where it is a model, else its subfolder (``av``, ``ar``, ``critic``, ...).

    Raises:
        CheckpointError: several subfolders could be meant.
    """
    if any((root / name).exists() for name in _PACKAGES):
        return root
    for name in _HALVES[role]:
        if _is_model(root / name):
            return root / name
    found = sorted({folder for pattern in _OTHER_HALVES[role] for folder in root.glob(pattern) if _is_model(folder)})
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise CheckpointError(
            f"{root} holds several {role.upper()} checkpoints: {names}. Name the folder that is meant."
        )
    return found[0] if found else root


def _is_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in _PACKAGES)


def sidecar_file(folder: Path, role: Literal["av", "ar"]) -> Path:
    """The sidecar of a checkpoint: its own, one named ``*.nla_meta.yaml``, or that of the root that holds it.

    Raises:
        SidecarError: there are several and none is named for the half.
    """
    own = folder / SIDECAR_NAME
    if own.exists():
        return own
    named = sorted(folder.glob(f"*.{SIDECAR_NAME}"))
    of_role = [file for file in named if file.name.split(".")[0] in _HALVES[role]]
    if len(of_role or named) > 1:
        told = ", ".join(file.name for file in named)
        raise SidecarError(
            f"{folder} holds several sidecars: {told}. Rename the {role.upper()}'s to {role}.{SIDECAR_NAME}."
        )
    if named:
        return (of_role or named)[0]
    root = folder.parent / SIDECAR_NAME
    return root if root.exists() else own


def read_json(file: Path) -> Mapping[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        CheckpointError: missing, unreadable or no object.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Copy it again from the release.") from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{file} must hold an object, found {type(data).__name__}. Copy it again from the release."
        )
    return data


def _base_of(folder: Path, role: Literal["av", "ar"], wanted: str | None, patterns: Sequence[str]) -> Checkpoint:
    """The base model; a relative folder is taken from here, or from the adapter's."""
    named = read_json(folder / (ADAPTER_NAME if (folder / ADAPTER_NAME).exists() else AR_META_NAME))
    base = wanted or named.get("base_model_name_or_path") or named.get("base_ckpt")
    if not base:
        raise CheckpointError(
            f"{folder} is a LoRA adapter and names no base model. Set nla.base to the model that it was trained on."
        )
    beside = folder / str(base)
    place, revision = (beside if beside.is_dir() else str(base)), (None if wanted else named.get("revision"))
    try:
        return open_checkpoint(place, role, revision=revision, patterns=patterns)
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is a LoRA adapter of {str(base)!r}: {error} Or set nla.base.") from error


def _download(repo: str, folder: str, revision: str | None, patterns: Sequence[str]) -> Path:
    import huggingface_hub  # noqa: PLC0415 - only hub ids need it
    from huggingface_hub.errors import EntryNotFoundError  # noqa: PLC0415 - the same

    prefix = f"{folder}/" if folder else ""
    try:
        with quiet_hub():
            root = huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=[prefix + pattern for pattern in patterns]
            )
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise CheckpointError(
            f"checkpoint {repo!r} (revision {revision or 'main'}) cannot be fetched from the hub: "
            f"{_first_line(error)}. If it is a local folder, the path does not exist from here. If it is a hub id, "
            "check its spelling, the revision and your access; without a network, download it beforehand and give the "
            "folder."
        ) from error
    local = Path(root) / folder
    if not local.is_dir():
        raise CheckpointError(
            f"hub repository {repo!r} has no folder {folder!r} at revision {revision or 'main'}. Correct it."
        )
    return local


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


@contextmanager
def quiet_hub() -> Iterator[None]:
    """No download progress bars while the block runs; the caller's setting is put back."""
    from huggingface_hub.utils.tqdm import (  # noqa: PLC0415 - only hub ids need it
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def content_hash(folder: Path) -> str:
    """``sha256:<64 hex>`` over names and bytes of a checkpoint's files (weights, config, sidecar, tokenizer).

    The provenance of every explanation and score. Notes such as ``README.md`` do not count. Computed once per process
    for the same files (by path, size and modification time).

    Raises:
        CheckpointError: a file cannot be read.
    """
    try:
        files = sorted({file for pattern in CHECKPOINT_FILES for file in folder.glob(pattern) if file.is_file()})
        stats = [(file, file.stat()) for file in files]
        key = tuple((os.fspath(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in stats)
        with _HASHES_LOCK:
            if key not in _HASHES:
                _HASHES[key] = _hash_files(files)
            return _HASHES[key]
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error}. Check its permissions.") from error


def _hash_files(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.name}\0{digest}\n".encode())
    return f"sha256:{total.hexdigest()}"
