"""How much is taken of each forward: budgets, backpressure, an epoch's reservoir, bursts.

``Pace`` turns what has happened so far (the clock, the queue, earlier scores) into the ``Draw`` of the next forward: a
number of sequences, and thresholds on the keyed thinning score. The scores decide what is left out, the pace only how
much; so what survives at a given threshold is the same on every rank and after every resume, what survives a lower
threshold survives a higher one, and inclusion probabilities are known.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

from nla_monitor.capture.keys import FULL, SALT_FORWARD, score_int
from nla_monitor.capture.policy import Draw, Policy, whole
from nla_monitor.config import CaptureConfig

FLOOR = 2.0**-10
"""Share that is taken under the worst pressure: never nothing, or what was not read could not be estimated."""
_EASY = 0.5
"""Load up to which nothing is thinned."""
_NORMS = 512
_FIRST_NORMS, _RENEW = 64, 32


class TokenBucket:
    """Samples that may be taken, refilled with time; holds at most one second's.

    Args:
        per_second: samples per second, on average.
        clock: in seconds; one that jumps gives or takes at most one second's.
    """

    def __init__(self, per_second: float, clock: Callable[[], float]) -> None:
        self._per_second = per_second
        self._clock = clock
        self._left = per_second
        self._at = clock()

    def take(self, samples: float) -> float:
        """The share of ``samples`` that may be taken, at least ``FLOOR``; it is taken from the bucket."""
        now = self._clock()
        self._left = min(self._per_second, self._left + max(0.0, now - self._at) * self._per_second)
        self._at = now
        share = 1.0 if samples <= 0 else min(1.0, max(FLOOR, self._left / samples))
        self._left -= share * samples
        return share

    def give_back(self, samples: float) -> None:
        """Samples that were taken and did not come; a negative number came without having been taken."""
        self._left = min(self._per_second, self._left + samples)


class Reservoir:
    """The ``size`` smallest scores of an epoch so far: those of a uniform sample, whatever their order."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._epoch: int | None = None
        self._largest_first: list[int] = []
        self._members: set[int] = set()
        self._threshold = FULL

    def threshold(self, epoch: int) -> int:
        """Scores at or above it are no longer among the smallest of this epoch."""
        return self._threshold if epoch == self._epoch else FULL

    def offer(self, epoch: int, scores: Iterable[int]) -> None:
        """Scores of samples that were taken; those of an epoch that is over change nothing."""
        if self._epoch is None or epoch > self._epoch:
            self._epoch, self._largest_first, self._members = epoch, [], set()
        if epoch == self._epoch:
            for score in scores:
                self._add(score)
            full = len(self._largest_first) >= self._size
            self._threshold = -self._largest_first[0] if full else FULL

    def _add(self, score: int) -> None:
        if score in self._members:  # the same position again
            return
        self._members.add(score)
        if len(self._largest_first) < self._size:
            heapq.heappush(self._largest_first, -score)
        else:
            self._members.discard(-heapq.heappushpop(self._largest_first, -score))


class NormSinks:
    """Which norms are those of attention sinks: above ``factor`` times the median of the last ones.

    A sink's vector says that it is a sink and nothing of the text, and its explanation is empty or wild. The median is
    over what came before, so the first 64 norms of a run pass.

    Args:
        factor: None: nothing is a sink.
    """

    def __init__(self, factor: float | None) -> None:
        self._factor = factor
        self._norms: deque[float] = deque(maxlen=_NORMS)
        self._seen = 0
        self._limit = float("inf")

    def is_sink(self, norm: float) -> bool:
        """Whether this norm is out of the ordinary; it counts for those that come."""
        if self._factor is None:
            return False
        sink = norm > self._limit
        self._norms.append(norm)
        self._seen += 1
        if self._seen >= _FIRST_NORMS and self._seen % _RENEW == 0:
            self._limit = self._factor * sorted(self._norms)[len(self._norms) // 2]
        return sink


class Pace:
    """Says of each forward how much is taken of it. Safe for use from several threads.

    Args:
        config: budgets.
        load: fill of the queue in memory, 0 to 1.
        layers: samples that each position gives.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: CaptureConfig,
        *,
        load: Callable[[], float],
        layers: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._layers = layers
        self._load = load
        self._backlog = 0.0
        self._bucket = TokenBucket(config.samples_per_second, clock) if config.samples_per_second else None
        self._reservoir = Reservoir(config.reservoir) if config.reservoir else None
        self._lock = threading.Lock()
        self._burst_left = 0
        self._step: int | None = None
        self._taken = self._forward = 0
        self._forwards = 1
        """Training forwards of the last step: how many the budget of this one is shared by."""

    @property
    def has_reservoir(self) -> bool:
        """Whether ``offer`` changes anything."""
        return self._reservoir is not None

    def step(self, step: int) -> None:
        """Optimizer step ``step`` begins."""
        with self._lock:
            if step == self._step:
                return
            if self._step is not None:
                self._burst_left = max(0, self._burst_left - 1)
            if self._forward:
                self._forwards = self._forward
            self._step, self._taken, self._forward = step, 0, 0

    def burst(self) -> None:
        """Something was found: look more closely for the rest of this step and the configured number of next ones."""
        if self._config.burst is not None:
            with self._lock:
                self._burst_left = self._config.burst.steps + (self._step is not None)

    def backlog(self, waiting: int) -> None:
        """So many samples wait to be read."""
        if self._config.max_backlog is not None:
            self._backlog = waiting / self._config.max_backlog

    def policy(self, policy: Policy) -> Policy:
        """The policy as it is now: larger during a burst."""
        burst = self._config.burst
        return policy.times(burst.factor) if burst is not None and self._burst_left else policy

    def train(self, policy: Policy, sequences: int, epoch: int) -> Draw:
        """The draw of a training forward with at most ``sequences`` sequences."""
        with self._lock:
            policy = self.policy(policy)
            draw = whole(policy)
            if self._step is None:
                self._burst_left = max(0, self._burst_left - 1)
            else:
                draw = self._lot(policy, sequences)
            return self._thinned(draw, sequences, FULL if self._reservoir is None else self._reservoir.threshold(epoch))

    def other(self, policy: Policy, sequences: int) -> Draw:
        """The draw of any other forward."""
        with self._lock:
            policy = self.policy(policy)
            if self._step is None:  # nobody counts steps, so forwards are counted, as in ``train``
                self._burst_left = max(0, self._burst_left - 1)
            return self._thinned(whole(policy), sequences, FULL)

    def settle(self, expected: float, samples: int) -> None:
        """``samples`` came of a forward that ``expected`` were taken from the budget for (``Draw.expected``)."""
        if self._bucket is not None:
            with self._lock:
                self._bucket.give_back(expected - samples)

    def offer(self, epoch: int, scores: Iterable[int]) -> None:
        """Thinning scores of the random training samples that were taken."""
        if self._reservoir is not None:
            self._reservoir.offer(epoch, scores)

    def _lot(self, policy: Policy, sequences: int) -> Draw:
        """This forward's part of the step's budget; the lock is held.

        The forwards of a step share it evenly: as many as the step before had are expected. What does not divide is
        given by systematic sampling with one keyed start for each step, so that no micro-batch is always left out, and
        the chance of each is known beforehand. Forwards beyond the expected ones get what is left.
        """
        limit, expected, number = policy.sequences, self._forwards, self._forward
        sure = taken = max(0, limit - self._taken)
        lot = 0.0
        if number < expected == 1:  # as in most runs: nothing to divide, nothing to draw lots for
            sure = taken = limit
        elif number < expected:
            start = score_int(policy.seed, SALT_FORWARD, self._step or 0, 0) % expected
            taken = ((number + 1) * limit + start) // expected - (number * limit + start) // expected
            sure, lot = limit // expected, limit % expected / expected
        self._forward += 1
        self._taken += min(sequences, taken)
        return Draw(policy, sequences=taken, sure=sure, lot=lot)

    def _thinned(self, draw: Draw, sequences: int, reservoir: int) -> Draw:
        """The draw with the thresholds of this moment; the lock is held."""
        fill = max(self._load() if self._config.backpressure else 0.0, self._backlog)
        share = 1.0 if fill <= _EASY else max(FLOOR, (1.0 - fill) / (1.0 - _EASY))
        expected = 0.0
        if self._bucket is not None:
            most = min(draw.sequences, sequences) * draw.policy.per_sequence * self._layers * share
            taken = self._bucket.take(most)
            share, expected = share * taken, most * taken / self._layers
        if share == 1.0 and reservoir == FULL:
            return draw
        return replace(draw, rate=int(share * FULL), reservoir=reservoir, expected=expected)
