"""``NLARunHooks``: model calls told with their messages, for models that generate where no context follows.

The trace processor needs no hooks. They add what spans do not have: the prompt before the forward runs, so that its
tokens tell a forward in a bare thread or in another batch, and the answer after it.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

from agents import Agent, ModelResponse, RunContextWrapper, RunHooks
from agents.items import ItemHelpers, TResponseInputItem

from nla_monitor.agent_calls import CallStats, SpanMonitor, shared
from nla_monitor.agent_spans import Span
from nla_monitor.records import Completion, uuid7
from nla_monitor_openai_agents.messages import chat_messages, visible_answer, visible_prompt
from nla_monitor_openai_agents.processor import FRAMEWORK, Spans, Step, conversation, current_span_id

_MAX_RUNS = 4_096


class NLARunHooks(RunHooks[Any]):
    """Give it to ``Runner.run(..., hooks=NLARunHooks(monitor, tokenizer=tokenizer))``.

    The prompt is made into tokens through the tokenizer's chat template, in the event loop's thread (as long as that
    takes). Where the model renders it otherwise, its tokens are others and the call is found by its context only.
    Works without tracing as well; then run and parent are those of the hooks alone. No exception leaves it.

    Args:
        monitor: a ``Monitor`` attached to the model.
        tokenizer: of the model, with a chat template.
    """

    def __init__(self, monitor: SpanMonitor, *, tokenizer: Any) -> None:
        self._monitor = monitor
        self._calls = shared(monitor, FRAMEWORK, Spans)
        self._tokenizer = copy.deepcopy(tokenizer)  # carries state of its own: the host's is left alone
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[int, int], tuple[Span, str]] = OrderedDict()

    @property
    def stats(self) -> CallStats:
        """Counters of all processors and hooks of this monitor."""
        return self._calls.stats

    async def on_llm_start(
        self,
        context: RunContextWrapper[Any],
        agent: Agent[Any],
        system_prompt: str | None,
        input_items: list[TResponseInputItem],
    ) -> None:
        """The model is about to be called."""
        with self._monitor.guard("openai_agents.on_llm_start"):
            run = id(context), id(agent)
            self._end(run, failed=True)  # no end was told of the last one: it failed
            name = agent.model if isinstance(agent.model, str) else agent.name
            step = Step(None, name, conversation(), tuple(input_items), system=system_prompt)
            started = self._calls.start(uuid7(), current_span_id(), step)
            if started is None:
                return
            with self._lock:
                self._open[run] = started, name
                forgotten = self._open.popitem(last=False)[1] if len(self._open) > _MAX_RUNS else None
            if forgotten is not None:
                self._calls.end(forgotten[0].key, failed=True)
            self._calls.open_prompt(started, self._encode(chat_messages(system_prompt, input_items)))

    async def on_llm_end(self, context: RunContextWrapper[Any], agent: Agent[Any], response: ModelResponse) -> None:
        """The model has answered."""
        with self._monitor.guard("openai_agents.on_llm_end"):
            text = "".join(ItemHelpers.extract_last_text(item) or "" for item in _messages(response))
            completion = Completion(text=text) if text else None
            span = self._end((id(context), id(agent)), failed=False, completion=completion)
            if span is not None and not any(step.payload.told for step in span.parents[-1:]):
                self._tell(span, response)

    def _tell(self, span: Span, response: ModelResponse) -> None:
        """What no span of the SDK has told: the visible side of the call."""
        if self._calls.keeps_text:
            prompt = partial(visible_prompt, span.payload.system, span.payload.messages)
            self._calls.said(span, prompt, partial(visible_answer, tuple(response.output)))

    def _end(self, run: tuple[int, int], *, failed: bool, completion: Completion | None = None) -> Span | None:
        with self._lock:
            entry = self._open.pop(run, None)
        if entry is not None:
            span, name = entry
            # A forward that the prompt's tokens did not tell is on the span around it, and no miss.
            found = any(step.claimed for step in span.parents[-1:])
            self._calls.end(span.key, model_call=not found, name=name, failed=failed, completion=completion)
            return span
        return None

    def _encode(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        with self._lock:
            encoded = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=True
            )
        return list(encoded["input_ids"])


def _messages(response: ModelResponse) -> list[Any]:
    return [item for item in response.output if getattr(item, "type", None) == "message"]
