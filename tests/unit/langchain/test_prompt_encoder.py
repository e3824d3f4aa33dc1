"""The ids that a handler computes are those that the model is fed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from nla_monitor_langchain import ChatNLAModel, NLACallbackHandler, prompt_encoder
from nla_monitor_langchain.extract import fingerprint, plain_messages, token_list
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from nla_monitor.errors import ConfigError
from tests.langchain_support import RecordingMonitor, byte_tokenizer, text_pipeline

TALK = [SystemMessage("be brief"), HumanMessage("hello")]


def fed(model: LlamaForCausalLM, call: Any) -> list[list[int]]:
    """Ids of the prefills that ``call`` causes."""
    seen: list[list[int]] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        if kwargs["input_ids"].shape[1] > 1:
            seen.extend(kwargs["input_ids"].tolist())

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        call()
    finally:
        hook.remove()
    return seen


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=40))
def test_a_text_prompt_is_encoded_as_the_pipeline_encodes_it(
    model: LlamaForCausalLM, llm: HuggingFacePipeline, text: str
) -> None:
    assert fed(model, lambda: llm.invoke(text)) == [prompt_encoder(llm).encode_text(text, {})]


@pytest.mark.parametrize(
    "extra",
    [
        {"add_special_tokens": False},
        {"prefix": "system note. "},
        {"truncation": True, "tokenizer_encode_kwargs": {"max_length": 9}},
    ],
)
def test_the_pipelines_own_settings_are_followed(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, extra: Any
) -> None:
    llm = HuggingFacePipeline(pipeline=text_pipeline(model, tokenizer, **extra))
    prompt = "a prompt of some length"
    assert fed(model, lambda: llm.invoke(prompt)) == [prompt_encoder(llm).encode_text(prompt, {})]


def test_settings_of_a_streaming_call_are_followed(
    model: LlamaForCausalLM, llm: HuggingFacePipeline, monitor: RecordingMonitor
) -> None:
    config = {"callbacks": [NLACallbackHandler(monitor, llm=llm)]}
    list(llm.stream("cut this", config=config, pipeline_kwargs={"add_special_tokens": False}))
    assert monitor.stray == []


def test_the_pipeline_kwargs_of_the_constructor_which_langchain_never_applies_are_not_applied(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    pipe = text_pipeline(model, tokenizer)
    llm = HuggingFacePipeline(pipeline=pipe, pipeline_kwargs={"add_special_tokens": False})
    params = {"pipeline_kwargs": llm.pipeline_kwargs}
    assert fed(model, lambda: llm.invoke("hello")) == [prompt_encoder(llm).encode_text("hello", params)]


def test_a_chat_prompt_is_encoded_as_chat_huggingface_encodes_it_with_its_doubled_beginning(
    model: LlamaForCausalLM, llm: HuggingFacePipeline
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<bos>" + tokenizer.chat_template
    chat = ChatHuggingFace(llm=llm, tokenizer=tokenizer)
    (ids,) = fed(model, lambda: chat.invoke(TALK))
    assert ids[:2] == [1, 1]
    assert prompt_encoder(chat).encode_messages(TALK, {}).ids == ids
    plain = prompt_encoder(tokenizer=tokenizer)
    assert plain.encode_messages(TALK, {"_type": "huggingface-chat-wrapper"}).ids == ids


def test_a_tokenizer_alone_encodes_messages_through_its_template(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = prompt_encoder(tokenizer=tokenizer).encode_messages(TALK, {}).ids
    assert tokenizer.decode(ids) == "<|system|>be brief<eos><|user|>hello<eos><|assistant|>"


def test_our_own_chat_model_is_asked_itself(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=2)
    assert [prompt_encoder(chat).encode_messages(TALK, {}).ids] == fed(model, lambda: chat.invoke(TALK))


def test_the_hosts_tokenizer_is_not_touched(model: LlamaForCausalLM) -> None:
    tokenizer = byte_tokenizer()
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=8)
    before = (tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation)
    encoder = prompt_encoder(HuggingFacePipeline(pipeline=text_pipeline(model, tokenizer)))
    encoder.encode_text("hello", {})
    prompt_encoder(tokenizer=tokenizer).encode_text("hello", {})
    assert (tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation) == before
    assert before[0] is not None


def test_a_binding_is_looked_through(llm: HuggingFacePipeline) -> None:
    bound = llm.bind(stop=["x"]).with_config(tags=["t"])
    assert prompt_encoder(bound).encode_text("a", {}) == prompt_encoder(llm).encode_text("a", {})


def test_an_api_model_is_refused_with_what_to_give_instead() -> None:
    with pytest.raises(ConfigError, match=r"FakeListChatModel has no local transformers pipeline.*tokenizer="):
        prompt_encoder(FakeListChatModel(responses=["x"]))


def test_the_wrong_kind_of_prompt_is_an_error(
    llm: HuggingFacePipeline, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match="takes a text prompt"):
        prompt_encoder(llm).encode_messages(TALK, {})
    with pytest.raises(ConfigError, match="takes messages"):
        prompt_encoder(ChatNLAModel(model=model, tokenizer=tokenizer)).encode_text("x", {})


def test_nothing_known_no_encoder() -> None:
    assert prompt_encoder() is None


def test_tool_calls_reach_a_template_with_arguments_as_objects() -> None:
    @tool
    def ls(path: str) -> str:
        """List."""
        return path

    asked = AIMessage("", tool_calls=[{"name": "ls", "args": {"path": "/x"}, "id": "1"}])
    plain = plain_messages([asked, ToolMessage("a.py", tool_call_id="1")])
    assert plain[0]["tool_calls"][0]["function"] == {"name": "ls", "arguments": {"path": "/x"}}
    assert plain[1] == {"role": "tool", "tool_call_id": "1", "content": "a.py"}


def test_the_fingerprint_sees_text_and_kind_but_not_ids() -> None:
    assert fingerprint([HumanMessage("a", id="1")]) == fingerprint([HumanMessage("a", id="2")])
    assert fingerprint([HumanMessage([{"type": "text", "text": "a"}])]) == fingerprint([HumanMessage("a")])
    assert fingerprint([HumanMessage("a")]) != fingerprint([AIMessage("a")])
    assert fingerprint([HumanMessage("a"), HumanMessage("b")]) != fingerprint([HumanMessage("ab")])


def test_ids_are_flat_whatever_the_nesting() -> None:
    assert token_list([[1, 2]]) == token_list([1, 2]) == [1, 2]
    assert token_list([]) == []
