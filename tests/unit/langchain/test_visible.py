"""What people see of a model call reaches the transcript, whatever way the model is called."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_huggingface import HuggingFacePipeline
from nla_monitor_langchain import ChatNLAModel, NLACallbackHandler
from nla_monitor_langchain.visible import visible

from nla_monitor.guard import STRICT_VARIABLE
from nla_monitor.store.engine import open_engine
from nla_monitor.store.messages import Said, messages_of
from nla_monitor.transcripts import Message, Transcripts
from tests.langchain_support import RecordingMonitor, byte_tokenizer, text_pipeline, tiny_llama

RUN = "run-1"


class Monitor(RecordingMonitor):
    """Records sessions, and keeps a transcript."""

    def __init__(self, tokenizer: Any, transcripts: Any) -> None:
        super().__init__(tokenizer)
        self.transcripts = transcripts


@pytest.fixture
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "t.db").write_bytes(request.getfixturevalue("_sqlite_store").read_bytes())
    opened = open_engine(f"sqlite:///{tmp_path / 't.db'}")
    yield opened
    opened.dispose()


@pytest.fixture
def monitor(engine: Any) -> Iterator[Monitor]:
    made = Monitor(byte_tokenizer(), None)
    made.transcripts = Transcripts(engine, lambda: RUN, made.guard)
    yield made
    made.transcripts.close()


@pytest.fixture
def chat(monitor: Monitor) -> ChatNLAModel:
    return ChatNLAModel(model=tiny_llama(), tokenizer=monitor.tokenizer, max_new_tokens=3)


def said(monitor: Monitor, engine: Any, thread: str = "talk") -> list[Said]:
    assert monitor.transcripts.flush()
    return messages_of(engine, RUN, thread)


def config(monitor: Monitor, thread: str = "talk") -> Any:
    return {"callbacks": [NLACallbackHandler(monitor)], "metadata": {"thread_id": thread}}


async def _astream(chat: Any, messages: Any, settings: Any) -> str:
    return "".join([chunk.text async for chunk in chat.astream(messages, settings)])


@pytest.mark.parametrize("how", ["invoke", "stream", "ainvoke", "astream"])
def test_prompt_and_answer_are_kept_however_the_model_is_called(
    chat: ChatNLAModel, monitor: Monitor, engine: Any, how: str
) -> None:
    messages, settings = [SystemMessage("Be brief."), HumanMessage("hello")], config(monitor)
    if how == "invoke":
        told = chat.invoke(messages, settings).text
    elif how == "stream":
        told = "".join(chunk.text for chunk in chat.stream(messages, settings))
    elif how == "ainvoke":
        told = asyncio.run(chat.ainvoke(messages, settings)).text
    else:
        told = asyncio.run(_astream(chat, messages, settings))
    kept = said(monitor, engine)
    assert [(one.message.role, one.written) for one in kept] == [
        ("system", False),
        ("user", False),
        ("assistant", True),
    ]
    assert kept[-1].message.text == told
    (session,) = monitor.sessions
    assert {one.agent_run_id for one in kept} == {session.context.agent_run_id}


def test_a_stream_that_is_given_up_leaves_the_prompt_and_no_answer(
    chat: ChatNLAModel, monitor: Monitor, engine: Any
) -> None:
    stream = chat.stream([HumanMessage("hello")], config(monitor))
    next(iter(stream))
    stream.close()  # type: ignore[attr-defined]  # a generator
    kept = said(monitor, engine)
    assert kept[0].message == Message("user", "hello")
    assert len(kept) <= 2


def test_a_text_models_prompt_is_one_message(monitor: Monitor, engine: Any) -> None:
    pipe = text_pipeline(tiny_llama(), monitor.tokenizer, return_full_text=False)
    llm = HuggingFacePipeline(pipeline=pipe)
    told = llm.invoke("hello", config(monitor))
    kept = said(monitor, engine)
    assert [(one.message.role, one.message.text) for one in kept] == [("prompt", "hello"), ("assistant", told)]


def test_a_fault_in_the_transcript_costs_no_session(
    chat: ChatNLAModel, monitor: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(STRICT_VARIABLE, raising=False)
    real = monitor.transcripts

    class Broken:
        enabled = True

        def prompt(self, *_: Any) -> None:
            raise RuntimeError("a bug of ours")

        answer = prompt

    monitor.transcripts = Broken()
    assert chat.invoke([HumanMessage("hello")], config(monitor)).text
    assert len(monitor.sessions) == 1
    assert monitor.open == []
    assert monitor.guard.faults == {"langchain.transcript": 2}
    monitor.transcripts = real


def test_a_monitor_without_a_transcript_is_no_obstacle(chat: ChatNLAModel, monitor: Monitor, engine: Any) -> None:
    real, monitor.transcripts = monitor.transcripts, None
    assert chat.invoke([HumanMessage("hello")], config(monitor)).text
    monitor.transcripts = real
    assert said(monitor, engine) == []


def test_every_kind_of_message_becomes_visible() -> None:
    call: Any = {"name": "f", "args": {"x": 1}, "id": "call_1", "type": "tool_call"}
    image: Any = [{"type": "text", "text": "look"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    assert visible(HumanMessage(image)) == Message("user", "look")
    assert visible(SystemMessage("s")) == Message("system", "s")
    told = visible(AIMessage("a", tool_calls=[call], name="planner"))
    assert told == Message("assistant", "a", "planner", tool_calls=({"name": "f", "args": {"x": 1}, "id": "call_1"},))
    assert visible(ToolMessage("4", tool_call_id="call_1", name="f")) == Message("tool", "4", "f", "call_1")
