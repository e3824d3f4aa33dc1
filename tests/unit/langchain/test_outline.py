"""Where messages lie in a prompt's tokens: exact, or nothing."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    ChatMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from nla_monitor_langchain.extract import chat_text
from nla_monitor_langchain.outline import Outliner
from transformers import PreTrainedTokenizerFast

from nla_monitor.records import MessageSpan
from tests.langchain_support import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for call in m['tool_calls'] or [] %}\n<tool_call>{{ call['function']['name'] }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(chat=False)
    tokenizer.chat_template = template
    return tokenizer


def asked(name: str, call_id: str, text: str = "") -> AIMessage:
    return AIMessage(text, tool_calls=[{"name": name, "args": {}, "id": call_id}])


def outlined(
    messages: Sequence[BaseMessage], template: str = CHATML, *, special: bool = False
) -> list[tuple[str, str, Any]]:
    """Role, text and call of each span of the prompt."""
    tokenizer = tokenizer_with(template)
    text = chat_text(tokenizer, messages)
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    spans = Outliner(tokenizer).spans(messages, text, ids)
    check_whole(spans, len(ids))
    return [(span.role, tokenizer.decode(ids[span.start : span.end]), span.tool_call_id) for span in spans]


def check_whole(spans: Sequence[MessageSpan], length: int) -> None:
    """One after the other, from the first token on, with no gap; the last is still being written."""
    assert spans[0].start == 0
    assert [span.end for span in spans[:-1]] == [span.start for span in spans[1:]]
    assert spans[-1].end is None
    assert spans[-1].start <= length


def test_a_template_with_control_tokens() -> None:
    messages = [
        SystemMessage("be brief"),
        HumanMessage("what is in it?"),
        asked("open_file", "c1"),
        ToolMessage("three rows", tool_call_id="c1"),
    ]
    assert outlined(messages) == [
        ("system", "<|im_start|>system\nbe brief<|im_end|>\n", None),
        ("user", "<|im_start|>user\nwhat is in it?<|im_end|>\n", None),
        ("assistant", "<|im_start|>assistant\n<tool_call>open_file</tool_call><|im_end|>\n", "c1"),
        ("tool", "<|im_start|>tool\nthree rows<|im_end|>\n", "c1"),
        ("assistant", "<|im_start|>assistant\n", None),
    ]


def test_a_beginning_token_belongs_to_the_first_message() -> None:
    (first, second) = outlined([HumanMessage("hi")], special=True)
    assert first[:2] == ("user", "<bos><|im_start|>user\nhi<|im_end|>\n")
    assert second[0] == "assistant"


def test_a_template_whose_turns_end_differently() -> None:
    messages = [HumanMessage("hi"), AIMessage("ho"), HumanMessage("so")]
    assert [(role, text) for role, text, _ in outlined(messages, INSTRUCT)] == [
        ("user", "[INST] hi"),
        ("assistant", " [/INST] ho</s>"),
        ("user", "[INST] so"),
        ("assistant", " [/INST]"),
    ]


def test_two_calls_in_one_turn_are_nobodys_alone() -> None:
    both = AIMessage("", tool_calls=[{"name": name, "args": {}, "id": name} for name in ("ls", "cat")])
    results = [ToolMessage("one", tool_call_id="ls"), ToolMessage("two", tool_call_id="cat", name="cat file")]
    calls = [(role, call) for role, _, call in outlined([HumanMessage("go"), both, *results])]
    assert calls == [("user", None), ("assistant", None), ("tool", "ls"), ("tool", "cat"), ("assistant", None)]


def test_tools_are_named_by_their_message_or_by_the_call() -> None:
    messages = [asked("ls", "1"), ToolMessage("a", tool_call_id="1"), ToolMessage("b", tool_call_id="2", name="cat")]
    tokenizer = tokenizer_with(CHATML)
    text = chat_text(tokenizer, messages)
    spans = Outliner(tokenizer).spans(messages, text, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert [span.tool for span in spans] == [None, "ls", "cat", None]


def test_roles_of_one_s_own_are_kept() -> None:
    assert [role for role, _, _ in outlined([ChatMessage("hi", role="critic")])] == ["critic", "assistant"]


def test_words_that_a_template_leaves_out_make_no_neighbour_longer() -> None:
    template = CHATML.replace("<|im_start|>{{", "{% if m['role'] != 'system' %}<|im_start|>{{", 1).replace(
        "<|im_end|>\n{% endfor %}", "<|im_end|>\n{% endif %}{% endfor %}", 1
    )
    tokenizer = tokenizer_with(template)
    messages = [SystemMessage("left out"), HumanMessage("hi")]
    text = chat_text(tokenizer, messages)
    spans = Outliner(tokenizer).spans(messages, text, tokenizer(text, add_special_tokens=False)["input_ids"])
    assert [(span.role, span.start) for span in spans] == [
        ("user", len("<|im_start|>user\n")),
        ("assistant", len("<|im_start|>user\nhi<|im_end|>\n")),
    ]


@pytest.mark.parametrize("case", ["other tokens", "a slow tokenizer", "no tokenizer"])
def test_what_is_not_certain_is_not_said(case: str) -> None:
    tokenizer = tokenizer_with(CHATML)
    messages = [HumanMessage("hi")]
    text = chat_text(tokenizer, messages)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if case == "other tokens":
        assert Outliner(tokenizer).spans(messages, text, [*ids, 7]) == ()
    elif case == "a slow tokenizer":

        class Slow:
            is_fast = False

        assert Outliner(Slow()).spans(messages, text, ids) == ()
    else:
        assert Outliner(None).spans(messages, text, ids) == ()


def test_without_a_template_lines_are_messages() -> None:
    tokenizer = byte_tokenizer(chat=False)
    messages = [HumanMessage("one\ntwo"), ToolMessage("three", tool_call_id="7"), AIMessage("four")]
    text = "\n".join(message.text for message in messages)
    ids = tokenizer(text)["input_ids"]
    spans = Outliner(tokenizer).spans(messages, text, ids)
    found = [tokenizer.decode(ids[span.start : span.end]) for span in spans]
    assert found == ["<bos>one\ntwo\n", "three\n", "four", ""]


WORDS = st.text(st.sampled_from("ab hi\n.é user"), min_size=1, max_size=12).map(str.strip).filter(bool)
MESSAGES = st.lists(
    st.one_of(
        WORDS.map(HumanMessage),
        WORDS.map(AIMessage),
        WORDS.map(lambda text: ToolMessage(text, tool_call_id=text)),
        st.just(asked("ls", "c")),
    ),
    min_size=1,
    max_size=8,
)


@functools.cache
def _chatml() -> tuple[PreTrainedTokenizerFast, Outliner]:
    tokenizer = tokenizer_with(CHATML)
    return tokenizer, Outliner(tokenizer)


@settings(deadline=None, max_examples=60)
@given(MESSAGES)
def test_every_token_of_any_conversation_is_its_own_messages(messages: list[BaseMessage]) -> None:
    """Whatever is said, also what looks like a role or repeats another message: the spans are the template's turns."""
    tokenizer, outliner = _chatml()
    text = chat_text(tokenizer, messages)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spans = outliner.spans(messages, text, ids)
    turns = [f"<|im_start|>{turn}" for turn in text.split("<|im_start|>")[1:]]
    assert [tokenizer.decode(ids[span.start : span.end]) for span in spans] == turns
    assert all(one.end == other.start for one, other in pairwise(spans))
