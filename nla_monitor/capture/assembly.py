"""From a captured forward to samples: on the background thread, over host copies."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nla_monitor.breathing import breathe
from nla_monitor.capture import keys, sampling
from nla_monitor.capture.agent_draws import AgentDraws
from nla_monitor.capture.budget import NormSinks
from nla_monitor.capture.policy import CANDIDATE, FIRST_TRIGGER, PROMPT_END, RANDOM, Draw, Policy
from nla_monitor.capture.screens import Screens
from nla_monitor.capture.session import SessionHandle, SessionView
from nla_monitor.capture.triggers import TextTriggers
from nla_monitor.errors import ConfigError
from nla_monitor.records import ActivationSample, AgentContext, Phase, Scalar, Vector, uuid7

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Origin:
    """What the host knew when a forward ran."""

    phase: Phase
    step: int | None
    attributes: Mapping[str, Scalar]
    captured_at: float
    """Unix seconds."""
    model: str | None = None
    """Name that the model was attached by."""
    adapter: str | None = None
    sessions: SessionView = field(default_factory=SessionView)
    thread_session: SessionHandle | None = None


@dataclass(eq=False, slots=True)
class Owners:
    """Which session each chosen row of a generation belongs to: filled with its prompt, read by its tokens."""

    of_row: dict[int, SessionHandle | None] = field(default_factory=dict)
    known: bool = False


@dataclass(eq=False, slots=True)
class Job:
    """One captured forward: host copies (complete after ``event``) and where they came from."""

    vectors: Tensor
    """``[n, d_model]`` in the model's dtype."""
    meta: Tensor
    """``[n, 10]`` int64, see ``sampling``."""
    context: Tensor | None
    """``[n, window]`` int64 token ids, -1 where there are none."""
    event: torch.cuda.Event | None
    origin: Origin
    owners: Owners
    layer: int
    draw: Draw
    """Of the forward; of a generated token, of its prompt."""
    screens: Tensor | None = None
    """``[n, screens]`` float32: what was measured of each vector."""
    generated: int | None = None
    """Index of the generated token that the forward read; None for a prompt or a whole sequence."""

    @property
    def patient(self) -> bool:
        """A generated token: its samples may be built with the next write. A prompt says whose generation it is."""
        return self.generated is not None

    def count(self) -> int:
        """Valid candidates; all of them while a copy is under way."""
        if self.event is not None and not self.event.query():  # type: ignore[no-untyped-call]  # torch annotates no events
            return int(self.meta.shape[0])
        return int(self.meta[:, sampling.VALID].sum())

    def discard(self) -> None:
        """Nothing is held of it."""


class TokenText:
    """Decodes token ids with its own copy of the tokenizer.

    A fast tokenizer that is decoding in one thread raises "Already borrowed" in another that pads or truncates: the
    host's tokenizer is therefore never used from our thread.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = None
        if tokenizer is None:
            return
        try:
            self._tokenizer = copy.deepcopy(tokenizer)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            logger.warning("samples carry no text: the tokenizer cannot be copied (%s)", error)

    @property
    def works(self) -> bool:
        """Whether there is a tokenizer to decode with."""
        return self._tokenizer is not None

    def decode(self, rows: list[list[int]]) -> list[str | None]:
        """Text of each row of ids; None without a tokenizer."""
        if self._tokenizer is None:
            return [None] * len(rows)
        decode = self._tokenizer.decode
        texts: list[str | None] = []
        for row in rows:
            texts.append(decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False))
            breathe()
        return texts


class TextMatcher:
    """Tells which candidates stand where a text trigger matches, by the text up to them.

    Args:
        patterns: RE2.
        text: decodes.
        window: tokens that are looked at, the candidate included.

    Raises:
        ConfigError: a pattern cannot be used, or nothing can be decoded.
    """

    def __init__(self, patterns: Sequence[str], text: TokenText, window: int) -> None:
        self._triggers = TextTriggers(patterns)
        self._text = text
        self._window = window
        if not text.works:
            raise ConfigError(
                "capture.text_triggers need a copy of the tokenizer, and this one cannot be copied. Give attach() "
                "another, or use capture.triggers"
            )

    def match(self, rows: list[list[int]]) -> list[str | None]:
        """For each row of ids, whose last is a candidate: the pattern with a match that ends in it."""
        tokens = [[token for token in row[-self._window :] if token >= 0] for row in rows]
        texts = [text or "" for text in self._text.decode([ids for row in tokens for ids in (row, row[:-1])])]
        found = []
        for whole, before in zip(texts[::2], texts[1::2], strict=True):
            # Half a character before the candidate is another text than the whole one after it.
            start = len(before if whole.startswith(before) else before.rstrip("\ufffd"))
            found.append(self._triggers.first(whole, start))
            breathe()
        return found


class Assembler:
    """Builds ``ActivationSample`` records of jobs.

    Args:
        policy: names of triggers, sizes of the random draw.
        run_id: run of every sample.
        screens: what ``Job.screens`` holds, and what is made of it.
        rank: of this process.
        phases: which phases are kept.
        text: decoder for the content fields; None keeps no content.
        matcher: of text triggers.
        norm_sink_factor: of ``CaptureConfig``.
        on_sinks: called with the number of random samples left out because of their norm.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        run_id: str,
        screens: Screens,
        rank: int,
        phases: tuple[Phase, ...],
        text: TokenText | None,
        matcher: TextMatcher | None = None,
        norm_sink_factor: float | None = None,
        on_sinks: Callable[[int], None] | None = None,
    ) -> None:
        self._matcher = matcher
        self._sinks = defaultdict[int, NormSinks](partial(NormSinks, norm_sink_factor))
        """By layer."""
        self._on_sinks = on_sinks
        self._policy = policy
        self._run_id = run_id
        self._screens = screens
        self._rank = rank
        self._phases = phases
        self._text = text

    def build(self, job: Job) -> tuple[list[ActivationSample], int]:
        """The samples of a job, and how many chosen vectors were not finite (those give no sample)."""
        meta: list[list[int]] = job.meta.tolist()
        self._assign(job, meta)
        draws = AgentDraws(self._policy, job.draw, generated=job.generated is not None)
        allowed = [draws.allow(job.owners.of_row.get(row[sampling.ROW]), row) for row in meta]
        kept = [number for number, row in enumerate(meta) if allowed[number] and self._keep(job, row)]
        kept = _once(meta, kept)
        matched = self._match(job, meta, kept)
        kept = [number for number in kept if meta[number][sampling.KIND] != CANDIDATE or number in matched]
        if not kept:
            return [], 0
        vectors = job.vectors[kept].to(torch.float32).numpy()
        # float64: the squares of large but finite float32 entries overflow float32.
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
        finite = [number for number in range(len(kept)) if np.isfinite(norms[number])]
        lost = len(kept) - len(finite)
        finite = self._without_sinks(job, meta, kept, finite, norms)
        tokens, contexts = self._decode(job, meta, [kept[number] for number in finite])
        judged = self._judge(job, kept, vectors, finite)
        samples = []
        for number, token, context, (priority, screens) in zip(finite, tokens, contexts, judged, strict=True):
            samples.append(
                self._sample(
                    job,
                    meta[kept[number]],
                    vector=vectors[number].copy(),
                    norm=float(norms[number]),
                    token_text=token,
                    context=context,
                    priority=priority,
                    screens=screens,
                    pattern=matched.get(kept[number]),
                    draw=draws.of(job.owners.of_row.get(meta[kept[number]][sampling.ROW])),
                )
            )
            breathe()
        return samples, lost

    def _match(self, job: Job, meta: list[list[int]], kept: list[int]) -> dict[int, str]:
        """The candidates that a text trigger takes, with its pattern."""
        candidates = [number for number in kept if meta[number][sampling.KIND] == CANDIDATE]
        if not candidates or self._matcher is None or job.context is None:
            return {}
        found = self._matcher.match(job.context[candidates].tolist())
        return {number: pattern for number, pattern in zip(candidates, found, strict=True) if pattern is not None}

    def _without_sinks(
        self, job: Job, meta: list[list[int]], kept: list[int], finite: list[int], norms: Any
    ) -> list[int]:
        """Random samples with a sink's norm left out: a trigger's samples were asked for, whatever their norm."""
        sinks = self._sinks[job.layer]
        ordinary = []
        for number in finite:
            drawn = meta[kept[number]][sampling.KIND] == RANDOM
            if not (drawn and sinks.is_sink(float(norms[number]))):
                ordinary.append(number)
        if self._on_sinks is not None and len(ordinary) < len(finite):
            self._on_sinks(len(finite) - len(ordinary))
        return ordinary

    def _assign(self, job: Job, meta: list[list[int]]) -> None:
        """Match the rows of a prompt to sessions, once a row."""
        owners, origin = job.owners, job.origin
        if job.generated is not None or owners.known:
            return
        if origin.thread_session is not None:
            origin.thread_session.forwards += 1
        for row in meta:
            number = row[sampling.ROW]
            if number not in owners.of_row:
                owners.of_row[number] = origin.thread_session or origin.sessions.claim(row[sampling.HASH])
        owners.known = True

    def _keep(self, job: Job, row: list[int]) -> bool:
        if not row[sampling.VALID]:
            return False
        phase = self._phase(job, row)
        if phase not in self._phases:
            return False
        if phase is not Phase.AGENT:
            # Prompt ends and generated tokens are read for agents only.
            return row[sampling.KIND] != PROMPT_END and job.generated is None
        is_end = job.generated is None and row[sampling.POSITION] == row[sampling.LENGTH] - 1
        return not (is_end and row[sampling.KIND] == RANDOM)  # the prompt_end slot holds it already

    def _phase(self, job: Job, row: list[int]) -> Phase:
        return Phase.AGENT if job.owners.of_row.get(row[sampling.ROW]) is not None else job.origin.phase

    def _judge(
        self, job: Job, kept: list[int], vectors: Vector, finite: list[int]
    ) -> list[tuple[float, dict[str, float]]]:
        """Priority and screens of each finite vector."""
        if job.screens is None or not finite:
            return [(0.0, {}) for _ in finite]
        return self._screens.judge(job.layer, job.screens[kept].numpy()[finite], vectors[finite])

    def _sample(
        self,
        job: Job,
        row: list[int],
        *,
        vector: Vector,
        norm: float,
        token_text: str | None,
        context: str | None,
        priority: float,
        screens: Mapping[str, float],
        pattern: str | None,
        draw: Draw,
    ) -> ActivationSample:
        origin = job.origin
        session = job.owners.of_row.get(row[sampling.ROW])
        if session is not None:
            session.run.taken += 1
        attributes = {**origin.attributes, **(session.attributes if session is not None else {})}
        return ActivationSample(
            sample_id=uuid7(),
            run_id=self._run_id,
            layer=job.layer,
            vector=vector,
            norm=norm,
            phase=self._phase(job, row),
            sequence_id=keys.hex_of(row[sampling.HASH]),
            position=row[sampling.POSITION],
            token_id=row[sampling.TOKEN],
            trigger=self._policy.name(row[sampling.KIND]) if pattern is None else f"text:{pattern}",
            captured_at=origin.captured_at,
            step=origin.step,
            rank=self._rank,
            token_text=token_text,
            context=context,
            role=_ROLES.get(row[sampling.COMPLETION], "prompt" if session is not None else None),
            inclusion_probability=_probability(draw, job, row),
            traceparent=session.trace() if session is not None else None,
            agent=_agent(session, job.generated, row[sampling.POSITION]),
            attributes=attributes,
            model=origin.model,
            adapter=origin.adapter,
            priority=priority,
            screens=screens,
        )

    def _decode(self, job: Job, meta: list[list[int]], numbers: list[int]) -> tuple[list[str | None], list[str | None]]:
        nothing: list[str | None] = [None] * len(numbers)
        if self._text is None or not numbers:
            return nothing, nothing
        tokens = self._text.decode([[meta[number][sampling.TOKEN]] for number in numbers])
        if job.context is None or not self._policy.context:
            return tokens, nothing
        contexts: list[list[int]] = job.context[numbers, -self._policy.context :].tolist()
        return tokens, self._text.decode([[token for token in row if token >= 0] for row in contexts])


_ROLES = {0: "prompt", 1: "completion"}


def _once(meta: list[list[int]], kept: list[int]) -> list[int]:
    """Without the ends of prompts that a trigger takes, too: its name says more."""
    ends = [number for number in kept if meta[number][sampling.KIND] == PROMPT_END]
    if not ends:
        return kept
    named = {
        (meta[number][sampling.ROW], meta[number][sampling.POSITION])
        for number in kept
        if meta[number][sampling.KIND] >= FIRST_TRIGGER
    }
    twice = {n for n in ends if (meta[n][sampling.ROW], meta[n][sampling.POSITION]) in named}
    return [number for number in kept if number not in twice]


def _probability(draw: Draw, job: Job, row: list[int]) -> float | None:
    """Chance of this position within its forward, see ``Draw.probability``."""
    return draw.probability(
        row[sampling.KIND], row[sampling.SEQUENCES], row[sampling.DRAWN_FROM], generated=job.generated is not None
    )


def _agent(session: SessionHandle | None, generated: int | None, position: int) -> AgentContext | None:
    if session is None:
        return None
    context = replace(session.context, generated=generated is not None, token_index=generated)
    message = session.message_at(position)
    if message is None:
        return context
    # A tool's message is of its own call, whichever result the model call reads last.
    own = message.role == "tool" or message.tool_call_id is not None
    return replace(
        context,
        tool=message.tool if message.role == "tool" else context.tool,
        tool_call_id=message.tool_call_id if own else context.tool_call_id,
        message_role=message.role,
        span_start=message.start,
        span_end=message.end,
    )
