"""Attention of one new token per row on the CPU, as batched matrix products.

PyTorch's fused CPU kernel walks over rows and heads one by one and computes tiles of queries; with one query each there
is no tile to fill. For such steps two batched products and a softmax read the same keys and values at about twice the
speed. Every other call goes to the library's own function.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME: Final = "nla_monitor_steps"
"""Under which transformers knows it."""
_HANDLED: Final = frozenset({"sliding_window", "position_ids", "use_cache", "is_causal", "output_attentions"})
"""Further arguments that change nothing here: the cache hands out no keys beyond a sliding window."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' interface has it.

    Args:
        module: the attention module.
        query: ``[batch, heads, queries, head_dim]``.
        key: ``[batch, kv_heads, tokens, head_dim]``.
        value: as ``key``.
        attention_mask: None where every query sees every key.
        options: what else a model passes.

    Returns:
        ``[batch, queries, heads, head_dim]``, and no weights.
    """
    if query.shape[2] == 1 and attention_mask is None and _plain(query, options):
        return _one_query(query, key, value, options.get("scaling")), None
    mixed: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[0]
    return mixed, None


def _plain(query: torch.Tensor, options: dict[str, Any]) -> bool:
    """Whether nothing is asked for that only the library's function knows, gradients included."""
    asked = {name for name, value in options.items() if value is not None and name not in _HANDLED | {"scaling"}}
    return asked <= {"dropout"} and not options.get("dropout") and not (torch.is_grad_enabled() and query.requires_grad)


def _one_query(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    batch, heads, _, size = query.shape
    groups = batch * key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    # The query heads of a group are the rows of one product: keys and values are read once for all of them.
    asked = (query * scale).reshape(groups, heads // key.shape[1], size)
    shares = torch.bmm(asked, key.flatten(0, 1).transpose(1, 2)).softmax(dim=-1)
    return torch.bmm(shares, value.flatten(0, 1)).view(batch, 1, heads, value.shape[-1])


def use_batched_steps(model: PreTrainedModel) -> bool:
    """Lets a float32 CPU model that uses the fused kernel attend this way; returns whether it does now."""
    fits = model.device.type == "cpu" and model.dtype == torch.float32
    if not (fits and model.config._attn_implementation == "sdpa"):  # noqa: SLF001 - the library's own name for it
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return bool(model.config._attn_implementation == NAME)  # noqa: SLF001 - the same
