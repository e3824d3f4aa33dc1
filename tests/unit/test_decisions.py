"""The gate: what an agent is told, how long it waits for it, and what happens when anything fails."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_monitor.decisions import Decision, Gate, Place, Point, Verdict
from nla_monitor.errors import ConfigError, StoreUnavailableError
from nla_monitor.guard import STRICT_VARIABLE
from nla_monitor.records import Alert, Severity, TriageState
from nla_monitor.store.engine import open_engine
from nla_monitor.store.findings import Decided, decisions_on
from tests.gate_support import RUN, Desk

TOOL = Point("tool", "shell", "call_7")
FAILS = ("open", "closed")


def _let_decisions_end() -> None:
    """Decisions are kept on threads of the gate; one that still writes would leave its connection open."""
    for thread in threading.enumerate():
        if thread.name == "nla-monitor-decision":
            thread.join(10.0)


@pytest.fixture
def desk(store_url: str) -> Iterator[Desk]:
    engine = open_engine(store_url)
    yield Desk(engine)
    _let_decisions_end()
    engine.dispose()


@pytest.fixture
def local(sqlite_store_url: str) -> Iterator[Desk]:
    """For what has nothing to do with the kind of database."""
    engine = open_engine(sqlite_store_url)
    yield Desk(engine)
    _let_decisions_end()
    engine.dispose()


@pytest.fixture
def sqlite_store_url(request: pytest.FixtureRequest, tmp_path: Any) -> str:
    template = request.getfixturevalue("_sqlite_store")
    (tmp_path / "local.db").write_bytes(template.read_bytes())
    return f"sqlite:///{tmp_path / 'local.db'}"


def kept(desk: Desk, conversation: str = "talk", count: int = 1) -> list[Decided]:
    """What is stored of decisions; written a moment after the agent went on."""
    deadline = time.monotonic() + 5.0
    while len(found := decisions_on(desk.repository.engine, RUN, conversation)) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    return found


def test_a_finding_stops_the_agent_whose_it_is_and_no_other(desk: Desk) -> None:
    gate = Gate(desk, fail="open", deadline_seconds=5.0)
    fired = desk.found(desk.sampled("talk"))
    desk.read(desk.sampled("other", root="root-2"))
    decision = gate.decide(gate.place("talk"), TOOL)
    assert (decision.verdict, decision.decided_by, decision.complete) == (Verdict.REVIEW, "findings", True)
    assert [alert.alert_id for alert in decision.alerts] == [fired.alert_id]
    assert gate.decide(gate.place("other")).verdict is Verdict.PROCEED
    assert gate.decide(gate.place("unheard of")).verdict is Verdict.PROCEED
    (stored,) = kept(desk)
    assert (stored.verdict, stored.point, stored.tool, stored.tool_call_id) == ("review", "tool", "shell", "call_7")
    assert (stored.alerts, stored.rules, stored.complete) == ((fired.alert_id,), ("hack",), True)
    assert gate.stats.asked == 3
    assert gate.stats.verdicts == {"proceed": 2, "review": 1, "block": 0}


def test_an_alert_that_shows_another_conversation_counts_where_its_matches_are(desk: Desk) -> None:
    gate = Gate(desk, fail="open")
    fired = desk.found(desk.sampled("first", root="root-1"))
    desk.joined(fired, desk.sampled("second", root="root-2"))
    assert gate.decide(gate.place("second")).stops
    assert not gate.decide(gate.place("third")).stops


def test_without_a_conversation_the_outermost_run_counts(desk: Desk) -> None:
    gate = Gate(desk, fail="closed")
    desk.found(desk.sampled(None, root="root-1"))
    desk.read(desk.sampled(None, root="root-2"))
    assert gate.decide(gate.place(root_run_id="root-1")).stops
    assert not gate.decide(gate.place(root_run_id="root-2")).stops


def test_severity_and_rules_narrow_what_stops(local: Desk) -> None:
    local.found(local.sampled(), rule="tone", severity=Severity.LOW)
    local.found(local.sampled(), rule="hack", severity=Severity.HIGH)
    place = Place(RUN, "talk")
    assert [one.rule_id for one in Gate(local, fail="open").decide(place).alerts] == ["hack"]
    assert len(Gate(local, fail="open", severity="low").decide(place).alerts) == 2
    assert not Gate(local, fail="open", severity="critical").decide(place).stops
    assert not Gate(local, fail="open", severity="low", rules=["leak"]).decide(place).stops
    assert Gate(local, fail="open", severity="low", rules="tone").decide(place).stops


def test_it_waits_for_what_is_not_read_yet(local: Desk) -> None:
    gate = Gate(local, fail="open", deadline_seconds=20.0)
    waiting = local.sampled()
    worker = threading.Timer(0.3, lambda: local.found(waiting))
    worker.start()
    decision = gate.decide(gate.place("talk"))
    worker.join()
    assert decision.verdict is Verdict.REVIEW
    assert 0.2 < decision.seconds < 10.0


def test_what_it_waits_for_is_read_first(desk: Desk) -> None:
    others = [desk.sampled("other", root="root-2") for _ in range(5)]
    mine = desk.sampled("talk")
    Gate(desk, fail="open", deadline_seconds=0.3).decide(Place(RUN, "talk"))
    assert [one.sample_id for one in desk.spool.lease("worker", 1, 60.0).samples] == [mine.sample_id]
    assert len(desk.spool.lease("worker", 9, 60.0).samples) == len(others)


@pytest.mark.parametrize(("fail", "verdict"), [("open", Verdict.PROCEED), ("closed", Verdict.BLOCK)])
def test_what_is_not_read_in_time_is_the_users_choice(local: Desk, fail: Any, verdict: Verdict) -> None:
    gate = Gate(local, fail=fail, stop="block", deadline_seconds=0.2)
    local.sampled()
    decision = gate.decide(gate.place("talk"))
    assert (decision.verdict, decision.decided_by, decision.complete) == (verdict, "undecided", False)
    assert 0.15 < decision.seconds < 1.0
    assert gate.stats.undecided == 1


@pytest.mark.parametrize("fail", FAILS)
def test_a_finding_stops_though_not_all_is_read(local: Desk, fail: Any) -> None:
    gate = Gate(local, fail=fail, deadline_seconds=10.0)
    local.found(local.sampled())
    local.sampled()
    decision = gate.decide(gate.place("talk"))
    assert (decision.verdict, decision.complete) == (Verdict.REVIEW, False)
    assert decision.seconds < 5.0


@pytest.mark.parametrize(("fail", "verdict"), [("open", Verdict.PROCEED), ("closed", Verdict.REVIEW)])
def test_an_agent_that_nobody_watches_has_no_clean_bill(
    local: Desk, fail: Any, verdict: Verdict, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(local, fail=fail, deadline_seconds=30.0)
    decision = gate.decide(gate.place("unwatched"))
    assert (decision.verdict, decision.decided_by, decision.complete) == (verdict, "undecided", False)
    assert decision.seconds < 5.0, "there is nothing to wait for"
    assert "is its handler installed?" in caplog.text


def test_samples_that_were_given_up_are_no_clean_bill(local: Desk) -> None:
    local.sampled()
    for _ in range(local.spool._max_attempts + 1):
        local.spool.lease("worker", 10, 0.0)
        time.sleep(0.01)
    place = Place(RUN, "talk")
    assert not Gate(local, fail="open").decide(place).stops
    gate = Gate(local, fail="closed", deadline_seconds=5.0)
    decision = gate.decide(place)
    assert (decision.verdict, decision.decided_by, decision.failed) == (Verdict.REVIEW, "undecided", 1)
    gate.answer(decision, "proceed", who="ana")
    assert not gate.decide(place).stops, "a person let it pass"


# -- people ---------------------------------------------------------------------------------------------------------


def test_what_a_person_lets_pass_stops_nobody_there_again(local: Desk) -> None:
    gate = Gate(local, fail="open")
    fired = local.found(local.sampled("talk"))
    local.joined(fired, local.sampled("other", root="root-2"))
    decision = gate.decide(gate.place("talk"))
    answered = gate.answer(decision, "proceed", who="ana", note="looks fine", label="benign")
    assert (answered.verdict, answered.decided_by, answered.note) == (Verdict.PROCEED, "person", "ana: looks fine")
    assert not gate.decide(gate.place("talk")).stops
    assert gate.decide(gate.place("other")).stops, "asked about another conversation"
    assert local.repository.alerts()[0].triage is TriageState.BENIGN
    (label,) = local.repository.labels(fired.alert_id)
    assert (label.who, label.note) == ("ana", "looks fine")
    assert {one.decided_by for one in kept(local, count=2)} == {"findings", "person"}
    local.found(local.sampled("talk", root="root-3"))
    assert not gate.decide(gate.place("talk")).stops, "the same rule, in a later run of that conversation"
    local.found(local.sampled("talk"), rule="leak")
    assert gate.decide(gate.place("talk")).stops, "another rule"


def test_what_a_person_rejects_stays_stopped(local: Desk) -> None:
    gate = Gate(local, fail="open")
    local.found(local.sampled())
    decision = gate.decide(gate.place("talk"))
    assert gate.answer(decision, Verdict.BLOCK).verdict is Verdict.BLOCK
    assert gate.decide(gate.place("talk")).stops


def test_a_payload_leads_back_to_its_decision_in_another_process(local: Desk, store_url: str) -> None:
    fired = local.found(local.sampled())
    decision = Gate(local, fail="open").decide(Place(RUN, "talk", "root"), TOOL)
    payload = decision.payload()
    assert "special-case" not in str(payload), "words only where they are asked for"
    assert decision.payload(content=True)["findings"][0]["quote"] == fired.quote
    recalled = Gate(local, fail="closed").recall(payload)
    assert (recalled.place, recalled.point, recalled.decision_id) == (decision.place, TOOL, decision.decision_id)
    assert [one.alert_id for one in recalled.alerts] == [fired.alert_id]


# -- the callback ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "verdict"),
    [(None, Verdict.REVIEW), ("proceed", Verdict.PROCEED), (Verdict.BLOCK, Verdict.BLOCK), ("review", Verdict.REVIEW)],
)
def test_the_callback_decides(local: Desk, given: Any, verdict: Verdict) -> None:
    asked: list[Alert] = []

    def on_alert(alert: Alert) -> Any:
        asked.append(alert)
        return given

    gate = Gate(local, fail="open", on_alert=on_alert)
    fired = local.found(local.sampled())
    decision = gate.decide(gate.place("talk"))
    assert (decision.verdict, decision.decided_by) == (verdict, "callback")
    assert [one.alert_id for one in asked] == [fired.alert_id]
    gate.decide(gate.place("talk"))
    assert len(asked) == (1 if verdict is Verdict.PROCEED else 2), "what it let pass is not asked again"


def test_the_callback_is_asked_again_for_what_is_read_later(local: Desk) -> None:
    late = local.sampled()
    answers = {"first": Verdict.PROCEED, "second": Verdict.BLOCK}
    gate = Gate(local, fail="open", deadline_seconds=20.0, on_alert=lambda alert: answers[alert.rule_id])
    local.found(local.sampled(), rule="first")
    worker = threading.Timer(0.3, lambda: local.found(late, rule="second"))
    worker.start()
    decision = gate.decide(gate.place("talk"))
    worker.join()
    assert (decision.verdict, [one.rule_id for one in decision.alerts]) == (Verdict.BLOCK, ["second"])


@pytest.mark.parametrize(("fail", "verdict"), [("open", Verdict.PROCEED), ("closed", Verdict.REVIEW)])
def test_a_callback_that_hangs_holds_nobody_up(local: Desk, fail: Any, verdict: Verdict) -> None:
    release = threading.Event()
    gate = Gate(local, fail=fail, deadline_seconds=0.2, on_alert=lambda alert: release.wait(30) and None)
    local.found(local.sampled())
    for _ in range(10):
        decision = gate.decide(gate.place("talk"))
        assert decision.verdict is verdict
        assert decision.seconds < 1.0
    assert gate.stats.late == 8, "no more than so many hang at a time"
    assert gate.stats.faults == 2
    release.set()


@pytest.mark.parametrize(("fail", "verdict"), [("open", Verdict.PROCEED), ("closed", Verdict.REVIEW)])
@pytest.mark.parametrize("broken", [lambda alert: 1 / 0, lambda alert: "perhaps", lambda alert: 42])
def test_a_callback_that_fails_is_said_and_leaves_it_to_the_choice(
    local: Desk, fail: Any, verdict: Verdict, broken: Callable[[Alert], Any], caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(local, fail=fail, on_alert=broken)
    local.found(local.sampled())
    assert gate.decide(gate.place("talk")).verdict is verdict
    assert gate.decide(gate.place("talk")).decided_by == "fault"
    assert sum("on_alert failed" in record.message for record in caplog.records) == 1
    assert gate.stats.faults == 2


# -- what may go wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fail", "verdict"), [("open", Verdict.PROCEED), ("closed", Verdict.REVIEW)])
@pytest.mark.parametrize("kind", ["store", "bug", "flush", "nobody"])
def test_whatever_fails_the_choice_holds(
    local: Desk, fail: Any, verdict: Verdict, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(STRICT_VARIABLE, raising=False)

    def fault(*_: Any, **__: Any) -> Any:
        raise StoreUnavailableError("gone") if kind == "store" else RuntimeError("a bug of ours")

    gate = Gate(local, fail=fail, deadline_seconds=2.0)
    local.sampled()
    if kind == "flush":
        monkeypatch.setattr(local, "flush", fault)
    elif kind != "nobody":
        monkeypatch.setattr("nla_monitor.decisions.unread", fault)
    decision = gate.decide(gate.place() if kind == "nobody" else gate.place("talk"))
    assert (decision.verdict, decision.decided_by, decision.complete) == (verdict, "fault", False)
    assert gate.stats.faults == 1


def test_a_fault_of_ours_is_seen_in_tests(local: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STRICT_VARIABLE, "1")
    monkeypatch.setattr("nla_monitor.decisions.unread", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Gate(local, fail="open").decide(Place(RUN, "talk"))


def test_a_locked_database_holds_nobody_up(local: Desk, tmp_path: Any) -> None:
    local.sampled()
    other = sqlite3.connect(tmp_path / "local.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.monotonic()
    decision = Gate(local, fail="closed", deadline_seconds=0.3).decide(Place(RUN, "talk"))
    assert time.monotonic() - started < 2.0
    assert decision.stops
    other.execute("ROLLBACK")
    assert kept(local), "written once the database is free"


def test_asking_does_not_hold_up_the_event_loop(local: Desk) -> None:
    gate = Gate(local, fail="open", deadline_seconds=0.3)
    local.sampled()

    async def run() -> tuple[Decision, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.01)

        ticking = asyncio.create_task(tick())
        decision = await gate.adecide(gate.place("talk"))
        ticking.cancel()
        return decision, ticks

    decision, ticks = asyncio.run(run())
    assert decision.decided_by == "undecided"
    assert ticks > 5


def test_agents_that_wait_take_no_thread_of_the_hosts_pool(local: Desk) -> None:
    """The pool has a handful of threads, and the host runs its tools in them."""
    gate = Gate(local, fail="open", deadline_seconds=1.5)
    local.sampled()

    async def run() -> tuple[float, float]:
        started = time.monotonic()
        asking = [asyncio.create_task(gate.adecide(gate.place("talk"))) for _ in range(40)]
        await asyncio.sleep(0.2)
        asked = time.monotonic()
        await asyncio.to_thread(int)
        pool = time.monotonic() - asked
        await asyncio.gather(*asking)
        return pool, time.monotonic() - started

    pool, whole = asyncio.run(run())
    assert pool < 1.0
    assert whole < 6.0
    assert gate.stats.asked == 40


def test_a_fault_of_ours_in_async_code_is_seen_in_tests(local: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STRICT_VARIABLE, "1")
    monkeypatch.setattr("nla_monitor.decisions.unread", lambda *_: 1 / 0)
    gate = Gate(local, fail="open")
    with pytest.raises(ZeroDivisionError):
        asyncio.run(gate.adecide(Place(RUN, "talk")))


def test_an_agent_that_is_cancelled_while_it_waits_leaves_nothing_behind(local: Desk) -> None:
    gate = Gate(local, fail="closed", deadline_seconds=0.5)
    local.sampled()

    async def run() -> None:
        asking = asyncio.create_task(gate.adecide(gate.place("talk")))
        await asyncio.sleep(0.1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    asyncio.run(run())
    local.read(local.sampled("other", root="root-2"))
    assert gate.decide(gate.place("other")).verdict is Verdict.PROCEED


def test_many_agents_ask_at_once(local: Desk) -> None:
    names = [f"talk-{number}" for number in range(24)]
    guilty = set(names[::3])
    for name in names:
        one = local.sampled(name, root=name)
        (local.found if name in guilty else local.read)(one)
    gate = Gate(local, fail="closed", deadline_seconds=30.0)
    stopped: dict[str, bool] = {}
    threads = [
        threading.Thread(target=lambda name=name: stopped.update({name: gate.decide(gate.place(name)).stops}))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name for name, stops in stopped.items() if stops} == guilty


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"fail": "perhaps"}, "'open'.*'closed'"),
        ({"fail": "open", "severity": "hot"}, "severity='hot': valid are info, low"),
        ({"fail": "open", "stop": "proceed"}, "would stop nothing"),
        ({"fail": "open", "stop": "halt"}, "valid are proceed, review, block"),
        ({"fail": "open", "deadline_seconds": 0}, "above 0"),
        ({"fail": "open", "deadline_seconds": float("nan")}, "above 0"),
    ],
)
def test_arguments_are_checked(local: Desk, wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Gate(local, **wrong)


def test_the_choice_has_no_default(local: Desk) -> None:
    with pytest.raises(TypeError, match="fail"):
        Gate(local)  # type: ignore[call-arg]


@given(st.permutations(list(Verdict)))
def test_verdicts_are_ordered(order: list[Verdict]) -> None:
    assert max(order, key=lambda one: one.rank) is Verdict.BLOCK
    assert min(order, key=lambda one: one.rank) is Verdict.PROCEED
