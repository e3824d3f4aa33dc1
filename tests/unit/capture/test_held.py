"""Rows that are held and chosen from later give the samples that choosing at once gives."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from capture_kit import capturing, left_pad, make_model, token_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_monitor.capture import planning
from nla_monitor.records import ActivationSample

LAYERS = (0, 1)


def _samples(model: Any, forwards: Sequence[dict[str, torch.Tensor]], *, at_once: bool, **config: Any) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        if at_once:
            patch.setattr(planning, "MOST_TOKENS", -1)
        with capturing(model, layer=LAYERS, **config) as captured:
            for step, forward in enumerate(forwards):
                captured.capture.step(step, epoch=0.5)
                model(**forward, use_cache=False)
                captured.capture.flush(10)  # a reservoir's threshold depends on what was built before
            return [_said(sample) for sample in captured.samples()]


def _said(sample: ActivationSample) -> tuple[Any, ...]:
    """All but id and time."""
    return (
        *(sample.layer, sample.phase, sample.step, sample.sequence_id, sample.position, sample.token_id),
        *(sample.trigger, sample.role, sample.inclusion_probability, sample.norm, sample.vector.tobytes()),
        *(sample.context, tuple(sample.attributes.items()), tuple(sample.screens.items())),
    )


_lengths = st.lists(st.integers(3, 14), min_size=1, max_size=4)


@given(
    lengths=st.lists(_lengths, min_size=1, max_size=3),
    labelled=st.booleans(),
    packed=st.booleans(),
    config=st.fixed_dictionaries(
        {
            "tokens_per_sequence": st.integers(1, 3),
            "sequences_per_step": st.integers(1, 3),
            "triggers": st.sampled_from([(), ("7",), ("7", "9")]),
            "positions": st.sampled_from(["all", "prompt", "completion"]),
            "reservoir": st.sampled_from([None, 4]),
            "skip_first": st.integers(0, 4),
        }
    ),
)
@settings(max_examples=25, deadline=None)
def test_held_rows_give_the_same_samples(
    lengths: list[list[int]], labelled: bool, packed: bool, config: dict[str, Any]
) -> None:
    model = make_model().train()
    forwards = [_forward(row, seed, labelled=labelled, packed=packed) for seed, row in enumerate(lengths)]
    later, at_once = (_samples(model, forwards, at_once=flag, **config) for flag in (False, True))
    assert sorted(later) == sorted(at_once)


def _forward(lengths: Sequence[int], seed: int, *, labelled: bool, packed: bool) -> dict[str, torch.Tensor]:
    sequences = [token_batch(1, length, seed=seed + length)[0] for length in lengths]
    if packed:
        given = {
            "input_ids": torch.cat(sequences).unsqueeze(0),
            "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        }
    else:
        ids, mask = left_pad(sequences)
        given = {"input_ids": ids, "attention_mask": mask}
    if labelled:
        labels = given["input_ids"].clone()
        labels[:, :4] = -100
        given["labels"] = labels
    return given


def _hold_up(capture: Any, gate: threading.Event) -> None:
    """Our thread builds nothing until the gate opens."""
    build = capture._stager._build

    def late(job: Any) -> Any:
        assert gate.wait(10)
        return build(job)

    capture._stager._build = late


def test_what_the_host_overwrites_afterwards_changes_nothing() -> None:
    """Ids, mask, labels and the residual stream are the host's: it may use their memory again at once."""
    model, gate = make_model(), threading.Event()
    ids = token_batch(2, 12)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :6] = -100
    kept = [tensor.clone() for tensor in (ids, mask, labels)]
    overwritten: list[torch.Tensor] = []

    def overwrite(_: Any, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        overwritten.append(hidden)

    with capturing(model, positions="completion", skip_first=0, tokens_per_sequence=12) as captured, torch.no_grad():
        _hold_up(captured.capture, gate)
        handle = model.model.layers[captured.capture.layers[0]].register_forward_hook(overwrite)
        model(input_ids=ids, attention_mask=mask, labels=labels)
        handle.remove()
        for tensor in (ids, mask, labels, *overwritten):
            tensor.zero_()
        gate.set()
        samples = captured.samples()
        expected = make_model()(kept[0], output_hidden_states=True).hidden_states[captured.capture.layers[0] + 1]
    assert {sample.position for sample in samples} == set(range(6, 12))
    rows = {row.numpy().tobytes() for row in expected.reshape(-1, expected.shape[-1])}
    assert len(samples) == 12
    assert all(np.ascontiguousarray(sample.vector).tobytes() in rows for sample in samples)


def test_while_our_thread_is_behind_rows_are_chosen_at_once_and_nothing_is_lost() -> None:
    model, gate = make_model(), threading.Event()
    with capturing(model, tokens_per_sequence=2) as captured, torch.no_grad():
        _hold_up(captured.capture, gate)
        for seed in range(10):
            model(token_batch(1, 12, seed=seed))
        gate.set()
        assert len(captured.samples()) == 20
        assert captured.capture.stats.dropped == {}
