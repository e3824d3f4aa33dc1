"""Whose forward is this? Open agent sessions, matched to generations by the token ids of their prompt.

A session is opened where an agent framework announces a model call and closed where the call ends. The forward passes
in between may run in another thread, batched with others; nothing ambient reaches them. What does is the prompt: the
hash of a row's unpadded token ids names its session. Matching happens on the capture's background thread, against the
sessions that were open when the forward ran, so that a device never has to be waited for.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Final

from nla_monitor.capture.agent_runs import AgentRun, AgentRuns
from nla_monitor.capture.keys import hash_of
from nla_monitor.records import AgentContext, MessageSpan, Scalar

_DESCRIBED: Final = 512
"""Ended sessions whose prompt is still known, for samples that are under way."""


_latest: ContextVar[SessionHandle | None] = ContextVar("nla_monitor_latest_session", default=None)
"""Opened last in this context. A forward in the same thread, or in an executor's that was given a copy, sees it."""


@dataclass(eq=False, slots=True)
class SessionHandle:
    """One open (or closed) session; give it back to ``SessionRegistry.close``."""

    context: AgentContext
    sequence: int | None
    """Hash of the prompt; None for a session bound to a thread."""
    thread: int | None
    """Identity of the thread that a session without token ids is bound to."""
    opened_at: float
    traceparent: str | None = None
    attributes: Mapping[str, Scalar] = field(default_factory=dict)
    forwards: int = 0
    """Prompt passes that were matched to it (counted when their samples are built)."""
    run: AgentRun = field(default_factory=AgentRun)
    """The agent's run that the call is part of, shared by its calls."""
    closer: bool = False
    """A match in this run had been found when the call began: it is sampled more densely."""
    _span: Callable[[], str | None] | None = None
    _outline: Callable[[], Sequence[MessageSpan]] | None = None
    _spans: Sequence[MessageSpan] | None = None

    def describe(self, outline: Callable[[], Sequence[MessageSpan]]) -> None:
        """How to find out where the messages of the prompt lie, in order of position; before the first forward.

        Called at most once, on the capture's own thread, when the first sample of the session is built.
        """
        self._outline = outline

    def traced(self, find: Callable[[], str | None]) -> None:
        """How to find the trace context of the call's own span, which may begin after the session, and end before it.

        Asked when a sample is built and when the session is closed, on either thread, until it tells; it must not
        raise. Until then ``traceparent`` is what was known at the start.
        """
        self._span = find

    def trace(self) -> str | None:
        """W3C trace context of the call's span, as far as it is known."""
        find = self._span
        found = None if find is None else find()
        if found is not None:
            self.traceparent, self._span = found, None
        return self.traceparent

    def forget(self) -> None:
        """Its prompt is needed no more: samples that are still built of it name no message."""
        self._outline, self._spans = None, ()

    def message_at(self, position: int) -> MessageSpan | None:
        """The message that the token at this position of the sequence stands in; None where it is not known."""
        if self._spans is None:
            outline, self._outline, self._spans = self._outline, None, ()
            if outline is not None:
                self._spans = outline()
        index = bisect_right(self._spans, position, key=lambda span: span.start) - 1
        if index < 0:
            return None
        span = self._spans[index]
        return span if span.end is None or position < span.end else None


@dataclass(frozen=True, slots=True)
class SessionView:
    """The sessions that were open at one moment; immutable, shared by the forwards of that moment."""

    by_sequence: Mapping[int, tuple[SessionHandle, ...]] = field(default_factory=dict)
    by_thread: Mapping[int, SessionHandle] = field(default_factory=dict)
    version: int = 0
    here: SessionHandle | None = None
    """The session that the code around this forward is in, for rows that no prompt claims."""
    equals: bool = False
    """Whether several sessions have the same prompt."""
    latest: SessionHandle | None = None
    """The session opened last in the context of this forward; it decides between equal prompts only."""

    def __bool__(self) -> bool:
        return bool(self.by_sequence or self.by_thread or self.here is not None)

    def of_thread(self, thread: int) -> SessionHandle | None:
        """The newest session bound to this thread."""
        return self.by_thread.get(thread)

    def claim(self, sequence: int) -> SessionHandle | None:
        """The session of a prompt; of several equal prompts one matched least often, this context's or the oldest."""
        handles = self.by_sequence.get(sequence) or (() if self.here is None else (self.here,))
        if not handles:
            return None
        handle = min(handles, key=lambda item: (item.forwards, item is not self.latest))
        handle.forwards += 1
        return handle


class SessionRegistry:
    """Open sessions, bounded: the oldest go first beyond ``max_open``, the overdue after ``ttl_seconds``.

    Safe for use from several threads; readers take ``view``, a reference to an immutable snapshot, without a lock.
    """

    def __init__(
        self, *, max_open: int = 1024, ttl_seconds: float = 3600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_open = max_open
        self._ttl_seconds = ttl_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._open: OrderedDict[int, SessionHandle] = OrderedDict()
        self._closed: deque[SessionHandle] = deque(maxlen=4096)
        self._forgotten = 0
        self._evicted = 0
        self._view = SessionView()
        self.runs = AgentRuns()
        """What is remembered of the agents' runs that the sessions belong to."""
        self._finders: tuple[Callable[[], SessionHandle | None], ...] = ()

    @property
    def view(self) -> SessionView:
        """The sessions open now, as the calling thread sees them: asked for where a forward starts."""
        view = self._view
        for find in self._finders:
            here = find()
            if here is not None:
                return replace(view, here=here)
        latest = _latest.get() if view.equals else None
        return view if latest is None else replace(view, latest=latest)

    def ask(self, find: Callable[[], SessionHandle | None]) -> None:
        """Where no prompt tells, let ``find`` say in the thread of each forward whose it is; None: it does not know.

        Frameworks keep the step that code works for in a context variable, which follows it through tasks and threads.
        """
        with self._lock:
            if find not in self._finders:
                self._finders += (find,)

    def ask_no_more(self, find: Callable[[], SessionHandle | None]) -> None:
        """Take back what ``ask`` was given."""
        with self._lock:
            self._finders = tuple(known for known in self._finders if known != find)

    def open(
        self,
        context: AgentContext,
        token_ids: Sequence[int] | None,
        *,
        traceparent: str | None = None,
        attributes: Mapping[str, Scalar] | None = None,
        bound: bool = True,
    ) -> SessionHandle:
        """Announce a model call.

        Args:
            context: whose call it is.
            token_ids: the prompt as the model will see it, without padding; a row of a forward with the same ids
                belongs to the session, in whatever thread. None: every forward of the calling thread does.
            traceparent: W3C trace context of the call's span.
            attributes: metadata for its samples.
            bound: to the calling thread where ``token_ids`` is None; False: it is found by what ``ask`` was given.
        """
        handle = SessionHandle(
            context=context,
            sequence=None if token_ids is None else hash_of([int(token) for token in token_ids]),
            thread=threading.get_ident() if token_ids is None and bound else None,
            opened_at=self._clock(),
            traceparent=traceparent,
            attributes=dict(attributes or {}),
            run=self.runs.of(context.root_run_id or context.agent_run_id),
        )
        handle.closer = handle.run.next_call()
        _latest.set(handle)
        with self._lock:
            self._open[id(handle)] = handle
            self._expire()
            self._publish()
        return handle

    def close(self, handle: SessionHandle) -> None:
        """The call has ended; closing twice is harmless. Samples still under way keep the session."""
        handle.trace()
        with self._lock:
            if self._open.pop(id(handle), None) is not None:
                self._retire(handle)
                self._publish()

    @property
    def unmatched(self) -> int:
        """Ended sessions of which no forward was seen (exact once the capture is flushed)."""
        with self._lock:
            return self._forgotten + sum(not handle.forwards for handle in self._closed)

    @property
    def evicted(self) -> int:
        """Sessions that were never closed and fell out by age or number."""
        return self._evicted

    def __len__(self) -> int:
        return len(self._open)

    def _expire(self) -> None:
        overdue = self._clock() - self._ttl_seconds
        while self._open:
            oldest = next(iter(self._open.values()))
            if len(self._open) <= self._max_open and oldest.opened_at >= overdue:
                return
            self._open.popitem(last=False)
            self._evicted += 1
            self._retire(oldest)

    def _retire(self, handle: SessionHandle) -> None:
        if len(self._closed) == self._closed.maxlen:
            self._forgotten += not self._closed[0].forwards
        self._closed.append(handle)
        if len(self._closed) > _DESCRIBED:
            self._closed[-_DESCRIBED - 1].forget()  # a prompt may be long, and nothing else is kept of it

    def _publish(self) -> None:
        by_sequence: dict[int, tuple[SessionHandle, ...]] = {}
        by_thread: dict[int, SessionHandle] = {}
        for handle in self._open.values():
            if handle.sequence is not None:
                by_sequence[handle.sequence] = (*by_sequence.get(handle.sequence, ()), handle)
            elif handle.thread is not None:
                by_thread[handle.thread] = handle
        equals = any(len(handles) > 1 for handles in by_sequence.values())
        self._view = SessionView(by_sequence, by_thread, self._view.version + 1, equals=equals)
