"""What a server is sent for a vector: the AV's prompt as embeddings, made here from the tokenizer and a few table rows.

The model itself is not loaded: the rows of the prompt's tokens are read from the safetensors file, and go through the
architecture's own embedding module, so that they are the bits that the model in process would read (Gemma multiplies by
sqrt(d_model) there).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nla_monitor.errors import CheckpointError, TokenizerContractError
from nla_monitor.nla.loading import checkpoint_errors, quiet

INDEX_NAME = "model.safetensors.index.json"


class PromptEmbeddings:
    """The AV's prompt as embeddings, with a place for one vector.

    Args:
        rows: ``[tokens, d_model]`` in the dtype in which they are sent; at ``marker`` the marker's own embedding.
        marker: position of the row that a vector replaces.
    """

    def __init__(self, rows: torch.Tensor, marker: int) -> None:
        self.rows = rows
        self.marker = marker

    def filled(self, row: torch.Tensor | None) -> torch.Tensor:
        """The prompt with ``row`` (``[d_model]``) in the marker's place; as it is for None."""
        if row is None:
            return self.rows
        rows = self.rows.clone()
        rows[self.marker] = row.to(rows)
        return rows


def read_model_settings(folder: Path) -> PreTrainedConfig:
    """``config.json`` of a checkpoint, as transformers understands it.

    Raises:
        CheckpointError: it cannot be read.
    """
    with quiet(), checkpoint_errors(folder, "config"):
        settings: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return settings


def embed_tokens(folder: Path, settings: PreTrainedConfig, ids: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Input embeddings ``[len(ids), d_model]`` of tokens, as the model computes them in ``dtype``.

    Raises:
        CheckpointError: no safetensors file holds the embedding table.
        TokenizerContractError: the table has no row for an id.
    """
    with quiet(), checkpoint_errors(folder, "model"):
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]  # theirs
                settings, trust_remote_code=False
            )
        module = model.get_input_embeddings()
    name = next(name for name, one in model.named_modules() if one is module)
    distinct = sorted(set(ids))
    rows = _table_rows(folder, name.rpartition(".")[2], distinct).to(dtype)
    if type(module) is not torch.nn.Embedding:
        rows = _through(model, module, rows)
    return rows[torch.tensor([distinct.index(token) for token in ids], dtype=torch.long)]


@torch.no_grad()
def _through(model: PreTrainedModel, module: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """What an architecture's own embedding module makes of table rows."""
    module.padding_idx = None  # type: ignore[assignment]  # an nn.Embedding's; it only concerns gradients
    module.weight = torch.nn.Parameter(torch.empty_like(rows, device="meta"))
    module.to_empty(device=torch.device("cpu"))
    # Fills buffers that no checkpoint holds, as from_pretrained does.
    model._init_weights(module)  # type: ignore[no-untyped-call]  # noqa: SLF001 -- theirs; there is no public name
    module.weight = torch.nn.Parameter(rows)
    embedded: torch.Tensor = module(torch.arange(len(rows)))
    return embedded.detach()


def _table_rows(folder: Path, module: str, ids: Sequence[int]) -> torch.Tensor:
    """Rows ``[len(ids), d_model]`` of the embedding table, without reading the others."""
    file, key = _table_file(folder, module)
    with checkpoint_errors(folder, "embedding table"), safe_open(file, framework="pt") as tensors:
        table = tensors.get_slice(key)
        size = table.get_shape()[0]
        if max(ids) >= size:
            raise TokenizerContractError(
                f"the AV's tokenizer makes id {max(ids)} but the model embeds only {size} tokens. They are not of one "
                "release: take tokenizer and weights from the same folder."
            )
        return torch.cat([table[token : token + 1] for token in ids])


def _table_file(folder: Path, module: str) -> tuple[Path, str]:
    """The file and key of the one tensor that ends in the embedding module's name."""
    found = [(file, key) for file, keys in _keys(folder).items() for key in keys if _names(key, module)]
    if len(found) != 1:
        told = f"{len(found)} tensors are called so" if found else "none is"
        raise CheckpointError(
            f"{folder}: expected one tensor '*.{module}.weight' in its safetensors files, the embedding table that "
            f"prompts for a server are made from; {told}. Copy the file with the embeddings, and its index, again."
        )
    return found[0]


def _names(key: str, module: str) -> bool:
    wanted = f"{module}.weight"
    return key == wanted or key.endswith(f".{wanted}")


def _keys(folder: Path) -> dict[Path, list[str]]:
    """Keys by file: from the index where there is one (then only the table's own file must be here)."""
    index, keys = folder / INDEX_NAME, dict[Path, list[str]]()
    if index.is_file():
        with checkpoint_errors(folder, "index of weights"):
            for key, name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                keys.setdefault(folder / name, []).append(key)
        return keys
    for file in sorted(folder.glob("*.safetensors")):
        with checkpoint_errors(folder, "weights"), safe_open(file, framework="pt") as tensors:
            keys[file] = list(tensors.keys())
    return keys
