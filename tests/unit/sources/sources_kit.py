"""What the tests of sources share: a context whose sink is a list, a tap beside it, and a way to compare samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from nla_monitor.capture.screens import Screens
from nla_monitor.config import CaptureConfig, QueueConfig
from nla_monitor.guard import Guard
from nla_monitor.records import ActivationSample, AgentContext, Completion
from nla_monitor.sources import ActivationSource, TapSource
from nla_monitor.sources.base import SourceContext

LAYER, WIDTH = 1, 32

Place = tuple[int, int, str]


@dataclass
class Outlet:
    """Where the samples of a source end up, and what was reported."""

    source: Any
    guard: Guard
    samples: list[ActivationSample] = field(default_factory=list)
    dropped: list[tuple[str, int]] = field(default_factory=list)

    def read(self, *calls: tuple[Sequence[int] | None, Completion | None], **session: Any) -> list[ActivationSample]:
        """Open and close these calls, and what comes of them."""
        self.samples.clear()
        for number, (prompt, completion) in enumerate(calls):
            handle = self.source.open_session(AgentContext(f"run-{number}"), prompt, **session)
            self.source.close_session(handle, completion=completion)
        assert self.source.flush(60)
        return list(self.samples)


def context_of(
    outlet: Outlet, *, layers: tuple[int, ...] = (LAYER,), queue: QueueConfig | None = None, **capture: Any
) -> SourceContext:
    """A context for tiny models of width 32."""
    return SourceContext(
        run_id="run",
        layers=layers,
        width=WIDTH,
        capture=CaptureConfig(**({"skip_first": 0, "norm_sink_factor": None} | capture)),
        queue=QueueConfig() if queue is None else queue,
        sink=outlet.samples.extend,
        guard=outlet.guard,
        screens=Screens(()),
        on_dropped=lambda reason, number: outlet.dropped.append((reason, number)),
    )


@contextmanager
def started(source: ActivationSource | TapSource, **settings: Any) -> Iterator[Outlet]:
    """A source at work."""
    outlet = Outlet(source, Guard())
    source.start(context_of(outlet, **settings))
    try:
        yield outlet
    finally:
        source.close(30)


def decode(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> None:
    """The forward passes of a generation: the prompt at once, then each written token but the last."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for tokens in ([*prompt], *([token] for token in answer[:-1])):
            ids = torch.tensor([tokens])
            mask = torch.ones(1, cache.get_seq_length() + len(tokens), dtype=torch.long)
            model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)


def tapped(
    model: Any, tokenizer: Any, prompt: Sequence[int], answer: Sequence[int], **settings: Any
) -> list[ActivationSample]:
    """What a tap takes of such a generation."""
    source = TapSource(model, tokenizer)
    with started(source, **settings) as outlet:
        handle = source.open_session(AgentContext("run-0"), prompt)
        decode(model, prompt, answer)
        source.close_session(handle)
        assert source.flush(60)
        return list(outlet.samples)


def said(sample: ActivationSample) -> dict[str, Any]:
    """All that a sample says but for its id, its time, its vector and where it was obtained."""
    apart = {"sample_id", "captured_at", "vector", "norm", "attributes", "screens"}
    return {item.name: getattr(sample, item.name) for item in fields(sample) if item.name not in apart}


def by_place(samples: Sequence[ActivationSample]) -> dict[Place, ActivationSample]:
    """Samples by layer, position and trigger; each place once."""
    found = {(sample.layer, sample.position, sample.trigger): sample for sample in samples}
    assert len(found) == len(samples)
    return found


def assert_same(left: Sequence[ActivationSample], right: Sequence[ActivationSample], *, tolerance: float) -> float:
    """The same samples, with vectors that differ by at most ``tolerance`` of their norm; the largest such share."""
    ours, theirs = by_place(left), by_place(right)
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for place, one in ours.items():
        other = theirs[place]
        assert said(one) == said(other)
        worst = max(worst, float(np.linalg.norm(one.vector - other.vector)) / one.norm)
    assert worst <= tolerance
    return worst
