"""Acting on findings in agents of ``langchain.agents.create_agent``.

agent = create_agent(model, tools, middleware=[ReviewMiddleware(monitor, "high", fail="closed")], checkpointer=...)
"""

from __future__ import annotations

from typing import Any

from langchain_core.messages import AIMessage, BaseMessage
from langgraph.config import get_config

from nla_monitor.decisions import Gate, Point, Verdict
from nla_monitor.errors import MissingExtraError
from nla_monitor.records import Severity
from nla_monitor_langchain.review import NOT_RUN, GatedAgent, Review, ToolGate, not_run

try:
    from langchain.agents.middleware import AgentMiddleware, hook_config
except ModuleNotFoundError as missing:
    raise MissingExtraError("langchain", "langgraph", "nla_monitor_langchain.middleware") from missing


class ReviewMiddleware(AgentMiddleware):
    """After each answer of the model: where something was found in its activations, a person is asked.

    Approved, the agent goes on. Rejected, the tool calls of the answer are not run and the agent ends. The agent needs
    a checkpointer and a ``thread_id``, and the monitor's ``NLACallbackHandler`` in its config.

    Args:
        monitor: attached to the model.
        severity: findings of this severity or above.
        fail: ``open`` or ``closed``: what happens when not all is read in time. ``closed`` asks the person, too.
        message: what stands in the place of the results of tool calls that were not run.
        content: show the reviewer the words of the explanations; they then go wherever the graph's state goes.
        options: further arguments of ``Gate`` (``rules``, ``deadline_seconds``, ``stop``, ``on_alert``). With
            ``stop="block"`` nobody is asked.

    Raises:
        ConfigError: an argument is none of the possible ones.
    """

    def __init__(
        self,
        monitor: GatedAgent,
        severity: Severity | str = Severity.HIGH,
        *,
        fail: Any,
        message: str = NOT_RUN,
        content: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self._message = message
        self.gate = Gate(monitor, severity=severity, fail=fail, **options)
        self._review = Review(self.gate, monitor, content=content)

    @hook_config(can_jump_to=["end"])
    def after_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """Ask before anything follows from the answer."""
        return self._follow(state["messages"], self._review.verdict(Point(), get_config()))

    @hook_config(can_jump_to=["end"])
    async def aafter_model(self, state: Any, runtime: Any) -> dict[str, Any] | None:
        """The same without holding up the event loop."""
        return self._follow(state["messages"], await self._review.averdict(Point(), get_config()))

    def _follow(self, messages: list[BaseMessage], verdict: Verdict) -> dict[str, Any] | None:
        if verdict is Verdict.PROCEED:
            return None
        last = messages[-1] if messages else None
        calls = last.tool_calls if isinstance(last, AIMessage) else []
        return {"messages": [not_run(call, self._message) for call in calls], "jump_to": "end"}


class ToolGateMiddleware(AgentMiddleware):
    """Before each tool: see ``ToolGate``, whose arguments it takes."""

    def __init__(
        self, monitor: GatedAgent, severity: Severity | str = Severity.HIGH, *, fail: Any, **options: Any
    ) -> None:
        super().__init__()
        self._tool_gate = ToolGate(monitor, severity, fail=fail, **options)

    @property
    def gate(self) -> Gate:
        """What it asks."""
        return self._tool_gate.gate

    def wrap_tool_call(self, request: Any, handler: Any) -> Any:
        """Run a tool call, or answer it with the message."""
        return self._tool_gate.wrap_tool_call(request, handler)

    async def awrap_tool_call(self, request: Any, handler: Any) -> Any:
        """The same without holding up the event loop."""
        return await self._tool_gate.awrap_tool_call(request, handler)
