"""Putting a vector into a prompt: which vectors may go in, where the marker sits, and at which norm.

How it then gets into the model is a matter of dialect; see ``injectors``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nla_monitor.errors import ActivationError, TokenizerContractError
from nla_monitor.nla.sidecar import MARKER_PLACEHOLDER, VerbalizerContract

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKER_REMEDY = (
    "The tokenizer files, the chat template or the sidecar were changed after training: take all three from the same "
    "release, and never apply NFKC normalisation to templates (it rewrites the marker)."
)


def bad_rows(vectors: Iterable[npt.ArrayLike], d_model: int) -> dict[int, str]:
    """Rows that cannot be verbalized, with the reason; the others may go on.

    Args:
        vectors: ``[batch, d_model]``, or any iterable of rows (their widths may differ).
        d_model: width that the checkpoint reads.
    """
    reasons = ((index, _reason(np.asarray(row), d_model)) for index, row in enumerate(vectors))
    return {index: reason for index, reason in reasons if reason}


def _reason(row: npt.NDArray[Any], d_model: int) -> str:
    if row.shape != (d_model,):
        return f"shape {row.shape} instead of ({d_model},): captured from another model or layer than this NLA reads"
    with np.errstate(over="ignore"):  # an overflow is what is looked for
        single = row.astype(np.float32)
        norm = float(np.linalg.norm(single))
    nans, infinities = int(np.isnan(single).sum()), int(np.isinf(single).sum())
    if nans or infinities:
        return f"{nans} NaN and {infinities} Inf values: the forward pass overflowed there; drop the sample"
    if norm == 0.0:
        return "zero norm: nothing to rescale; drop the sample (padding, or a masked position)"
    if norm == np.inf:
        return "norm beyond float32: the activation exploded; drop the sample"
    return ""


def check_vectors(vectors: npt.ArrayLike, d_model: int) -> npt.NDArray[np.float32]:
    """The vectors as float32 ``[batch, d_model]``.

    Raises:
        ActivationError: a row holds NaN or Inf, has zero norm or the wrong width (names the row and what to do).
    """
    array = np.asarray(vectors)
    if array.ndim != 2:
        raise ActivationError(
            f"vectors must be [batch, {d_model}], found shape {array.shape}. Stack rows: vector[None, :]."
        )
    bad = bad_rows(array, d_model)
    if bad:
        index, reason = next(iter(bad.items()))
        others = f" ({len(bad)} of {len(array)} rows are unusable)" if len(bad) > 1 else ""
        raise ActivationError(
            f"row {index}: {reason}{others}. bad_rows() lists all of them, so that the rest can go on."
        )
    return np.ascontiguousarray(array, dtype=np.float32)


def rescale(vectors: npt.NDArray[np.float32], scale: float | None) -> npt.NDArray[np.float32]:
    """``v * scale / |v|`` row by row in float32, ``[batch, d_model]``; unchanged when ``scale`` is None (``raw``)."""
    if scale is None:
        return vectors
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: npt.NDArray[np.float32] = (vectors * np.float32(scale) / norms).astype(np.float32, copy=False)
    return scaled


@dataclass(frozen=True, slots=True)
class Prompt:
    """The AV's prompt as token ids: the same for every vector."""

    ids: tuple[int, ...]
    marker: int
    """Position of the first (and mostly only) marker."""
    offsets: tuple[int, ...] = (0,)
    """Where the markers stand, counted from the first."""

    @property
    def prefix(self) -> tuple[int, ...]:
        """Ids before the marker: their KV is computed once."""
        return self.ids[: self.marker]

    @property
    def suffix(self) -> tuple[int, ...]:
        """Ids after the marker."""
        return self.ids[self.marker + 1 :]


def build_prompt(tokenizer: PreTrainedTokenizerBase, contract: VerbalizerContract) -> Prompt:
    """The chat-templated prompt, with the marker found exactly once between its two neighbours.

    Two paths are tried, because tokenizers differ in which of them keeps the marker: template to text to ids, then
    template to ids directly.

    Raises:
        TokenizerContractError: no chat template, or no path yields the marker and neighbours of the sidecar (an
            oracle: as many placeholders as are wanted, side by side).
    """
    if not tokenizer.chat_template:
        raise TokenizerContractError(
            "the AV's tokenizer has no chat template, and its prompt is a user message. Copy chat_template.jinja (or "
            "the tokenizer_config.json that holds it) from the release."
        )
    messages = [{"role": "user", "content": contract.template.replace(MARKER_PLACEHOLDER, contract.marker)}]
    # enable_thinking: Qwen3 templates would open a thinking block; others ignore the variable.
    options: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": False}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    two_step = tokenizer.encode(text, add_special_tokens=False)
    alone = tokenizer.encode(contract.marker, add_special_tokens=False)
    if contract.marker_id is None and len(alone) == 1:
        contract = contract._replace(marker_id=alone[0])
    first = marker_fault(two_step, contract)
    if not first:
        return _prompt(two_step, contract)
    one_step = list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options))
    if not marker_fault(one_step, contract):
        return _prompt(one_step, contract)
    raise TokenizerContractError(f"{first}; the marker alone tokenizes to {alone}. {_MARKER_REMEDY}")


def _prompt(ids: Sequence[int], contract: VerbalizerContract) -> Prompt:
    return Prompt(tuple(ids), list(ids).index(contract.marker_id or 0), tuple(range(contract.markers)))


def marker_fault(ids: Sequence[int], contract: VerbalizerContract) -> str:
    """What is wrong with the marker in a prompt; empty when it stands once between both neighbours."""
    positions = [index for index, token in enumerate(ids) if token == contract.marker_id]
    name = f"marker {contract.marker!r} (tokens.injection_token_id {contract.marker_id})"
    if contract.left_id is None or contract.right_id is None:
        return _placeholder_fault(positions[: contract.markers], contract, name)
    if len(positions) != 1:
        return f"{name}: expected once in the AV prompt, found {len(positions)} times in ids {list(ids)}"
    at = positions[0]
    found = (ids[at - 1] if at else None, ids[at + 1] if at + 1 < len(ids) else None)
    if found != (contract.left_id, contract.right_id):
        return f"neighbours of {name}: expected {(contract.left_id, contract.right_id)}, found {found} at position {at}"
    return ""


def _placeholder_fault(positions: Sequence[int], contract: VerbalizerContract, name: str) -> str:
    """Placeholders come first, side by side; the question after them may hold the same token."""
    side_by_side = all(right - left == 1 for left, right in itertools.pairwise(positions))
    if len(positions) < contract.markers or not side_by_side:
        return f"{name}: expected {contract.markers} side by side in the prompt, found positions {list(positions)}"
    return ""
