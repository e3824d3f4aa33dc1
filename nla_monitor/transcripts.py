"""The visible side of agents' conversations, kept beside the activations (``capture.store_transcript``, opt-in).

An integration tells what a model is about to read and what it answered. In the host's thread that is one append; a
thread of ours makes text of it, finds out what is new and writes that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import Engine

from nla_monitor.breathing import breathe
from nla_monitor.errors import StoreError
from nla_monitor.guard import Guard
from nla_monitor.records import AgentContext
from nla_monitor.store.messages import Message, Said, chain_id, save_messages

__all__ = ["Message", "TranscriptStats", "Transcripts"]

logger = logging.getLogger("nla_monitor")

MAX_WAITING: Final = 4_096
"""Prompts and answers in memory; the oldest go first."""
MAX_OPEN: Final = 4_096
"""Model calls whose answer is awaited."""
_KNOWN: Final = 65_536
"""Ids of written messages that are remembered, so that a history is not sent to the database with every call."""
_WRITE_SECONDS: Final = 0.2
_RETRY_SECONDS: Final = 2.0


@dataclass(frozen=True, slots=True)
class _Prompt:
    context: AgentContext
    messages: Callable[[], Sequence[Message]]
    at: float


@dataclass(frozen=True, slots=True)
class _Answer:
    agent_run_id: str
    message: Callable[[], Message | None]
    at: float


@dataclass(frozen=True, slots=True)
class _End:
    """Where a model call's answer goes."""

    context: AgentContext
    last: Said | None


@dataclass(frozen=True, slots=True)
class TranscriptStats:
    """Counters since the start."""

    written: int
    """New messages in the database."""
    dropped: int
    """Prompts and answers that no longer fitted into memory."""
    orphans: int
    """Answers to a prompt that was never told, or was dropped."""


class Transcripts:
    """Keeps what agents read and write. Safe for use from any thread; nothing here waits, but ``flush`` and ``close``.

    Args:
        engine: the monitor's database.
        run_id: asked when a message is written (it is fixed only when the monitor is attached).
        guard: the monitor's host boundary.
        enabled: False: what is told is forgotten at once.
        size: prompts and answers kept in memory until they are written.
    """

    def __init__(
        self,
        engine: Engine,
        run_id: Callable[[], str],
        guard: Guard,
        *,
        enabled: bool = True,
        size: int = MAX_WAITING,
    ) -> None:
        self._engine = engine
        self._run_id = run_id
        self._guard = guard
        self._enabled = enabled
        self._lock = threading.Lock()  # of the queue; held for an append, never while anything is written
        self._waiting: deque[_Prompt | _Answer] = deque(maxlen=size)
        self._thread: threading.Thread | None = None
        self._wake, self._stop = threading.Event(), threading.Event()
        self._writing = threading.Lock()  # of everything below
        self._open: OrderedDict[str, _End] = OrderedDict()
        self._known: OrderedDict[str, None] = OrderedDict()
        self._unwritten: deque[Said] = deque(maxlen=16 * size)
        self._down = False
        self._written = self._dropped = self._orphans = 0

    @property
    def enabled(self) -> bool:
        """Whether anything is kept; what is not need not be told."""
        return self._enabled

    def prompt(self, context: AgentContext, messages: Callable[[], Sequence[Message]]) -> None:
        """A model call of ``context.agent_run_id`` is about to read these messages, oldest first.

        ``messages`` is called later, on our own thread.
        """
        self._put(_Prompt(context, messages, time.time()))

    def answer(self, agent_run_id: str, message: Callable[[], Message | None]) -> None:
        """The model call has answered; None: with nothing. ``message`` is called later, on our own thread."""
        self._put(_Answer(agent_run_id, message, time.time()))

    def _put(self, item: _Prompt | _Answer) -> None:
        if not self._enabled or self._stop.is_set():
            return
        with self._lock:
            self._dropped += len(self._waiting) == self._waiting.maxlen
            self._waiting.append(item)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="nla-monitor-transcript", daemon=True)
                self._thread.start()
        self._wake.set()

    # -- our own thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait()
            self._wake.clear()
            self._stop.wait(_RETRY_SECONDS if self._down else _WRITE_SECONDS)  # several at once, one transaction
            self._write_out()
            if self._unwritten:
                self._wake.set()

    def _write_out(self) -> None:
        with self._writing, self._guard("transcript"):
            while self._waiting:  # nobody else takes from it
                item = self._waiting.popleft()
                with self._guard("transcript.message"):
                    self._take(item)
            self._save()

    def _take(self, item: _Prompt | _Answer) -> None:
        if isinstance(item, _Prompt):
            last = self._chain(item.context, None, item.messages(), item.at, written=False)
            self._open[item.context.agent_run_id] = _End(item.context, last)
            while len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
            return
        end = self._open.pop(item.agent_run_id, None)
        if end is None:
            self._orphans += 1
            return
        message = item.message()
        if message is not None:
            self._chain(end.context, end.last, (message,), item.at, written=True)

    def _chain(
        self, context: AgentContext, last: Said | None, messages: Sequence[Message], at: float, *, written: bool
    ) -> Said | None:
        run_id = self._run_id()
        conversation = context.conversation_id or context.root_run_id or context.agent_run_id
        for message in messages:
            parent = None if last is None else last.message_id
            last = Said(
                message_id=chain_id(parent, run_id, conversation, message),
                parent_id=parent,
                run_id=run_id,
                conversation=conversation,
                root_run_id=context.root_run_id,
                agent_run_id=context.agent_run_id,
                node=context.node,
                place=0 if last is None else last.place + 1,
                written=written,
                created_at=at,
                message=message,
            )
            if last.message_id not in self._known:
                self._unwritten.append(last)
                self._remember(last.message_id)
            breathe()
        return last

    def _remember(self, message_id: str) -> None:
        self._known[message_id] = None
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)

    def _save(self) -> None:
        try:
            new = list(self._unwritten)
            self._written += save_messages(self._engine, new) if new else 0
            for _ in new:
                self._unwritten.popleft()
            self._down = False
        except StoreError as error:
            if not self._down:
                logger.warning("nla_monitor: the transcript cannot be written now, trying on: %s", error)
            self._down = True

    # -- for those who may wait --------------------------------------------------------------------------------------

    def flush(self, timeout: float = 30.0) -> bool:
        """Write what was told so far; False when it could not be done in ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while self._waiting or self._writing.locked() or self._unwritten:
            if time.monotonic() >= deadline:
                return False
            self._wake.set()
            time.sleep(0.01)
        return True

    def close(self, timeout: float = 5.0) -> bool:
        """Write what is left, and stop; False when it could not be done in time."""
        if self._thread is None:
            self._stop.set()
            return True
        done = self.flush(timeout)
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout)
        return done

    @property
    def stats(self) -> TranscriptStats:
        """Counters since the start."""
        return TranscriptStats(self._written, self._dropped, self._orphans)
