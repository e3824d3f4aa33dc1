"""A local transformers model as a LangChain chat model."""

from __future__ import annotations

import asyncio
import json
import uuid
from typing import Any

import pytest
import torch
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.tools import tool
from nla_monitor_langchain import ChatNLAModel, NLACallbackHandler
from pydantic import ValidationError
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.langchain_support import RecordingMonitor, byte_tokenizer, tiny_llama

TALK = [SystemMessage("be brief"), HumanMessage("hello")]


@pytest.fixture
def chat(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> ChatNLAModel:
    return ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=12)


def reference(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: list[int], count: int) -> str:
    """Greedy text of the plain model, token by token, without a cache."""
    ids = list(ids)
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_it_writes_what_the_model_writes_greedily(
    chat: ChatNLAModel, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    answer = chat.invoke(TALK)
    ids = tokenizer("<|system|>be brief<eos><|user|>hello<eos><|assistant|>", add_special_tokens=False)["input_ids"]
    assert answer.content == reference(model, tokenizer, ids, 12)
    assert answer.usage_metadata == {"input_tokens": len(ids), "output_tokens": 12, "total_tokens": len(ids) + 12}
    assert answer.response_metadata["finish_reason"] == "length"


def test_streaming_and_async_give_the_same_text(chat: ChatNLAModel) -> None:
    async def collect() -> list[AIMessageChunk]:
        return [chunk async for chunk in chat.astream(TALK)]

    whole = chat.invoke(TALK)
    chunks = list(chat.stream(TALK))
    for pieces in (chunks, asyncio.run(collect())):
        assert "".join(piece.content for piece in pieces) == whole.content
        assert pieces[-1].usage_metadata == whole.usage_metadata
    assert asyncio.run(chat.ainvoke(TALK)).content == whole.content
    assert [item.content for item in chat.batch([TALK, TALK])] == [whole.content] * 2


def test_a_stop_text_ends_the_completion_and_is_not_part_of_it(chat: ChatNLAModel) -> None:
    text = chat.invoke(TALK).content
    stop = text[3:5]
    expected = text[: text.index(stop)]
    answer = chat.invoke(TALK, stop=[stop])
    assert answer.content == expected
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] < 12
    assert "".join(piece.content for piece in chat.stream(TALK, stop=[stop])) == expected
    assert chat.model_copy(update={"stop": [stop]}).invoke(TALK).content == expected


def test_sampling_repeats_with_a_seed_and_leaves_the_hosts_random_state_alone(chat: ChatNLAModel) -> None:
    hot = chat.model_copy(update={"temperature": 2.0, "seed": 5})
    before = torch.get_rng_state()
    first = hot.invoke(TALK).content
    assert hot.invoke(TALK).content == first
    assert hot.invoke(TALK, seed=6).content != first
    assert chat.invoke(TALK, temperature=2.0, seed=5).content == first
    assert torch.equal(before, torch.get_rng_state())


def test_a_call_may_shorten_the_completion(chat: ChatNLAModel) -> None:
    assert chat.invoke(TALK, max_new_tokens=3).usage_metadata["output_tokens"] == 3


def test_a_tokenizer_without_a_template_gets_the_contents_or_the_given_format(model: LlamaForCausalLM) -> None:
    bare = byte_tokenizer(chat=False)
    chat = ChatNLAModel(model=model, tokenizer=bare)
    assert bare.decode(chat.prompt_ids(TALK), skip_special_tokens=True) == "be brief\nhello"
    chat = ChatNLAModel(model=model, tokenizer=bare, prompt_format=lambda messages: f"Q: {messages[-1].text}\nA:")
    assert bare.decode(chat.prompt_ids(TALK), skip_special_tokens=True) == "Q: hello\nA:"


def test_the_end_token_ends_a_completion(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama()
    ids = ChatNLAModel(model=model, tokenizer=tokenizer).prompt_ids(TALK)
    with torch.no_grad():
        model.generation_config.eos_token_id = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    answer = ChatNLAModel(model=model, tokenizer=tokenizer).invoke(TALK)
    assert answer.usage_metadata["output_tokens"] == 1
    assert answer.response_metadata["finish_reason"] == "stop"


@tool
def ls(path: str) -> str:
    """List files."""
    return path


def parse(text: str) -> list[dict]:
    return [{"name": "ls", "args": {"path": "/"}, "id": "call-1", "type": "tool_call"}]


def test_the_parser_makes_tool_calls_also_when_streaming(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    chat = ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=3, tool_parser=parse)
    expected = [{"name": "ls", "args": {"path": "/"}, "id": "call-1", "type": "tool_call"}]
    assert chat.invoke(TALK).tool_calls == expected
    whole = None
    for chunk in chat.stream(TALK):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls == expected


def test_an_error_of_the_parser_reaches_the_caller(chat: ChatNLAModel) -> None:
    broken = chat.model_copy(update={"tool_parser": json.loads})
    with pytest.raises(json.JSONDecodeError):
        broken.invoke(TALK)


def test_bound_tools_reach_the_template(model: LlamaForCausalLM) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for t in tools %}[{{ t['function']['name'] }}]{% endfor %}" + tokenizer.chat_template
    chat = ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=2)
    bound = chat.bind_tools([ls])
    ids = chat.prompt_ids(TALK, tools=bound.kwargs["tools"])
    assert tokenizer.decode(ids).startswith("[ls]<|system|>")
    monitor = RecordingMonitor()
    with monitor.watching(model):
        bound.invoke(TALK, {"callbacks": [NLACallbackHandler(monitor)]})
    assert monitor.sessions[0].seen == [ids]


def test_its_session_is_opened_in_the_thread_that_generates_and_only_there(
    chat: ChatNLAModel, model: LlamaForCausalLM
) -> None:
    monitor = RecordingMonitor()
    run_ids = [uuid.uuid4() for _ in range(2)]
    with monitor.watching(model):
        chat.invoke(TALK, {"callbacks": [NLACallbackHandler(monitor)], "run_id": run_ids[0]})
        list(chat.stream(TALK, {"callbacks": [NLACallbackHandler(monitor)], "run_id": run_ids[1]}))
        model(input_ids=torch.tensor([[5, 6, 7]]))
    assert [monitor.session(run).forwards for run in run_ids] == [1, 1]
    assert len(monitor.sessions) == 2
    assert monitor.stray == [[5, 6, 7]]
    assert monitor.sessions[0].thread != monitor.sessions[1].thread


class _Streams(BaseCallbackHandler):
    """A handler that makes LangChain stream inside invoke, as LangGraph's message streaming does."""

    def __init__(self) -> None:
        self.text = ""

    def on_llm_new_token(self, token: Any, **kwargs: Any) -> None:
        self.text += token

    def tap_output_aiter(self, run_id: Any, output: Any) -> Any:
        return output

    def tap_output_iter(self, run_id: Any, output: Any) -> Any:
        return output


def test_streaming_inside_invoke_finds_its_run_too(chat: ChatNLAModel, model: LlamaForCausalLM) -> None:
    from langchain_core.tracers._streaming import _StreamingCallbackHandler

    class Streams(_Streams, _StreamingCallbackHandler):
        pass

    monitor, run_id, witness = RecordingMonitor(), uuid.uuid4(), Streams()
    with monitor.watching(model):
        answer = chat.invoke(TALK, {"callbacks": [NLACallbackHandler(monitor), witness], "run_id": run_id})
    assert witness.text == answer.content
    assert (monitor.session(run_id).forwards, monitor.stray) == (1, [])


def test_events_of_an_async_graph_find_their_runs(chat: ChatNLAModel, model: LlamaForCausalLM) -> None:
    monitor = RecordingMonitor()

    async def run() -> set[str]:
        config = {"callbacks": [NLACallbackHandler(monitor)]}
        return {event["run_id"] async for event in chat.astream_events(TALK, config, version="v2")}

    with monitor.watching(model):
        runs = asyncio.run(run())
    assert {session.context.agent_run_id for session in monitor.sessions} == runs
    assert monitor.stray == []


def test_two_monitors_each_get_a_session(chat: ChatNLAModel, model: LlamaForCausalLM) -> None:
    monitors = [RecordingMonitor(), RecordingMonitor()]
    chat.invoke(TALK, {"callbacks": [NLACallbackHandler(monitor) for monitor in monitors]})
    assert [len(monitor.sessions) for monitor in monitors] == [1, 1]


def test_a_monitor_of_its_own_needs_no_handler(chat: ChatNLAModel, model: LlamaForCausalLM) -> None:
    monitor = RecordingMonitor()
    own = chat.model_copy(update={"monitor": monitor})
    with monitor.watching(model):
        own.invoke(TALK)
        list(own.stream(TALK))
        own.invoke(TALK, {"callbacks": [NLACallbackHandler(monitor)], "run_id": uuid.UUID(int=1)})
    assert [session.forwards for session in monitor.sessions] == [1, 1, 1]
    assert monitor.sessions[2].context.agent_run_id == str(uuid.UUID(int=1))
    assert monitor.open == []


def test_a_cached_answer_is_no_forward_pass_and_is_counted(chat: ChatNLAModel, model: LlamaForCausalLM) -> None:
    from langchain_core.caches import InMemoryCache

    monitor = RecordingMonitor()
    handler = NLACallbackHandler(monitor)
    handler._tracker._settle_seconds = 0.0
    cached = chat.model_copy(update={"cache": InMemoryCache()})
    with monitor.watching(model):
        for _ in range(3):
            cached.invoke(TALK, {"callbacks": [handler]})
    assert len(monitor.sessions) == 1
    assert handler.stats.without_activations == {"nla-chat": 2}


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"max_new_tokens": 0}, {"top_p": 1.5}, {"max_tokens": 5}], ids=str
)
def test_settings_out_of_range_or_unknown_are_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: dict[str, object]
) -> None:
    with pytest.raises(ValidationError):
        ChatNLAModel(model=model, tokenizer=tokenizer, **settings)


def test_an_error_in_the_model_reaches_the_caller_and_leaves_nothing_open(
    chat: ChatNLAModel, model: LlamaForCausalLM
) -> None:
    monitor = RecordingMonitor()
    handler = NLACallbackHandler(monitor)
    hook = model.register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError("out of memory")))
    try:
        for attempt in (chat.invoke, lambda *args: list(chat.stream(*args))):
            with pytest.raises(MemoryError):
                attempt(TALK, {"callbacks": [handler]})
    finally:
        hook.remove()
    assert (monitor.open, handler.stats.open_calls) == ([], 0)
