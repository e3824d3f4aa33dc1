"""Sources that read a call after it was answered: two bounded queues, none of which the host ever waits for.

The first holds closed calls; its thread, of low priority, gets their vectors from wherever they come (``_read``). The
second holds samples on their way to the database. Both are the capture's own ``Stager``: bounded, counted, ended by a
fork in the child.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nla_monitor.capture import CaptureStats, SessionHandle, SessionRegistry
from nla_monitor.capture.assembly import Job
from nla_monitor.capture.staging import FAULT, StagedJob, Stager
from nla_monitor.errors import AttachError
from nla_monitor.records import PROXY, SOURCE, ActivationSample, AgentContext, Completion, Scalar
from nla_monitor.sources.base import Call, SourceContext
from nla_monitor.sources.reading import SequenceReader

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("nla_monitor")

LOWEST_PRIORITY: Final = 19
_READING: Final = 0.8
"""Share of the time for an end that calls may still be read in."""
TAP_SECONDS: Final = 5.0
"""How long is waited for the tap of this process to say whether it saw a call."""

NO_PROMPT, NO_ANSWER, TAPPED = "no_prompt", "no_answer", "tapped"

REMEDIES: Final[Mapping[str, str]] = {
    NO_PROMPT: "its prompt's token ids are not known. Give the handler the tokenizer of the model that is read "
    "(tokenizer=...), or attach the source with one",
}
"""What is said, once, of calls that cannot be read, by reason. Reasons without an entry are only counted."""


class SkipError(Exception):
    """A call cannot be read. Internal: it never leaves its source, which counts it and says it once."""

    def __init__(self, reason: str, detail: str | None = None) -> None:
        super().__init__(detail or REMEDIES.get(reason) or reason)
        self.reason = reason
        self.told = detail is not None or reason in REMEDIES


@dataclass(eq=False, slots=True)
class CallJob:
    """A closed call in the queue."""

    call: Call
    event: torch.cuda.Event | None = None

    @property
    def patient(self) -> bool:
        """Never: its source may have to be asked while the answer is still there."""
        return False

    def count(self) -> int:
        """One call."""
        return 1

    def discard(self) -> None:
        """It will not be read."""
        self.call.read = False


class RecordedSource(ABC):
    """What all sources that read afterwards share; ``_read`` says how vectors are had.

    Args:
        kind: the attribute ``source`` of its samples.
        tokenizer: of the model that is read.
        proxy: whether that model is another than the one that answers.
    """

    def __init__(self, kind: str, tokenizer: Any, *, proxy: bool) -> None:
        self.kind = kind
        self.sessions = SessionRegistry()
        """Calls that were opened and not closed yet, and the agents' runs that they are part of."""
        self._tokenizer = tokenizer
        self._labels: dict[str, Scalar] = {SOURCE: kind} | ({PROXY: True} if proxy else {})
        self._lock = threading.Lock()
        self._said: set[str] = set()
        self._skipped: Counter[str] = Counter()
        self._forwards = self._unmatched = 0
        self._seconds = 0.0
        self._closing = False
        """Whether nothing is waited for any more."""
        self._quiet = False
        """Whether the reading thread has taken its low priority."""

    @property
    def tokenizer(self) -> Any:
        """See ``ActivationSource``."""
        return self._tokenizer

    # What subclasses fill in.

    @abstractmethod
    def _prepare(self, context: SourceContext) -> Any:
        """Check the model against the AV; its transformers config, where there is one.

        Raises:
            AttachError: it does not fit.
        """

    @abstractmethod
    def _read(self, call: Call) -> list[Job]:
        """The jobs of a closed call, on the reading thread.

        Raises:
            SkipError: it cannot be read.
        """

    # ``ActivationSource``.

    def start(self, context: SourceContext) -> None:
        """See ``ActivationSource``."""
        if hasattr(self, "_context"):
            raise AttachError(f"this {type(self).__name__} is attached to a monitor already; make one for each")
        model_config = self._prepare(context)
        self._context = context
        self._reader = SequenceReader(
            context, tokenizer=self._tokenizer, model_config=model_config, load=self._load, on_sinks=self._sinks
        )
        queue = context.queue
        calls = queue.model_copy(update={"max_samples": max(1, queue.max_samples // max(1, self._reader.most))})
        self._calls = Stager(self._build, _nothing, context.guard, calls, on_dropped=self._lost)
        self._samples = Stager(
            self._assemble,
            context.sink,
            context.guard,
            queue,
            on_sampled=context.on_sampled,
            on_dropped=context.on_dropped,
        )

    def open_session(
        self,
        context: AgentContext,
        token_ids: Sequence[int] | None,
        *,
        traceparent: str | None = None,
        attributes: Mapping[str, Scalar] | None = None,
        tapped: SessionHandle | None = None,
    ) -> Call:
        """See ``ActivationSource``."""
        labelled = {**(attributes or {}), **self._labels}
        session = self.sessions.open(context, None, traceparent=traceparent, attributes=labelled, bound=False)
        return Call(session, None if token_ids is None else tuple(token_ids), tapped)

    def close_session(self, handle: Call, *, completion: Completion | None = None) -> None:
        """See ``ActivationSource``."""
        with self._lock:
            if handle.closed:
                return
            handle.closed, handle.closed_at, handle.completion = True, time.monotonic(), completion
            if handle.prompt is None and completion is not None:
                handle.prompt = completion.prompt_ids
        self.sessions.close(handle.session)
        self._calls.put_nowait(CallJob(handle))

    def burst(self) -> None:
        """See ``ActivationSource``."""
        self._reader.burst()

    def flush(self, timeout: float) -> bool:
        """See ``ActivationSource``."""
        deadline = time.monotonic() + timeout
        return self._calls.flush(timeout) and self._samples.flush(max(0.0, deadline - time.monotonic()))

    def close(self, timeout: float) -> bool:
        """See ``ActivationSource``."""
        deadline = time.monotonic() + timeout
        read = self._calls.flush(_READING * timeout)  # what was read by then must still be written
        self._closing = True
        read = self._calls.close(max(0.0, deadline - time.monotonic())) and read
        return self._samples.close(max(0.0, deadline - time.monotonic())) and read

    @property
    def stats(self) -> CaptureStats:
        """See ``ActivationSource``: ``forwards`` are calls that were read, ``unmatched_sessions`` the others."""
        with self._lock:
            return CaptureStats(
                forwards=self._forwards,
                sampled=self._samples.sampled,
                written=self._samples.written,
                dropped=self._samples.dropped,
                skipped=dict(self._skipped),
                unmatched_sessions=self._unmatched,
                host_seconds=0.0,
                retries=self._samples.retries,
            )

    # Inside.

    def _load(self) -> float:
        """Fill of the queue of samples, 0 to 1."""
        return self._samples.depth / self._context.queue.max_samples

    def _sinks(self, number: int) -> None:
        self._count("norm_sink", number)

    def _lost(self, reason: str, number: int) -> None:
        """Calls fell out of the queue unread, or failed while they were read, which ``_build`` has noted."""
        with self._lock:
            self._unmatched += number if reason != FAULT else 0
        self._count(reason, number)

    def _build(self, job: StagedJob) -> tuple[list[ActivationSample], int]:
        """On the reading thread: no sample comes of it here, they are put into the second queue."""
        if not isinstance(job, CallJob):
            raise TypeError(f"the queue of calls gave a {type(job).__name__}, not a CallJob")
        if not self._quiet:
            self._quiet = True
            lower_priority()
        read = False
        try:
            jobs = self._untapped(job.call)
            for one in jobs:
                self._samples.put_nowait(one)
            read = True
        except SkipError as error:
            self._skip(error)
        finally:
            with self._lock:
                self._forwards += read
                self._unmatched += not read
            job.call.read = read
        return [], 0

    def _untapped(self, call: Call) -> list[Job]:
        """The jobs of a call that the tap of this process has not seen."""
        if call.tapped is not None and self._context.flush_taps is not None:
            self._context.flush_taps(TAP_SECONDS)
            if call.tapped.forwards:
                raise SkipError(TAPPED)
        return self._read(call)

    def _assemble(self, job: StagedJob) -> tuple[list[ActivationSample], int]:
        if not isinstance(job, Job):
            raise TypeError(f"the queue of samples gave a {type(job).__name__}, not a Job")
        return self._reader.build(job)

    def _skip(self, error: SkipError) -> None:
        self._count(error.reason)
        if error.told:
            counted = f"Counted in stats.skipped[{error.reason!r}], not said again"
            self._warn(error.reason, f"a call is not read: {error}. {counted}")

    def _count(self, reason: str, number: int = 1) -> None:
        with self._lock:
            self._skipped[reason] += number

    def _warn(self, key: str, message: str) -> None:
        """Once for each key."""
        with self._lock:
            if key in self._said:
                return
            self._said.add(key)
        logger.warning("nla_monitor: %s: %s", self.kind, message)


def lower_priority() -> None:
    """The calling thread yields to all others of this machine, as far as the system lets it say so.

    On Linux a thread has a nice value of its own; elsewhere it would be the whole host's, which is left alone.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)


def _nothing(samples: Sequence[ActivationSample]) -> None:
    """The queue of calls makes no samples of its own."""
