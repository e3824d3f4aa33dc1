"""Several layers and several models at once: the same positions, each sample with where it is from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from capture_kit import Captured, capturing, make_model, places, token_batch

from nla_monitor.capture.keys import hash_of, hex_of
from nla_monitor.errors import AttachError
from nla_monitor.records import AgentContext

LAYERS = (0, 2)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT asks for it


def _adapted(**changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | changes
    torch.manual_seed(3)
    return peft.get_peft_model(make_model(), peft.LoraConfig(**settings)).eval()


def test_every_layer_is_read_at_the_same_positions_to_the_bit() -> None:
    model = make_model()
    ids = token_batch(2, 10)
    rows = {hex_of(hash_of(row.tolist())): number for number, row in enumerate(ids)}
    with capturing(model, layer=(0, 1), tokens_per_sequence=3, skip_first=0) as captured, torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
        samples = captured.samples()
    by_layer = {layer: [one for one in samples if one.layer == layer] for layer in (0, 1)}
    assert [len(found) for found in by_layer.values()] == [6, 6]
    assert places(by_layer[0]) == places(by_layer[1])
    for one in samples:
        assert np.array_equal(one.vector, hidden[one.layer + 1][rows[one.sequence_id], one.position].numpy())


def test_several_layers_leave_training_bitwise_the_same() -> None:
    def losses(model: Any) -> list[torch.Tensor]:
        torch.manual_seed(5)
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        found = []
        for step in range(3):
            ids = token_batch(2, 8, seed=step)
            loss = model(ids, labels=ids).loss
            loss.backward()
            found += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            optimizer.step()
            optimizer.zero_grad()
        return found

    plain = losses(make_model("gpt2"))
    watched = make_model("gpt2")
    with capturing(watched, layer=LAYERS) as captured:
        assert all(torch.equal(one, other) for one, other in zip(plain, losses(watched), strict=True))
        assert {one.layer for one in captured.samples()} == set(LAYERS)


def test_compiled_forwards_are_read_at_every_layer_without_a_graph_break() -> None:
    torch._dynamo.reset()
    model = make_model()
    with capturing(model, layer=LAYERS, tokens_per_sequence=2, skip_first=0) as captured, torch.no_grad():
        torch.compile(model, backend="aot_eager", fullgraph=True)(token_batch(2, 10), use_cache=False)
        samples = captured.samples()
    torch._dynamo.reset()
    assert sorted(one.layer for one in samples) == [0] * 4 + [2] * 4


def test_a_layer_that_is_never_reached_is_said_while_the_others_are_read() -> None:
    model = make_model()
    with capturing(model, layer=LAYERS) as captured:
        model.config.num_hidden_layers = 2  # the model stops before its last block, which still stands
        with torch.no_grad():
            model(token_batch())
        assert {one.layer for one in captured.samples()} == {0}
        problem = captured.capture.check_fired()
    assert problem is not None
    assert "captured 0 of 1 expected forwards at layer 2: the hook on model.layers.2 never fired" in problem


def test_policy_and_reference_are_told_apart_by_name_and_share_agent_sessions() -> None:
    policy, reference = make_model(seed=1), make_model(seed=2)
    with capturing(None) as first:
        first.capture.attach(policy)
        prompt = token_batch(1, 12)
        second = Captured(None)
        second.capture = type(first.capture)(
            first.capture._config,
            run_id="run",
            layer=1,
            sink=second.got.extend,
            guard=first.guard,
            queue=first.capture._stager._config,
            name="reference",
            sessions=first.capture.sessions,
        )
        second.capture.attach(reference)
        handle = first.capture.sessions.open(AgentContext("call"), prompt[0].tolist())
        with torch.no_grad():
            policy(prompt)
            reference(prompt)
        samples = [*first.samples(), *second.samples()]
        first.capture.sessions.close(handle)
        second.capture.close(5)
    assert {(one.model, one.agent.agent_run_id if one.agent else None) for one in samples} == {
        (None, "call"),
        ("reference", "call"),
    }


@pytest.mark.parametrize("compiled", [False, True])
def test_passes_with_and_without_the_adapter_are_told_apart(compiled: bool) -> None:
    """As the reference passes of DPO and GRPO: the same weights object, the adapter switched off for a while."""
    model = _adapted()
    ids = token_batch(1, 12)
    torch._dynamo.reset()
    called = torch.compile(model, backend="aot_eager") if compiled else model
    with capturing(model, tokens_per_sequence=2) as captured, torch.no_grad():
        for _ in range(2):
            called(input_ids=ids, use_cache=False)
            with model.disable_adapter():
                called(input_ids=ids, use_cache=False)
        samples = captured.samples()
    torch._dynamo.reset()
    assert [one.adapter for one in samples] == ["default", "default", None, None] * 2
    assert not np.array_equal(samples[0].vector, samples[2].vector)
    assert places(samples[:2]) == places(samples[2:4])


def test_the_adapter_in_use_is_named_and_one_that_comes_after_attach_is_found() -> None:
    peft = pytest.importorskip("peft")
    base = make_model()
    ids = token_batch(1, 12)
    with capturing(base, tokens_per_sequence=1) as captured, torch.no_grad():
        base(ids)
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
        captured.capture.step(0)
        model(input_ids=ids)
        model.set_adapter("second")
        model(input_ids=ids)
        assert [one.adapter for one in captured.samples()] == [None, "default", "second"]


def test_layers_out_of_range_are_refused_before_any_hook_is_set() -> None:
    model = make_model()
    with capturing(None, layer=(0, 9)) as captured, pytest.raises(AttachError, match="layer 9 is out of range"):
        captured.capture.attach(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
