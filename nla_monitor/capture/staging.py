"""The hand-over from the host's thread to the database: bounded, never waiting, counted.

The host's thread appends a job (tensors whose copy to the host may still be under way) and goes on. One daemon thread
waits for the copy, builds records, batches them and calls the sink. Beyond ``QueueConfig.max_samples`` the oldest are
dropped and counted by reason.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nla_monitor.config import QueueConfig
from nla_monitor.errors import StoreUnavailableError
from nla_monitor.guard import Guard
from nla_monitor.leaving import busy
from nla_monitor.records import ActivationSample

QUEUE_FULL = "queue_full"
STORE_UNAVAILABLE = "store_unavailable"
NON_FINITE = "non_finite"
CLOSED = "closed"
FAULT = "fault"

_FIRST_RETRY_SECONDS = 0.1
_LAST_RETRY_SECONDS = 5.0

_stagers: weakref.WeakSet[Stager] = weakref.WeakSet()


class StagedJob(Protocol):
    """What was captured of one forward pass."""

    event: torch.cuda.Event | None
    """Recorded after the copies to the host; None: they are done."""

    @property
    def patient(self) -> bool:
        """Whether it may wait for the next write: nothing depends on its samples, and it holds nothing scarce."""
        ...

    def count(self) -> int:
        """Samples that it will give, as exactly as can be said without waiting."""
        ...

    def discard(self) -> None:
        """It will not be built."""
        ...


Builder = Callable[["StagedJob"], tuple[list[ActivationSample], int]]
"""Turns a finished job into samples, and says how many vectors were not finite."""


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host: pinned and asynchronous from CUDA (record an event after it), a clone from the CPU.

    ``tensor`` may be overwritten by later work of the same stream.
    """
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    # torch caches pinned blocks and reuses them only after the copies into them: no cudaHostAlloc after warm-up.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Stager:
    """The bounded queue and its background thread.

    Args:
        build: makes samples of a job, on the background thread.
        sink: gets batches, on the background thread; ``StoreUnavailableError`` is retried with back-off.
        guard: takes every other fault.
        queue: bounds and batching.
        on_sampled: called with numbers of built samples, on the background thread.
        on_dropped: called with ``(reason, number)``, on any thread.
    """

    def __init__(
        self,
        build: Builder,
        sink: Callable[[Sequence[ActivationSample]], None],
        guard: Guard,
        queue: QueueConfig,
        *,
        on_sampled: Callable[[int], None] | None = None,
        on_dropped: Callable[[str, int], None] | None = None,
    ) -> None:
        self._build = build
        self._sink = sink
        self._guard = guard
        self._config = queue
        # A write is due long before the queue is full, also where that is small.
        self._batch = min(queue.write_batch, max(1, queue.max_samples // 2))
        self._on_sampled = on_sampled
        self._on_dropped = on_dropped
        self._reset()
        self._disabled = False
        _stagers.add(self)

    def _reset(self) -> None:
        self._wake = threading.Condition(threading.Lock())
        self._jobs: deque[tuple[StagedJob, int]] = deque()
        self._jobs_count = self._pressing = 0
        self._ready: deque[ActivationSample] = deque()
        self._busy = False
        self._urgent = 0
        self._closing = False
        self._thread: threading.Thread | None = None
        self._refused_at = 0.0
        self._retry_seconds = 0.0
        self._waiting_since = 0.0
        self._dropped: Counter[str] = Counter()
        self.sampled = 0
        self.written = 0
        self.retries = 0
        """Batches that the sink could not take for now."""

    @property
    def dropped(self) -> dict[str, int]:
        """Samples that were lost, by reason."""
        with self._wake:
            return dict(self._dropped)

    @property
    def depth(self) -> int:
        """Samples in memory."""
        return self._jobs_count + len(self._ready)

    @property
    def alive(self) -> bool:
        """Whether samples are still taken: not closed, and not the child of a fork."""
        return not (self._disabled or self._closing)

    def put_nowait(self, job: StagedJob) -> None:
        """Append a job; returns at once. A full queue drops its oldest, a closed one this job."""
        if self._disabled:
            return
        lost: Counter[str] | None = None
        count = job.count()
        with self._wake:
            if self._closing:
                lost = Counter({CLOSED: count})
                job.discard()
            else:
                self._start()
                if self._append(job, count):
                    self._wake.notify_all()
                if self.depth > self._config.max_samples:
                    lost = Counter()
                    self._trim(lost)
        if lost is not None:
            self._report(lost)

    def _append(self, job: StagedJob, count: int) -> bool:
        """Append a job; whether our thread must look at it now. The lock is held.

        A thread that is woken asks for the interpreter in the middle of the host's forward, and its caches are cold:
        many jobs at once cost a fraction of as many one by one.
        """
        first = not (self._jobs or self._ready)
        if first:
            self._waiting_since = time.monotonic()
        self._jobs.append((job, count))
        self._jobs_count += count
        self._pressing += not job.patient
        return first or self._pressing > 0 or self.depth >= self._batch

    def drop(self, reason: str, count: int) -> None:
        """Count samples that were lost elsewhere in the capture."""
        self._report(Counter({reason: count}))

    def flush(self, timeout: float) -> bool:
        """Wait until all that was put is written; False when the deadline passes or nothing can be written."""
        if self._disabled:
            return False
        deadline = time.monotonic() + timeout
        with self._wake:
            self._urgent += 1
            self._wake.notify_all()
            try:
                return self._wait_idle(deadline)
            finally:
                self._urgent -= 1

    def close(self, timeout: float) -> bool:
        """Flush, then stop the thread. What cannot be written until the deadline is dropped and counted ``closed``."""
        if self._disabled:
            return False
        deadline = time.monotonic() + timeout
        with self._wake:
            self._closing = True
            self._urgent += 1
            self._wake.notify_all()
            done = self._wait_idle(deadline)
            lost = Counter({CLOSED: sum(job.count() for job, _ in self._jobs) + len(self._ready)})
            for job, _ in self._jobs:
                job.discard()
            self._jobs.clear()
            self._ready.clear()
            self._jobs_count = self._pressing = 0
            thread, self._thread = self._thread, None
            self._wake.notify_all()
        self._report(lost)
        if thread is not None and thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))
        return done

    def _wait_idle(self, deadline: float) -> bool:
        while self._jobs or self._ready or self._busy:
            left = deadline - time.monotonic()
            if left <= 0 or self._thread is None or not self._thread.is_alive():
                return False
            self._wake.wait(min(left, 0.1))
        return True

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="nla-monitor-capture", daemon=True)
            self._thread.start()

    def _trim(self, lost: Counter[str]) -> None:
        """Drop the oldest beyond the bound; the lock is held."""
        reason = STORE_UNAVAILABLE if self._retry_seconds else QUEUE_FULL
        excess = self._jobs_count + len(self._ready) - self._config.max_samples
        while excess > 0 and self._ready:
            self._ready.popleft()
            lost[reason] += 1
            excess -= 1
        while excess > 0 and len(self._jobs) > 1:
            job, count = self._pop_job()
            lost[reason] += job.count()
            job.discard()
            excess -= count

    def _pop_job(self) -> tuple[StagedJob, int]:
        job, count = self._jobs.popleft()
        self._jobs_count -= count
        self._pressing -= not job.patient
        return job, count

    def _report(self, lost: Counter[str]) -> None:
        lost = +lost
        if not lost:
            return
        with self._wake:
            self._dropped.update(lost)
        if self._on_dropped is not None:
            for reason, count in lost.items():
                with self._guard("capture.on_dropped"):
                    self._on_dropped(reason, count)

    # The background thread.

    def _run(self) -> None:
        me = threading.current_thread()
        while True:
            with self._wake:
                while self._thread is me and not self._due():
                    self._wake.wait(self._pause())
                if self._thread is not me:
                    return
                writes = not self._jobs or self._writes_first()
                job = None if writes else self._pop_job()[0]
                batch = self._take_batch() if job is None else []
                self._busy = True
            try:
                with busy():
                    if job is not None:
                        self._build_job(job)
                    elif batch:
                        self._write(batch)
            finally:
                with self._wake:
                    self._busy = False
                    self._wake.notify_all()

    def _writes_first(self) -> bool:
        """Whether jobs must wait for a write, so that a stream of them never keeps samples here; the lock is held."""
        overdue = time.monotonic() - self._waiting_since > 2 * self._config.write_interval_seconds
        return self._wait_seconds() <= 0 and (len(self._ready) >= self._batch or (overdue and bool(self._ready)))

    def _due(self) -> bool:
        """Whether there is something to build or to write now; the lock is held."""
        return self._pressing > 0 or (bool(self._jobs or self._ready) and self._wait_seconds() <= 0)

    def _wait_seconds(self) -> float:
        """Until the next write; the lock is held."""
        now = time.monotonic()
        full = self.depth >= self._batch or self._urgent > 0
        ripe = 0.0 if full else self._config.write_interval_seconds - (now - self._waiting_since)
        retry = self._retry_seconds - (now - self._refused_at) if self._retry_seconds else 0.0
        # Longer than it was meant to be: the clock has jumped back since, and to wait for it could take days.
        ripe = ripe if ripe <= self._config.write_interval_seconds else 0.0
        return max(ripe, retry if retry <= self._retry_seconds else 0.0)

    def _pause(self) -> float | None:
        return max(0.0, self._wait_seconds()) if self._jobs or self._ready else None

    def _take_batch(self) -> list[ActivationSample]:
        return [self._ready.popleft() for _ in range(min(len(self._ready), self._batch))]

    def _build_job(self, job: StagedJob) -> None:
        results: list[tuple[list[ActivationSample], int]] = []  # stays empty where the guard takes a fault
        with self._guard("capture.build"):
            if job.event is not None:
                job.event.synchronize()
            results.append(self._build(job))
        lost: Counter[str] = Counter()
        if not results:
            lost[FAULT] = job.count()
        built = [sample for samples, _ in results for sample in samples]
        lost[NON_FINITE] = sum(number for _, number in results)
        with self._wake:
            if built:
                self._ready.extend(built)
                self.sampled += len(built)
            self._trim(lost)
        self._report(lost)
        if built and self._on_sampled is not None:
            with self._guard("capture.on_sampled"):
                self._on_sampled(len(built))

    def _write(self, batch: list[ActivationSample]) -> None:
        outcome = FAULT
        with self._guard("capture.sink"):
            try:
                self._sink(batch)
                outcome = ""
            except StoreUnavailableError:
                outcome = STORE_UNAVAILABLE
        lost: Counter[str] = Counter()
        with self._wake:
            if outcome == STORE_UNAVAILABLE:
                self._back_off(batch, lost)
            else:
                self._retry_seconds = 0.0
                self._waiting_since = time.monotonic()
                self.written += len(batch) if not outcome else 0
                lost[FAULT] += len(batch) if outcome else 0
        self._report(lost)

    def _back_off(self, batch: list[ActivationSample], lost: Counter[str]) -> None:
        self.retries += 1
        self._retry_seconds = min(_LAST_RETRY_SECONDS, max(_FIRST_RETRY_SECONDS, 2 * self._retry_seconds))
        self._refused_at = time.monotonic()
        self._ready.extendleft(reversed(batch))
        if self._thread is None:  # closed meanwhile: nobody will write it
            lost[CLOSED] += len(self._ready)
            self._ready.clear()
        self._trim(lost)

    def disable_after_fork(self) -> None:
        """In the child of a fork: no thread lives here and the locks may be held by nobody; take nothing any more."""
        self._reset()
        self._disabled = True


def _disable_children() -> None:
    for stager in list(_stagers):
        stager.disable_after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disable_children)
