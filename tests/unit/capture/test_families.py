"""Every decoder family of the installed transformers is read to the bit, found by structure, and left as it is."""

from __future__ import annotations

import logging
import warnings
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from capture_kit import Captured, capturing
from family_kit import NOT_BUILT, Family, families, inputs_of

from nla_monitor.capture import find_blocks
from nla_monitor.capture.keys import hash_of, hex_of
from nla_monitor.errors import AttachError

AT_LEAST = 245
"""Model classes of transformers 5.23 that are read; fewer means that something was lost."""

SPREAD = (
    "BambaForCausalLM",  # attention and state space
    "BloomForCausalLM",  # blocks return tuples
    "Gemma3ForConditionalGeneration",  # beside a vision tower
    "GitForCausalLM",  # its text blocks are called an encoder's
    "LlamaForCausalLM",
    "MambaForCausalLM",  # no attention
    "OlmoHybridForCausalLM",  # blocks of two classes
    "OpenAIGPTLMHeadModel",  # blocks return lists
    "Qwen3MoeForCausalLM",  # experts
    "RwkvForCausalLM",  # recurrent
    "T5ForConditionalGeneration",  # the decoder of two equal stacks
    "XLNetLMHeadModel",  # refused
)

WITHOUT_EMBEDDINGS = {"FalconMambaForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM", "RwkvForCausalLM"}
"""Their ``hidden_states`` begin with the output of block 0."""

NOT_READ = {
    "CpmAntForCausalLM": "puts virtual tokens before those of input_ids",
    "DeepseekV4ForCausalLM": "several residual streams for each token",
    "FSMTForConditionalGeneration": "time is the first dimension of its residual stream",
    "Gemma3nForCausalLM": "several residual streams for each token",
    "HYV4ForCausalLM": "several residual streams for each token",
    "HrmTextForCausalLM": "its blocks run several times in a forward pass",
    "ProphetNetForCausalLM": "several residual streams for each token",
    "ProphetNetForConditionalGeneration": "several residual streams for each token",
    "XLMWithLMHeadModel": "attention and feed-forward lie in lists of their own, there are no blocks",
    "XLNetLMHeadModel": "time is the first dimension of its residual stream",
}
"""Where ``hidden_states[K + 1]`` is no one vector a token: refused at attach, or said after the first forward."""


def _forward(model: Any, arguments: dict[str, Any], **more: Any) -> Any:
    torch.manual_seed(5)  # a few families draw random numbers in a forward pass, also in eval mode
    with torch.no_grad():
        return model(**arguments, **more)


def _check(captured: Captured, family: Family, ids: torch.Tensor, hidden: torch.Tensor) -> None:
    """Every token once, its vector that of ``hidden`` ``[rows, length, d_model]``, bit for bit."""
    rows = {hex_of(hash_of(row.tolist())): number for number, row in enumerate(ids)}
    samples = captured.samples()
    places = {(rows[sample.sequence_id], sample.position) for sample in samples}
    assert len(samples) == len(places) == ids.numel(), f"{family.name}: {captured.capture.check_fired()}"
    for sample in samples:
        expected = hidden[rows[sample.sequence_id], sample.position].numpy()
        assert np.array_equal(sample.vector, expected), f"{family.name}, layer {captured.capture.layers}"


def _check_read(family: Family, model: Any) -> None:
    arguments, ids = inputs_of(family)
    plain = _forward(model, arguments, output_hidden_states=True)
    states = getattr(plain, "decoder_hidden_states", None) or plain.hidden_states
    blocks = find_blocks(model).blocks
    # Without an image, Mllama steps over its cross-attention blocks, in ``hidden_states`` too.
    layers = sorted({0, len(blocks) - 2}) if len(states) == len(blocks) + 1 else [0]
    with ExitStack() as stack:
        taps = [stack.enter_context(_all_tokens(model, layer)) for layer in layers]
        watched = _forward(model, arguments)
        assert torch.equal(watched.logits, plain.logits), family.name
        for layer, tap in zip(layers, taps, strict=True):
            _check(tap, family, ids, states[layer + (family.name not in WITHOUT_EMBEDDINGS)])


def _all_tokens(model: Any, layer: int) -> Any:
    return capturing(model, layer=layer, tokens_per_sequence=64, norm_sink_factor=None, skip_special_tokens=False)


def _check_refused(family: Family, model: Any) -> None:
    arguments, _ = inputs_of(family)
    try:
        with _all_tokens(model, 0) as captured:
            _forward(model, arguments)
            said = captured.capture.check_fired()
            assert captured.samples() == []
    except AttachError as error:
        said = str(error)
    assert said is not None, f"{family.name} is not read, and nobody is told"
    assert "captured 0 of 1" in said or "no list of decoder blocks" in said


def _walk(chosen: set[str] | None = None) -> list[str]:
    """Check each family; the names of those that were read."""
    read = []
    for family in families():
        if chosen is not None and family.name not in chosen:
            continue
        if family.name in NOT_BUILT:
            continue
        model = family.build()
        if family.name in NOT_READ:
            _check_refused(family, model)
        else:
            _check_read(family, model)
            read.append(family.name)
    return read


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """Families without fast kernels, and those that are deprecated, say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        yield
        logging.disable(logging.NOTSET)


def test_a_spread_of_families_is_read_to_the_bit() -> None:
    assert set(_walk(set(SPREAD))) == set(SPREAD) - set(NOT_READ)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_decoder_family_is_read_to_the_bit() -> None:
    read = _walk()
    assert len(read) >= AT_LEAST


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in families() if family.name in NOT_BUILT], ids=lambda f: f.name)
def test_what_is_said_not_to_be_built_is_not(family: Family) -> None:
    """A family that can be built after all belongs to the walk."""
    arguments, _ = inputs_of(family)
    with pytest.raises(Exception):  # noqa: B017, PT011 -- each fails in its own way
        _forward(family.build(), arguments, output_hidden_states=True)
