"""Whose forward is this? Open agent sessions, matched to generations by the token ids of their prompt.

A session is opened where an agent framework announces a model call and closed where the call ends. The forward passes
in between may run in another thread, batched with others; nothing ambient reaches them. What does is the prompt: the
hash of a row's unpadded token ids names its session. Matching happens on the capture's background thread, against the
sessions that were open when the forward ran, so that a device never has to be waited for.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from nla_monitor.capture.keys import hash_of
from nla_monitor.records import AgentContext, Scalar


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


@dataclass(frozen=True, slots=True)
class SessionView:
    """The sessions that were open at one moment; immutable, shared by the forwards of that moment."""

    by_sequence: Mapping[int, tuple[SessionHandle, ...]] = field(default_factory=dict)
    by_thread: Mapping[int, SessionHandle] = field(default_factory=dict)
    version: int = 0

    def __bool__(self) -> bool:
        return bool(self.by_sequence or self.by_thread)

    def of_thread(self, thread: int) -> SessionHandle | None:
        """The newest session bound to this thread."""
        return self.by_thread.get(thread)

    def claim(self, sequence: int) -> SessionHandle | None:
        """The session of a prompt; of several with the same prompt the one matched least often, oldest first."""
        handles = self.by_sequence.get(sequence)
        if not handles:
            return None
        handle = min(handles, key=lambda item: item.forwards)
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

    @property
    def view(self) -> SessionView:
        """The sessions open now."""
        return self._view

    def open(
        self,
        context: AgentContext,
        token_ids: Sequence[int] | None,
        *,
        traceparent: str | None = None,
        attributes: Mapping[str, Scalar] | None = None,
    ) -> SessionHandle:
        """Announce a model call.

        Args:
            context: whose call it is.
            token_ids: the prompt as the model will see it, without padding; a row of a forward with the same ids
                belongs to the session, in whatever thread. None: every forward of the calling thread does.
            traceparent: W3C trace context of the call's span.
            attributes: metadata for its samples.
        """
        handle = SessionHandle(
            context=context,
            sequence=None if token_ids is None else hash_of([int(token) for token in token_ids]),
            thread=threading.get_ident() if token_ids is None else None,
            opened_at=self._clock(),
            traceparent=traceparent,
            attributes=dict(attributes or {}),
        )
        with self._lock:
            self._open[id(handle)] = handle
            self._expire()
            self._publish()
        return handle

    def close(self, handle: SessionHandle) -> None:
        """The call has ended; closing twice is harmless. Samples still under way keep the session."""
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

    def _publish(self) -> None:
        by_sequence: dict[int, tuple[SessionHandle, ...]] = {}
        by_thread: dict[int, SessionHandle] = {}
        for handle in self._open.values():
            if handle.sequence is not None:
                by_sequence[handle.sequence] = (*by_sequence.get(handle.sequence, ()), handle)
            elif handle.thread is not None:
                by_thread[handle.thread] = handle
        self._view = SessionView(by_sequence, by_thread, self._view.version + 1)
