"""Which step a forward is part of: properties over any order of starts, ends and contexts; bounds that hold."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from contextvars import Context, copy_context
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_monitor.agent_calls import AgentCalls, shared
from nla_monitor.agent_spans import CallInfo, Span, ToolResult
from nla_monitor.capture.agent_runs import AgentRuns
from nla_monitor.capture.keys import hash_of
from nla_monitor.capture.session import SessionRegistry
from nla_monitor.guard import Guard
from nla_monitor.records import AgentContext

STEP = True
"""Payload of a span that is a step of an agent."""


class Registry:
    """A monitor whose tap is a registry of sessions only."""

    def __init__(self) -> None:
        self.guard = Guard()
        self.capture = self
        self.source = None
        self.sessions = SessionRegistry()
        self.sessions.runs = AgentRuns(size=100)

    def open_session(self, context: Any, ids: Any, *, traceparent: Any = None, attributes: Any = None) -> Any:
        return self.sessions.open(context, ids, traceparent=traceparent, attributes=attributes)

    def close_session(self, handle: Any, *, completion: Any = None) -> None:
        self.sessions.close(handle)


class Reader:
    """Spans whose payload says whether they are steps."""

    def __init__(self) -> None:
        self.now: str | None = None

    def current(self) -> str | None:
        return self.now

    def is_step(self, span: Span) -> bool:
        return bool(span.payload)

    def describe(self, span: Span) -> CallInfo:
        read = span.model_fed()
        return CallInfo(AgentContext(span.key, tool=None if read is None else read.tool), "model")


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def found(calls: AgentCalls) -> str | None:
    handle = calls.find()
    return None if handle is None else handle.context.agent_run_id


@pytest.fixture
def monitor() -> Registry:
    return Registry()


def test_the_tap_may_be_attached_later(monitor: Registry) -> None:
    """The registry is asked for as soon as there is one."""
    monitor.capture, later = None, monitor  # type: ignore[assignment]
    calls = AgentCalls(monitor, Reader())
    calls.start("a", None, STEP, mark=True)
    monitor.capture = later
    calls.start("b", "a", STEP, mark=True)
    here = monitor.sessions.view.here
    assert here is not None
    assert here.context.agent_run_id == "b"


@given(data=st.data())
def test_a_forward_is_of_an_open_step_of_its_own_context_or_of_nobody(data: st.DataObject) -> None:
    """Whatever starts, ends and forks in whatever order: never of an ended step, never of another context's."""
    monitor = Registry()
    calls = AgentCalls(monitor, Reader())
    contexts: list[tuple[Context, set[str]]] = [(Context(), set())]
    open_spans: dict[str, int] = {}
    parents: dict[str, str | None] = {}
    number = 0
    for _ in range(data.draw(st.integers(1, 25))):
        which = data.draw(st.integers(0, len(contexts) - 1))
        context, known = contexts[which]
        action = data.draw(st.sampled_from(["start", "start", "end", "fork", "forward", "forward"]))
        if action == "start":
            key, number = f"s{number}", number + 1
            parent = data.draw(st.sampled_from([None, *sorted(known & open_spans.keys())]))
            context.run(calls.start, key, parent, data.draw(st.booleans()), mark=True)
            known.add(key)
            open_spans[key], parents[key] = which, parent
        elif action == "end" and open_spans:
            key = data.draw(st.sampled_from(sorted(open_spans)))
            contexts[data.draw(st.integers(0, len(contexts) - 1))][0].run(calls.end, key)
            del open_spans[key]
        elif action == "fork":
            contexts.append((context.run(copy_context), set(known)))
        elif action == "forward":
            owner = context.run(found, calls)
            assert owner is None or (owner in known and owner in open_spans)
            steps = {key for key in known & open_spans.keys() if calls._spans[key][1].payload}
            if len(steps) == 1:
                assert owner == next(iter(steps))
    assert monitor.guard.faults == {}
    for key in list(open_spans):
        calls.end(key)
    assert len(monitor.sessions) == 0


def test_the_current_span_goes_before_marks_that_are_not_within_it(monitor: Registry) -> None:
    """A span that is current says more than one that was merely started here."""
    reader = Reader()
    calls = AgentCalls(monitor, reader)
    calls.start("outer", None, STEP, mark=True)
    calls.start("other", None, STEP, mark=True)
    reader.now = "outer"
    assert found(calls) == "outer"
    calls.start("inner", "outer", STEP, mark=True)
    assert found(calls) == "inner"
    reader.now = "unknown"
    assert found(calls) is None or found(calls) in {"other", "inner"}


def test_a_step_that_never_ends_does_not_stand_in_the_way(monitor: Registry) -> None:
    """Once it has had its forward, the next call of the context gets its own."""
    calls = AgentCalls(monitor, Reader())
    calls.start("leaked", None, STEP, mark=True)
    assert found(calls) == "leaked"
    calls.start("next", None, STEP, mark=True)
    assert found(calls) == "next"
    calls.end("next")
    assert calls.stats.ambiguous == 0


def test_tools_of_parallel_branches_stay_apart(monitor: Registry) -> None:
    """Two sub-agents at once under one root: each model call reads its own branch's tool."""
    calls = AgentCalls(monitor, Reader())
    calls.start("root", None, STEP)
    for branch in ("left", "right"):
        calls.start(branch, "root", STEP)
        calls.start(f"{branch}-ask", branch, STEP)
    for branch in ("left", "right"):
        Context().run(calls.find)
        calls.end(f"{branch}-ask", model_call=True)
    for branch in ("left", "right"):
        calls.start(f"{branch}-tool", branch, STEP)
        calls.end(f"{branch}-tool", tool=ToolResult(branch, f"{branch}-tool"))
    for branch in ("right", "left"):
        span = calls.start(f"{branch}-read", branch, STEP, mark=True)
        assert span is not None
        assert calls.info(span).context.tool == branch
        calls.end(f"{branch}-read", model_call=True)
        again = calls.start(f"{branch}-on", branch, STEP)
        assert again is not None
        assert calls.info(again).context.tool is None
        calls.end(f"{branch}-on", model_call=True)


def test_a_prompts_own_session_goes_before_what_the_context_says(monitor: Registry) -> None:
    """Rows of one forward: known by its tokens the one, by the context the rest."""
    calls = AgentCalls(monitor, Reader())
    calls.start("here", None, STEP, mark=True)
    by_tokens = monitor.sessions.open(AgentContext("by tokens"), [5, 6, 7])
    view = monitor.sessions.view
    assert view.claim(hash_of([5, 6, 7])) is by_tokens
    other = view.claim(hash_of([8, 9]))
    assert other is not None
    assert other.context.agent_run_id == "here"


def test_a_tool_in_a_node_of_its_own_is_read_outside_of_it(monitor: Registry) -> None:
    """The innermost step in which a model has asked; a tool that none had asked for is nobody's."""
    calls = AgentCalls(monitor, Reader())
    calls.start("root", None, STEP)
    calls.start("unasked", "root", STEP)
    calls.end("unasked", tool=ToolResult("unasked", "unasked"))
    for key, tool in (("ask", None), ("read", "t")):
        span = calls.start(key, "root", STEP)
        assert span is not None
        assert calls.info(span).context.tool == tool
        calls.end(key, model_call=True)
        calls.start(f"{key}-node", "root", STEP)
        calls.start("tool", f"{key}-node", STEP)
        calls.end("tool", tool=ToolResult("t", "tool"))
        calls.end(f"{key}-node")


def test_a_failed_call_has_not_read_its_tool(monitor: Registry) -> None:
    """Its retry reads it."""
    calls = AgentCalls(monitor, Reader())
    calls.start("root", None, STEP)
    calls.start("ask", "root", STEP)
    calls.end("ask", model_call=True)
    calls.start("tool", "root", STEP)
    calls.end("tool", tool=ToolResult("t", "tool"))
    for key, failed in (("first", True), ("retry", False)):
        span = calls.start(key, "root", STEP)
        assert span is not None
        assert calls.info(span).context.tool == "t"
        calls.end(key, model_call=True, failed=failed)


def test_steps_that_never_end_are_bounded(monitor: Registry) -> None:
    """By number and by age; the oldest go, and their sessions with them."""
    clock = Clock()
    calls = AgentCalls(monitor, Reader(), max_open=10, ttl_seconds=60, clock=clock)
    for number in range(100):
        Context().run(lambda number=number: (calls.start(f"s{number}", None, STEP, mark=True), calls.find()))
    assert calls.stats.open_spans == 10
    assert len(monitor.sessions) == 10
    clock.now = 61.0
    calls.start("later", None, STEP)
    assert calls.stats.open_spans == 1
    assert calls.stats.expired == 100
    assert len(monitor.sessions) == 0


def test_memory_is_flat_over_many_runs(monitor: Registry) -> None:
    """7,000 runs in one context, every tenth without an end."""
    calls = AgentCalls(monitor, Reader(), max_open=100)

    def runs(first: int, count: int) -> None:
        for number in range(first, first + count):
            calls.start(f"r{number}", None, STEP, mark=True)
            calls.start(f"c{number}", f"r{number}", STEP, mark=True)
            calls.find()
            if number % 10:
                calls.end(f"c{number}", model_call=True)
                calls.end(f"r{number}")

    tracemalloc.start()
    runs(0, 4_500)  # until what is bounded is full
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    runs(4_500, 2_500)
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 200_000
    assert len(monitor.sessions) <= 100


def test_many_threads_at_once(monitor: Registry) -> None:
    """Each in its own context: every forward on its own step."""
    calls = AgentCalls(monitor, Reader())
    wrong: list[str] = []

    def work(name: str) -> None:
        for number in range(200):
            key = f"{name}-{number}"
            calls.start(key, None, STEP, mark=True)
            if found(calls) != key:
                wrong.append(key)
            calls.end(key, model_call=True)

    threads = [threading.Thread(target=work, args=(f"t{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert calls.stats.calls == 800


def test_shared_by_all_of_a_monitor(monitor: Registry) -> None:
    """One for each framework and monitor; a closed one is followed by a new one."""
    one = shared(monitor, "f", Reader)
    assert shared(monitor, "f", Reader) is one
    assert shared(monitor, "g", Reader) is not one
    assert shared(Registry(), "f", Reader) is not one
    one.release()
    assert not one.closed
    one.release()
    assert one.closed
    assert shared(monitor, "f", Reader) is not one


def test_a_monitor_that_is_gone_is_no_fault() -> None:
    """Spans may outlive it."""
    monitor = Registry()
    calls = AgentCalls(monitor, Reader())
    span = calls.start("a", None, STEP, mark=True)
    assert span is not None
    del monitor
    gc.collect()
    assert calls.find() is None
    calls.open_prompt(span, [1, 2])
    calls.afterwards(calls.info(span), [1, 2], None)
    assert calls.end("a", model_call=True) is span
