"""From a whole sequence and its residual stream to the samples that a tap would have taken while it was generated.

A tap sees a prompt in one pass and then one written token at a time. Whoever has the whole sequence afterwards walks it
in the same way over the tokens alone, so that the same positions are chosen, and takes their rows. The last token that
was written never went into the model, so that a tap cannot read it; neither is it read here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nla_monitor.breathing import breathe
from nla_monitor.capture import SessionHandle, sampling
from nla_monitor.capture import generation as generations
from nla_monitor.capture.assembly import Assembler, Job, Origin, Owners, TextMatcher, TokenText
from nla_monitor.capture.budget import Pace
from nla_monitor.capture.policy import Draw, build_policy
from nla_monitor.capture.sampling import Choice
from nla_monitor.records import ActivationSample, Phase
from nla_monitor.sources.base import SourceContext


@dataclass(frozen=True, slots=True)
class Pass:
    """What is read of one forward pass of a generation."""

    choice: Choice
    rows: Tensor
    """``[n]`` int64: tokens of the whole sequence, in the order of the choice."""
    generated: int | None
    """Index of the written token that the pass was fed; None: the prompt."""


@dataclass(frozen=True, slots=True)
class Itinerary:
    """What is read of one call."""

    draw: Draw
    passes: tuple[Pass, ...]
    owners: Owners
    captured_at: float
    """Unix seconds."""

    @property
    def rows(self) -> Tensor:
        """``[n]`` int64: every token whose vectors are wanted, in order, each once."""
        return torch.tensor(sorted({row for one in self.passes for row in one.rows.tolist()}), dtype=torch.int64)


class SequenceReader:
    """Chooses positions of whole sequences, and makes samples of their vectors.

    Args:
        context: whose samples, and what is sampled.
        tokenizer: resolves triggers, decodes text; copied, never used itself. None: no text.
        model_config: transformers config of the model that is read, for its special tokens; None: not known.
        load: fill of the queue in memory, 0 to 1.
        on_sinks: called with the number of random samples left out because of their norm.

    Raises:
        ConfigError: a trigger can never match, or nothing could ever be sampled.
        AttachError: a screen is for another layer or width.
    """

    def __init__(
        self,
        context: SourceContext,
        *,
        tokenizer: Any = None,
        model_config: Any = None,
        load: Callable[[], float] = float,
        on_sinks: Callable[[int], None] | None = None,
    ) -> None:
        capture = context.capture
        context.screens.check(context.layers, context.width)
        self._context = context
        self._policy = build_policy(capture, tokenizer, model_config)
        text = TokenText(tokenizer) if capture.store_text or capture.text_triggers else None
        matcher = None
        if capture.text_triggers and text is not None:
            matcher = TextMatcher(capture.text_triggers, text, self._policy.window)
        self._assembler = Assembler(
            self._policy,
            run_id=context.run_id,
            screens=context.screens,
            rank=context.rank,
            phases=capture.phases,
            text=text if capture.store_text else None,
            matcher=matcher,
            norm_sink_factor=capture.norm_sink_factor,
            on_sinks=on_sinks,
        )
        self._pace = Pace(capture, load=load, layers=len(context.layers))

    @property
    def most(self) -> int:
        """Samples of one layer that one call can give."""
        policy = self._policy.times(self._policy.burst)
        return policy.per_sequence + policy.generated

    def burst(self) -> None:
        """See ``Pace.burst``."""
        self._pace.burst()

    def plan(self, session: SessionHandle, prompt: Sequence[int], written: Sequence[int]) -> Itinerary | None:
        """What is read of a call; None: nothing, for want of a token or of agents in ``capture.phases``.

        Args:
            session: whose call it is.
            prompt: token ids that went into the model at once.
            written: token ids that went in one by one after them: all that were generated, but for the last.
        """
        if not prompt or Phase.AGENT not in self._context.capture.phases:
            return None
        ids = torch.tensor([list(prompt)], dtype=torch.int64)
        real = torch.ones_like(ids, dtype=torch.bool)
        draw = self._pace.other(self._policy, 1)
        choice = sampling.choose(draw, ids, real, agent=True)
        if choice is None:
            return None
        generation = generations.start(draw, choice, ids, real, None)
        generation.owners.of_row.update(dict.fromkeys(range(len(choice.rows)), session))
        generation.owners.known = True
        passes = [Pass(choice, choice.index, None)]
        # ``capture.positions: prompt`` reads no written token.
        for number, token in enumerate(written if self._policy.positions != "prompt" else ()):
            taken, index = generations.advance(generation, torch.tensor([[token]]))
            if taken is not None:
                passes.append(Pass(taken, taken.index + len(prompt) + number, index))
            breathe()
        return Itinerary(draw, tuple(passes), generation.owners, time.time())

    def jobs(self, plan: Itinerary, vectors: dict[int, Tensor]) -> list[Job]:
        """What was planned, with its vectors.

        Args:
            plan: of ``plan``.
            vectors: by layer ``[n, d_model]``, beside ``plan.rows``.
        """
        origin = Origin(Phase.AGENT, None, {}, plan.captured_at)
        rows = plan.rows
        return [
            self._job(plan, one, origin, layer, found[torch.searchsorted(rows, one.rows)])
            for one in plan.passes
            for layer, found in sorted(vectors.items())
        ]

    def _job(self, plan: Itinerary, one: Pass, origin: Origin, layer: int, vectors: Tensor) -> Job:
        measured = None
        with self._context.guard("sources.screen"):  # a screen that fails costs its numbers, not the samples
            measured = self._context.screens.measure(layer, vectors)
        return Job(
            vectors=vectors,
            meta=one.choice.meta,
            context=one.choice.context,
            event=None,
            origin=origin,
            owners=plan.owners,
            layer=layer,
            draw=plan.draw,
            screens=measured,
            generated=one.generated,
        )

    def build(self, job: Job) -> tuple[list[ActivationSample], int]:
        """The samples of a job, and how many of its vectors were not finite."""
        samples, lost = self._assembler.build(job)
        self._pace.settle(job.draw.expected if job.generated is None else 0.0, len(samples))
        return samples, lost
