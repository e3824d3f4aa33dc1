"""The map that cannot leak."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from nla_monitor_langchain.bounded import BoundedMap


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 20)), max_size=60), st.integers(1, 5))
def test_never_more_than_size_and_never_older_than_ttl_and_every_value_is_accounted_for(puts: Any, size: int) -> None:
    clock = Clock()
    entries: BoundedMap[int, int] = BoundedMap(size, ttl_seconds=10.0, clock=clock)
    born: dict[int, float] = {}
    evicted: list[int] = []
    replaced = 0
    for number, (key, wait) in enumerate(puts):
        clock.now += wait
        replaced += key in entries
        evicted += entries.put(key, number)
        born[number] = clock.now
        assert len(entries) <= size
        assert all(clock.now - born[value] <= 10.0 for value in entries.values())
    assert len(evicted) + len(entries) + replaced == len(puts)


def test_the_oldest_goes_first_and_a_rewritten_entry_is_young_again() -> None:
    entries: BoundedMap[str, int] = BoundedMap(2, ttl_seconds=60.0)
    entries.put("a", 1)
    entries.put("b", 2)
    entries.put("a", 3)
    assert entries.put("c", 4) == [2]
    assert (entries.get("a"), entries.get("b"), entries.pop("c"), entries.pop("c")) == (3, None, 4, None)
