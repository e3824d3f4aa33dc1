"""Model calls of agents that are under way, for frameworks that tell of spans: which of them is a forward part of?

A framework announces steps (spans) as they start and end. A forward pass knows nothing of them; but the code around it
runs in a context (``contextvars``), which Python hands on to tasks, to ``asyncio.to_thread`` and to what starts threads
with a copied context. Two things are found there, and only there:

1. the framework's own current span, where it keeps one;
2. a mark that ``start`` leaves in the context in which a span was started.

A forward belongs to the innermost open span of its context. Where the context was lost on the way (a bare thread) or
several calls of one context wait for their forward (a batch), there is no answer: the forward is given to nobody, and
the calls are counted. Neither the thread that a span was started in nor the time decides anything: both tell lies under
concurrency. Where the prompt's token ids are known at the start they take precedence, in whatever thread.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Protocol

from nla_monitor.agent_spans import CallInfo, Span, ToolResult
from nla_monitor.guard import Guard
from nla_monitor.records import AgentContext, Completion, Scalar
from nla_monitor.transcripts import Message, Transcripts

logger = logging.getLogger("nla_monitor")

MAX_OPEN: Final = 16_384
TTL_SECONDS: Final = 3_600.0
SETTLE_SECONDS: Final = 5.0
MAX_SETTLING: Final = 1_024
MAX_DEPTH: Final = 64
MAX_MARKS: Final = 64


class AgentMonitor(Protocol):
    """What every integration of agents needs of a ``Monitor``; its ``tokenizer`` is used when it has one."""

    @property
    def guard(self) -> Guard:
        """The monitor's host boundary."""
        ...

    def open_session(
        self,
        context: AgentContext,
        token_ids: Sequence[int] | None,
        *,
        traceparent: str | None = None,
        attributes: Mapping[str, Scalar] | None = None,
    ) -> Any:
        """Tie the forward passes of this prompt (None: of the calling thread) to an agent's run, until closed.

        Returns an opaque handle (its ``forwards``, if it has that, counts forward passes), None when not attached.
        """
        ...

    def close_session(self, handle: Any, *, completion: Completion | None = None) -> None:
        """No further forward pass belongs to the session; ``completion`` is what the model answered, where it did."""
        ...


class SpanMonitor(AgentMonitor, Protocol):
    """What span-driven integrations need besides."""

    @property
    def capture(self) -> Any:
        """The tap in this process, whose ``sessions`` can be asked for a forward's owner; None without any."""
        ...

    @property
    def source(self) -> Any:
        """What reads calls that are answered elsewhere; None without any."""
        ...


class SpanReader(Protocol):
    """What is asked of a framework's spans, when a forward or a prompt needs it."""

    def current(self) -> str | None:
        """Key of the framework's current span in the calling context; None where it keeps none."""
        ...

    def is_step(self, span: Span) -> bool:
        """Whether the span is a step of an agent."""
        ...

    def describe(self, span: Span) -> CallInfo:
        """What the samples of such a step carry."""
        ...


@dataclass(frozen=True, slots=True)
class CallStats:
    """Counters since the start; nothing that was missed is missing here."""

    calls: int
    """Steps that were given a session."""
    ambiguous: int
    """Steps whose forward could be another's as well: several of one context waited for it."""
    duplicates: int
    """Start events of a step already known."""
    expired: int
    """Steps given up because no end event came."""
    without_activations: Mapping[str, int]
    """Model calls that ended without one forward pass of the monitored model, by model: API models, a cached answer, a
    forward in a thread that the framework's context did not reach. Known some seconds after the call where its prompt
    was known, because such forwards are matched in the background."""
    open_spans: int


@dataclass(frozen=True, slots=True)
class _Ended:
    at: float
    model_type: str
    handles: Sequence[Any]


_marks: ContextVar[tuple[tuple[int, Span], ...]] = ContextVar("nla_monitor_started_spans", default=())
"""Spans started in this context, oldest first, each with the id of its ``AgentCalls``."""


class AgentCalls:
    """Open spans of one framework and one monitor. Safe for use from any thread; nothing here waits or raises.

    Args:
        monitor: opens and closes sessions.
        spans: reads the framework's spans, in the host's thread.
        max_open: spans remembered at a time; beyond it the oldest is given up.
        ttl_seconds: age at which a span that never ended is given up.
        settle_seconds: time after the end of a call with a known prompt at which it must have seen a forward pass.
        clock: seconds, monotonic (tests inject one).
    """

    def __init__(
        self,
        monitor: SpanMonitor,
        spans: SpanReader,
        *,
        max_open: int = MAX_OPEN,
        ttl_seconds: float = TTL_SECONDS,
        settle_seconds: float = SETTLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monitor = weakref.ref(monitor)
        self._reader = spans
        self._max_open = max_open
        self._ttl = ttl_seconds
        self._settle_seconds = settle_seconds
        self._clock = clock
        self._lock = threading.RLock()
        self._spans: OrderedDict[str, tuple[float, Span]] = OrderedDict()
        self._ended: deque[_Ended] = deque()
        self._counts: Counter[str] = Counter()
        self._silent: Counter[str] = Counter()
        self._said: set[str] = set()
        self._sessions: Any = None
        self._closed = False
        self._users = 0

    # --- what a framework's callbacks call ------------------------------------------------------------------------

    def start(self, key: str, parent: str | None, payload: Any, *, mark: bool = False) -> Span | None:
        """A step has started; None where it is known already, or after ``close``.

        Args:
            key: unique among open spans.
            parent: key of the step that it is part of.
            payload: for ``describe``.
            mark: leave a mark in the calling context: for frameworks without a current span. The call must come
                straight from the code that does the step's work.
        """
        if self._closed:
            return None
        self._hook()
        with self._lock:
            if key in self._spans:
                self._counts["duplicates"] += 1
                return None
            above = self._spans.get(parent) if parent is not None else None
            parents = () if above is None else (*above[1].parents, above[1])[-MAX_DEPTH:]
            span = Span(key, parents, payload)
            self._spans[key] = (self._clock(), span)
            expired = self._expire()
        for old in expired:
            self._finish(old)
        if mark:
            known = tuple(item for item in _marks.get() if item[1].is_open)
            _marks.set((*known[1 - MAX_MARKS :], (id(self), span)))
        return span

    def open_prompt(self, span: Span, token_ids: Sequence[int]) -> None:
        """The prompt ``[token]`` that a step's model is about to be fed: its forwards are known in any thread."""
        monitor = self._monitor()
        if monitor is None:
            return
        handle = _open(monitor, self.info(span), token_ids)
        if handle is not None:
            with self._lock:
                span.opened.append(handle)

    def end(
        self,
        key: str,
        *,
        model_call: bool = False,
        name: str = "",
        failed: bool = False,
        completion: Completion | None = None,
        tool: ToolResult | None = None,
        read_later: bool = False,
    ) -> Span | None:
        """A step has ended; the span, or None where it was not open.

        Args:
            key: of the span.
            model_call: it was announced as a call of a model: one without any forward is counted.
            name: of the model, for the count.
            failed: it failed or was cancelled, so that a missing forward means nothing.
            completion: what the model answered, where it is known.
            tool: it was a tool's, which returned this.
            read_later: a source may still read it, so that without any forward it is no miss yet.
        """
        with self._lock:
            entry = self._spans.pop(key, None)
        if entry is None:
            return None
        span = entry[1]
        with self._lock:
            if model_call or span.runs:
                span.model_ended(failed=failed)
            if tool is not None:
                span.tool_ended(tool)
        self._finish(span, completion)
        if model_call and not (failed or span.claimed or (read_later and not span.opened)):
            self._wait_for(span, name)
        self._settle()
        return span

    @property
    def keeps_text(self) -> bool:
        """Whether ``said`` has any effect (``capture.store_transcript``)."""
        return self._transcripts() is not None

    def said(
        self,
        span: Span,
        prompt: Callable[[], Sequence[Message]] | None,
        answer: Callable[[], Message | None] | None = None,
    ) -> None:
        """The visible side of a model call, for the transcript of its conversation; called later, on another thread.

        Args:
            span: of the call; open or ended.
            prompt: what it read, oldest first; None: told before.
            answer: what it answered; None: not known (yet).
        """
        transcripts = self._transcripts()
        if transcripts is None:
            return
        if prompt is not None:
            transcripts.prompt(self.info(span).context, prompt)
        if answer is not None:
            transcripts.answer(span.key, answer)

    def _transcripts(self) -> Transcripts | None:
        kept: Transcripts | None = getattr(self._monitor(), "transcripts", None)
        return kept if kept is not None and kept.enabled else None

    def missed(self, name: str) -> None:
        """A call of which there is nothing to read, as became known when it was over."""
        with self._lock:
            self._silent[name] += 1
        self._say_without_activations(name)

    def afterwards(self, info: CallInfo, token_ids: Sequence[int], completion: Completion | None) -> None:
        """A call whose prompt ``[token]`` and answer became known when it was over: for sources that read it then."""
        monitor = self._monitor()
        if monitor is None:
            return
        handle = _open(monitor, info, token_ids)
        if handle is not None:
            monitor.close_session(handle, completion=completion)

    def acquire(self) -> None:
        """One more uses this; see ``release``."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """One of those that ``shared`` gave this to needs it no more; closed with the last."""
        with self._lock:
            self._users -= 1
            last = self._users <= 0
        if last:
            self.close()

    def close(self) -> None:
        """Give up all open spans; later ones are not looked at."""
        self._closed = True
        with self._lock:
            spans = [span for _, span in self._spans.values()]
            self._spans.clear()
        for span in spans:
            self._finish(span)
        sessions, self._sessions = self._sessions, None
        if sessions is not None:
            sessions.ask_no_more(self.find)

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._closed

    # --- what a forward asks ----------------------------------------------------------------------------------------

    def find(self) -> Any:
        """The session of the forward that starts in the calling context; None: not known."""
        monitor = self._monitor()
        if monitor is None or self._closed:
            return None
        with monitor.guard("agents.find"):
            span = self._innermost()
            return None if span is None else self._session(span)
        return None

    def _innermost(self) -> Span | None:
        around = self._around()
        marked = [
            span for owner, span in _marks.get() if owner == id(self) and span.is_open and self._reader.is_step(span)
        ]
        if around is not None:
            marked = [span for span in marked if around in span.parents]
            if not marked:
                return around
        outer = {id(step) for span in marked for step in span.parents}
        inner = [span for span in marked if id(span) not in outer]
        return self._only(inner) if inner else None

    def _around(self) -> Span | None:
        """The innermost step of an agent that the framework's current span is, or is part of."""
        key = self._reader.current()
        entry = self._spans.get(key) if key is not None else None
        if entry is None:
            return None
        return next((span for span in entry[1].chain() if span.is_open and self._reader.is_step(span)), None)

    def _only(self, inner: list[Span]) -> Span | None:
        """Of several innermost steps the one that has seen no forward yet; none has: the newest. Of several: nobody."""
        waiting = [span for span in inner if not span.claimed]
        if len(waiting) <= 1:
            return (waiting or inner)[-1]
        with self._lock:
            self._counts["ambiguous"] += sum(not span.crowded for span in waiting)
        for span in waiting:
            span.crowded = True
        return None

    def _session(self, span: Span) -> Any:
        info = self.info(span)
        with self._lock:
            span.claim()
            if span.here is None and span.is_open and self._sessions is not None:
                span.here = self._sessions.open(
                    info.context, None, traceparent=info.traceparent, attributes=info.attributes, bound=False
                )
            return span.here

    def info(self, span: Span) -> CallInfo:
        """What the samples of a step carry: as it was when this was first asked."""
        if span.info is None:
            span.info = self._reader.describe(span)
            with self._lock:
                self._counts["calls"] += 1
        return span.info

    # --- inside -----------------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        """Be asked by the tap, which may be attached after this was made."""
        monitor = self._monitor()
        sessions = getattr(getattr(monitor, "capture", None), "sessions", None)
        if sessions is not None and sessions is not self._sessions:
            sessions.ask(self.find)
            self._sessions = sessions

    def _expire(self) -> list[Span]:
        now, expired = self._clock(), []
        while self._spans:
            born, oldest = next(iter(self._spans.values()))
            if len(self._spans) <= self._max_open and now - born <= self._ttl:
                break
            self._spans.popitem(last=False)
            self._counts["expired"] += 1
            expired.append(oldest)
        return expired

    def _finish(self, span: Span, completion: Completion | None = None) -> None:
        with self._lock:
            span.ended()
            handles, here = list(span.opened), span.here
        monitor = self._monitor()
        if monitor is not None:
            for handle in handles:
                monitor.close_session(handle, completion=completion)
            if here is not None and self._sessions is not None:
                self._sessions.close(here)

    def _wait_for(self, span: Span, name: str) -> None:
        with self._lock:
            self._ended.append(_Ended(self._clock(), name, list(span.opened)))

    def _settle(self) -> None:
        """Judge calls that ended long enough ago: has the capture seen a forward pass of theirs?"""
        silent = []
        with self._lock:
            due = self._clock() - self._settle_seconds
            while self._ended and (
                not self._ended[0].handles or self._ended[0].at <= due or len(self._ended) > MAX_SETTLING
            ):
                ended = self._ended.popleft()
                if not any(_saw_forward(handle) for handle in ended.handles):
                    silent.append(ended.model_type)
            self._silent.update(silent)
        for name in silent:
            self._say_without_activations(name)

    def _say_without_activations(self, name: str) -> None:
        with self._lock:
            if name in self._said or len(self._said) >= MAX_SETTLING:
                return
            self._said.add(name)
        logger.warning(
            "nla_monitor: a call of %r ended without one forward pass of the monitored model in its context: it left "
            "no activations to read. For an API model, which has none here, configure a replay through a local model. "
            "Local weights that generate in a bare thread are reached by token ids only: use the framework's own "
            "integration, or give tokenizer=... Counted in stats.without_activations, not said again",
            name,
        )

    @property
    def stats(self) -> CallStats:
        """Counters since the start."""
        self._settle()
        with self._lock:
            return CallStats(
                calls=self._counts["calls"],
                ambiguous=self._counts["ambiguous"],
                duplicates=self._counts["duplicates"],
                expired=self._counts["expired"],
                without_activations=dict(self._silent),
                open_spans=len(self._spans),
            )


def _open(monitor: SpanMonitor, info: CallInfo, token_ids: Sequence[int]) -> Any:
    return monitor.open_session(info.context, token_ids, traceparent=info.traceparent, attributes=info.attributes)


def _saw_forward(handle: Any) -> bool:
    """Whether any forward pass fell into the session; True for a monitor whose handles don't tell."""
    forwards = getattr(handle, "forwards", None)
    return forwards is None or bool(forwards)


_shared: weakref.WeakKeyDictionary[SpanMonitor, dict[str, AgentCalls]] = weakref.WeakKeyDictionary()
_shared_lock = threading.Lock()


def shared(monitor: SpanMonitor, framework: str, spans: Callable[[], SpanReader]) -> AgentCalls:
    """The calls that all processors of a framework share for one monitor, so that two of them double nothing.

    To be given back by ``AgentCalls.release``, once.
    """
    with _shared_lock:
        known = _shared.setdefault(monitor, {})
        calls = known.get(framework)
        if calls is None or calls.closed:
            calls = known[framework] = AgentCalls(monitor, spans())
        calls.acquire()
        return calls
