"""``watch``: one agent and the agents that it manages under a monitor."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from smolagents import (  # type: ignore[import-untyped]  # smolagents ships no type information
    ActionStep,
    FinalAnswerStep,
    MultiStepAgent,
    PlanningStep,
    TaskStep,
)
from smolagents.memory import MemoryStep  # type: ignore[import-untyped]  # the same

from nla_monitor.agent_calls import CallStats, SpanMonitor, shared
from nla_monitor.agent_spans import CallInfo, Span, current_traceparent
from nla_monitor.records import AgentContext, Alert, AlertState, Completion, Scalar, Severity, uuid7
from nla_monitor_smolagents.model import original, watched
from nla_monitor_smolagents.text import visible, visible_prompt

logger = logging.getLogger("nla_monitor")


class AlertingMonitor(SpanMonitor, Protocol):
    """What this integration needs of a ``Monitor``."""

    def on_alert(self, listener: Callable[[Alert], None]) -> None:
        """Call the listener when an alert fires or resolves."""
        ...


@dataclass(frozen=True, slots=True)
class _Call:
    """What is known of a model call when it begins."""

    agent: str
    model: str
    step: int
    run: str
    parent_run: str | None
    root_run: str
    conversation: str
    tool: str | None
    tool_call_id: str | None


class NLAStepCallback:
    """The step callback of one watched agent; made by ``watch``.

    Samples carry a run id of their own for each model call, the agent's run as parent, the outermost agent's run as
    root, the agent's name as node, the tool whose result the model reads with the id of its call, the step's number.
    A conversation is what one memory holds: it begins anew with each ``run(reset=True)``.

    No exception of ours leaves it.
    """

    def __init__(
        self,
        monitor: AlertingMonitor,
        agent: MultiStepAgent,
        *,
        manager: NLAStepCallback | None = None,
        stop_on: Severity | None = None,
    ) -> None:
        self._monitor = monitor
        self._calls = shared(monitor, "smolagents", _Spans)
        self._agent = weakref.ref(agent)
        self._manager = manager
        self._stop_on = stop_on
        self._stopping: set[str] = set()
        self._task: TaskStep | None = None
        self._first: TaskStep | None = None
        self._run = self._conversation = uuid7()
        self._on = True
        self._unwatched = 0
        self._look_at(agent)
        for kind in (ActionStep, PlanningStep, FinalAnswerStep):
            agent.step_callbacks.register(kind, self)
        if stop_on is not None:
            monitor.on_alert(self._heard)

    @property
    def stats(self) -> CallStats:
        """Counters of all watched agents of this monitor."""
        return self._calls.stats

    @property
    def unwatched_steps(self) -> int:
        """Steps whose model had been swapped for one that is not watched; from the next step on it is."""
        return self._unwatched

    def __call__(self, memory_step: MemoryStep, agent: MultiStepAgent) -> None:
        """A step has ended."""
        with self._monitor.guard("smolagents.step"):
            if not self._on:
                return
            if original(agent.model) is None:
                self._unwatched += not isinstance(memory_step, FinalAnswerStep)
                self._look_at(agent)
            if self._root() in self._stopping:
                agent.interrupt()

    def close(self) -> None:
        """Give the agent its own model back and watch no more; smolagents itself never lets go of callbacks."""
        self._on = False
        agent = self._agent()
        model = None if agent is None else original(agent.model)
        if agent is not None and model is not None:
            agent.model = model

    # --- model calls (``model.Announcer``) ----------------------------------------------------------------------------

    def begin(self, messages: Sequence[Any]) -> Span | None:
        """A model call begins, in the agent's thread."""
        with self._monitor.guard("smolagents.begin"):
            agent = self._agent()
            if agent is None or not self._on:
                return None
            self._follow(agent)
            span = self._calls.start(uuid7(), None, self._describe(agent), mark=True)
            if span is not None and self._calls.keeps_text:
                self._calls.said(span, partial(visible_prompt, tuple(messages)))
            return span
        return None

    def fed(self, call: Span | None, prompt: Any) -> None:
        """Its prompt's token ids, a tensor ``[1, token]``."""
        with self._monitor.guard("smolagents.fed"):
            if call is not None and prompt is not None:
                self._calls.open_prompt(call, prompt[0].tolist())

    def end(self, call: Span | None, answer: Callable[[], Any] | None, *, failed: bool) -> None:
        """It is over."""
        with self._monitor.guard("smolagents.end"):
            if call is None:
                return
            # The answer is looked at only where somebody runs it again.
            text = None if answer is None or self._monitor.source is None else getattr(answer(), "content", None)
            completion = Completion(text=text) if isinstance(text, str) else None
            name = call.payload.model
            self._calls.end(call.key, model_call=True, name=name, failed=failed, completion=completion)
            if answer is not None:
                self._calls.said(call, None, lambda: visible(answer()))

    # --- inside -------------------------------------------------------------------------------------------------------

    def _look_at(self, agent: MultiStepAgent) -> None:
        agent.model = watched(agent.model, self)

    def _follow(self, agent: MultiStepAgent) -> None:
        """Notice a new run: smolagents announces none, but its memory begins with the task."""
        tasks = [step for step in agent.memory.steps if isinstance(step, TaskStep)]
        if tasks and tasks[-1] is not self._task:
            self._task, self._run = tasks[-1], uuid7()
            self._stopping.clear()
        if tasks and tasks[0] is not self._first:
            self._first, self._conversation = tasks[0], self._run

    def _root(self) -> str:
        return self._run if self._manager is None else self._manager._root()  # noqa: SLF001 -- its like

    def _describe(self, agent: MultiStepAgent) -> _Call:
        steps = agent.memory.steps
        last = steps[-1] if steps else None
        read = None
        if isinstance(last, ActionStep) and last.tool_calls and last.observations is not None:
            read = last.tool_calls[-1]
        top = self._manager
        return _Call(
            agent=agent.name or type(agent).__name__,
            model=str(getattr(agent.model, "model_id", None) or type(agent.model).__name__),
            step=getattr(agent, "step_number", 0),
            run=self._run,
            parent_run=None if top is None else top._run,  # noqa: SLF001 -- its like
            root_run=self._root(),
            conversation=self._conversation,
            tool=None if read is None else read.name,
            tool_call_id=None if read is None else read.id,
        )

    def _heard(self, alert: Alert) -> None:
        """On the watcher's thread: an alert fired or resolved."""
        loud = self._stop_on is not None and alert.severity.rank >= self._stop_on.rank
        root = alert.agent.root_run_id if alert.agent is not None else None
        if loud and root is not None and root == self._root() and alert.state is AlertState.FIRING:
            self._stopping.add(root)
            message = "nla_monitor: %s alert on this run: %s (“%s”); the agent is interrupted after its step"
            logger.warning(message, alert.severity.value, alert.rule_title, alert.quote)


class _Spans:
    """Calls of watched models, for ``AgentCalls``."""

    def current(self) -> str | None:
        """The framework keeps no current call: calls are found by their marks."""
        return None

    def is_step(self, span: Span) -> bool:
        """Every one is an agent's."""
        return True

    def describe(self, span: Span) -> CallInfo:
        """What the samples of a call carry."""
        call: _Call = span.payload
        context = AgentContext(
            agent_run_id=span.key,
            parent_run_id=call.run,
            root_run_id=call.root_run,
            tool=call.tool,
            node=call.agent,
            conversation_id=call.conversation,
            tool_call_id=call.tool_call_id,
        )
        extra: dict[str, Scalar] = {"model_type": call.model, "agent": call.agent, "agent_step": call.step}
        if call.parent_run is not None:
            extra["manager_run"] = call.parent_run
        return CallInfo(context, call.model, current_traceparent(), extra)


_watched: weakref.WeakKeyDictionary[MultiStepAgent, weakref.WeakKeyDictionary[Any, NLAStepCallback]] = (
    weakref.WeakKeyDictionary()
)
_lock = threading.Lock()


def watch(
    agent: MultiStepAgent,
    monitor: AlertingMonitor,
    *,
    stop_on: Severity | str | None = None,
    manager: NLAStepCallback | None = None,
) -> NLAStepCallback:
    """Watch an agent and, each under it, the agents that it manages; twice is once.

    Args:
        agent: any smolagents agent over local weights.
        monitor: a ``Monitor`` attached to the weights (``model.model`` of a ``TransformersModel``).
        stop_on: opt-in: an alert of this severity or above on a run interrupts the agent after its step, as
            ``agent.interrupt()`` does. None: nothing is ever interrupted.
        manager: the watched agent that manages this one, where ``managed_agents`` does not say so.
    """
    with _lock:
        known = _watched.setdefault(agent, weakref.WeakKeyDictionary())
        callback = known.get(monitor)
        if callback is None or not callback._on:  # noqa: SLF001 -- its like
            severity = None if stop_on is None else Severity(stop_on)
            callback = known[monitor] = NLAStepCallback(monitor, agent, manager=manager, stop_on=severity)
    for managed in (agent.managed_agents or {}).values():
        if isinstance(managed, MultiStepAgent):
            watch(managed, monitor, stop_on=stop_on, manager=callback)
    return callback
