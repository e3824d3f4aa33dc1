"""Which tool's result a model call reads."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage, ToolMessage
from nla_monitor_langchain.lineage import ToolLedger, ToolResult, result_needles, sequence_step, tool_of_messages


def result(tool: str, output: object, parent: str | None = "seq", step: int | None = None) -> ToolResult:
    return ToolResult(tool, f"run-{tool}", parent, step, result_needles(output))


def read(ledger: ToolLedger, prompt: str, parent: str | None = None, step: int | None = None) -> list[str]:
    return [item.tool for item in ledger.read_by(prompt, parent, step)]


@pytest.mark.parametrize(
    ("output", "prompt", "found"),
    [
        ("12 tests passed", "the tool said: 12 tests passed. go on", True),
        ("12 tests passed", "the tool said nothing", False),
        ("3", "there are 3 files", True),
        ("3", "there are 13 files", False),
        ("", "anything", False),
        ({"rows": 3}, "you got {'rows': 3} back", True),
        ({"rows": 3}, 'you got {"rows": 3} back', True),
        (ToolMessage("all green today", tool_call_id="1"), "log: all green today", True),
        ("x" * 5000, "y" + "x" * 600, True),
        (None, "None of it", True),
    ],
)
def test_a_result_is_found_by_its_text_in_the_prompt(output: Any, prompt: str, found: bool) -> None:
    ledger = ToolLedger()
    ledger.add(result("t", output))
    assert bool(read(ledger, prompt)) is found


def test_an_earlier_step_of_the_same_sequence_is_read_whatever_became_of_its_text() -> None:
    ledger = ToolLedger()
    ledger.add(result("grep", "unseen text", parent="seq", step=1))
    assert read(ledger, "3 rows", parent="seq", step=3) == ["grep"]
    assert read(ledger, "3 rows", parent="seq", step=1) == []
    assert read(ledger, "3 rows", parent="other", step=3) == []
    assert read(ledger, "3 rows", parent="seq", step=None) == []


def test_a_result_is_read_until_a_call_that_read_it_has_ended() -> None:
    ledger = ToolLedger()
    ledger.add(result("a", "result of a"))
    ledger.add(result("b", "result of b"))
    prompt = "result of b, result of a"
    assert read(ledger, prompt) == read(ledger, prompt) == ["a", "b"]
    ledger.consume(ledger.read_by("only result of a", None, None))
    assert read(ledger, prompt) == ["b"]
    ledger.consume(ledger.read_by(prompt, None, None))
    ledger.consume([result("a", "result of a")])
    assert read(ledger, prompt) == []


def test_unread_results_are_bounded() -> None:
    ledger = ToolLedger()
    for number in range(1000):
        ledger.add(result(f"t{number}", f"the result number {number:05}"))
    assert read(ledger, "the result number 00001") == []
    assert read(ledger, "the result number 00999") == ["t999"]


def call(name: str, key: str) -> AIMessage:
    return AIMessage("", tool_calls=[{"name": name, "args": {}, "id": key}])


@pytest.mark.parametrize(
    ("messages", "tool"),
    [
        ([HumanMessage("hi")], None),
        ([HumanMessage("hi"), call("ls", "1"), ToolMessage("a.py", tool_call_id="1")], "ls"),
        ([call("ls", "1"), ToolMessage("a.py", tool_call_id="1", name="list_files")], "list_files"),
        ([call("ls", "1"), ToolMessage("a", tool_call_id="1"), SystemMessage("mind the budget")], "ls"),
        ([call("ls", "1"), ToolMessage("a", tool_call_id="1"), AIMessage("done"), HumanMessage("thanks")], None),
        ([call("a", "1"), ToolMessage("1", tool_call_id="1"), call("b", "2"), ToolMessage("2", tool_call_id="2")], "b"),
        ([ToolMessage("orphan", tool_call_id="9")], None),
    ],
)
def test_a_chat_prompt_reads_the_tool_messages_after_the_models_last_word(
    messages: list[BaseMessage], tool: str | None
) -> None:
    name, call_id = tool_of_messages(messages)
    assert name == tool
    assert call_id == (messages[-1 - isinstance(messages[-1], SystemMessage)].tool_call_id if call_id else None)


@given(st.lists(st.text(max_size=12), max_size=5), st.integers(0, 99))
def test_the_step_is_found_among_any_tags(tags: list[str], step: int) -> None:
    others = [tag for tag in tags if not tag.startswith("seq:step:")]
    assert sequence_step(others) is None
    assert sequence_step([*others, f"seq:step:{step}"]) == step


def test_no_tags_no_step() -> None:
    assert sequence_step(None) is None
