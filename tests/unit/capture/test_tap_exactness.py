"""What is captured is the output of block K, to the bit; what the model computes is untouched, to the bit."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from capture_kit import BLOCKS, CONFIGS, PAD, capturing, left_pad, make_model, token_batch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from nla_monitor.capture.keys import hash_of, hex_of
from nla_monitor.records import Phase


def _train(model: Any, steps: int = 3, **arguments: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Losses and all gradients of a few optimizer steps with dropout on."""
    torch.manual_seed(7)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, gradients = [], []
    for step in range(steps):
        ids = token_batch(2, 10, seed=step)
        mask = torch.ones_like(ids)
        loss = model(input_ids=ids, attention_mask=mask, labels=ids, **arguments).loss
        loss.backward()
        losses.append(loss.detach().clone())
        gradients += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def _small() -> Any:
    """Two blocks: a graph that is traced quickly."""
    model = make_model()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model


def _checkpoint(model: Any, *, reentrant: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name that all of transformers 5 knows
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def _equal(left: tuple[Any, Any], right: tuple[Any, Any]) -> bool:
    pairs = zip(left[0] + left[1], right[0] + right[1], strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("layer", range(BLOCKS - 1))
def test_vector_is_hidden_states_of_k_plus_one(family: str, layer: int) -> None:
    model = make_model(family)
    sequences = [token_batch(1, length, seed=length)[0] for length in (5, 9, 12)]
    ids, mask = left_pad(sequences)
    with capturing(model, layer=layer, tokens_per_sequence=4) as captured, torch.no_grad():
        hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[layer + 1]
        samples = captured.samples()
    assert len(samples) == 12
    rows = {hex_of(hash_of(sequence.tolist())): row for row, sequence in enumerate(sequences)}
    for sample in samples:
        row = rows[sample.sequence_id]
        column = ids.shape[1] - len(sequences[row]) + sample.position
        assert np.array_equal(sample.vector, hidden[row, column].numpy())
        assert sample.token_id == ids[row, column] != PAD
        assert sample.norm == pytest.approx(float(hidden[row, column].double().norm()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_stored_without_loss(dtype: torch.dtype) -> None:
    model = make_model().to(dtype)
    ids = token_batch(1)
    with capturing(model, tokens_per_sequence=12) as captured, torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states[2]
        samples = captured.samples()
    for sample in samples:
        assert np.array_equal(sample.vector, hidden[0, sample.position].float().numpy())


def test_block_that_returns_a_tuple_is_read() -> None:
    model = make_model()
    block = model.model.layers[1]
    plain = block.forward
    block.forward = lambda *args, **kwargs: (plain(*args, **kwargs), "beside")
    following = model.model.layers[2]
    after = following.forward
    following.forward = lambda hidden, *args, **kwargs: after(hidden[0], *args, **kwargs)
    with capturing(model, tokens_per_sequence=1) as captured, torch.no_grad():
        model(token_batch(1))
        assert len(captured.samples()) == 1


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_training_is_bitwise_the_same(checkpointing: bool | None) -> None:
    """Loss and gradients over several steps; gradient checkpointing off, reentrant, not reentrant."""

    def model() -> Any:
        made = make_model("gpt2")  # has dropout: an eaten random number would show
        if checkpointing is not None:
            _checkpoint(made, reentrant=checkpointing)
        return made

    plain = _train(model())
    watched = model()
    with capturing(watched, tokens_per_sequence=3) as captured:
        assert _equal(plain, _train(watched))
        samples = captured.samples()
    # Two sequences a step, three positions each: the recomputation in the backward pass is not sampled again.
    assert len(samples) == 3 * 2 * 3
    assert {sample.phase for sample in samples} == {Phase.TRAIN}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("attach_first", [True, False])
def test_blocks_checkpointed_from_outside_are_sampled_once(reentrant: bool, attach_first: bool) -> None:
    """PyTorch's own wrapper runs a block, and the hook on it, again in the backward pass."""
    implementation = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    model = make_model().train()
    model.enable_input_require_grads()
    ids = token_batch(2)
    with capturing(None, tokens_per_sequence=3) as captured:
        if attach_first:
            captured.capture.attach(model)
        for number, block in enumerate(model.model.layers):
            model.model.layers[number] = checkpoint_wrapper(block, checkpoint_impl=implementation)
        if not attach_first:
            captured.capture.attach(model)
        model(ids, labels=ids, use_cache=False).loss.backward()
        samples = captured.samples()
        assert len(samples) == len({(sample.sequence_id, sample.position) for sample in samples}) == 2 * 3
        assert captured.capture.check_fired() is None


def test_checkpointing_the_whole_model_is_sampled_once() -> None:
    model = make_model().train()
    ids = token_batch(2)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    with capturing(model, tokens_per_sequence=1) as captured:

        def forward(_: torch.Tensor) -> torch.Tensor:
            return model(ids, labels=ids).loss

        torch.utils.checkpoint.checkpoint(forward, embeddings, use_reentrant=False).backward()
        assert len(captured.samples()) == 2


def test_inference_mode_and_training_share_a_capture() -> None:
    """Buffers made under inference mode must still be writable outside of it, and the other way round."""
    model = make_model()
    ids = token_batch(2)
    with capturing(model, tokens_per_sequence=1) as captured:
        with torch.inference_mode():
            model(ids)
        model.train()
        model(ids, labels=ids).loss.backward()
        with torch.inference_mode():
            model.generate(ids, max_new_tokens=3, do_sample=False)
        assert len(captured.samples()) == 6


@pytest.mark.parametrize("compile_first", [False, True])
def test_compiled_training_is_captured_without_graph_breaks(compile_first: bool) -> None:
    """With ``fullgraph`` a graph break raises; losses and gradients are those of the eager model without a tap."""
    plain = _train(_small(), use_cache=False)
    torch._dynamo.reset()
    model = _small()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with capturing(compiled if compile_first else model, layer=0, tokens_per_sequence=2) as captured:
        assert _equal(plain, _train(compiled, use_cache=False))
        assert len(captured.samples()) == 3 * 2 * 2
    torch._dynamo.reset()


@pytest.mark.parametrize("way", ["wrapper", "model", "step"])
def test_attached_after_the_first_compiled_call(way: str) -> None:
    """The graph from before has no hooks: it is made anew, once, and is back after detaching."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model = _small()
    ids = token_batch(2, 10)

    def step(ids: torch.Tensor) -> Any:
        return model(ids, use_cache=False).logits

    compiled = torch.compile(step if way == "step" else model, backend=counter, fullgraph=True)
    called = functools.partial(compiled, ids, **({} if way == "step" else {"use_cache": False}))
    with torch.no_grad():
        called()
        with capturing(
            compiled if way == "wrapper" else model, layer=0, tokens_per_sequence=2, skip_first=0
        ) as captured:
            before = counter.frame_count
            called()
            assert len(captured.samples()) == 4
            frames = counter.frame_count
            assert frames > before
            called()
            assert len(captured.samples()) == 4
            assert captured.capture.check_fired() is None
        called()
        assert counter.frame_count == frames
    assert not any("forward" in module.__dict__ for module in model.modules())
    torch._dynamo.reset()


def test_compiled_forward_gives_the_vectors_of_the_block() -> None:
    torch._dynamo.reset()
    model = _small()
    ids = token_batch(2, 10)
    names = [hex_of(hash_of(row.tolist())) for row in ids]
    with capturing(model, layer=0) as captured, torch.no_grad():
        torch.compile(model, backend="aot_eager", fullgraph=True)(ids, use_cache=False)
        samples = captured.samples()
        hidden = model(ids, output_hidden_states=True).hidden_states[1]
    assert len(samples) == 4
    for sample in samples:
        expected = hidden[names.index(sample.sequence_id), sample.position].numpy()
        assert np.allclose(sample.vector, expected, rtol=1e-5, atol=1e-7)  # the graph may round otherwise than eager
    torch._dynamo.reset()


def test_the_hooks_cause_no_recompilation() -> None:
    """Different data, different choices, different steps: no graph more after the first step."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = _small()
    with capturing(model, layer=0, triggers=("5",)) as captured:
        compiled = torch.compile(model, backend=counter)
        frames = []
        for step in range(5):
            captured.capture.step(step)
            ids = token_batch(2, 10, seed=step)
            compiled(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
            frames.append(counter.frame_count)
        assert len(captured.samples()) >= 5 * 2
    # The model is one graph; torch traces the two hooks around it as frames of their own.
    assert frames == [3] * 5
    torch._dynamo.reset()


def test_a_watched_model_can_be_copied_and_pickled() -> None:
    """Reference models, EMA and whole-model saves copy the hooks; the copy is a plain model."""
    model = make_model()
    with capturing(model, tokens_per_sequence=1) as captured:
        twin = copy.deepcopy(model)
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        loaded = torch.load(stream, weights_only=False)
        restored = pickle.loads(pickle.dumps(model))  # noqa: S301 -- our own bytes
        with torch.no_grad():
            expected = model(token_batch()).logits
            assert captured.samples()
            for other in (twin, loaded, restored):
                assert torch.equal(other(token_batch()).logits, expected)
        assert captured.samples() == []


def test_a_forward_that_raises_leaves_nothing_behind() -> None:
    model = make_model()
    with capturing(model, tokens_per_sequence=1) as captured, torch.no_grad():
        with pytest.raises(IndexError):
            model(torch.full((1, 4), 10_000))
        model(token_batch(1))
        assert len(captured.samples()) == 1


def test_rows_that_do_not_match_the_ids_are_skipped() -> None:
    """Virtual prompt tokens make the residual stream longer than ``input_ids``."""
    model = make_model()
    stack = model.model
    plain = stack.forward

    def longer(input_ids: torch.Tensor, **_: Any) -> Any:
        return plain(inputs_embeds=stack.embed_tokens(torch.cat([input_ids, input_ids], dim=1)))

    with capturing(model) as captured, torch.no_grad():
        stack.forward = longer
        model(token_batch())
        assert captured.samples() == []
        assert captured.capture.stats.skipped == {"shape_mismatch": 1}


@pytest.mark.parametrize("name", ["begin", "tap", "end"])
def test_no_cuda_graph_records_the_hooks(name: str) -> None:
    """A graph that is replayed would not run their Python: nothing would be captured after the first call."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.nla_monitor, name).default.tags
