"""Work of ours in the host's thread: what it costs, and in which modes of torch it runs."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

import torch


class HostWork:
    """Opens blocks of our work in host threads and adds up their processor time.

    A block's tensors are ordinary ones even under the host's inference mode, and nothing in it is recorded for
    gradients. It is opened three times a forward, so modes that are right already are not set again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.seconds = 0.0
        """Processor time of all blocks so far."""

    def __call__(self) -> _Block:
        """A block of ours, to be used with ``with``."""
        return _Block(self)

    def add(self, seconds: float) -> None:
        """A block took so long."""
        with self._lock:
            self.seconds += seconds


class _Block:
    __slots__ = ("_gradients", "_inference", "_started", "_work")

    def __init__(self, work: HostWork) -> None:
        self._work = work
        self._inference: Any = None

    def __enter__(self) -> None:
        self._started = time.thread_time()
        if torch.is_inference_mode_enabled():
            self._inference = torch.inference_mode(mode=False)
            self._inference.__enter__()
        self._gradients = torch.is_grad_enabled()
        if self._gradients:
            torch.set_grad_enabled(False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._gradients:
            torch.set_grad_enabled(True)
        if self._inference is not None:
            self._inference.__exit__(kind, error, trace)
        self._work.add(time.thread_time() - self._started)
