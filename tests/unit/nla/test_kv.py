"""The buffered KV gives what the library's own cache gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from nla_checkpoints import CONFIG, prompt_ids
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from nla_monitor.nla.checkpoint import Checkpoint
from nla_monitor.nla.kv import BufferedPrefix, CopiedPrefix, PrefixCache, share_prefix
from nla_monitor.nla.loading import load_causal_lm


@pytest.fixture(scope="module")
def model(checkpoints: Path, family: str) -> PreTrainedModel:
    return load_causal_lm(Checkpoint(checkpoints / family / "av"), CONFIG)


def prefix_of(model: PreTrainedModel, family: str) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.tensor([prompt_ids(family)]), past_key_values=cache)
    return cache


@torch.inference_mode()
def play(model: PreTrainedModel, prefix: PrefixCache, batch: int) -> list[torch.Tensor]:
    """Logits of a few steps, rows leaving on the way."""
    cache, seen = prefix.rows(batch), []
    tokens = torch.arange(batch * 3).reshape(batch, 3) + 5
    for step in range(6):
        logits = model(input_ids=tokens, past_key_values=cache).logits[:, -1]
        seen.append(logits)
        if step in (1, 3) and len(logits) > 1:
            keep = torch.arange(len(logits) - 1, 0, -1)
            cache.batch_select_indices(keep)
            logits = logits[keep]
        tokens = logits.argmax(-1, keepdim=True)
    return seen


def test_buffers_give_the_logits_of_the_dynamic_cache(model: PreTrainedModel, family: str) -> None:
    """For batches that grow and shrink, so that buffers are made, reused and widened."""
    prefix = prefix_of(model, family)
    ours, theirs = share_prefix(prefix, capacity=len(prompt_ids(family)) + 8), CopiedPrefix(prefix)
    assert isinstance(ours, BufferedPrefix)
    for batch in (2, 5, 1, 4):
        for left, right in zip(play(model, ours, batch), play(model, theirs, batch), strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_a_smaller_batch_reuses_the_buffers(model: PreTrainedModel, family: str) -> None:
    shared = share_prefix(prefix_of(model, family), capacity=60)
    first = shared.rows(4).layers[1].keys
    again = shared.rows(3).layers[1].keys
    assert first is not None
    assert again is not None
    assert first.data_ptr() == again.data_ptr()
    assert len(again) == 3


def test_other_kinds_of_blocks_are_copied() -> None:
    class Other(DynamicLayer):
        """A block that keeps more than keys and values."""

    cache = DynamicCache()
    cache.layers = [Other()]
    cache.layers[0].update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    shared = share_prefix(cache, capacity=10)
    assert isinstance(shared, CopiedPrefix)
    assert shared.rows(5).get_seq_length() == 3
    keys = shared.rows(5).layers[0].keys
    assert keys is not None
    assert keys.shape == (5, 2, 3, 4)
