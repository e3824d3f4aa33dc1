"""The decoder blocks of a model are found by structure, whatever wraps them; what cannot be attached says why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from capture_kit import BLOCKS, CONFIGS, capturing, make_model, token_batch
from torch import nn

from nla_monitor.capture import find_blocks, unwrap
from nla_monitor.errors import AttachError, ConfigError


class _Wrapper(nn.Module):
    """As DDP and DataParallel do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class _Adapter(nn.Module):
    """As PEFT does: the inner model's ``forward`` is called, not its ``__call__``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model
        self.peft_config: dict[str, Any] = {}

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.forward(*args, **kwargs)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_blocks_of_every_family_are_found(family: str) -> None:
    found = find_blocks(make_model(family))
    assert len(found.blocks) == BLOCKS
    assert found.stack is not found.base


@pytest.mark.parametrize("wrap", [_Wrapper, _Adapter, lambda model: torch.compile(model, backend="eager")])
def test_wrappers_are_seen_through(wrap: Any) -> None:
    model = make_model()
    wrapped = wrap(model)
    assert unwrap(wrapped) is model
    assert find_blocks(wrapped).blocks is model.model.layers


def test_text_model_is_chosen_beside_a_vision_tower_of_the_same_depth() -> None:
    text = make_model()
    both = nn.Module()
    both.vision_tower = make_model("llama")
    both.language_model = text
    both.config = text.config
    assert find_blocks(both).blocks is text.model.layers


def test_two_language_models_cannot_be_told_apart() -> None:
    both = nn.ModuleDict({"left": make_model(), "right": make_model()})
    with pytest.raises(AttachError, match=r"several lists.*left\.model\.layers.*submodule"):
        find_blocks(both)


def test_longest_list_wins_where_no_config_says_the_depth() -> None:
    model = make_model()
    model.draft = make_model()
    model.draft.model.layers = model.draft.model.layers[:1]
    del model.config
    model.config = SimpleNamespace()
    assert len(find_blocks(model).blocks) == BLOCKS


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "no list of decoder blocks in Linear.*no ModuleList"),
        (nn.Sequential(nn.ModuleList([nn.ReLU()])), r"found 0 \(1 x ReLU\)"),
        (lambda ids: ids, "cannot attach to function.*pipeline"),
    ],
)
def test_models_without_blocks_are_refused_with_a_remedy(model: Any, message: str) -> None:
    with capturing(None) as captured, pytest.raises(AttachError, match=message):
        captured.capture.attach(model)


@pytest.mark.parametrize("layer", [-1, BLOCKS, 99])
def test_layer_out_of_range_names_the_range(layer: int) -> None:
    with capturing(None, layer=layer) as captured, pytest.raises(AttachError, match=f"has {BLOCKS} decoder blocks"):
        captured.capture.attach(make_model())


def test_attaching_again_to_the_same_model_does_nothing() -> None:
    model = make_model()
    with capturing(model, tokens_per_sequence=1) as captured:
        captured.capture.attach(model)
        with torch.no_grad():
            model(token_batch(1))
        assert len(captured.samples()) == 1


def test_one_capture_refuses_a_second_model() -> None:
    with (
        capturing(make_model()) as captured,
        pytest.raises(AttachError, match="already attached to a Qwen2ForCausalLM"),
    ):
        captured.capture.attach(make_model("llama"))


def test_two_captures_may_share_a_model() -> None:
    model = make_model()
    with capturing(model, layer=0) as first, capturing(model, layer=1) as second:
        with torch.no_grad():
            model(token_batch(1))
        assert {sample.layer for sample in first.samples()} == {0}
        assert {sample.layer for sample in second.samples()} == {1}


@pytest.mark.parametrize("wrap", [_Wrapper, _Adapter])
@pytest.mark.parametrize("attach_to_wrapper", [True, False])
def test_forwards_through_a_wrapper_are_captured_once(wrap: Any, attach_to_wrapper: bool) -> None:
    """Also where the wrapper steps over the model's own hooks."""
    model = make_model()
    wrapped = wrap(model)
    with capturing(wrapped if attach_to_wrapper else model, tokens_per_sequence=1) as captured:
        with torch.no_grad():
            wrapped(token_batch(2))
        assert len(captured.samples()) == 2
        assert captured.capture.stats.forwards == 1


def test_the_base_model_called_directly_is_captured() -> None:
    """TRL's losses call ``model.model`` and apply the head in pieces."""
    model = make_model()
    with capturing(model, tokens_per_sequence=1) as captured:
        with torch.no_grad():
            model.model(input_ids=token_batch(2))
        assert len(captured.samples()) == 2


def test_detached_model_is_left_without_hooks() -> None:
    model = make_model()
    with capturing(model) as captured:
        captured.capture.detach()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        with torch.no_grad():
            model(token_batch())
        assert captured.samples() == []


def test_trigger_that_is_no_token_is_an_error_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match=r"'<turn>' cannot be resolved without a tokenizer"):
        capturing(make_model(), triggers=("<turn>",)).__enter__()
    with pytest.raises(ConfigError, match="nothing can ever be sampled"):
        capturing(make_model(), tokens_per_sequence=0).__enter__()


def test_model_that_is_not_the_one_that_runs_is_reported() -> None:
    with capturing(make_model()) as captured:
        assert captured.capture.check_fired() is None  # nothing has run yet
        captured.capture.step(1)
        assert captured.capture.check_fired() is None
        captured.capture.step(2)
        problem = captured.capture.check_fired()
        assert problem is not None
        assert "captured 0 of 1 expected forwards at layer 1" in problem
        assert "attach first, or call torch._dynamo.reset()" in problem


def test_forward_without_token_ids_is_counted_and_reported() -> None:
    model = make_model()
    with capturing(model) as captured:
        with torch.no_grad():
            model(inputs_embeds=torch.randn(1, 4, 32))
        assert captured.capture.stats.skipped == {"no_input_ids": 1}
        assert "Pass input_ids" in (captured.capture.check_fired() or "")
