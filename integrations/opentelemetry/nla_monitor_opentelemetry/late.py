"""Calls that were answered elsewhere: spans tell prompt and answer at the end, for sources that read them then."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from nla_monitor.agent_calls import AgentCalls
from nla_monitor.agent_spans import CallInfo
from nla_monitor.guard import Guard
from nla_monitor.records import Completion
from nla_monitor_opentelemetry.attributes import Attributes
from nla_monitor_opentelemetry.prompts import PromptEncoder

_WAITING: Final = 256


@dataclass(frozen=True, slots=True)
class LateCall:
    """An ended call of a model elsewhere."""

    info: CallInfo
    said: Attributes
    completion: Completion


class LateCalls:
    """Prompts are made into tokens on a thread of ours, because the thread that ends a span is the host's.

    Args:
        calls: announces them to the monitor, and counts what cannot be read.
        guard: the monitor's.
        tokenizer: of the model that reads the calls; asked for when the first one comes.
    """

    def __init__(self, calls: AgentCalls, guard: Guard, tokenizer: Callable[[], Any]) -> None:
        self._calls = calls
        self._guard = guard
        self._tokenizer = tokenizer
        self._encoder: PromptEncoder | None = None
        self._queue: queue.Queue[LateCall | None] = queue.Queue(_WAITING)
        """None ends the thread."""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, call: LateCall) -> None:
        """A call has ended; beyond a few hundred that wait it is not read, and counted. Never waits."""
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            self._calls.missed(call.info.model_type)
            return
        with self._lock:
            if self._thread is None or not self._thread.is_alive():  # the first, or the child of a fork
                self._thread = threading.Thread(target=self._work, name="nla-monitor-late-calls", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Announce what waits, then end the thread; does not wait for it."""
        with self._lock:
            if self._thread is not None:
                with suppress(queue.Full):  # a daemon thread that is that far behind ends with the process
                    self._queue.put_nowait(None)

    def flush(self, timeout: float) -> bool:
        """Wait at most so many seconds until all calls so far are announced; False if the time ran out."""
        deadline = time.monotonic() + timeout
        while self._queue.unfinished_tasks:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.005)
        return True

    def _work(self) -> None:
        while True:
            call = self._queue.get()
            try:
                if call is None:
                    return
                with self._guard("opentelemetry.late"):
                    self._announce(call)
            finally:
                self._queue.task_done()

    def _announce(self, call: LateCall) -> None:
        if self._encoder is None:
            tokenizer = self._tokenizer()
            self._encoder = None if tokenizer is None else PromptEncoder(tokenizer)
        ids = None if self._encoder is None else self._encoder.encode(call.said)
        if ids is None:
            self._calls.missed(call.info.model_type)
        else:
            self._calls.afterwards(call.info, ids, call.completion)
