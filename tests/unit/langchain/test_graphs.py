"""LangGraph: every way of calling, nested graphs, parallel branches, retries, cancellations; and faults everywhere."""

from __future__ import annotations

import asyncio
import operator
import threading
import uuid
from collections import Counter
from typing import Annotated, Any, TypedDict

import pytest
import torch
from langchain_core.messages import AIMessage, HumanMessage, ToolCall
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.tools import tool
from langgraph.errors import NodeCancelledError
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from langgraph.types import RetryPolicy
from nla_monitor_langchain import ChatNLAModel, NLACallbackHandler
from nla_monitor_langchain.tracker import ModelCall, Prompt, Tracker, tracker_for
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from nla_monitor.records import AgentContext
from tests.langchain_support import RecordingMonitor, Session, tiny_llama

EVENTS = (
    *("on_llm_start", "on_chat_model_start", "on_llm_end", "on_llm_error", "on_chain_start", "on_chain_end"),
    *("on_chain_error", "on_tool_start", "on_tool_end", "on_tool_error"),
)


@tool
def look_up(word: str) -> str:
    """Look a word up."""
    return f"{word} is a word of the dictionary"


@pytest.fixture
def chat(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> ChatNLAModel:
    return ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=3)


def tool_agent(chat: ChatNLAModel, calls: int = 1) -> Any:
    """Asks for the tool ``calls`` times, then answers."""

    def script(state: MessagesState, answer: AIMessage) -> dict[str, Any]:
        said = sum(isinstance(message, AIMessage) for message in state["messages"])
        if said >= calls:
            return {"messages": [answer]}
        wanted = ToolCall(name="look_up", args={"word": "dog"}, id=f"call-{uuid.uuid4()}", type="tool_call")
        return {"messages": [AIMessage(answer.text, tool_calls=[wanted], id=answer.id)]}

    def speak(state: MessagesState) -> dict[str, Any]:
        return script(state, chat.invoke(state["messages"]))

    async def aspeak(state: MessagesState) -> dict[str, Any]:
        return script(state, await chat.ainvoke(state["messages"]))

    graph = StateGraph(MessagesState)
    graph.add_node("speak", RunnableLambda(speak, aspeak))
    graph.add_node("tools", ToolNode([look_up]))
    graph.add_edge(START, "speak")
    graph.add_conditional_edges("speak", lambda state: "tools" if state["messages"][-1].tool_calls else END)
    graph.add_edge("tools", "speak")
    return graph.compile()


def asked(text: str = "what is a dog?") -> dict[str, Any]:
    return {"messages": [HumanMessage(text)]}


def config_of(handler: NLACallbackHandler, thread: str = "t1", **more: Any) -> RunnableConfig:
    config: RunnableConfig = {
        "callbacks": [handler],
        "run_id": uuid.uuid4(),
        "configurable": {"thread_id": thread},
    }
    return {**config, **more}  # type: ignore[typeddict-item]


def check_idle(handler: NLACallbackHandler, monitor: RecordingMonitor) -> None:
    stats = handler.stats
    assert (stats.open_calls, stats.open_runs, monitor.open, monitor.stray) == (0, 0, [], [])


async def _astream(graph: Any, *args: Any) -> None:
    async for _ in graph.astream(*args):
        pass


@pytest.mark.parametrize("how", ["invoke", "stream", "ainvoke", "astream", "batch", "abatch"])
def test_every_way_of_calling_a_graph(chat: ChatNLAModel, monitor: RecordingMonitor, how: str) -> None:
    graph, handler = tool_agent(chat), NLACallbackHandler(monitor)
    config = config_of(handler)
    if "batch" in how:
        del config["run_id"]  # of one run only
    {
        "invoke": lambda: graph.invoke(asked(), config),
        "stream": lambda: list(graph.stream(asked(), config)),
        "ainvoke": lambda: asyncio.run(graph.ainvoke(asked(), config)),
        "astream": lambda: asyncio.run(_astream(graph, asked(), config)),
        "batch": lambda: graph.batch([asked(), asked("what is a cat?")], config),
        "abatch": lambda: asyncio.run(graph.abatch([asked(), asked("what is a cat?")], config)),
    }[how]()
    runs = 2 if "batch" in how else 1
    assert Counter(session.forwards for session in monitor.sessions) == {1: 2 * runs}
    contexts = [session.context for session in monitor.sessions]
    assert len({context.root_run_id for context in contexts}) == runs
    assert {(context.node, context.conversation_id) for context in contexts} == {("speak", "t1")}
    assert Counter(context.tool for context in contexts) == {None: runs, "look_up": runs}
    assert all((context.tool_call_id is None) == (context.tool is None) for context in contexts)
    check_idle(handler, monitor)


def test_the_call_that_asked_for_a_tool_is_known(chat: ChatNLAModel, monitor: RecordingMonitor) -> None:
    """By the id of the tool call, for whoever decides about the tool."""
    parsed = chat.model_copy(update={"tool_parser": lambda _: [ToolCall(name="look_up", args={}, id="call-7")]})
    handler = NLACallbackHandler(monitor)
    parsed.invoke("hi", config_of(handler))
    assert tracker_for(monitor).writer_of("call-7") == monitor.sessions[0].context.agent_run_id
    assert tracker_for(monitor).writer_of("call-8") is None


def test_a_nested_graph_belongs_to_the_outermost_run(chat: ChatNLAModel, monitor: RecordingMonitor) -> None:
    inner, handler = tool_agent(chat), NLACallbackHandler(monitor)
    outer = StateGraph(MessagesState)
    outer.add_node("sub", inner)
    outer.add_node(
        "call", lambda state: {"messages": inner.invoke({"messages": state["messages"][:1]})["messages"][1:]}
    )
    outer.add_edge(START, "sub")
    outer.add_edge("sub", "call")
    outer.add_edge("call", END)
    config = config_of(handler)
    outer.compile().invoke(asked(), config)
    assert len(monitor.sessions) == 4
    assert {session.context.root_run_id for session in monitor.sessions} == {str(config["run_id"])}
    assert {session.context.node for session in monitor.sessions} == {"speak"}
    check_idle(handler, monitor)


class Branches(TypedDict):
    """What parallel branches write to."""

    texts: Annotated[list[str], operator.add]


def test_parallel_branches_keep_apart(chat: ChatNLAModel, monitor: RecordingMonitor) -> None:
    graph, handler = StateGraph(Branches), NLACallbackHandler(monitor)
    for name in ("left", "middle", "right"):

        def speak(_: Branches, name: str = name) -> dict[str, Any]:
            return {"texts": [name + chat.invoke("the same words").text]}

        graph.add_node(name, speak)
        graph.add_edge(START, name)
        graph.add_edge(name, END)
    config = config_of(handler)
    found = graph.compile().invoke({"texts": []}, config)
    assert len(found["texts"]) == 3
    assert Counter((session.context.node, session.forwards) for session in monitor.sessions) == {
        ("left", 1): 1,
        ("middle", 1): 1,
        ("right", 1): 1,
    }
    check_idle(handler, monitor)


def test_a_retried_node_has_a_run_for_each_attempt(chat: ChatNLAModel, monitor: RecordingMonitor) -> None:
    handler, tries = NLACallbackHandler(monitor), []

    def shaky(state: MessagesState) -> dict[str, Any]:
        answer = chat.invoke(state["messages"])
        tries.append(answer)
        if len(tries) < 3:
            raise ConnectionError("try again")
        return {"messages": [answer]}

    graph = StateGraph(MessagesState)
    graph.add_node("shaky", shaky, retry_policy=RetryPolicy(max_attempts=3, initial_interval=0.01))
    graph.add_edge(START, "shaky")
    graph.add_edge("shaky", END)
    config = config_of(handler)
    graph.compile().invoke(asked(), config)
    assert [session.forwards for session in monitor.sessions] == [1, 1, 1]
    assert len({session.context.agent_run_id for session in monitor.sessions}) == 3
    assert {session.context.root_run_id for session in monitor.sessions} == {str(config["run_id"])}
    check_idle(handler, monitor)


def test_a_runnables_own_retry_and_fallback(chat: ChatNLAModel, monitor: RecordingMonitor) -> None:
    handler, failures = NLACallbackHandler(monitor), iter([True, False, True])

    def fragile(text: str) -> str:
        answer = chat.invoke(text)
        if next(failures):
            raise ConnectionError("no")
        return answer.text

    RunnableLambda(fragile).with_retry(wait_exponential_jitter=False).invoke("hi", config_of(handler))
    fallback = RunnableLambda(lambda _: "given up")
    assert RunnableLambda(fragile).with_fallbacks([fallback]).invoke("hi", config_of(handler)) == "given up"
    assert [session.forwards for session in monitor.sessions] == [1, 1, 1]
    check_idle(handler, monitor)


def test_several_agents_on_one_model_at_once(chat: ChatNLAModel, monitor: RecordingMonitor) -> None:
    graphs, handler = [tool_agent(chat, calls) for calls in (1, 2, 3)], NLACallbackHandler(monitor)
    configs = [config_of(handler, f"conversation {number}") for number in range(6)]

    async def run() -> None:
        await asyncio.gather(*(graphs[n % 3].ainvoke(asked(), config) for n, config in enumerate(configs)))

    asyncio.run(run())
    by_root = Counter(session.context.root_run_id for session in monitor.sessions)
    assert by_root == {str(config["run_id"]): 2 + number % 3 for number, config in enumerate(configs)}
    talks = {session.context.root_run_id: session.context.conversation_id for session in monitor.sessions}
    assert talks == {str(config["run_id"]): f"conversation {number}" for number, config in enumerate(configs)}
    assert {session.forwards for session in monitor.sessions} == {1}
    check_idle(handler, monitor)


# --- what is written, and where messages lie --------------------------------------------------------------------------


def test_a_session_is_told_what_was_answered(
    chat: ChatNLAModel, monitor: RecordingMonitor, llm: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Exact tokens by our own model; by a pipeline the text, without the prompt that it repeats."""
    answer = chat.invoke("hello", config_of(NLACallbackHandler(monitor)))
    streamed = "".join(chunk.text for chunk in chat.stream("hello", config_of(NLACallbackHandler(monitor))))
    for text, session in zip((answer.text, streamed), monitor.sessions, strict=True):
        assert session.completion.token_ids is not None
        assert len(session.completion.token_ids) == 3
        assert tokenizer.decode(session.completion.token_ids, skip_special_tokens=True) == text
    whole = llm.invoke("hello", config_of(NLACallbackHandler(monitor, llm=llm)))
    assert monitor.sessions[-1].completion.text == whole.removeprefix("hello")
    assert whole.startswith("hello")


def test_a_session_knows_where_its_messages_lie(chat: ChatNLAModel, monitor: RecordingMonitor) -> None:
    tool_agent(chat).invoke(asked(), config_of(NLACallbackHandler(monitor)))
    spans = monitor.sessions[-1].spans()
    assert [span.role for span in spans] == ["user", "assistant", "tool", "assistant"]
    call_id = monitor.sessions[-1].context.tool_call_id
    assert [span.tool_call_id for span in spans] == [None, call_id, call_id, None]
    assert [span.tool for span in spans] == [None, None, "look_up", None]


# --- things that go wrong ---------------------------------------------------------------------------------------------


class Break(Exception):  # noqa: N818 -- a test's own
    """A fault of ours."""


@pytest.mark.parametrize("event", EVENTS)
def test_a_fault_in_any_callback_changes_nothing_for_the_agent(
    chat: ChatNLAModel, monitor: RecordingMonitor, event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is the same, and the next run is watched as ever."""
    monkeypatch.delenv("NLA_MONITOR_STRICT")
    handler, graph = NLACallbackHandler(monitor), tool_agent(chat)
    plain = graph.invoke(asked())["messages"][-1].text
    with monkeypatch.context() as broken:
        _break(broken, event)
        assert graph.invoke(asked(), config_of(handler))["messages"][-1].text == plain
    assert graph.invoke(asked(), config_of(handler))["messages"][-1].text == plain
    assert [session.forwards for session in monitor.sessions][-2:] == [1, 1]
    assert monitor.open == []


def _break(broken: pytest.MonkeyPatch, event: str) -> None:
    """Make what the event does first fail."""

    def fail(*_: Any, **__: Any) -> Any:
        raise Break

    inside = {
        "on_llm_end": "end_call",
        "on_chain_start": "start_run",
        "on_chain_end": "end_run",
        "on_chain_error": "end_run",
        "on_tool_start": "start_run",
        "on_tool_end": "tool_result",
        "on_tool_error": "end_run",
        "on_llm_error": "end_call",
    }
    broken.setattr(Tracker, inside.get(event, "is_open"), fail)


@pytest.mark.parametrize("name", ["open_session", "close_session"])
def test_a_monitor_that_fails_changes_nothing_for_the_agent(
    chat: ChatNLAModel, model: LlamaForCausalLM, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NLA_MONITOR_STRICT")
    monitor = RecordingMonitor()
    plain = tool_agent(chat).invoke(asked())["messages"][-1].text

    def fail(*_: Any, **__: Any) -> Any:
        raise Break

    monkeypatch.setattr(monitor, name, fail)
    handler = NLACallbackHandler(monitor)
    assert tool_agent(chat).invoke(asked(), config_of(handler))["messages"][-1].text == plain
    assert sum(monitor.guard.faults.values()) >= 2
    assert handler.stats.open_calls == 0


def test_a_fault_in_the_outline_costs_roles_only(
    chat: ChatNLAModel, monitor: RecordingMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NLA_MONITOR_STRICT")
    monkeypatch.setattr("nla_monitor_langchain.outline._regions", lambda *_: 1 / 0)
    chat.invoke("hi", config_of(NLACallbackHandler(monitor)))
    assert monitor.sessions[0].spans() == []
    assert monitor.guard.faults == {"langchain.outline": 1}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, asyncio.CancelledError])
def test_what_the_model_raises_reaches_the_agent_and_leaves_nothing_open(
    chat: ChatNLAModel, model: LlamaForCausalLM, monitor: RecordingMonitor, error: type[BaseException]
) -> None:
    handler = NLACallbackHandler(monitor)

    def fail(*_: Any) -> None:
        raise error("from the model")

    hook = model.register_forward_hook(fail)
    try:
        # LangGraph makes an error of its own of a cancellation that a node raises.
        with pytest.raises(NodeCancelledError if error is asyncio.CancelledError else error):
            tool_agent(chat).invoke(asked(), config_of(handler))
    finally:
        hook.remove()
    assert (monitor.open, handler.stats.open_calls) == ([], 0)
    tool_agent(chat).invoke(asked(), config_of(handler))
    assert [session.forwards for session in monitor.sessions[-2:]] == [1, 1]


def test_a_task_cancelled_in_the_midst_of_its_generation(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monitor: RecordingMonitor
) -> None:
    """The thread that generates goes on to its end by itself; the agent after it has its own session."""
    slow = ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=40)
    handler, graph, begun = NLACallbackHandler(monitor), tool_agent(slow), threading.Event()
    hook = model.register_forward_hook(lambda *_: begun.set())

    async def run() -> None:
        task = asyncio.create_task(graph.ainvoke(asked(), config_of(handler)))
        assert await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await graph.ainvoke(asked("and now?"), config_of(handler, "t2"))

    asyncio.run(run())
    hook.remove()
    second = [session for session in monitor.sessions if session.context.conversation_id == "t2"]
    assert [session.forwards for session in second] == [1, 1]
    assert (monitor.open, handler.stats.open_calls, handler.stats.open_runs) == ([], 0, 0)
    assert handler.stats.abandoned == 1


def test_a_session_stays_with_its_generation_when_the_agent_is_gone(monitor: RecordingMonitor) -> None:
    """An agent may be cancelled while its model's thread goes on: what that thread reads is still this run's."""
    tracker, call = Tracker(monitor), ModelCall(AgentContext("run"), "nla-chat", fingerprint="words")
    tracker.start_call(call, (), claimable=True)
    with tracker.claim("run", "words", None, Prompt(None)) as claim:
        assert claim is not None
        tracker.end_call("run", failed=True)
        assert [session.closed for session in monitor.sessions] == [False]
    assert [session.closed for session in monitor.sessions] == [True]
    assert tracker.stats.open_calls == 0


@pytest.mark.parametrize("whose", ["chat", "pipeline"])
def test_a_model_swapped_between_calls_is_harmless_and_the_miss_is_counted(
    chat: ChatNLAModel, llm: Any, monitor: RecordingMonitor, whose: str
) -> None:
    other = tiny_llama(seed=3)
    agent, holder = (chat, chat) if whose == "chat" else (llm, llm.pipeline)
    handler = NLACallbackHandler(monitor, llm=agent)
    watched = holder.model
    agent.invoke("hello", config_of(handler))
    try:
        holder.model = other
        agent.invoke("hello", config_of(handler))
        assert [session.forwards for session in monitor.sessions] == [1, 0]
        holder.model = watched
        agent.invoke("hello", config_of(handler))
    finally:
        holder.model = watched
    assert [session.forwards for session in monitor.sessions] == [1, 0, 1]
    handler._tracker._settle_seconds = 0.0
    assert sum(handler.stats.without_activations.values()) == 1
    check_idle(handler, monitor)


def test_a_pipeline_with_another_tokenizer_in_its_place_is_followed(
    llm: Any, model: LlamaForCausalLM, monitor: RecordingMonitor
) -> None:
    from tests.langchain_support import byte_tokenizer, text_pipeline

    handler = NLACallbackHandler(monitor, llm=llm)
    llm.invoke("hello", config_of(handler))
    other = byte_tokenizer()
    other.add_tokens(["hello"])
    model.resize_token_embeddings(len(other))
    try:
        llm.pipeline = text_pipeline(model, other)
        llm.invoke("hello", config_of(handler))
    finally:
        model.resize_token_embeddings(259)
    assert [session.forwards for session in monitor.sessions] == [1, 1]
    assert len(monitor.sessions[1].token_ids or ()) < len(monitor.sessions[0].token_ids or ())


def test_an_agent_that_never_ends_keeps_its_runs_and_no_more(chat: ChatNLAModel, monitor: RecordingMonitor) -> None:
    handler = NLACallbackHandler(monitor)
    endless = tool_agent(chat, calls=10**9).stream(asked("x"), config_of(handler, recursion_limit=10**6))
    for _, _ in zip(range(40), endless, strict=False):
        stats = handler.stats
        assert stats.open_calls <= 1
        assert stats.open_runs <= 8
    endless.close()
    seen: list[Session] = monitor.sessions
    assert len({session.context.root_run_id for session in seen}) == 1
    assert monitor.open == []


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
