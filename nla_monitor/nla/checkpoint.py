"""Where a checkpoint is (folder or hub id) and what exactly it is (content hash). No torch here."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from nla_monitor.errors import CheckpointError

SIDECAR_NAME = "nla_meta.yaml"
CONFIG_NAME = "config.json"
HEAD_NAME = "value_head.safetensors"
METADATA_FILES = (SIDECAR_NAME, CONFIG_NAME)
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.yaml", "*.jinja", "*.model", "*.txt")
"""What is downloaded and hashed: weights, config, sidecar, tokenizer. Safe formats only; pickles are left out."""

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
