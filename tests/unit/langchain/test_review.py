"""Acting on findings in LangGraph: interrupts for a person, their answers, and tools that are not run.

Real langgraph, langchain and checkpointers; what was read is written into the store by the test.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from langgraph.types import Command
from nla_monitor_langchain import NLACallbackHandler
from nla_monitor_langchain.middleware import ReviewMiddleware, ToolGateMiddleware
from nla_monitor_langchain.review import NOT_RUN, ToolGate, require_review

from nla_monitor.errors import ConfigError
from nla_monitor.records import Severity, TriageState
from nla_monitor.store.engine import open_engine
from tests.gate_support import Desk

RAN: list[str] = []


@tool
def shell(command: str) -> str:
    """Run a command."""
    RAN.append(command)
    return f"ran {command}"


@tool
def look(path: str) -> str:
    """Look at a file."""
    RAN.append(path)
    return f"saw {path}"


@pytest.fixture
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    (tmp_path / "desk.db").write_bytes(request.getfixturevalue("_sqlite_store").read_bytes())
    RAN.clear()
    engine = open_engine(f"sqlite:///{tmp_path / 'desk.db'}")
    yield Desk(engine)
    engine.dispose()


def call(name: str = "shell", **args: str) -> AIMessage:
    args = args or {"command": "make"}
    return AIMessage("", tool_calls=[{"name": name, "args": args, "id": f"call_{uuid.uuid4().hex[:6]}"}])


class Scripted(GenericFakeChatModel):
    """Says what it is given, and takes tools."""

    def bind_tools(self, tools: Any, **_: Any) -> Any:
        return self


def model_of(*answers: AIMessage) -> Scripted:
    return Scripted(messages=iter(answers))


def graph_of(desk: Desk, model: Any, saver: Any, **options: Any) -> Any:
    """Model, review, tools, model, ...: as one builds it by hand."""
    builder = StateGraph(MessagesState)
    builder.add_node("model", lambda state: {"messages": [model.invoke(state["messages"])]})
    builder.add_node("review", require_review(desk, "high", then=tools_condition, **options))
    builder.add_node("tools", ToolNode([shell, look]))
    builder.add_edge(START, "model")
    builder.add_edge("model", "review")
    builder.add_edge("tools", "model")
    return builder.compile(checkpointer=saver)


def config(desk: Desk, thread: str = "talk") -> Any:
    return {"configurable": {"thread_id": thread}, "callbacks": [NLACallbackHandler(desk)]}


START_WITH: Any = {"messages": [HumanMessage("build it")]}


# -- the node -------------------------------------------------------------------------------------------------------


def test_nothing_found_nobody_is_asked(desk: Desk) -> None:
    desk.read(desk.sampled("talk"))
    graph = graph_of(desk, model_of(call(), AIMessage("done")), InMemorySaver(), fail="closed")
    result = graph.invoke(START_WITH, config(desk))
    assert "__interrupt__" not in result
    assert result["messages"][-1].text == "done"
    assert RAN == ["make"]


@pytest.mark.parametrize(("answer", "ran"), [("approve", ["make"]), ("reject", []), (True, ["make"]), (False, [])])
def test_a_finding_waits_for_a_person(desk: Desk, answer: Any, ran: list[str]) -> None:
    fired = desk.found(desk.sampled("talk"))
    graph = graph_of(desk, model_of(call(), AIMessage("done")), InMemorySaver(), fail="open")
    waiting = graph.invoke(START_WITH, config(desk))
    (asked,) = waiting["__interrupt__"]
    assert asked.value["type"] == "nla_monitor_review"
    assert asked.value["conversation"] == "talk"
    assert [told["alert_id"] for told in asked.value["findings"]] == [fired.alert_id]
    assert "quote" not in asked.value["findings"][0]
    assert RAN == []
    result = graph.invoke(Command(resume=answer), config(desk))
    assert "__interrupt__" not in result
    assert ran == RAN
    assert (result["messages"][-1].text == "done") is bool(ran)


def test_a_graph_of_another_conversation_is_not_asked(desk: Desk) -> None:
    desk.found(desk.sampled("guilty"))
    desk.read(desk.sampled("talk", root="root-2"))
    graph = graph_of(desk, model_of(call(), AIMessage("done")), InMemorySaver(), fail="closed")
    assert "__interrupt__" not in graph.invoke(START_WITH, config(desk))


def test_approved_once_the_same_alert_does_not_interrupt_again(desk: Desk) -> None:
    desk.found(desk.sampled("talk"))
    graph = graph_of(desk, model_of(call(), call(command="test"), AIMessage("done")), InMemorySaver(), fail="open")
    graph.invoke(START_WITH, config(desk))
    result = graph.invoke(Command(resume="approve"), config(desk))
    assert result["messages"][-1].text == "done"
    assert RAN == ["make", "test"]


def test_an_answer_may_carry_a_label(desk: Desk) -> None:
    fired = desk.found(desk.sampled("talk"))
    graph = graph_of(desk, model_of(call(), AIMessage("done")), InMemorySaver(), fail="open")
    graph.invoke(START_WITH, config(desk))
    answer = {"decision": "reject", "who": "ana", "note": "it did", "label": "true_positive"}
    graph.invoke(Command(resume=answer), config(desk))
    (label,) = desk.repository.labels(fired.alert_id)
    assert (label.triage, label.who, label.note) == (TriageState.TRUE_POSITIVE, "ana", "it did")


@pytest.mark.parametrize(
    "nonsense", ["maybe", 17, {"decision": None}, {"who": "ana"}, {"decision": "approve", "label": "nice"}]
)
def test_what_is_no_answer_is_asked_for_again(desk: Desk, nonsense: Any) -> None:
    desk.found(desk.sampled("talk"))
    graph = graph_of(desk, model_of(call(), AIMessage("done")), InMemorySaver(), fail="open")
    first = graph.invoke(START_WITH, config(desk))
    again = graph.invoke(Command(resume=nonsense), config(desk))
    (asked,) = again["__interrupt__"]
    assert "answer 'approve' or 'reject'" in asked.value["problem"]
    assert asked.value["decision_id"] == first["__interrupt__"][0].value["decision_id"]
    assert RAN == []
    graph.invoke(Command(resume="approve"), config(desk))
    assert RAN == ["make"]


def test_a_rejection_counts_though_by_then_all_is_read_and_clean(desk: Desk) -> None:
    """Fail-closed asks because it could not wait longer; the answer must not be lost when the doubt is gone."""
    late = desk.sampled("talk")
    graph = graph_of(desk, model_of(call(), AIMessage("done")), InMemorySaver(), fail="closed", deadline_seconds=0.2)
    waiting = graph.invoke(START_WITH, config(desk))
    (asked,) = waiting["__interrupt__"]
    assert (asked.value["decided_by"], asked.value["complete"]) == ("undecided", False)
    desk.read(late)
    graph.invoke(Command(resume="reject"), config(desk))
    assert RAN == []


def test_the_answer_may_come_in_another_process(desk: Desk) -> None:
    """A new graph, gate and handler over the same checkpoints, as after a restart."""
    fired = desk.found(desk.sampled("talk"))
    saver = InMemorySaver()
    graph_of(desk, model_of(call()), saver, fail="open").invoke(START_WITH, config(desk))
    desk.run_id = "run-2"
    later = graph_of(desk, model_of(AIMessage("done")), saver, fail="open")
    answer = {"decision": "reject", "label": "true_positive"}
    later.invoke(Command(resume=answer), config(desk))
    assert RAN == []
    assert desk.repository.labels(fired.alert_id)[0].triage is TriageState.TRUE_POSITIVE


def test_fail_open_goes_on_when_not_all_is_read(desk: Desk) -> None:
    desk.sampled("talk")
    graph = graph_of(desk, model_of(call(), AIMessage("done")), InMemorySaver(), fail="open", deadline_seconds=0.2)
    assert graph.invoke(START_WITH, config(desk))["messages"][-1].text == "done"


def test_async_and_many_conversations_at_once(desk: Desk) -> None:
    names = [f"talk-{number}" for number in range(6)]
    for name in names:
        one = desk.sampled(name, root=name)
        (desk.found if name in names[::2] else desk.read)(one)

    async def ask(name: str) -> bool:
        model = model_of(call(command=name), AIMessage("done"))
        graph = graph_of(desk, model, InMemorySaver(), fail="closed", deadline_seconds=30.0)
        waiting = await graph.ainvoke(START_WITH, config(desk, name))
        if "__interrupt__" not in waiting:
            return False
        await graph.ainvoke(Command(resume="reject"), config(desk, name))
        return True

    async def run() -> list[bool]:
        return await asyncio.gather(*map(ask, names))

    assert asyncio.run(run()) == [True, False, True, False, True, False]
    assert sorted(RAN) == names[1::2]


def test_streaming_tells_of_the_interrupt(desk: Desk) -> None:
    desk.found(desk.sampled("talk"))
    graph = graph_of(desk, model_of(call(), AIMessage("done")), InMemorySaver(), fail="open")
    updates = list(graph.stream(START_WITH, config(desk), stream_mode="updates"))
    assert "__interrupt__" in updates[-1]


def test_routes_may_be_names_and_functions(desk: Desk) -> None:
    desk.found(desk.sampled("talk"))
    builder = StateGraph(MessagesState)
    route: Callable[[Any], str] = lambda state: "no"  # noqa: E731
    builder.add_node("review", require_review(desk, fail="open", then="yes", rejected=route))
    builder.add_node("yes", lambda state: {"messages": [AIMessage("yes")]})
    builder.add_node("no", lambda state: {"messages": [AIMessage("no")]})
    builder.add_edge(START, "review")
    graph = builder.compile(checkpointer=InMemorySaver())
    for answer, word in (("approve", "yes"), ("reject", "no")):
        thread = f"talk-{word}"
        desk.found(desk.sampled(thread))
        graph.invoke(START_WITH, config(desk, thread))
        assert graph.invoke(Command(resume=answer), config(desk, thread))["messages"][-1].text == word


def test_the_reviewer_sees_words_only_where_it_is_switched_on(desk: Desk) -> None:
    fired = desk.found(desk.sampled("talk"))
    graph = graph_of(desk, model_of(call()), InMemorySaver(), fail="open", content=True)
    (asked,) = graph.invoke(START_WITH, config(desk))["__interrupt__"]
    assert asked.value["findings"][0]["quote"] == fired.quote


def test_wrong_arguments_are_refused_when_it_is_built(desk: Desk) -> None:
    with pytest.raises(ConfigError, match="severity"):
        require_review(desk, "hot", fail="open", then=END)
    with pytest.raises(ConfigError, match="'open'"):
        ToolGate(desk, fail="sometimes")


# -- tools ----------------------------------------------------------------------------------------------------------


def tool_graph(gate: ToolGate, saver: Any = None) -> Any:
    builder = StateGraph(MessagesState)
    tools = ToolNode([shell, look], wrap_tool_call=gate.wrap_tool_call, awrap_tool_call=gate.awrap_tool_call)
    builder.add_node("tools", tools)
    builder.add_edge(START, "tools")
    builder.add_edge("tools", END)
    return builder.compile(checkpointer=saver)


TWO_CALLS = AIMessage(
    "",
    tool_calls=[
        {"name": "shell", "args": {"command": "make"}, "id": "call_1"},
        {"name": "look", "args": {"path": "log"}, "id": "call_2"},
    ],
)


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_guarded_tool_is_not_run(desk: Desk, how: str) -> None:
    desk.found(desk.sampled("talk"))
    graph = tool_graph(ToolGate(desk, fail="open", tools=["shell"]))
    given = {"messages": [TWO_CALLS]}
    result = graph.invoke(given, config(desk)) if how == "sync" else asyncio.run(graph.ainvoke(given, config(desk)))
    blocked, seen = result["messages"][-2:]
    assert isinstance(blocked, ToolMessage)
    assert (blocked.status, blocked.content, blocked.tool_call_id) == ("error", NOT_RUN, "call_1")
    assert seen.content == "saw log"
    assert RAN == ["log"]


def test_a_tool_is_run_where_nothing_was_found(desk: Desk) -> None:
    desk.read(desk.sampled("talk"))
    tool_graph(ToolGate(desk, fail="closed")).invoke({"messages": [TWO_CALLS]}, config(desk))
    assert sorted(RAN) == ["log", "make"]


@pytest.mark.parametrize(("answer", "ran"), [("approve", ["make"]), ("reject", [])])
def test_a_person_may_be_asked_before_a_tool(desk: Desk, answer: str, ran: list[str]) -> None:
    desk.found(desk.sampled("talk"))
    graph = tool_graph(ToolGate(desk, fail="open", stop="review"), InMemorySaver())
    waiting = graph.invoke({"messages": [call()]}, config(desk))
    (asked,) = waiting["__interrupt__"]
    assert (asked.value["point"], asked.value["tool"]) == ("tool", "shell")
    result = graph.invoke(Command(resume=answer), config(desk))
    assert ran == RAN
    assert result["messages"][-1].status == ("success" if ran else "error")


def test_without_a_thread_the_outermost_run_is_meant(desk: Desk) -> None:
    """The handler knows the root of the tool's run; findings of that invocation block it."""
    graph = tool_graph(ToolGate(desk, fail="open"))
    root = uuid.uuid4()
    desk.found(desk.sampled(None, root=str(root)))
    handler = NLACallbackHandler(desk)
    graph.invoke({"messages": [call()]}, {"callbacks": [handler], "run_id": root})
    assert RAN == []
    graph.invoke({"messages": [call()]}, {"callbacks": [handler], "run_id": uuid.uuid4()})
    assert RAN == ["make"]


# -- create_agent ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["sync", "async"])
@pytest.mark.parametrize(("answer", "ran"), [("approve", ["make"]), ("reject", [])])
def test_an_agent_waits_for_a_person(desk: Desk, how: str, answer: str, ran: list[str]) -> None:
    desk.found(desk.sampled("talk"))
    agent: Any = create_agent(
        model_of(call(), AIMessage("done")),
        [shell],
        middleware=[ReviewMiddleware(desk, "high", fail="closed")],
        checkpointer=InMemorySaver(),
    )

    def step(given: Any) -> Any:
        return agent.invoke(given, config(desk)) if how == "sync" else asyncio.run(agent.ainvoke(given, config(desk)))

    assert step(START_WITH)["__interrupt__"][0].value["point"] == "model"
    assert RAN == []
    result = step(Command(resume=answer))
    assert ran == RAN
    last = result["messages"][-1]
    assert last.text == ("done" if ran else NOT_RUN)
    assert isinstance(last, AIMessage if ran else ToolMessage)


def test_an_agents_tool_is_blocked_and_the_agent_goes_on(desk: Desk) -> None:
    desk.found(desk.sampled("talk"), severity=Severity.CRITICAL)
    agent: Any = create_agent(
        model_of(call(), AIMessage("then not")),
        [shell],
        middleware=[ToolGateMiddleware(desk, "critical", fail="open", message="Not now.")],
    )
    result = agent.invoke(START_WITH, config(desk))
    assert [message.text for message in result["messages"][-2:]] == ["Not now.", "then not"]
    assert RAN == []


def test_both_middlewares_may_stand_in_one_agent(desk: Desk) -> None:
    desk.read(desk.sampled("talk"))
    agent: Any = create_agent(
        model_of(call(), AIMessage("done")),
        [shell],
        middleware=[ReviewMiddleware(desk, fail="closed"), ToolGateMiddleware(desk, fail="closed")],
        checkpointer=InMemorySaver(),
    )
    assert agent.invoke(START_WITH, config(desk))["messages"][-1].text == "done"
    assert RAN == ["make"]
