"""Handlers that nobody passes around: ``with monitor.langchain():`` and ``NLA_MONITOR_LANGCHAIN=1``."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import RunnableLambda
from langchain_huggingface import HuggingFacePipeline
from nla_monitor_langchain import ChatNLAModel, NLACallbackHandler, watching
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from nla_monitor import attached
from tests.langchain_support import RecordingMonitor

VARIABLE = attached.LANGCHAIN_VARIABLE


@pytest.fixture
def announced(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RecordingMonitor]:
    """A monitor that is attached, in a process whose environment asks for handlers."""
    monkeypatch.setenv(VARIABLE, "1")
    monitor = RecordingMonitor(tokenizer)
    attached.announce(monitor)
    with monitor.watching(model):
        yield monitor
    attached.withdraw(monitor)


@pytest.mark.parametrize("how", ["invoke", "stream", "batch", "ainvoke", "astream", "abatch"])
def test_every_run_inside_the_block_is_watched(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monitor: RecordingMonitor, how: str
) -> None:
    chat = ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=3)
    chain = RunnableLambda(lambda text: text) | chat

    async def drain() -> None:
        async for _ in chain.astream("hello"):
            pass

    with watching(monitor) as handler:
        {
            "invoke": lambda: chain.invoke("hello"),
            "stream": lambda: list(chain.stream("hello")),
            "batch": lambda: chain.batch(["hello", "hello you"]),
            "ainvoke": lambda: asyncio.run(chain.ainvoke("hello")),
            "astream": lambda: asyncio.run(drain()),
            "abatch": lambda: asyncio.run(chain.abatch(["hello", "hello you"])),
        }[how]()
    expected = 2 if "batch" in how else 1
    assert [session.forwards for session in monitor.sessions] == [1] * expected
    assert all(session.context.root_run_id != session.context.agent_run_id for session in monitor.sessions)
    assert (handler.stats.open_calls, handler.stats.open_runs) == (0, 0)
    chain.invoke("after the block")
    assert len(monitor.sessions) == expected


def test_a_handler_given_besides_takes_no_sample_twice(llm: HuggingFacePipeline, monitor: RecordingMonitor) -> None:
    with watching(monitor, llm=llm):
        llm.invoke("hello", {"callbacks": [NLACallbackHandler(monitor, llm=llm)]})
    assert [session.forwards for session in monitor.sessions] == [1]


def test_blocks_of_two_monitors_nest(llm: HuggingFacePipeline, model: LlamaForCausalLM) -> None:
    outer, inner = RecordingMonitor(), RecordingMonitor()
    with watching(outer, llm=llm):
        llm.invoke("one")
        with watching(inner, llm=llm):
            llm.invoke("two")
        llm.invoke("three")
    assert (len(outer.sessions), len(inner.sessions)) == (3, 1)


def test_another_thread_and_another_task_are_not_inside(llm: HuggingFacePipeline, monitor: RecordingMonitor) -> None:
    """What runs beside the block belongs to somebody else."""
    inside, done = threading.Event(), threading.Event()

    def elsewhere() -> None:
        inside.wait(10)
        llm.invoke("not ours")
        done.set()

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(elsewhere)
        with watching(monitor, llm=llm):
            inside.set()
            assert done.wait(30)
        job.result()
    assert monitor.sessions == []


def test_an_error_inside_the_block_comes_out_and_ends_it(llm: HuggingFacePipeline, monitor: RecordingMonitor) -> None:
    with pytest.raises(ZeroDivisionError), watching(monitor, llm=llm):
        raise ZeroDivisionError
    llm.invoke("after")
    assert monitor.sessions == []


def test_the_variable_watches_every_run_of_the_process(llm: HuggingFacePipeline, announced: RecordingMonitor) -> None:
    def elsewhere() -> None:
        llm.invoke("in another thread")

    llm.invoke("hello")
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert [session.forwards for session in announced.sessions] == [1, 1]
    llm.invoke("with a handler besides", {"callbacks": [NLACallbackHandler(announced)]})
    assert [session.forwards for session in announced.sessions] == [1, 1, 1]


@pytest.mark.parametrize("value", ["", "0", "false", None])
def test_without_the_variable_nothing_is_watched(
    llm: HuggingFacePipeline, announced: RecordingMonitor, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv(VARIABLE)
    else:
        monkeypatch.setenv(VARIABLE, value)
    llm.invoke("hello")
    assert announced.sessions == []


def test_a_closed_monitor_is_left_alone(llm: HuggingFacePipeline, announced: RecordingMonitor) -> None:
    other = RecordingMonitor(announced.tokenizer)
    attached.announce(other)
    llm.invoke("both")
    attached.withdraw(other)
    llm.invoke("one")
    assert (len(announced.sessions), len(other.sessions)) == (2, 1)
    assert list(attached.attached()) == [announced]


def test_the_variable_with_nobody_attached_harms_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    assert FakeListChatModel(responses=["fine"]).invoke("hi").content == "fine"


def test_a_missing_langchain_is_said_and_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sys

    monkeypatch.setenv(VARIABLE, "1")
    monkeypatch.setitem(sys.modules, "langchain_core", None)
    for name in [name for name in sys.modules if name.split(".")[0] == "nla_monitor_langchain"]:
        monkeypatch.delitem(sys.modules, name)
    monitor: Any = RecordingMonitor()
    attached.announce(monitor)
    attached.withdraw(monitor)
    assert f"{VARIABLE} is set" in caplog.text
    assert "pip install" in caplog.text
