"""What other people's spans say, in either vocabulary; what they do not say, or say wrongly, is not known."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nla_monitor_opentelemetry import attributes as told
from nla_monitor_opentelemetry import visible
from nla_monitor_opentelemetry.attributes import Kind
from nla_monitor_opentelemetry.prompts import PromptEncoder

from tests.langchain_support import byte_tokenizer

GEN_AI = {
    "gen_ai.system_instructions": json.dumps([{"type": "text", "content": "be brief"}]),
    "gen_ai.input.messages": json.dumps(
        [
            {"role": "user", "parts": [{"type": "text", "content": "how many?"}]},
            {"role": "assistant", "parts": [{"type": "tool_call", "id": "c1", "name": "count", "arguments": {"t": 1}}]},
            {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": {"rows": 3}}]},
        ]
    ),
    "gen_ai.output.messages": json.dumps([{"role": "assistant", "parts": [{"type": "text", "content": "three"}]}]),
}
OPENINFERENCE = {
    "llm.input_messages.0.message.role": "system",
    "llm.input_messages.0.message.content": "be brief",
    "llm.input_messages.1.message.role": "user",
    "llm.input_messages.1.message.contents.0.message_content.text": "how many?",
    "llm.input_messages.2.message.role": "assistant",
    "llm.input_messages.2.message.tool_calls.0.tool_call.id": "c1",
    "llm.input_messages.2.message.tool_calls.0.tool_call.function.name": "count",
    "llm.input_messages.2.message.tool_calls.0.tool_call.function.arguments": '{"t": 1}',
    "llm.input_messages.3.message.role": "tool",
    "llm.input_messages.3.message.content": '{"rows": 3}',
    "llm.input_messages.3.message.tool_call_id": "c1",
    "llm.output_messages.0.message.role": "assistant",
    "llm.output_messages.0.message.content": "three",
}


@pytest.mark.parametrize("said", [GEN_AI, OPENINFERENCE], ids=["gen_ai", "openinference"])
def test_the_same_conversation_in_both(said: dict[str, Any]) -> None:
    """Roles, texts, calls and the tool that a result is of."""
    messages = told.prompt_messages(said)
    assert [(one.role, one.text) for one in messages] == [
        ("system", "be brief"),
        ("user", "how many?"),
        ("assistant", ""),
        ("tool", '{"rows": 3}'),
    ]
    assert messages[2].calls == (("c1", "count", {"t": 1}),)
    read = told.result_read(messages)
    assert read is not None
    assert (read.tool, read.tool_call_id) == ("count", "c1")
    assert told.result_read(messages[:2]) is None
    assert told.answer_text(said) == "three"


@pytest.mark.parametrize(
    ("said", "scope", "kind"),
    [
        ({"gen_ai.operation.name": "chat"}, "", Kind.MODEL),
        ({"gen_ai.operation.name": "text_completion"}, "", Kind.MODEL),
        ({"gen_ai.operation.name": "execute_tool"}, "", Kind.TOOL),
        ({"gen_ai.operation.name": "invoke_agent"}, "", Kind.AGENT),
        ({"gen_ai.operation.name": "embeddings"}, "", Kind.OTHER),
        ({"gen_ai.request.model": "m"}, "", Kind.MODEL),
        ({"gen_ai.conversation.id": "c"}, "", Kind.OTHER),
        ({"openinference.span.kind": "LLM"}, "", Kind.MODEL),
        ({"openinference.span.kind": "tool"}, "", Kind.TOOL),
        ({"openinference.span.kind": "CHAIN"}, "", Kind.AGENT),
        ({"openinference.span.kind": "RETRIEVER"}, "", Kind.OTHER),
        ({}, "openinference.instrumentation.langchain", Kind.OTHER),
        ({"http.request.method": "GET"}, "opentelemetry.instrumentation.fastapi", None),
        ({}, "", None),
    ],
)
def test_kinds(said: dict[str, Any], scope: str, kind: Kind | None) -> None:
    assert told.kind_of(said, scope) is kind


@pytest.mark.parametrize("said", [GEN_AI, OPENINFERENCE], ids=["gen_ai", "openinference"])
def test_the_visible_side(said: dict[str, Any]) -> None:
    """As the transcript keeps it."""
    read = visible.prompt(said)
    assert [(one.role, one.text, one.name, one.tool_call_id) for one in read] == [
        ("system", "be brief", None, None),
        ("user", "how many?", None, None),
        ("assistant", "", None, None),
        ("tool", '{"rows": 3}', "count", "c1"),
    ]
    assert read[2].tool_calls == ({"name": "count", "args": {"t": 1}, "id": "c1"},)
    answered = visible.answer(said)
    assert answered is not None
    assert (answered.role, answered.text) == ("assistant", "three")
    assert [one.text for one in visible.prompt({"llm.prompts": ("hello",)})] == ["hello"]
    assert visible.prompt({}) == []
    assert visible.answer({}) is None


def test_names() -> None:
    """The first that is said counts; an empty one is none."""
    assert told.conversation_of({"gen_ai.conversation.id": "", "session.id": "s"}) == "s"
    assert told.agent_of({"agent.name": "a", "gen_ai.agent.name": "g"}) == "g"
    assert told.node_of({"graph.node.id": "n"}) == "n"
    assert told.tool_of({"tool.name": "t"}) == "t"
    assert told.tool_call_of({"gen_ai.tool.call.id": "c"}) == "c"
    assert told.model_of({}) is None


def test_prompts_of_text() -> None:
    """One prompt is a prompt; of several no row is known to be whose."""
    assert told.prompt_text({"llm.prompts": ("hello",)}) == "hello"
    assert told.prompt_text({"llm.prompts": ("a", "b")}) is None
    assert told.prompt_text({"llm.prompts.0.prompt.text": "hello"}) == "hello"
    assert told.prompt_text({"llm.prompts.0.prompt.text": "a", "llm.prompts.1.prompt.text": "b"}) is None
    assert told.prompt_text({}) is None


def test_answers_that_are_more_than_text_are_not_known() -> None:
    """A tool call is rendered as the model's own template wills: its tokens are not these."""
    call = [{"role": "assistant", "parts": [{"type": "tool_call", "id": "c", "name": "n", "arguments": {}}]}]
    assert told.answer_text({"gen_ai.output.messages": json.dumps(call)}) is None
    assert told.answer_text({"output.value": "{}", "output.mime_type": "application/json"}) is None
    assert told.answer_text({"output.value": "three"}) == "three"
    assert told.answer_text({"llm.choices.0.completion.text": "three"}) == "three"
    assert told.answer_text({}) is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "parts", "type", "content", "id", "name", "response"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(value=json_values, raw=st.text(max_size=20), encode=st.booleans())
def test_whatever_stands_there_nothing_is_raised(value: Any, raw: str, encode: bool) -> None:
    """Instrumentation writes what it likes; we read it or we do not."""
    for content in (json.dumps(value) if encode else value, raw):
        said = {
            "gen_ai.input.messages": content,
            "gen_ai.output.messages": content,
            "gen_ai.system_instructions": content,
            "llm.input_messages.0.message.content": content,
            "llm.input_messages.x.message.role": content,
            "llm.prompts": content,
        }
        told.prompt_messages(said)
        told.answer_text(said)
        told.prompt_text(said)
        told.kind_of(said)


def test_prompts_as_tokens() -> None:
    """Messages through the template, text as it is; without either nothing. The host's tokenizer is left alone."""
    tokenizer = byte_tokenizer()
    encoder = PromptEncoder(tokenizer)
    assert encoder.encode({"llm.prompts": ("hello",)}) == tokenizer("hello")["input_ids"]
    said = {"llm.input_messages.0.message.role": "user", "llm.input_messages.0.message.content": "hello"}
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert encoder.encode(said) == list(expected["input_ids"])
    assert encoder.encode({}) is None
    assert PromptEncoder(byte_tokenizer(chat=False)).encode(said) is None
