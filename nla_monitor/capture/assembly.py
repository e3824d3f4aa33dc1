"""From a captured forward to samples: on the background thread, over host copies."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nla_monitor.capture import sampling
from nla_monitor.capture.sampling import Policy
from nla_monitor.capture.session import SessionHandle, SessionView
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
    """``[n, context]`` int64 token ids, -1 where there are none."""
    event: torch.cuda.Event | None
    origin: Origin
    owners: Owners
    sequences: int = 1
    """How many sequences of the batch were chosen."""
    generated: int | None = None
    """Index of the generated token that the forward read; None for a prompt or a whole sequence."""

    def count(self) -> int:
        """Valid candidates; all of them while a copy is under way."""
        if self.event is not None and not self.event.query():  # type: ignore[no-untyped-call]  # torch annotates no events
            return int(self.meta.shape[0])
        return int(self.meta[:, sampling.VALID].sum())


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

    def decode(self, rows: list[list[int]]) -> list[str | None]:
        """Text of each row of ids; None without a tokenizer."""
        if self._tokenizer is None:
            return [None] * len(rows)
        decode = self._tokenizer.decode
        return [decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in rows]


class Assembler:
    """Builds ``ActivationSample`` records of jobs.

    Args:
        policy: names of triggers, sizes of the random draw.
        run_id: run of every sample.
        layer: K.
        rank: of this process.
        phases: which phases are kept.
        text: decoder for the content fields; None keeps no content.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        run_id: str,
        layer: int,
        rank: int,
        phases: tuple[Phase, ...],
        text: TokenText | None,
    ) -> None:
        self._policy = policy
        self._run_id = run_id
        self._layer = layer
        self._rank = rank
        self._phases = phases
        self._text = text

    def build(self, job: Job) -> tuple[list[ActivationSample], int]:
        """The samples of a job, and how many chosen vectors were not finite (those give no sample)."""
        meta: list[list[int]] = job.meta.tolist()
        self._assign(job, meta)
        kept = [number for number, row in enumerate(meta) if self._keep(job, row)]
        if not kept:
            return [], 0
        vectors = job.vectors[kept].to(torch.float32).numpy()
        # float64: the squares of large but finite float32 entries overflow float32.
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
        finite = [number for number in range(len(kept)) if np.isfinite(norms[number])]
        tokens, contexts = self._decode(job, meta, [kept[number] for number in finite])
        samples = []
        for number, token, context in zip(finite, tokens, contexts, strict=True):
            samples.append(
                self._sample(
                    job,
                    meta[kept[number]],
                    vector=vectors[number].copy(),
                    norm=float(norms[number]),
                    token_text=token,
                    context=context,
                )
            )
            # Hands the interpreter to the host between records: a thread that asks for it waits up to 5 ms otherwise.
            time.sleep(0)
        return samples, len(kept) - len(finite)

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
            return row[sampling.KIND] != sampling.PROMPT_END and job.generated is None
        is_end = job.generated is None and row[sampling.POSITION] == row[sampling.LENGTH] - 1
        return not (is_end and row[sampling.KIND] == sampling.RANDOM)  # the prompt_end slot holds it already

    def _phase(self, job: Job, row: list[int]) -> Phase:
        return Phase.AGENT if job.owners.of_row.get(row[sampling.ROW]) is not None else job.origin.phase

    def _sample(
        self, job: Job, row: list[int], *, vector: Vector, norm: float, token_text: str | None, context: str | None
    ) -> ActivationSample:
        origin = job.origin
        session = job.owners.of_row.get(row[sampling.ROW])
        attributes = {**origin.attributes, **(session.attributes if session is not None else {})}
        return ActivationSample(
            sample_id=uuid7(),
            run_id=self._run_id,
            layer=self._layer,
            vector=vector,
            norm=norm,
            phase=self._phase(job, row),
            sequence_id=sampling.hex_of(row[sampling.HASH]),
            position=row[sampling.POSITION],
            token_id=row[sampling.TOKEN],
            trigger=self._policy.name(row[sampling.KIND]),
            captured_at=origin.captured_at,
            step=origin.step,
            rank=self._rank,
            token_text=token_text,
            context=context,
            role=_ROLES.get(row[sampling.COMPLETION], "prompt" if session is not None else None),
            inclusion_probability=self._probability(job, row),
            traceparent=session.traceparent if session is not None else None,
            agent=_agent(session, job.generated),
            attributes=attributes,
        )

    def _probability(self, job: Job, row: list[int]) -> float | None:
        """Chance of this position within its forward: of its sequence among the batch, times of it in the sequence."""
        if row[sampling.KIND] != sampling.RANDOM:
            return None
        draws = self._policy.random if job.generated is None else 1
        return _share(job.sequences, row[sampling.SEQUENCES]) * _share(draws, row[sampling.DRAWN_FROM])

    def _decode(self, job: Job, meta: list[list[int]], numbers: list[int]) -> tuple[list[str | None], list[str | None]]:
        nothing: list[str | None] = [None] * len(numbers)
        if self._text is None or not numbers:
            return nothing, nothing
        tokens = self._text.decode([[meta[number][sampling.TOKEN]] for number in numbers])
        if job.context is None:
            return tokens, nothing
        contexts: list[list[int]] = job.context[numbers].tolist()
        return tokens, self._text.decode([[token for token in row if token >= 0] for row in contexts])


_ROLES = {0: "prompt", 1: "completion"}


def _share(taken: int, available: int) -> float:
    return 1.0 if available <= taken else taken / available


def _agent(session: SessionHandle | None, generated: int | None) -> AgentContext | None:
    if session is None:
        return None
    return replace(session.context, generated=generated is not None, token_index=generated)
