"""``NLAHooks``: Inspect tells of samples and model calls; a finding may end a sample.

Inspect awaits ``on_before_model_generate`` in the task that then calls the model, so that a mark left in its context
(``nla_monitor.agent_calls``) is found by a provider that runs its forward there, or in a worker thread with that
context. The ``hf/`` provider batches the prompts of many samples in one bare thread: there the prompt's tokens, made by
the provider's own rendering, tell whose row it is.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from inspect_ai.event import ModelEvent
from inspect_ai.hooks import BeforeModelGenerate, Hooks, ModelUsageData, SampleEnd, SampleEvent, SampleStart, hooks
from inspect_ai.model import ChatMessage, ChatMessageTool, Model
from inspect_ai.util import LimitExceededError

from nla_monitor.agent_calls import AgentCalls, CallStats, SpanMonitor, shared
from nla_monitor.agent_spans import CallInfo, Span, current_traceparent
from nla_monitor.records import AgentContext, Alert, AlertState, Completion, Severity, uuid7
from nla_monitor_inspect.prompts import HuggingFacePrompts
from nla_monitor_inspect.text import visible, visible_prompt

logger = logging.getLogger("nla_monitor")

_MAX_SAMPLES = 4_096


class AlertingMonitor(SpanMonitor, Protocol):
    """What these hooks need of a ``Monitor``."""

    def on_alert(self, listener: Callable[[Alert], None]) -> None:
        """Call the listener when an alert fires or resolves."""
        ...


@dataclass(frozen=True, slots=True)
class _Sample:
    uuid: str
    name: str | None = None
    """Its id in the data set."""
    epoch: int | None = None
    task: str | None = None


@dataclass(slots=True)
class _Call:
    """What is kept of a model call."""

    data: BeforeModelGenerate
    sample: _Sample
    calls: AgentCalls
    """Whose it is: hooks of several monitors may watch the same call."""
    returned: bool = False
    """The model has answered: a later forward of this context is not its."""

    @property
    def messages(self) -> Sequence[ChatMessage]:
        return self.data.input

    @property
    def key(self) -> tuple[str, tuple[str | None, ...]]:
        return self.sample.uuid, tuple(message.id for message in self.messages)


_sample: ContextVar[_Sample | None] = ContextVar("nla_monitor_inspect_sample", default=None)
_calling: ContextVar[tuple[_Call, ...]] = ContextVar("nla_monitor_inspect_calls", default=())
"""The model call announced last in this context, as each monitor's hooks keep it."""


class NLAHooks(Hooks):
    """Inspect's hooks for one monitor; made and registered by ``install``.

    Samples of activations carry a run id of their own for each model call, the evaluation sample's uuid as parent, root
    and conversation, the tool whose result the model reads with the id of its call, and ``task``, ``sample`` and
    ``epoch`` as attributes. No exception leaves the hooks but the one that ``stop_on`` asks for.

    Args:
        monitor: a ``Monitor`` attached to the model.
        model: the ``hf/`` model, whose rendering tells the tokens of each prompt. None: calls are found by context.
        stop_on: opt-in: an alert of this severity or above on a sample ends it at its next model call, as an operator's
            limit would. It is scored with what it has. None: nothing is ever ended.

    Raises:
        ConfigError: the model has no local weights to read.
    """

    def __init__(
        self, monitor: AlertingMonitor, *, model: Model | None = None, stop_on: Severity | str | None = None
    ) -> None:
        self._monitor = monitor
        self._calls = shared(monitor, "inspect", _Spans)
        self._prompts = None if model is None else HuggingFacePrompts(model)
        self._stop_on = None if stop_on is None else Severity(stop_on)
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[str, tuple[str | None, ...]], Span] = OrderedDict()
        self._stopping: OrderedDict[str, Alert] = OrderedDict()
        self._on = True
        if self._stop_on is not None:
            monitor.on_alert(self._heard)

    @property
    def stats(self) -> CallStats:
        """Counters of all hooks of this monitor."""
        return self._calls.stats

    def enabled(self) -> bool:
        """Whether Inspect should call these hooks."""
        return self._on

    def close(self) -> None:
        """Watch no more; Inspect itself never lets go of hooks."""
        with self._monitor.guard("inspect.close"):
            if self._on:
                self._on = False
                self._calls.release()

    async def on_sample_start(self, data: SampleStart) -> None:
        """A sample of the evaluation starts, in the task that runs it."""
        with self._monitor.guard("inspect.on_sample_start"):
            _sample.set(_Sample(data.sample_id, str(data.summary.id), data.summary.epoch))

    async def on_before_model_generate(self, data: BeforeModelGenerate) -> None:
        """A model is about to be called, in the task that calls it.

        Raises:
            LimitExceededError: an alert has asked to stop this sample.
        """
        sample = replace(_sample.get() or _Sample(data.sample_id or ""), task=data.task_name)
        self._stop(sample)
        with self._monitor.guard("inspect.on_before_model_generate"):
            same = tuple(known for known in _calling.get() if known.data is data)
            if any(known.calls is self._calls for known in same):
                return  # hooks of this monitor are installed twice
            call = _Call(data, sample, self._calls)
            span = self._calls.start(uuid7(), None, call, mark=True)
            if span is None:
                return
            _calling.set((*same, call))
            with self._lock:
                known = self._open.pop(call.key, None)  # a retry of the same call: the last attempt failed
                self._open[call.key] = span
                forgotten = self._open.popitem(last=False)[1] if len(self._open) > _MAX_SAMPLES else None
            for old in (known, forgotten):
                if old is not None:
                    self._calls.end(old.key, failed=True)
            if self._calls.keeps_text:
                self._calls.said(span, partial(visible_prompt, tuple(data.input)))
            ids = None if self._prompts is None else self._prompts.encode(data)
            if ids is not None:
                self._calls.open_prompt(span, ids)

    async def on_model_usage(self, data: ModelUsageData) -> None:
        """A model has answered, in the task that called it."""
        with self._monitor.guard("inspect.on_model_usage"):
            for call in _calling.get():
                call.returned = True

    async def on_sample_event(self, data: SampleEvent) -> None:
        """Something has happened in a sample; of interest is that a model call is over."""
        with self._monitor.guard("inspect.on_sample_event"):
            event = data.event
            if not isinstance(event, ModelEvent):
                return
            with self._lock:
                span = self._open.pop((data.sample_id, tuple(message.id for message in event.input)), None)
            if span is not None:
                failed = event.error is not None
                text = None if failed or event.output.empty else event.output.completion
                if text is not None:
                    self._calls.said(span, None, partial(visible, event.output.message))
                self._end(span, failed=failed or event.cache == "read", text=text)

    async def on_sample_end(self, data: SampleEnd) -> None:
        """A sample has ended; calls of which no end was told are given up."""
        with self._monitor.guard("inspect.on_sample_end"):
            with self._lock:
                self._stopping.pop(data.sample_id, None)
                left = [key for key in self._open if key[0] == data.sample_id]
                spans = [self._open.pop(key) for key in left]
            for span in spans:
                self._end(span, failed=not span.payload.returned)

    def _end(self, span: Span, *, failed: bool, text: str | None = None) -> None:
        completion = None if text is None else Completion(text=text)
        self._calls.end(
            span.key, model_call=True, name=span.payload.data.model_name, failed=failed, completion=completion
        )

    def _heard(self, alert: Alert) -> None:
        """On the watcher's thread: an alert fired or resolved."""
        loud = self._stop_on is not None and alert.severity.rank >= self._stop_on.rank
        root = alert.agent.root_run_id if alert.agent is not None else None
        if loud and root is not None and alert.state is AlertState.FIRING:
            with self._lock:
                self._stopping.setdefault(root, alert)
                if len(self._stopping) > _MAX_SAMPLES:
                    self._stopping.popitem(last=False)

    def _stop(self, sample: _Sample) -> None:
        with self._lock:
            alert = self._stopping.get(sample.uuid)
        if alert is not None:
            message = f"nla_monitor: {alert.severity.value} alert on this sample: {alert.rule_title} (“{alert.quote}”)"
            logger.warning("%s; the sample is ended", message)
            raise LimitExceededError("custom", value=1, limit=0, message=message)


class _Spans:
    """Inspect's model calls, for ``AgentCalls``."""

    def current(self) -> str | None:
        """Inspect keeps no current span of a model call: calls are found by their marks."""
        return None

    def is_step(self, span: Span) -> bool:
        """Whether the call's model may still be running."""
        call: _Call = span.payload
        return not call.returned

    def describe(self, span: Span) -> CallInfo:
        """What the samples of a call carry."""
        call: _Call = span.payload
        sample, name = call.sample, call.data.model_name
        last = call.messages[-1] if call.messages else None
        read = last if isinstance(last, ChatMessageTool) else None
        context = AgentContext(
            agent_run_id=span.key,
            parent_run_id=sample.uuid or None,
            root_run_id=sample.uuid or span.key,
            tool=None if read is None else read.function,
            conversation_id=sample.uuid or None,
            tool_call_id=None if read is None else read.tool_call_id,
        )
        told = {"task": sample.task, "sample": sample.name, "epoch": sample.epoch}
        extra = {"model_type": name, **{key: value for key, value in told.items() if value is not None}}
        return CallInfo(context, name, current_traceparent(), extra)


def install(monitor: AlertingMonitor, *, model: Model | None = None, stop_on: Severity | str | None = None) -> NLAHooks:
    """Register hooks of this monitor with Inspect, for the rest of the process or until ``close``.

    Raises:
        ConfigError: the model has no local weights to read.
    """
    made = NLAHooks(monitor, model=model, stop_on=stop_on)

    class Installed(NLAHooks):
        """Inspect makes its own instance, without arguments; it shall be this one."""

        def __new__(cls) -> NLAHooks:  # type: ignore[misc]  # on purpose no Installed
            return made

    hooks(name=f"nla_monitor_{id(made):x}", description="Ties activations to samples and model calls")(Installed)
    return made
