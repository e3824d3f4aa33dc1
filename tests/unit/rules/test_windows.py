"""When matches become an alert."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rule_kit import match

from nla_monitor.records import Match, WindowVerdict
from nla_monitor.rules.schema import Window
from nla_monitor.rules.window import judge, window_start


def window(**values: object) -> Window:
    return Window.model_validate(values)


def fires(shape: Window, found: list[Match], step: int | None = None, now: float = 0.0) -> bool:
    return judge(shape, found, step=step, now=now).firing


def test_counts_within_steps() -> None:
    shape = window(count=3, within="10 steps")
    found = [match(n, step=step) for n, step in enumerate((1, 5, 10))]
    assert fires(shape, found, step=10)
    assert not fires(shape, found, step=11), "step 1 is ten steps back and has left"
    assert not fires(shape, found[:2], step=10)


def test_a_repeated_match_counts_once() -> None:
    shape = window(count=2, within="10 steps")
    assert not fires(shape, [match(1), match(1)], step=0)


@pytest.mark.parametrize(
    ("distinct", "found", "needed"),
    [
        ("position", [match(1, position=4), match(2, position=4, step=1), match(3, position=5)], 2),
        ("position", [match(1, sequence="a", position=4), match(2, sequence="b", position=4)], 2),
        ("sequence_id", [match(1, sequence="a"), match(2, sequence="a", position=1), match(3, sequence="b")], 2),
        ("step", [match(1, step=1), match(2, step=1), match(3, step=2)], 2),
        ("sample_id", [match(1), match(2)], 2),
    ],
)
def test_counts_what_is_distinct(distinct: str, found: list[Match], needed: int) -> None:
    verdict = judge(window(count=needed, distinct=distinct, within="10 steps"), found, step=3, now=0)
    assert (verdict.firing, verdict.distinct, verdict.needed, len(verdict.matches)) == (
        True,
        needed,
        needed,
        len(found),
    )
    assert not fires(window(count=needed + 1, distinct=distinct, within="10 steps"), found, step=3)


def test_runs_without_steps_count_seconds() -> None:
    shape = window(count=2, within={"steps": 10, "seconds": 60})
    found = [match(1, step=None, seconds=100), match(2, step=None, seconds=159)]
    assert fires(shape, found, step=None, now=159)
    assert not fires(shape, found, step=None, now=161)
    assert fires(window(count=2, within="10 steps"), found, step=None, now=161), "600 s where the rule names none"


def test_seconds_alone_rule_also_where_there_are_steps() -> None:
    shape = window(count=2, within="60s")
    assert fires(shape, [match(1, step=1, seconds=10), match(2, step=500, seconds=20)], step=500, now=20)


def test_for_asks_that_the_window_held_all_along() -> None:
    shape = window(count=1, within="3 steps", **{"for": "5 steps"})
    dense = [match(n, step=n) for n in range(10)]
    assert fires(shape, dense, step=9)
    assert not fires(shape, [m for m in dense if m.step not in (5, 6, 7)], step=9), (
        "at step 7 nothing was in the window"
    )
    assert not fires(shape, dense[:1], step=0), "it has only just begun"


def test_matches_beyond_the_moment_are_not_seen_yet() -> None:
    found = [match(1, step=1), match(2, step=9)]
    assert judge(window(count=2), found, step=5, now=0).distinct == 1


def test_the_matches_of_a_verdict_come_oldest_first() -> None:
    found = [match(3, step=3), match(1, step=1), match(2, step=2)]
    assert [m.step for m in judge(window(count=1, within="9 steps"), found, step=3, now=0).matches] == [1, 2, 3]


def test_no_matches_no_alarm() -> None:
    assert judge(window(count=1), [], step=3, now=0) == WindowVerdict(firing=False, matches=(), distinct=0, needed=1)


EVENTS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3), st.integers(0, 3)), max_size=25)
SHAPES = st.builds(
    lambda count, distinct, within, hold, unit: window(
        count=count, distinct=distinct, within={unit: within}, **({"for": {unit: hold}} if hold else {})
    ),
    st.integers(1, 4),
    st.sampled_from(["sample_id", "position", "sequence_id", "step"]),
    st.integers(1, 12),
    st.integers(0, 6),
    st.sampled_from(["steps", "seconds"]),
)


def matches_of(events: list[tuple[int, int, int]], *, steps: bool) -> list[Match]:
    return [
        match(n, step=at if steps else None, seconds=float(at), sequence=f"s{sequence}", position=position)
        for n, (at, sequence, position) in enumerate(events)
    ]


@given(EVENTS, SHAPES, st.integers(0, 35), st.booleans(), st.randoms())
def test_order_and_batching_change_nothing(
    events: list[tuple[int, int, int]], shape: Window, at: int, steps: bool, rng: random.Random
) -> None:
    found = matches_of(events, steps=steps)
    shuffled = [*found, *found[: len(found) // 2]]
    rng.shuffle(shuffled)
    step = at if steps else None
    assert judge(shape, shuffled, step=step, now=float(at)) == judge(shape, found, step=step, now=float(at))


@given(EVENTS, SHAPES, st.integers(0, 35), st.booleans())
def test_one_more_match_never_turns_it_off(
    events: list[tuple[int, int, int]], shape: Window, at: int, steps: bool
) -> None:
    found = matches_of(events, steps=steps)
    step = at if steps else None
    verdicts = [judge(shape, found[:n], step=step, now=float(at)) for n in range(len(found) + 1)]
    assert [v.firing for v in verdicts] == sorted(v.firing for v in verdicts)
    assert [v.distinct for v in verdicts] == sorted(v.distinct for v in verdicts)


@given(EVENTS, SHAPES, st.integers(0, 35), st.booleans())
def test_the_sweep_agrees_with_looking_at_every_moment(
    events: list[tuple[int, int, int]], shape: Window, at: int, steps: bool
) -> None:
    found = matches_of(events, steps=steps)
    unit = "steps" if steps else "seconds"
    length = getattr(shape.within, unit) or (None if steps else 600)
    if steps and length is None:
        return  # a rule in seconds looks at the clock, tested above
    hold = (getattr(shape.hold, unit) or 0) if shape.hold else 0

    def count(moment: float) -> int:
        inside = [m for m in found if moment - length < m.captured_at <= moment]
        keys = {"position": lambda m: (m.sequence_id, m.position), "sequence_id": lambda m: m.sequence_id}
        return len(
            {keys.get(shape.distinct, lambda m: m.step if shape.distinct == "step" else m.sample_id)(m) for m in inside}
        )

    naive = all(count(at - back / 2) >= shape.count for back in range(int(hold * 2) + 1))
    assert judge(shape, found, step=at if steps else None, now=float(at)).firing == naive


@given(EVENTS, SHAPES, st.integers(0, 35), st.booleans())
def test_what_lies_before_the_window_start_is_not_needed(
    events: list[tuple[int, int, int]], shape: Window, at: int, steps: bool
) -> None:
    found = matches_of(events, steps=steps)
    step = at if steps else None
    since_step, since_time = window_start(shape, step=step, now=float(at))
    kept = [
        m
        for m in found
        if (since_step is None or (m.step is not None and m.step > since_step))
        and (since_time is None or m.captured_at > since_time)
    ]
    assert judge(shape, kept, step=step, now=float(at)) == judge(shape, found, step=step, now=float(at))
