"""Files of hidden states as vLLM writes them: whether they are whole, what they hold, and the rows that are wanted.

vLLM's ``extract_hidden_states`` with ``ExampleHiddenStatesConnector`` (read in 0.32,
``distributed/kv_transfer/kv_connector/v1/example_hidden_states_connector.py``) writes one safetensors file for each
request, ``<request id>.safetensors`` in ``shared_storage_path``:

- ``token_ids`` ``[tokens]`` int64: the prompt; with ``include_output_tokens`` also what was written, but for the last;
- ``hidden_states`` ``[tokens, layers, d_model]``: for each id of ``eagle_aux_hidden_state_layer_ids`` what goes into
  that decoder block. Id ``K + 1`` is the output of block K.

A companion ``<file>.lock`` is held exclusively (``flock``) until the file is whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nla_monitor.errors import ConfigError
from nla_monitor.sources.recorded import SkipError

try:
    import fcntl
except ImportError:  # no such locks on Windows, where no such server runs either
    fcntl = None  # type: ignore[assignment]

SUFFIX: Final = ".safetensors"
FOREIGN: Final = "foreign_file"
UNREADABLE: Final = "unreadable_file"
_STILL_SECONDS: Final = 1.0
"""A file without a lock counts as whole when it has not changed for so long."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Where the layers that are read stand in the files of a server."""

    of_layer: dict[int, int]
    """Column of each K."""
    number: int
    """Columns in all."""
    width: int
    """``d_model``."""


def columns_of(layers: Sequence[int], layer_ids: Sequence[int], width: int) -> Columns:
    """The columns of layers in files of a server that was started with these ids.

    Args:
        layers: K of each layer that is read.
        layer_ids: ``eagle_aux_hidden_state_layer_ids``; empty: ``K + 1`` of each layer, in order.
        width: ``d_model`` that the AV reads.

    Raises:
        ConfigError: a layer that is read is not among them.
    """
    ids = list(layer_ids) or [layer + 1 for layer in layers]
    missing = [layer for layer in layers if layer + 1 not in ids]
    if missing:
        wanted = [layer + 1 for layer in missing]
        raise ConfigError(
            f"source.layer_ids is {ids}, which does not hold {', '.join(map(str, wanted))}. vLLM's id i is what "
            "goes into block i, so layer K (the output of block K) has id K + 1. Start the server with "
            f"eagle_aux_hidden_state_layer_ids {sorted({*ids, *wanted})}, and say the same here"
        )
    return Columns({layer: ids.index(layer + 1) for layer in layers}, len(ids), width)


def is_whole(path: Path) -> bool:
    """Whether nobody writes the file any more; False where it is not there."""
    try:
        changed = path.stat().st_mtime
    except OSError:
        return False
    lock = Path(f"{path}.lock")
    if fcntl is None or not lock.exists():
        return abs(time.time() - changed) > _STILL_SECONDS
    try:
        with lock.open("rb") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # deleted meanwhile, or a file system without such locks
        return abs(time.time() - changed) > _STILL_SECONDS
    return True


def token_ids(path: Path, columns: Columns) -> tuple[int, ...]:
    """The tokens ``[tokens]`` whose hidden states a whole file holds.

    Raises:
        SkipError: it is cut short, no such file, or of another model or other layers.
    """
    with _opened(path) as file:
        if {"hidden_states", "token_ids"} - set(file.keys()):
            raise SkipError(
                FOREIGN,
                f"{path.name} holds {sorted(file.keys())}, not hidden_states and token_ids: it is no file of vLLM's "
                "hidden-state extraction. Let source.folder be the server's shared_storage_path alone",
            )
        ids = file.get_tensor("token_ids")
        shape = tuple(file.get_slice("hidden_states").get_shape())
    wanted = (ids.numel(), columns.number, columns.width)
    if ids.dim() != 1 or ids.is_floating_point() or shape != wanted:
        raise SkipError(
            FOREIGN,
            f"{path.name} holds hidden_states {list(shape)} for {ids.numel()} tokens; expected {list(wanted)} (tokens, "
            "layers, d_model). Correct source.layer_ids to what the server was started with, or serve the model that "
            "the NLA was trained on, with chunked prefill off",
        )
    return tuple(ids.tolist())


def vectors_of(path: Path, rows: Tensor, columns: Columns) -> dict[int, Tensor]:
    """By layer the vectors ``[n, d_model]`` of the tokens ``rows`` ``[n]``, in the file's dtype.

    Raises:
        SkipError: it cannot be read.
    """
    with _opened(path) as file:
        states = file.get_slice("hidden_states")
        taken = [states[row : row + 1] for row in rows.tolist()]  # these rows alone leave the disk
    found = torch.cat(taken) if taken else torch.zeros((0, columns.number, columns.width))
    return {layer: found[:, column].clone() for layer, column in columns.of_layer.items()}


def remove(path: Path) -> None:
    """Delete a file that was read, and its lock."""
    for one in (path, Path(f"{path}.lock")):
        with suppress(OSError):  # somebody else did, or may; the disk is the server's to keep
            one.unlink()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """``safe_open`` whose failures say what is wrong with a file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise SkipError(
            UNREADABLE,
            f"{path.name} cannot be read, as if it were cut short ({error}). If the disk of source.folder is full, "
            "give it room; /dev/shm is fast",
        ) from error
