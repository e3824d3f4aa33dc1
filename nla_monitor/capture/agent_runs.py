"""What the capture remembers of an agent's run while it works: how much of it was sampled, and whether to look closer.

A run is one agent invocation: all model calls with the same root. It may never end, so what is remembered is bounded,
and a budget is not spent at once: from half of it on, an ever smaller keyed share of the samples is taken.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

MOST_RUNS: Final = 4_096
_EASY: Final = 0.5
"""Share of the budget up to which everything is taken."""


@dataclass(eq=False, slots=True)
class AgentRun:
    """One agent's run; plain counters, written by the capture's own thread (``closer`` also by the watcher's)."""

    taken: int = 0
    """Samples of it so far."""
    left_out: int = 0
    """Samples that its budget did not allow."""
    closer: int = 0
    """Model calls that are still looked at more closely, after a match in this run."""

    def next_call(self) -> bool:
        """A model call of the run begins: whether it is looked at more closely."""
        if self.closer <= 0:
            return False
        self.closer -= 1
        return True

    def share(self, budget: int | None) -> float:
        """The keyed share of samples that is taken now, 0 to 1: all up to half the budget, none once it is spent."""
        if budget is None:
            return 1.0
        fill = self.taken / budget
        return 1.0 if fill <= _EASY else max(0.0, (1.0 - fill) / (1.0 - _EASY))


class AgentRuns:
    """Runs by the id of their root; the least recently used of more than ``size`` are forgotten. Thread-safe."""

    def __init__(self, size: int = MOST_RUNS) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._runs: OrderedDict[str, AgentRun] = OrderedDict()
        self._left_out = 0

    def of(self, root_run_id: str) -> AgentRun:
        """The run with this root; a new one where it is not known."""
        with self._lock:
            run = self._runs.get(root_run_id)
            if run is None:
                run = self._runs[root_run_id] = AgentRun()
                if len(self._runs) > self._size:
                    self._left_out += self._runs.popitem(last=False)[1].left_out
            else:
                self._runs.move_to_end(root_run_id)
            return run

    def look_closer(self, root_run_id: str, calls: int) -> None:
        """Something was found in this run: its next ``calls`` model calls are sampled more densely."""
        self.of(root_run_id).closer = calls

    @property
    def left_out(self) -> int:
        """Samples that no budget allowed, over all runs."""
        with self._lock:
            return self._left_out + sum(run.left_out for run in self._runs.values())

    def __len__(self) -> int:
        return len(self._runs)
