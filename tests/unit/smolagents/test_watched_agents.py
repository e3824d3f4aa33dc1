"""smolagents over a local TransformersModel: each forward on its agent, run, step and tool."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from nla_monitor_smolagents import watch
from smolagents import ChatMessage, ChatMessageStreamDelta, MessageRole, ToolCallingAgent, TransformersModel, tool
from smolagents.models import ChatMessageToolCall, ChatMessageToolCallFunction, ChatMessageToolCallStreamDelta
from smolagents.utils import AgentError

from nla_monitor.records import AgentContext, Severity
from tests.agents_support import CaptureMonitor, Spoken
from tests.langchain_support import byte_tokenizer, tiny_llama
from tests.store_support import alert, sample

PLAN = ("count_rows", "find_owner", "final_answer")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'][-12:] }}{{ loop.index }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class Planned(TransformersModel):
    """Local weights that run a real generation; what it asks for follows a plan, by the results that it reads."""

    plan: tuple[str, ...] = PLAN
    fail = False
    prompts: list[list[int]]
    after: Callable[[], object] = staticmethod(lambda: None)

    def _prepare_completion_args(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("tools_to_call_from", None)
        kwargs.pop("stop_sequences", None)
        prepared = super()._prepare_completion_args(messages, *args, **kwargs)
        prepared["do_sample"] = False
        self.prompts.append(prepared["inputs"][0].tolist())
        return prepared

    def _wanted(self, messages: Any) -> tuple[str, dict[str, Any]]:
        read = sum(str(message.role) in ("MessageRole.TOOL_RESPONSE", "tool-response") for message in messages)
        name = self.plan[min(read, len(self.plan) - 1)]
        return name, {"answer": "done"} if name == "final_answer" else {"table": "sales"}

    def generate(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        super().generate(messages, *args, **kwargs)
        self.after()
        if self.fail:
            raise RuntimeError("the model broke")
        name, arguments = self._wanted(messages)
        function = ChatMessageToolCallFunction(name=name, arguments=arguments)
        call = ChatMessageToolCall(id=f"call-{name}", type="function", function=function)
        return ChatMessage(role=MessageRole.ASSISTANT, content="", tool_calls=[call])

    def generate_stream(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        for delta in super().generate_stream(messages, *args, **kwargs):
            yield ChatMessageStreamDelta(content=delta.content)
        name, arguments = self._wanted(messages)
        function = ChatMessageToolCallFunction(name=name, arguments=json.dumps(arguments))
        call = ChatMessageToolCallStreamDelta(index=0, id=f"call-{name}", type="function", function=function)
        yield ChatMessageStreamDelta(content="", tool_calls=[call])


@tool
def count_rows(table: str) -> str:
    """Count rows.

    Args:
        table: whose rows.
    """
    return f"{table} holds 3 rows"


@tool
def find_owner(table: str) -> str:
    """Find an owner.

    Args:
        table: whose owner.
    """
    return f"{table} belongs to accounting"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smolagents-model")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved: Path) -> Planned:
    made = Planned(str(saved), device_map="cpu", max_new_tokens=6)
    made.prompts = []
    return made


@pytest.fixture
def monitor(model: Planned) -> Iterator[CaptureMonitor]:
    with CaptureMonitor(model.model, model.tokenizer) as made:
        yield made


def clerk(model: Any, **settings: Any) -> ToolCallingAgent:
    return ToolCallingAgent(tools=[count_rows, find_owner], model=model, verbosity_level=0, **settings)


@pytest.mark.parametrize("stream", [False, True], ids=["generate", "stream from a bare thread"])
def test_an_agent_with_two_tools(model: Planned, monitor: CaptureMonitor, stream: bool) -> None:
    """Each call has its run; step and tool are those that it reads; parent and root are the agent's run."""
    agent = clerk(model, stream_outputs=stream)
    callback = watch(agent, monitor)
    assert agent.run("count the sales") == "done"
    runs = monitor.runs()
    assert len(runs) == 3
    told = {}
    for run, samples in runs.items():
        assert "" not in runs
        contexts = {(s.agent.tool, s.agent.tool_call_id, s.attributes["agent_step"]) for s in samples if s.agent}
        ((name, call_id, step),) = contexts
        told[step] = name, call_id
        ids = model.prompts[int(str(step)) - 1]
        for one in samples:
            assert one.agent is not None
            assert one.agent.agent_run_id == run
            assert one.agent.parent_run_id == one.agent.root_run_id == one.agent.conversation_id
            assert one.agent.generated or one.token_id == ids[one.position]
        assert {one.agent.generated for one in samples if one.agent} == {False, True}
    assert told == {1: (None, None), 2: ("count_rows", "call-count_rows"), 3: ("find_owner", "call-find_owner")}
    assert callback.stats.without_activations == {}
    assert callback.stats.open_spans == 0


def test_three_agents_on_one_model_at_once(model: Planned, monitor: CaptureMonitor) -> None:
    """Each agent sees the shared weights through a model of its own: no call is another's."""
    agents = [clerk(model, name=f"clerk_{number}", description="a clerk") for number in range(3)]
    for agent in agents:
        watch(agent, monitor)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda number: agents[number].run(f"task {number}"), range(3)))
    runs = monitor.runs()
    assert len(runs) == 9
    roots: dict[Any, set[Any]] = {}
    for samples in runs.values():
        for one in samples:
            assert one.agent is not None
            roots.setdefault(one.agent.node, set()).add(one.agent.root_run_id)
    assert sorted(roots) == ["clerk_0", "clerk_1", "clerk_2"]
    assert all(len(found) == 1 for found in roots.values())


def test_a_managed_agents_runs_are_under_its_manager(model: Planned, monitor: CaptureMonitor) -> None:
    """One root for both; the managed agent has its own run."""
    helper = clerk(model, name="helper", description="counts")

    class Managing(Planned):
        plan = ("helper", "final_answer")

        def _wanted(self, messages: Any) -> tuple[str, dict[str, Any]]:
            name, arguments = super()._wanted(messages)
            return (name, {"task": "count"}) if name == "helper" else (name, arguments)

    managing = Managing.__new__(Managing)
    managing.__dict__.update(model.__dict__)
    boss = ToolCallingAgent(tools=[], model=managing, managed_agents=[helper], verbosity_level=0, name="boss")
    watch(boss, monitor)
    boss.run("do it")
    seen = {
        (one.agent.node, one.agent.parent_run_id, one.agent.root_run_id)
        for samples in monitor.runs().values()
        for one in samples
        if one.agent
    }
    assert {node for node, _, _ in seen} == {"boss", "helper"}
    assert len({root for _, _, root in seen}) == 1
    assert len({parent for _, parent, _ in seen}) == 2


def test_runs_and_conversations(model: Planned, monitor: CaptureMonitor) -> None:
    """A run that keeps the memory goes on with the conversation."""
    agent = clerk(model)
    watch(agent, monitor)
    agent.run("one")
    agent.run("two", reset=False)
    agent.run("three")
    contexts = [one.agent for samples in monitor.runs().values() for one in samples if one.agent]
    assert len({context.root_run_id for context in contexts}) == 3
    assert len({context.conversation_id for context in contexts}) == 2


def test_watched_twice_and_given_back(model: Planned, monitor: CaptureMonitor) -> None:
    """Twice is once; closed, the agent has its own model and nothing is read as an agent's."""
    agent = clerk(model)
    callback = watch(agent, monitor)
    assert watch(agent, monitor) is callback
    assert isinstance(agent.model, Planned)
    agent.run("one")
    assert len(monitor.runs()) == 3
    callback.close()
    assert agent.model is model
    agent.run("two")
    assert len(set(monitor.runs()) - {""}) == 3


def test_a_model_swapped_between_calls(model: Planned, monitor: CaptureMonitor) -> None:
    """The step in which it happened is counted; from the next on the new one is watched."""
    agent = clerk(model)
    callback = watch(agent, monitor)
    agent.model = model
    agent.run("one")
    assert callback.unwatched_steps == 1
    assert len(set(monitor.runs()) - {""}) == 2


def test_a_model_that_fails(model: Planned, monitor: CaptureMonitor) -> None:
    """The agent's own error passes; nothing stays open."""
    agent = clerk(model)
    callback = watch(agent, monitor)
    model.fail = agent.model.fail = True
    with pytest.raises(AgentError, match="the model broke"):
        agent.run("one")
    assert len(monitor.runs()) == 1
    assert callback.stats.open_spans == 0
    assert len(monitor.capture.sessions) == 0


def test_a_stream_left_early(model: Planned, monitor: CaptureMonitor) -> None:
    """Its consumer goes away in the middle: no session is left, and the model's own stream is closed with it."""
    agent = clerk(model, stream_outputs=True)
    callback = watch(agent, monitor)
    pieces = agent.model.generate_stream([ChatMessage(role=MessageRole.USER, content=[{"type": "text", "text": "hi"}])])
    next(pieces)
    pieces.close()
    assert callback.stats.open_spans == 0
    assert len(monitor.capture.sessions) == 0


def test_an_alert_interrupts_only_where_asked_for(model: Planned, monitor: CaptureMonitor) -> None:
    """After the step, as the agent's own ``interrupt``; without the option nothing happens."""

    def fire(samples: Any) -> None:
        for one in samples:
            agent = AgentContext("call", None, one.agent.root_run_id)
            for listener in monitor.listeners:
                listener(alert(sample(), agent=agent, severity=Severity.HIGH))

    monitor.on_samples = fire
    model.after = lambda: monitor.capture.flush(10)
    unasked = clerk(model)
    watch(unasked, monitor)
    assert unasked.run("one") == "done"
    asked = clerk(model)
    watch(asked, monitor, stop_on="high")
    with pytest.raises(AgentError, match="interrupted"):
        asked.run("one")
    assert len(asked.memory.steps) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_the_visible_side(model: Planned, monitor: CaptureMonitor, stream: bool) -> None:
    """Roles of each prompt, and each answer with what it asks for."""
    monitor.transcripts = Spoken()
    agent = clerk(model, stream_outputs=stream)
    watch(agent, monitor)
    agent.run("one")
    last = max(monitor.transcripts.prompts.values(), key=len)
    turn = ["assistant", "assistant", "tool"]  # smolagents writes down a call of a tool as a message of its own
    assert [one.role for one in last] == ["system", "user", *turn, *turn]
    assert "sales holds 3 rows" in last[4].text
    said = [one for one in monitor.transcripts.answers.values() if one]
    assert [[call["name"] for call in one.tool_calls] for one in said] == [[name] for name in PLAN]


def test_an_alert_on_another_run_interrupts_nobody(
    model: Planned, monitor: CaptureMonitor, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does it say that it will."""
    agent = clerk(model)
    watch(agent, monitor, stop_on="high")
    for listener in monitor.listeners:
        listener(alert(sample(), agent=AgentContext("call", None, "another"), severity=Severity.HIGH))
    assert agent.run("one") == "done"
    assert "interrupted" not in caplog.text


def test_a_fault_of_ours_reaches_nobody(
    model: Planned, monitor: CaptureMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every entry point broken: the agent ends as it would."""
    monkeypatch.setenv("NLA_MONITOR_STRICT", "0")
    agent = clerk(model)
    watch(agent, monitor)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("ours")

    for name in ("open_prompt", "end", "_innermost"):
        monkeypatch.setattr(f"nla_monitor.agent_calls.AgentCalls.{name}", broken)
    assert agent.run("one") == "done"
    monkeypatch.setattr("nla_monitor.agent_calls.AgentCalls.start", broken)
    assert agent.run("two") == "done"
    assert {"smolagents.begin", "smolagents.fed", "smolagents.end"} <= set(monitor.guard.faults)
