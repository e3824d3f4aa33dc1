"""Regular expressions screened in a process of their own: most of what a replay computes, and free of its data.

The results are those of ``prefilter`` itself, from the same patterns in the same order; only the core differs.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from typing import Any, Self

from nla_monitor.rules.prefilter import Screened, regex_filter, screen


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for us


@lru_cache(maxsize=4)
def _filter(sources: tuple[str, ...]) -> Any:
    return regex_filter(sources)


def _screen(sources: tuple[str, ...], texts: Sequence[str]) -> list[Screened]:
    found = _filter(sources)
    return [screen(found, text) for text in texts]


class ScreeningPool:
    """Processes that screen pages of texts. Use as a context manager.

    Args:
        sources: the patterns, in the prefilter's order (``RuleSet.regexes``).
        processes: how many.
    """

    def __init__(self, sources: Sequence[str], processes: int) -> None:
        # Spawned: a fork would copy the locks of torch's and the database's threads.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(processes, context, initializer=_prepare)
        # Goes with each page: as an argument of the initializer it would fill the pipe, and hold us until a process
        # is up to read it.
        self._sources = tuple(sources)

    def submit(self, texts: Sequence[str]) -> Future[list[Screened]]:
        """Screen a page; the result says of each text which patterns match it."""
        return self._pool.submit(_screen, self._sources, texts)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
