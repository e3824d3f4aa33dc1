"""What cannot be captured is refused at attach, or said at the first step: blind must not look like calm."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from capture_kit import VOCAB, capturing, make_model, token_batch
from torch import nn

from nla_monitor.errors import AttachError, ConfigError


def test_a_block_that_was_replaced_after_attach_is_said() -> None:
    model = make_model()
    with capturing(model) as captured, torch.no_grad():
        model(token_batch())
        assert captured.capture.check_fired() is None
        model.model.layers[1] = make_model(seed=9).model.layers[1]
        model(token_batch())
        problem = captured.capture.check_fired()
        assert problem == captured.capture.replaced()
    assert problem is not None
    assert "model.layers.1 was replaced after the monitor was attached" in problem


def test_a_replaced_block_list_is_said() -> None:
    model = make_model()
    with capturing(model) as captured:
        model.model.layers = make_model(seed=9).model.layers
        assert "model.layers.1 was replaced" in (captured.capture.replaced() or "")
        del model.model.layers
        assert "model.layers.1 was replaced" in (captured.capture.replaced() or "")


def test_a_wrapper_put_around_a_block_is_no_replacement() -> None:
    """As activation checkpointing, FSDP and a compiled block do."""

    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    model = make_model()
    with capturing(model, tokens_per_sequence=1) as captured, torch.no_grad():
        model.model.layers[1] = Wrapper(model.model.layers[1])
        model(token_batch(1, 12))
        assert captured.capture.check_fired() is None
        assert len(captured.samples()) == 1


def test_new_weights_in_the_same_blocks_are_no_replacement() -> None:
    model = make_model()
    with capturing(model) as captured:
        model.load_state_dict(make_model(seed=4).state_dict(), assign=True)
        assert captured.capture.replaced() is None


def _orphan() -> nn.Module:
    compiled = torch.compile(make_model(), backend="eager")
    del compiled._modules["_orig_mod"]
    return compiled


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: torch.compile(lambda ids: ids, backend="eager"),
            "cannot attach to function.*give the model inside it",
        ),
        (_orphan, "compiled, and the model that it was compiled from is gone.*attach to the original"),
        (lambda: nn.Linear(2, 2), "no list of decoder blocks in Linear.*Give a causal language model"),
    ],
)
def test_models_that_cannot_be_looked_into_are_refused_with_a_remedy(model: Any, message: str) -> None:
    with capturing(None) as captured, pytest.raises(AttachError, match=message):
        captured.capture.attach(model())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tokens_per_sequence": 0}, "nothing can ever be sampled.*Set capture.tokens_per_sequence"),
        (
            {"triggers": (str(VOCAB),)},
            f"token id {VOCAB} can never match: the vocabulary ends at {VOCAB - 1}. Write an id",
        ),
        ({"phases": ()}, "capture.phases is empty.*Name train, eval or agent"),
    ],
)
def test_a_policy_that_can_never_match_is_refused_with_a_remedy(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message), capturing(make_model(), **config):
        pass


def test_a_sequence_parallel_block_is_refused_at_attach() -> None:
    """``parallelize_module`` leaves this hook; the test needs no process group for it."""
    from torch.distributed.tensor.parallel import SequenceParallel

    model = make_model()
    style = partial(SequenceParallel._prepare_input_fn, SequenceParallel().sequence_sharding)
    norm = model.model.layers[1].input_layernorm
    norm.register_forward_pre_hook(lambda module, inputs: style(module, inputs, None))
    with capturing(None) as captured:
        with pytest.raises(
            AttachError, match=r"layer 1 is sharded.*layers\.1\.input_layernorm is SequenceParallel.*Repl"
        ):
            captured.capture.attach(model)
        with capturing(model, layer=0) as other:  # another layer's stream may still be whole
            assert other.capture.layers == (0,)


def test_reasons_and_remedies_of_forwards_that_cannot_be_read_are_said() -> None:
    model = make_model()
    with capturing(model) as captured, torch.no_grad():
        model.model.layers[1].register_forward_hook(lambda *_: None)
        block = model.model.layers[1]
        plain = block.forward
        block.forward = lambda hidden, *args, **kwargs: plain(hidden, *args, **kwargs).repeat(1, 2, 1)
        following = model.model.layers[2]
        after = following.forward
        following.forward = lambda hidden, *args, **kwargs: after(hidden[:, ::2], *args, **kwargs)
        model(token_batch())
        problem = captured.capture.check_fired()
    assert captured.capture.stats.skipped == {"shape_mismatch": 1}
    assert problem is not None
    assert "captured 0 of 1 expected forwards at layer 1: no forward could be read: shape_mismatch (1)" in problem
    assert "virtual prompt tokens" in problem
