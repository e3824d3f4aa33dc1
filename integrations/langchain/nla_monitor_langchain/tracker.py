"""What is known of running agents, once per monitor: run tree, tool results, open capture sessions.

All handlers and models of one monitor share one tracker, so that a handler installed twice (constructor and config,
say) opens a model call's session once. State is keyed by run id, locked and bounded; nothing hangs on a handler.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from nla_monitor.agent_calls import AgentMonitor
from nla_monitor.records import AgentContext, Completion, MessageSpan, Scalar
from nla_monitor_langchain.bounded import BoundedMap, Families
from nla_monitor_langchain.lineage import Run, ToolLedger, ToolResult

logger = logging.getLogger("nla_monitor")

MAX_RUNS = 16_384
MAX_MODEL_CALLS = 1_024
MAX_TOOL_CALLS = 4_096
TTL_SECONDS = 3_600.0
SETTLE_SECONDS = 5.0
MAX_SETTLING = 1_024


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a model call."""

    token_ids: Sequence[int] | None
    """``[token]`` as the model is fed it; None: whatever the calling thread feeds it."""
    text: str | None = None
    """What was tokenized, to be taken off an answer that repeats it."""
    outline: Callable[[], Sequence[MessageSpan]] | None = None
    """Finds its messages among its tokens; called on the capture's thread, if at all."""


@dataclass(slots=True)
class Claim:
    """A call that a model of ours works on; it says here what it wrote."""

    call: ModelCall
    completion: Completion | None = None


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A model call that has started: everything its samples will carry."""

    context: AgentContext
    model_type: str
    traceparent: str | None = None
    attributes: Mapping[str, Scalar] = field(default_factory=dict)
    reads: tuple[ToolResult, ...] = ()
    fingerprint: str | None = None
    """Hash of the messages, by which ``ChatNLAModel`` finds its call where LangChain passes no run id."""
    span: Callable[[], str | None] | None = None
    """Finds the trace context of the call's own span while it goes on; ``traceparent`` is the ambient one."""


@dataclass(frozen=True, slots=True)
class _Ended:
    """A call whose sessions are closed; the capture may still be matching its forward passes, in the background."""

    at: float
    model_type: str
    handles: Sequence[Any]


@dataclass(slots=True)
class _Open:
    """A started call and its capture sessions; guarded by the tracker's lock."""

    call: ModelCall
    handles: list[Any] = field(default_factory=list)
    prompts: list[str | None] = field(default_factory=list)
    """Text of the prompt of each session."""
    claimable: bool = False
    """The model itself opens the session (``ChatNLAModel``); False once it has."""
    claimed: bool = False
    """It has, and closes it."""


@dataclass(frozen=True, slots=True)
class TrackerStats:
    """Counters since the start; nothing that was missed is missing here."""

    model_calls: int
    sessions: int
    duplicates: int
    """Start events of a model call already known: a handler is installed twice."""
    expired: int
    """Sessions closed because no end event came for too long."""
    abandoned: int
    """Model calls whose agent ended before they did: cancelled in their midst."""
    unwatched: Mapping[str, int]
    """Model calls for which no tokenizer is known, by model type: nothing was opened for them."""
    without_activations: Mapping[str, int]
    """Model calls that ended without one forward pass of the monitored model, by model type: API models, another
    model than the attached one, a cached answer, a prompt tokenized in another way. Known some seconds after the
    call, because the capture matches forward passes in the background."""
    open_calls: int
    open_runs: int


class Tracker:
    """Run tree, tool results and open sessions of one monitor. Safe for use from any thread.

    Args:
        monitor: opens and closes capture sessions.
        max_runs: chain and tool runs remembered at a time.
        max_calls: model calls open at a time; beyond it the oldest session is closed and counted as expired.
        ttl_seconds: age at which a run or session that never ended is given up.
        settle_seconds: time after the end of a call at which it must have seen a forward pass.
        clock: seconds, monotonic (tests inject one).
    """

    def __init__(
        self,
        monitor: AgentMonitor,
        *,
        max_runs: int = MAX_RUNS,
        max_calls: int = MAX_MODEL_CALLS,
        ttl_seconds: float = TTL_SECONDS,
        settle_seconds: float = SETTLE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monitor = weakref.ref(monitor)
        self._lock = threading.RLock()
        self._runs: BoundedMap[str, Run] = BoundedMap(max_runs, ttl_seconds, clock)
        self._ledgers: BoundedMap[str, ToolLedger] = BoundedMap(max_runs, ttl_seconds, clock)
        self._calls: BoundedMap[str, _Open] = BoundedMap(max_calls, ttl_seconds, clock)
        self._writers: BoundedMap[str, str] = BoundedMap(MAX_TOOL_CALLS, ttl_seconds, clock)
        self._clock = clock
        self._settle_seconds = settle_seconds
        self._families = Families()
        self._ended: deque[_Ended] = deque()
        self._counts: Counter[str] = Counter()
        self._silent: Counter[str] = Counter()
        self._unwatched: Counter[str] = Counter()
        self._said: set[str] = set()

    # --- runs ---------------------------------------------------------------------------------------------------

    def root_of(self, run_id: str, parent_run_id: str | None) -> str:
        """Outermost run; the parent where its own start was not seen, the run itself where it has none."""
        with self._lock:
            parent = self._runs.get(parent_run_id) if parent_run_id else None
        return parent.root_run_id if parent else parent_run_id or run_id

    def start_run(self, run: Run) -> None:
        """A chain or tool run has started."""
        with self._lock:
            self._families.add(run.root_run_id, run.run_id)
            for old in self._runs.put(run.run_id, run):
                self._families.discard(old.root_run_id, old.run_id)

    def end_run(self, run_id: str) -> Run | None:
        """A chain or tool run has ended; with the root goes what its tools returned, and what was never ended in it.

        A cancelled task tells the root, but not every run inside.
        """
        left: set[str] = set()
        with self._lock:
            run = self._runs.pop(run_id)
            if run is not None:
                self._families.discard(run.root_run_id, run_id)
                if run.root_run_id == run_id:
                    self._ledgers.pop(run_id)
                    left = self._families.pop(run_id)
        for member in left:
            self._abandon(member)
        return run

    def _abandon(self, run_id: str) -> None:
        """A run, or a model call, whose end will not come."""
        with self._lock:
            self._runs.pop(run_id)
            self._counts["abandoned"] += run_id in self._calls
        self.end_call(run_id, failed=True)

    def tool_result(self, root_run_id: str, result: ToolResult) -> None:
        """A tool has returned something that a later model call of the same root may read."""
        with self._lock:
            ledger = self._ledgers.get(root_run_id) or ToolLedger()
            ledger.add(result)
            self._ledgers.put(root_run_id, ledger)

    def results_read(self, run: Run, prompt: str) -> list[ToolResult]:
        """Unread tool results that a model call with this place and prompt reads, oldest first."""
        with self._lock:
            ledger = self._ledgers.get(run.root_run_id)
            return [] if ledger is None else ledger.read_by(prompt, run.parent_run_id, run.step)

    # --- model calls --------------------------------------------------------------------------------------------

    def is_open(self, run_id: str) -> bool:
        """Whether this model call is known already; counts a second announcement of it."""
        with self._lock:
            known = run_id in self._calls
            self._counts["duplicates"] += known
        return known

    def start_call(self, call: ModelCall, prompts: Sequence[Prompt], *, claimable: bool = False) -> None:
        """A model call begins: one capture session for each prompt.

        ``claimable``: none yet, the model will ``claim`` the call in the thread that runs its forward passes.
        """
        run_id = call.context.agent_run_id
        entry = _Open(call, claimable=claimable)
        with self._lock:
            if run_id in self._calls:
                self._counts["duplicates"] += 1
                return
            self._counts["model_calls"] += 1
            self._families.add(call.context.root_run_id or run_id, run_id)
            expired = self._calls.put(run_id, entry)
            self._counts["expired"] += len(expired)
            for old in expired:
                gone = old.call.context
                self._families.discard(gone.root_run_id or gone.agent_run_id, gone.agent_run_id)
        for old in expired:
            self._close(old.handles)
        for prompt in prompts:
            self._open(entry, prompt)

    def end_call(self, run_id: str, answers: Sequence[str] = (), *, failed: bool = False) -> None:
        """A model call has ended; the tool results that it read are read, unless it failed.

        Args:
            run_id: of the call.
            answers: what it wrote, for each prompt.
            failed: it was cancelled, or raised.
        """
        with self._lock:
            entry = self._calls.pop(run_id)
            if entry is None:
                return
            root = entry.call.context.root_run_id or run_id
            self._families.discard(root, run_id)
            ledger = self._ledgers.get(root)
            if ledger is not None and not failed:
                ledger.consume(entry.call.reads)
            # A claimed session is closed by the thread that generates, also when its agent is gone before it.
            handles = [] if entry.claimed else entry.handles
        if handles or entry.claimable:
            self._finish(entry.call, handles, _completions(entry, answers), failed=failed)

    def wrote_call(self, tool_call_id: str, run_id: str) -> None:
        """A model call has asked for a tool."""
        with self._lock:
            self._writers.put(tool_call_id, run_id)

    def writer_of(self, tool_call_id: str) -> str | None:
        """Run id of the model call that asked for this tool call; None: not seen, or long ago."""
        with self._lock:
            return self._writers.get(tool_call_id)

    def _finish(
        self, call: ModelCall, handles: Sequence[Any], completions: Sequence[Completion | None], *, failed: bool
    ) -> None:
        self._close(handles, completions)
        if not failed:
            with self._lock:
                self._ended.append(_Ended(self._clock(), call.model_type, handles))
        self._settle()

    def _settle(self) -> None:
        """Judge calls that ended long enough ago: has the capture seen a forward pass of theirs?"""
        silent: list[str] = []
        with self._lock:
            due = self._clock() - self._settle_seconds
            while self._ended and (self._ended[0].at <= due or len(self._ended) > MAX_SETTLING):
                ended = self._ended.popleft()
                if not any(_saw_forward(handle) for handle in ended.handles):
                    silent.append(ended.model_type)
            self._silent.update(silent)
        for model_type in silent:
            self._say_without_activations(model_type)

    def unwatched(self, model_type: str) -> None:
        """A model call cannot be tied to forward passes because nobody told us how the model tokenizes."""
        with self._lock:
            self._unwatched[model_type] += 1
        self._say_once(
            f"unwatched:{model_type}",
            "nla_monitor: a call of %r is not watched: no tokenizer is known for it. For local weights pass llm=... or "
            "tokenizer=... to the handler, or attach the monitor with a tokenizer. An API model has no activations to "
            "read; a local model can read its prompts and answers in its place (monitor.attach_source with a "
            "ReplaySource, labelled proxy). Counted in stats.unwatched, not said again",
            model_type,
        )

    @contextmanager
    def claim(self, run_id: str | None, fingerprint: str, hint: str | None, prompt: Prompt) -> Iterator[Claim | None]:
        """For a model of ours, around its forward passes in the calling thread: the call and an open session.

        Args:
            run_id: the run, where LangChain passes it to the model.
            fingerprint: hash of the messages, for the paths where it doesn't.
            hint: run started last in this context; taken when its fingerprint is this one.
            prompt: what the model is fed in the calling thread.

        Yields:
            None when no handler has announced such a call.
        """
        entry = self._take(run_id, fingerprint, hint)
        if entry is None:
            yield None
            return
        with self._session(entry, prompt) as claim:
            yield claim

    @contextmanager
    def session(self, call: ModelCall, prompt: Prompt) -> Iterator[Claim]:
        """A session for the calling thread's forward passes, for a model that no handler watches."""
        with self._session(_Open(call), prompt) as claim:
            yield claim

    @contextmanager
    def _session(self, entry: _Open, prompt: Prompt) -> Iterator[Claim]:
        with self._monitor_guard("langchain.claim"):
            self._open(entry, prompt)
        claim, failed = Claim(entry.call), True
        try:
            yield claim
            failed = False
        finally:
            with self._monitor_guard("langchain.claim"):
                self._release(entry, claim.completion, failed=failed)

    def _release(self, entry: _Open, completion: Completion | None, *, failed: bool) -> None:
        with self._lock:
            handles, entry.handles = entry.handles, []
        if handles:
            self._finish(entry.call, handles, [completion] * len(handles), failed=failed)

    def _take(self, run_id: str | None, fingerprint: str, hint: str | None) -> _Open | None:
        with self._lock:
            entry = self._find(run_id, fingerprint, hint)
            if entry is not None:
                entry.claimable, entry.claimed = False, True
        return entry

    def _find(self, run_id: str | None, fingerprint: str, hint: str | None) -> _Open | None:
        if run_id is not None:
            entry = self._calls.get(run_id)
            return entry if entry is not None and entry.claimable else None
        hinted = self._calls.get(hint) if hint else None
        waiting = ([hinted] if hinted else []) + self._calls.values()
        return next((entry for entry in waiting if entry.claimable and entry.call.fingerprint == fingerprint), None)

    def _open(self, entry: _Open, prompt: Prompt) -> None:
        monitor = self._monitor()
        if monitor is None:
            return
        call, ids = entry.call, prompt.token_ids
        handle = monitor.open_session(call.context, ids, traceparent=call.traceparent, attributes=call.attributes)
        if handle is None:
            self._say_once("unattached", "nla_monitor: the monitor is attached to no model; agents are not watched")
            return
        describe = getattr(handle, "describe", None)
        if prompt.outline is not None and describe is not None:
            describe(self._guarded(prompt.outline))
        traced = getattr(handle, "traced", None)
        if call.span is not None and traced is not None:
            traced(call.span)
        with self._lock:
            self._counts["sessions"] += 1
            entry.handles.append(handle)
            entry.prompts.append(prompt.text)

    def _guarded(self, outline: Callable[[], Sequence[MessageSpan]]) -> Callable[[], Sequence[MessageSpan]]:
        """A fault in it costs roles and spans, not the samples."""

        def find() -> Sequence[MessageSpan]:
            found: list[MessageSpan] = []
            with self._monitor_guard("langchain.outline"):
                found.extend(outline())
            return found

        return find

    def _close(self, handles: Sequence[Any], completions: Sequence[Completion | None] = ()) -> None:
        monitor = self._monitor()
        if monitor is None:
            return
        for handle, completion in zip_longest(handles, completions[: len(handles)]):
            monitor.close_session(handle, completion=completion)

    @contextmanager
    def _monitor_guard(self, where: str) -> Iterator[None]:
        monitor = self._monitor()
        if monitor is None:
            yield
            return
        with monitor.guard(where):
            yield

    def _say_without_activations(self, model_type: str) -> None:
        self._say_once(
            f"silent:{model_type}",
            "nla_monitor: a call of %r ended without one forward pass of the monitored model: there were no "
            "activations to read (an API model, a cached answer, another model than the attached one, or a tokenizer "
            "that splits the prompt in another way). Answers of an API model can be replayed through a local one: "
            "monitor.attach_source. Counted in stats.without_activations, not said again",
            model_type,
        )

    def _say_once(self, key: str, message: str, *args: object) -> None:
        with self._lock:
            if key in self._said:
                return
            self._said.add(key)
        logger.warning(message, *args)

    @property
    def stats(self) -> TrackerStats:
        """Counters since the start."""
        self._settle()
        with self._lock:
            return TrackerStats(
                model_calls=self._counts["model_calls"],
                sessions=self._counts["sessions"],
                duplicates=self._counts["duplicates"],
                expired=self._counts["expired"],
                abandoned=self._counts["abandoned"],
                unwatched=dict(self._unwatched),
                without_activations=dict(self._silent),
                open_calls=len(self._calls),
                open_runs=len(self._runs),
            )


def _completions(entry: _Open, answers: Sequence[str]) -> list[Completion | None]:
    """The answer to each prompt, without the prompt: some wrappers repeat it."""
    if len(answers) != len(entry.prompts):
        return [None] * len(entry.prompts)
    pairs = zip(answers, entry.prompts, strict=True)
    return [Completion(text=answer.removeprefix(prompt or "")) for answer, prompt in pairs]


def _saw_forward(handle: Any) -> bool:
    """Whether any forward pass fell into the session; True for a monitor whose handles don't tell."""
    forwards = getattr(handle, "forwards", None)
    return forwards is None or bool(forwards)


_trackers: weakref.WeakKeyDictionary[AgentMonitor, Tracker] = weakref.WeakKeyDictionary()
_trackers_lock = threading.Lock()


def tracker_for(monitor: AgentMonitor) -> Tracker:
    """The tracker that all handlers and models of this monitor share."""
    with _trackers_lock:
        tracker = _trackers.get(monitor)
        if tracker is None:
            tracker = _trackers[monitor] = Tracker(monitor)
        return tracker


def trackers() -> list[Tracker]:
    """Trackers of all living monitors."""
    with _trackers_lock:
        return list(_trackers.values())
