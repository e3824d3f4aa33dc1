"""Acting on findings in LangGraph: a node that waits for a person, and a wrapper that keeps a tool from being run.

    graph.add_node("review", require_review(monitor, "high", fail="closed", then=tools_condition))
    graph.add_edge("model", "review")

Opt-in: nothing here is installed by the callback handler. For ``create_agent`` see ``middleware``.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Final, Protocol, TypedDict

from langchain_core.messages import ToolMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, ensure_config

from nla_monitor.agent_calls import AgentMonitor
from nla_monitor.decisions import Decision, Gate, Gated, Point, Verdict
from nla_monitor.errors import MissingExtraError
from nla_monitor.records import Severity, TriageState
from nla_monitor.store.findings import Place
from nla_monitor_langchain.handler import conversation_of
from nla_monitor_langchain.tracker import tracker_for

try:
    from langgraph.graph import END, START, StateGraph
    from langgraph.types import Command, interrupt
except ModuleNotFoundError as missing:
    raise MissingExtraError("langgraph", "langgraph", "nla_monitor_langchain.review") from missing

NOT_RUN: Final = "This tool call was not run."
"""What the model is told of a blocked call. Not why: a model that learns what is read in its activations may learn to
hide it."""

_YES: Final = frozenset({"approve", "proceed", "accept", "yes"})
_NO: Final = frozenset({"reject", "block", "ignore", "no"})
_EXPECTED: Final = (
    "answer 'approve' or 'reject', or a mapping {'decision': 'approve' or 'reject', 'who': ..., 'note': ..., 'label': "
    f"one of {', '.join(TriageState)}}}"
)

Route = str | Callable[[Any], str]
"""The next node, or a function of the graph's state that names it (``tools_condition``)."""


class GatedAgent(Gated, AgentMonitor, Protocol):
    """What acting on findings needs of a ``Monitor``."""


class _Review(TypedDict, total=False):
    """State of the small graph behind a review; JSON only, because it is checkpointed."""

    point: dict[str, str | None]
    content: bool
    asked: dict[str, Any]
    verdict: str


class Review:
    """Asks a gate where an agent stands and, where it says ``review``, interrupts the graph for a person's answer.

    A graph of its own behind it keeps what was asked in the checkpoint: on resume nothing is asked again, so that a
    person's answer counts whatever is known by then, in whatever process the graph goes on.

    The interrupt's value is ``Decision.payload``. The answer is ``Command(resume=...)`` with ``"approve"``,
    ``"reject"``, or a mapping ``{"decision", "who", "note", "label"}``; a label is kept as the alerts' triage. What is
    none of these is asked for again, with a ``problem`` in the interrupt's value.

    Args:
        gate: what it asks.
        monitor: the gate's monitor; tells whose agent the calling code belongs to.
        content: show a reviewer the words of the explanations. They then go wherever the graph's state goes.
    """

    def __init__(self, gate: Gate, monitor: GatedAgent, *, content: bool = False) -> None:
        self.gate = gate
        self._monitor = monitor
        self._content = content
        builder = StateGraph(_Review)
        builder.add_node("decide", RunnableLambda(self._decide, afunc=self._adecide))
        builder.add_node("person", self._person)
        builder.add_edge(START, "decide")
        builder.add_conditional_edges("decide", _to_person, {"person": "person", END: END})
        builder.add_edge("person", END)
        self._graph = builder.compile()

    def verdict(self, point: Point, config: RunnableConfig | None = None) -> Verdict:
        """What the agent of the calling code is to do; interrupts the graph where a person has to say so."""
        return Verdict(self._graph.invoke(self._start(point), ensure_config(config))["verdict"])

    async def averdict(self, point: Point, config: RunnableConfig | None = None) -> Verdict:
        """The same without holding up the event loop."""
        return Verdict((await self._graph.ainvoke(self._start(point), ensure_config(config)))["verdict"])

    def _start(self, point: Point) -> _Review:
        return {"point": {"name": point.name, "tool": point.tool, "tool_call_id": point.tool_call_id}}

    def _decide(self, state: _Review, config: RunnableConfig) -> _Review:
        return self._told(self.gate.decide(here(self._monitor, config), _point(state)))

    async def _adecide(self, state: _Review, config: RunnableConfig) -> _Review:
        return self._told(await self.gate.adecide(here(self._monitor, config), _point(state)))

    def _told(self, decision: Decision) -> _Review:
        return {"asked": decision.payload(content=self._content), "verdict": decision.verdict.value}

    def _person(self, state: _Review) -> _Review:
        asked = state["asked"]
        given = interrupt(asked)
        while (answer := _answer(given)) is None:
            given = interrupt({**asked, "problem": f"found {given!r}; {_EXPECTED}"})
        return {"verdict": self.gate.answer(self.gate.recall(asked), **answer).verdict.value}


def require_review(
    monitor: GatedAgent,
    severity: Severity | str = Severity.HIGH,
    *,
    fail: Any,
    then: Route,
    rejected: Route = END,
    content: bool = False,
    **options: Any,
) -> Runnable[Any, Command[str]]:
    """A LangGraph node that interrupts for a person where something was found in the agent's activations.

    It names the next node itself: add no edge from it. The graph needs a checkpointer, as for every interrupt, and the
    config a ``thread_id``. Without findings it costs the time until what was sampled is read, and at most
    ``deadline_seconds``.

    Args:
        monitor: attached to the model; its ``NLACallbackHandler`` must be in the graph's config.
        severity: findings of this severity or above.
        fail: ``open`` or ``closed``: what happens when not all is read in time. ``closed`` asks the person, too.
        then: where to go on: a node's name, or a function of the state such as ``tools_condition``.
        rejected: where to go when the person says no; the graph's end by default.
        content: show the reviewer the words of the explanations; they then go wherever the graph's state goes.
        options: further arguments of ``Gate`` (``rules``, ``deadline_seconds``, ``on_alert``).

    Raises:
        ConfigError: an argument is none of the possible ones.
    """
    review = Review(Gate(monitor, severity=severity, fail=fail, **options), monitor, content=content)

    def go(state: Any, verdict: Verdict) -> Command[str]:
        route = then if verdict is Verdict.PROCEED else rejected
        return Command(goto=route(state) if callable(route) else route)

    def node(state: Any, config: RunnableConfig) -> Command[str]:
        return go(state, review.verdict(Point(), config))

    async def anode(state: Any, config: RunnableConfig) -> Command[str]:
        return go(state, await review.averdict(Point(), config))

    return RunnableLambda(node, afunc=anode, name="nla_review")


class ToolGate:
    """Keeps tools from being run while something is found in the agent's activations.

        gate = ToolGate(monitor, "high", fail="open")
        ToolNode(tools, wrap_tool_call=gate.wrap_tool_call, awrap_tool_call=gate.awrap_tool_call)

    A blocked call is answered by an error message in the tool's place. With ``stop="review"`` a person is asked first.

    Args:
        monitor: attached to the model; its ``NLACallbackHandler`` must be in the graph's config.
        severity: findings of this severity or above.
        fail: ``open`` or ``closed``: what happens when not all is read in time.
        tools: names of the tools that are guarded; by default all.
        message: what the model is told of a blocked call.
        content: show a reviewer the words of the explanations.
        options: further arguments of ``Gate`` (``rules``, ``deadline_seconds``, ``stop``, ``on_alert``).

    Raises:
        ConfigError: an argument is none of the possible ones.
    """

    def __init__(
        self,
        monitor: GatedAgent,
        severity: Severity | str = Severity.HIGH,
        *,
        fail: Any,
        tools: Collection[str] | None = None,
        message: str = NOT_RUN,
        content: bool = False,
        **options: Any,
    ) -> None:
        options = {"stop": Verdict.BLOCK, **options}
        self.gate = Gate(monitor, severity=severity, fail=fail, **options)
        self._review = Review(self.gate, monitor, content=content)
        self._tools = None if tools is None else frozenset([tools] if isinstance(tools, str) else tools)
        self._message = message

    def wrap_tool_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
        """Run a tool call, or answer it with the message."""
        call = request.tool_call
        if self._free(call) or self._review.verdict(_tool_point(call)) is Verdict.PROCEED:
            return handler(request)
        return not_run(call, self._message)

    async def awrap_tool_call(self, request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        """The same without holding up the event loop."""
        call = request.tool_call
        if self._free(call) or await self._review.averdict(_tool_point(call)) is Verdict.PROCEED:
            return await handler(request)
        return not_run(call, self._message)

    def _free(self, call: Mapping[str, Any]) -> bool:
        return self._tools is not None and call["name"] not in self._tools


def not_run(call: Mapping[str, Any], message: str = NOT_RUN) -> ToolMessage:
    """What stands in the place of a blocked call's result."""
    return ToolMessage(message, name=call["name"], tool_call_id=call["id"] or "", status="error")


def here(monitor: GatedAgent, config: RunnableConfig | None = None) -> Place:
    """The place of the calling code in its agent: the conversation of its config or, without one, its outermost run."""
    conversation, root = None, None
    with monitor.guard("langchain.here"):
        known = ensure_config(config)
        conversation = conversation_of(known.get("metadata") or {}) or conversation_of(known.get("configurable") or {})
        parent = getattr(known.get("callbacks"), "parent_run_id", None)
        root = None if parent is None else tracker_for(monitor).root_of("", str(parent))
    return Place(monitor.run_id, conversation, root)


def _tool_point(call: Mapping[str, Any]) -> Point:
    return Point("tool", call["name"], call["id"])


def _point(state: _Review) -> Point:
    told = state["point"]
    return Point(told["name"] or "", told["tool"], told["tool_call_id"])


def _to_person(state: _Review) -> str:
    return "person" if state["verdict"] == Verdict.REVIEW.value else END


def _answer(given: Any) -> dict[str, Any] | None:
    """Arguments of ``Gate.answer``; None where it is no answer."""
    told: Mapping[str, Any] = given if isinstance(given, Mapping) else {"decision": given}
    word = told.get("decision")
    yes = word is True or (isinstance(word, str) and word.casefold() in _YES)
    if not yes and not (word is False or (isinstance(word, str) and word.casefold() in _NO)):
        return None
    label = told.get("label")
    if label is not None and label not in set(TriageState):
        return None
    who, note = str(told.get("who") or ""), told.get("note")
    verdict = Verdict.PROCEED if yes else Verdict.BLOCK
    return {"verdict": verdict, "who": who, "note": None if note is None else str(note), "label": label}
