"""Products and attention through other kernels give what the library's own give, and leave models as they were."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from nla_monitor.nla import attention, linear
from nla_monitor.nla.attention import attend, use_batched_steps
from nla_monitor.nla.linear import OneDnnLinear, use_onednn

here = pytest.mark.skipif(not linear.faster_here(), reason="needs AVX-512 and oneDNN")


@here
@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    inner=st.integers(1, 70),
    outer=st.integers(1, 70),
    bias=st.booleans(),
)
def test_a_product_is_that_of_the_usual_layer(*, shape: list[int], inner: int, outer: int, bias: bool) -> None:
    usual = nn.Linear(inner, outer, bias=bias)
    fast = copy.deepcopy(usual)
    assert use_onednn(fast) == 1
    read = torch.randn(*shape, inner)
    with torch.inference_mode():
        torch.testing.assert_close(fast(read), usual(read), rtol=1e-5, atol=1e-5)
        if len(shape) > 1:
            turned = read.transpose(0, 1)
            torch.testing.assert_close(fast(turned), usual(turned), rtol=1e-5, atol=1e-5)


@here
def test_a_model_keeps_its_parameters_names_and_gradients() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, dtype=torch.float64))
    names = list(model.state_dict())
    assert use_onednn(model) == 1
    assert isinstance(model[0], OneDnnLinear)
    assert list(model.state_dict()) == names
    model[0](torch.randn(3, 8)).sum().backward()
    assert model[0].weight.grad is not None


def test_layers_of_other_kinds_are_left_alone() -> None:
    class Adapted(nn.Linear):
        """A subclass that may do anything."""

    assert use_onednn(nn.Sequential(Adapted(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16), nn.Embedding(4, 4))) == 0


def test_nothing_is_switched_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "faster_here", lambda: False)
    model = nn.Linear(4, 4)
    assert use_onednn(model) == 0
    assert type(model) is nn.Linear


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    tokens=st.integers(1, 20),
    queries=st.sampled_from([1, 1, 3]),
    scaling=st.sampled_from([None, 0.1, 0.5]),
)
def test_attention_is_that_of_the_library(
    *, batch: int, kv_heads: int, group: int, tokens: int, queries: int, scaling: float | None
) -> None:
    """Keys are a view into a longer buffer, as in decoding."""
    module = nn.Module()
    module.num_key_value_groups = group  # type: ignore[assignment]
    query = torch.randn(batch, kv_heads * group, queries, 8)
    key, value = (torch.randn(batch + 1, kv_heads, 30, 8)[:batch, :, 2 : 2 + max(tokens, queries)] for _ in range(2))
    options = {"scaling": scaling, "dropout": 0.0, "sliding_window": None, "use_cache": True}
    with torch.inference_mode():
        found, weights = attend(module, query, key, value, None, **options)
        expected, _ = sdpa_attention_forward(module, query, key, value, None, **options)
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_only_the_library_knows_goes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *_, **__: ("the library's", None))
    query, key = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 5, 8)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    assert attend(nn.Module(), query, key, key, mask)[0] == "the library's"
    for option in ({"softcap": 3.0}, {"dropout": 0.1}, {"position_bias": torch.ones(1)}, {"s_aux": torch.ones(4)}):
        assert attend(nn.Module(), query, key, key, None, **option)[0] == "the library's"
    assert attend(nn.Module(), query.requires_grad_(), key, key, None)[0] == "the library's"


def test_a_model_that_computes_otherwise_keeps_its_attention() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config)
    assert not use_batched_steps(model)
    assert model.config._attn_implementation == "eager"
