"""When matches make an alert: a pure function of the matches of one group and of the moment it is judged at.

The window holds at moment ``t`` when at least ``count`` distinct matches lie in ``(t - within, t]``; with ``for`` it
must have held at every moment of ``[t - for, t]``. Steps count where matches have a step and the rule names steps,
seconds (``captured_at``) elsewhere; the two kinds are never added up. Order, repetition and batching of the matches
don't matter, and one more match never turns a firing window off.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from nla_monitor.records import Match, WindowVerdict
from nla_monitor.rules.schema import Span, Window

DEFAULT_SECONDS: Final = 600.0
"""Used for matches without a step where the rule names steps only: agents have no steps."""
_ROUNDING: Final = 1e-3


@dataclass(frozen=True, slots=True)
class _Axis:
    """One way to place matches in time."""

    within: float | None  # None: since ever
    hold: float
    now: float

    @property
    def start(self) -> float | None:
        """The oldest moment that can matter (matches after it count)."""
        return None if self.within is None else self.now - self.hold - self.within


@dataclass(frozen=True, slots=True)
class _Event:
    at: float
    key: Hashable
    match: Match


def judge(window: Window, matches: Sequence[Match], *, step: int | None, now: float) -> WindowVerdict:
    """Whether the window of one group holds.

    Matches with a step count by steps, those without by time; it holds where either do. The verdict has both kinds: so
    that a match more only ever adds to it, however many come at one moment.

    Args:
        window: The rule's window.
        matches: Matches of the rule in one group; more than the window needs is fine.
        step: How far the run is (highest step read); None when it has none.
        now: Time that goes with it, Unix seconds.
    """
    stepped, timed = _by_axis(window, {match.match_id: match for match in matches}.values())
    verdicts = []
    if stepped:
        newest = max(match.step or 0 for match in stepped)
        axis = _step_axis(window, newest if step is None else step)
        verdicts.append(_verdict(window, axis, [_Event(float(m.step or 0), _key(window, m), m) for m in stepped]))
    if timed or not stepped:
        verdicts.append(
            _verdict(window, _time_axis(window, now), [_Event(m.captured_at, _key(window, m), m) for m in timed])
        )
    if len(verdicts) == 1:
        return verdicts[0]
    inside = sorted(
        (match for verdict in verdicts for match in verdict.matches),
        key=lambda match: (match.captured_at, match.match_id),
    )
    deciding = [verdict for verdict in verdicts if verdict.firing] or verdicts
    most = max(verdict.distinct for verdict in deciding)
    return WindowVerdict(deciding[0].firing, tuple(inside), most, window.count)


def next_change(window: Window, matches: Sequence[Match], *, step: int | None, now: float) -> tuple[float, float]:
    """The next step, and the next time, at which the verdict on these matches may differ without a further match.

    A verdict changes only where a match enters or leaves the window or its ``for`` span. Infinity: it does not.
    """
    stepped, timed = _by_axis(window, matches)
    moments = [float(match.step or 0) for match in stepped]
    newest = max(moments, default=0.0)
    steps = _next(_step_axis(window, int(newest) if step is None else step), moments)
    # Sums of times may be rounded: a little early is as good.
    return steps, _next(_time_axis(window, now), [match.captured_at for match in timed]) - _ROUNDING


def _next(axis: _Axis, moments: Sequence[float]) -> float:
    spans = {0.0, axis.hold} if axis.within is None else {0.0, axis.hold, axis.within, axis.within + axis.hold}
    return min((at + span for at in moments for span in spans if at + span > axis.now), default=math.inf)


def window_start(window: Window, *, step: int | None, now: float) -> tuple[int | None, float | None]:
    """The oldest step, or the oldest time, that can still matter at a moment (exclusive; None: no bound).

    At a moment with a step, a rule that names steps needs matches with a step only; then the time has no bound.
    """
    if step is not None and _has_steps(window):
        start = _step_axis(window, step).start
        return (None if start is None else int(start), None)
    return (None, _time_axis(window, now).start)


def _has_steps(window: Window) -> bool:
    return window.within is None or window.within.steps is not None


def _by_axis(window: Window, matches: Iterable[Match]) -> tuple[list[Match], list[Match]]:
    """Matches that count by steps, and those that count by time."""
    if not _has_steps(window):
        return [], list(matches)
    stepped: list[Match] = []
    timed: list[Match] = []
    for match in matches:
        (timed if match.step is None else stepped).append(match)
    return stepped, timed


def _step_axis(window: Window, step: int) -> _Axis:
    within = None if window.within is None or window.within.steps is None else float(window.within.steps)
    return _Axis(within, float(_part(window.hold, "steps")), float(step))


def _time_axis(window: Window, now: float) -> _Axis:
    within = None if window.within is None else window.within.seconds or DEFAULT_SECONDS
    return _Axis(within, float(_part(window.hold, "seconds")), now)


def _part(span: Span | None, name: str) -> float:
    return 0.0 if span is None else getattr(span, name) or 0.0


def _key(window: Window, match: Match) -> Hashable:
    if window.distinct == "position":
        return (match.sequence_id, match.position)
    value: Hashable = getattr(match, window.distinct)
    return value


def _verdict(window: Window, axis: _Axis, events: list[_Event]) -> WindowVerdict:
    begin = -math.inf if axis.within is None else axis.now - axis.within
    inside = [event for event in events if begin < event.at <= axis.now]
    distinct = len({event.key for event in inside})
    firing = distinct >= window.count and (not axis.hold or _held(events, axis, window.count))
    inside.sort(key=lambda event: (event.at, event.match.captured_at, event.match.match_id))
    return WindowVerdict(firing, tuple(event.match for event in inside), distinct, window.count)


def _held(events: Iterable[_Event], axis: _Axis, count: int) -> bool:
    """Whether ``count`` distinct events were in the window at every moment of ``[now - hold, now]``.

    Between two moments at which an event leaves the window the number only grows, so those moments and the first are
    enough. One sweep: O(n log n) for n events.
    """
    past = sorted((event for event in events if event.at <= axis.now), key=lambda event: event.at)
    first = axis.now - axis.hold
    leaving = [] if axis.within is None else [event.at + axis.within for event in past]
    moments = [first, *sorted(moment for moment in set(leaving) if first < moment <= axis.now)]
    present: Counter[Hashable] = Counter()
    entered = left = 0
    for moment in moments:
        while entered < len(past) and past[entered].at <= moment:
            present[past[entered].key] += 1
            entered += 1
        while axis.within is not None and left < entered and past[left].at + axis.within <= moment:
            _leave(present, past[left].key)
            left += 1
        if len(present) < count:
            return False
    return True


def _leave(present: Counter[Hashable], key: Hashable) -> None:
    present[key] -= 1
    if not present[key]:
        del present[key]
