"""The visible side of conversations: every message once, in its place, whatever the host does meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_monitor.errors import StoreUnavailableError
from nla_monitor.guard import STRICT_VARIABLE, Guard
from nla_monitor.records import AgentContext
from nla_monitor.store.engine import open_engine
from nla_monitor.store.messages import Said, chain_id, conversations, messages_of, save_messages
from nla_monitor.store.repository import Repository
from nla_monitor.store.retention import prune
from nla_monitor.transcripts import Message, Transcripts
from tests.gate_support import Desk

RUN = "run-1"


@pytest.fixture
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "t.db").write_bytes(request.getfixturevalue("_sqlite_store").read_bytes())
    opened = open_engine(f"sqlite:///{tmp_path / 't.db'}")
    yield opened
    opened.dispose()


@pytest.fixture
def transcripts(engine: Any) -> Iterator[Transcripts]:
    made = Transcripts(engine, lambda: RUN, Guard())
    yield made
    made.close()


def context(call: str, conversation: str | None = "talk", root: str = "root") -> AgentContext:
    return AgentContext(call, root_run_id=root, conversation_id=conversation, node="agent")


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str, *calls: dict[str, object]) -> Message:
    return Message("assistant", text, tool_calls=calls)


def tell(transcripts: Transcripts, call: str, history: Sequence[Message], answer: Message | None, **where: Any) -> None:
    transcripts.prompt(context(call, **where), lambda: history)
    transcripts.answer(call, lambda: answer)


def texts(engine: Any, conversation: str = "talk") -> list[str]:
    return [said.message.text for said in messages_of(engine, RUN, conversation)]


def test_a_history_sent_again_is_kept_once(engine: Any, transcripts: Transcripts) -> None:
    weather = {"name": "weather", "args": {"city": "Rome"}, "id": "call_1"}
    first = [Message("system", "Be brief."), user("Weather in Rome?")]
    called, result = assistant("", weather), Message("tool", "sunny", "weather", "call_1")
    tell(transcripts, "a", first, called)
    tell(transcripts, "b", [*first, called, result], assistant("It is sunny."))
    tell(transcripts, "c", [*first, called, result, assistant("It is sunny. "), user("Thanks")], assistant("Welcome."))
    assert transcripts.flush()
    said = messages_of(engine, RUN, "talk")
    assert [one.message.text for one in said] == [
        "Be brief.",
        "Weather in Rome?",
        "",
        "sunny",
        "It is sunny.",
        "Thanks",
        "Welcome.",
    ]
    assert [one.agent_run_id for one in said] == ["a", "a", "a", "b", "b", "c", "c"]
    assert [one.written for one in said] == [False, False, True, False, True, False, True]
    assert [one.place for one in said] == list(range(7))
    assert [one.parent_id for one in said] == [None, *(one.message_id for one in said[:-1])]
    assert said[2].message.tool_calls == (weather,)
    assert (said[3].message.name, said[3].message.tool_call_id) == ("weather", "call_1")
    assert said[0].node == "agent"
    assert transcripts.stats.written == 7


def test_a_history_is_not_sent_to_the_database_again(transcripts: Transcripts, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Said] = []
    monkeypatch.setattr("nla_monitor.transcripts.save_messages", lambda _, messages: sent.extend(messages) or 0)
    history: list[Message] = []
    for turn in range(10):
        history += [user(f"question {turn}")]
        tell(transcripts, str(turn), tuple(history), assistant(f"answer {turn}"))
        history += [assistant(f"answer {turn}")]
        assert transcripts.flush()
    assert len(sent) == 20


def test_a_changed_history_forks(engine: Any, transcripts: Transcripts) -> None:
    tell(transcripts, "a", [user("one")], assistant("1"))
    tell(transcripts, "b", [user("ONE")], assistant("1"))
    assert transcripts.flush()
    said = messages_of(engine, RUN, "talk")
    assert [(one.message.text, one.place) for one in said] == [("one", 0), ("1", 1), ("ONE", 0), ("1", 1)]
    assert len({one.message_id for one in said}) == 4


def test_conversations_and_runs_do_not_mix(engine: Any, transcripts: Transcripts) -> None:
    tell(transcripts, "a", [user("hello")], assistant("hi"))
    tell(transcripts, "b", [user("hello")], assistant("hi"), conversation="other")
    tell(transcripts, "c", [user("hello")], assistant("hi"), conversation=None, root="root-7")
    assert transcripts.flush()
    assert texts(engine) == texts(engine, "other") == texts(engine, "root-7") == ["hello", "hi"]
    assert {(one.conversation, one.messages) for one in conversations(engine)} == {
        ("talk", 2),
        ("other", 2),
        ("root-7", 2),
    }
    assert conversations(engine, "run-2") == []


message = st.builds(Message, st.sampled_from(["user", "assistant", "tool"]), st.text(max_size=8))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.lists(message, max_size=4), min_size=1, max_size=6), st.integers(0, 3))
def test_any_growing_conversation_is_kept_in_order_and_once(
    _sqlite_store: Path,  # noqa: PT019 -- its value is used
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[list[Message]],
    repeats: int,
) -> None:
    file = tmp_path_factory.mktemp("grown") / "t.db"
    file.write_bytes(_sqlite_store.read_bytes())
    engine = open_engine(f"sqlite:///{file}")
    transcripts = Transcripts(engine, lambda: RUN, Guard())
    history: list[Message] = [user("start")]
    for number, new in enumerate(steps):
        history += new
        told = tuple(history)
        for again in range(1 + repeats):
            transcripts.prompt(context(f"{number}-{again}"), lambda told=told: told)
    assert transcripts.close(30.0)
    said = messages_of(engine, RUN, "talk")
    engine.dispose()
    assert [one.message.text.replace("\x00", "\ufffd") for one in said] == [
        one.text.replace("\x00", "\ufffd") for one in history
    ]
    assert [one.place for one in said] == list(range(len(history)))


@given(st.lists(message, min_size=1, max_size=5))
def test_ids_follow_from_the_history(history: list[Message]) -> None:
    def ids(messages: Sequence[Message]) -> list[str]:
        found: list[str] = []
        for one in messages:
            found.append(chain_id(found[-1] if found else None, RUN, "talk", one))
        return found

    assert ids(history) == ids(history)
    assert ids(history)[:-1] == ids(history[:-1])
    changed = [Message(history[0].role, history[0].text + "x"), *history[1:]]
    assert set(ids(history)).isdisjoint(ids(changed))


# -- what may go wrong ------------------------------------------------------------------------------------------------


def test_nothing_is_kept_where_it_is_off(engine: Any) -> None:
    transcripts = Transcripts(engine, lambda: RUN, Guard(), enabled=False)
    tell(transcripts, "a", [user("secret")], assistant("secret"))
    assert transcripts.close()
    assert texts(engine) == []
    assert conversations(engine) == []


def test_telling_costs_the_host_next_to_nothing(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No text is made, nothing is hashed and nothing written in the calling thread."""
    callers: set[int] = set()

    def slow() -> list[Message]:
        callers.add(threading.get_ident())
        time.sleep(0.2)
        return [user("x")]

    transcripts = Transcripts(engine, lambda: RUN, Guard())
    started = time.perf_counter()
    for number in range(5):
        transcripts.prompt(context(str(number)), slow)
    assert time.perf_counter() - started < 0.1
    assert transcripts.close(30.0)
    assert threading.get_ident() not in callers


def test_a_message_that_cannot_be_made_costs_only_itself(
    engine: Any, monkeypatch: pytest.MonkeyPatch, transcripts: Transcripts
) -> None:
    monkeypatch.delenv(STRICT_VARIABLE, raising=False)
    transcripts.prompt(context("bad"), lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    tell(transcripts, "good", [user("hello")], assistant("hi"))
    assert transcripts.flush()
    assert texts(engine) == ["hello", "hi"]


def test_a_store_that_is_away_loses_nothing_that_fits(
    engine: Any, transcripts: Transcripts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away = True

    def saved(*arguments: Any) -> int:
        if away:
            raise StoreUnavailableError("locked")
        return save_messages(*arguments)

    monkeypatch.setattr("nla_monitor.transcripts.save_messages", saved)
    monkeypatch.setattr("nla_monitor.transcripts._RETRY_SECONDS", 0.05)
    tell(transcripts, "a", [user("hello")], assistant("hi"))
    assert not transcripts.flush(0.5)
    away = False
    assert transcripts.flush(5.0)
    assert texts(engine) == ["hello", "hi"]
    assert sum("cannot be written" in record.message for record in caplog.records) == 1


def test_memory_is_bounded_and_what_does_not_fit_is_counted(engine: Any) -> None:
    started, go = threading.Event(), threading.Event()

    def hold() -> list[Message]:
        started.set()
        go.wait(10)
        return []

    transcripts = Transcripts(engine, lambda: RUN, Guard(), size=4)
    transcripts.prompt(context("first"), hold)
    assert started.wait(10)
    for number in range(10):
        transcripts.prompt(context(str(number)), lambda: [user("x")])
    go.set()
    assert transcripts.close(10.0)
    assert transcripts.stats.dropped == 6


def test_an_answer_without_its_prompt_is_counted(engine: Any, transcripts: Transcripts) -> None:
    transcripts.answer("nobody", lambda: assistant("hi"))
    assert transcripts.flush()
    assert (texts(engine), transcripts.stats.orphans) == ([], 1)


def test_told_from_many_threads_each_conversation_is_whole(engine: Any, transcripts: Transcripts) -> None:
    def talk(name: str) -> None:
        history: list[Message] = []
        for turn in range(10):
            history.append(user(f"{name} {turn}"))
            tell(transcripts, f"{name}-{turn}", tuple(history), assistant(f"{name} yes {turn}"), conversation=name)
            history.append(assistant(f"{name} yes {turn}"))

    threads = [threading.Thread(target=talk, args=(f"talk-{number}",)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert transcripts.flush(30.0)
    for number in range(8):
        name = f"talk-{number}"
        assert texts(engine, name) == [f"{name}{word} {turn}" for turn in range(10) for word in ("", " yes")]


# -- the store --------------------------------------------------------------------------------------------------------


def test_both_databases_keep_messages(store_url: str) -> None:
    engine = open_engine(store_url)
    odd = Message("user", "nul \x00 and \ud800", tool_calls=({"name": "f", "args": {"x": float("inf")}, "id": None},))
    said = Said("id-1", None, RUN, "talk", "root", "call", None, 0, written=False, created_at=1.0, message=odd)
    assert save_messages(engine, [said]) == 1
    assert save_messages(engine, [said]) == 0
    (found,) = messages_of(engine, RUN, "talk")
    assert found.message.text == "nul \ufffd and \ufffd"
    engine.dispose()


def test_forgetting_takes_messages_along_but_not_those_that_findings_need(store_url: str) -> None:
    engine = open_engine(store_url)
    desk = Desk(engine)
    for name in ("kept", "gone"):
        text = Message("user", name)
        save_messages(
            engine, [Said(name, None, RUN, name, "root", "call", None, 0, written=False, created_at=10.0, message=text)]
        )
    desk.found(desk.sampled("kept", captured_at=10.0))
    desk.read(desk.sampled("gone", captured_at=10.0))
    assert prune(engine, 20.0, dry_run=True).messages == 1
    assert prune(engine, 20.0).messages == 1
    assert texts(engine, "kept") == ["kept"]
    assert texts(engine, "gone") == []
    assert Repository(engine).alerts()
    engine.dispose()
