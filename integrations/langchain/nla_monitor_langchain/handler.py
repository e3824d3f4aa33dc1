"""``NLACallbackHandler``: ties activations of a local model to the LangChain run that caused them.

It does bookkeeping only: run ids, tool results, a capture session for each model call. The vectors are taken in
the model's forward pass by the monitor; nothing here waits on anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import BaseMessage
from langchain_core.outputs import LLMResult
from langchain_core.runnables import ensure_config

from nla_monitor.agent_calls import AgentMonitor
from nla_monitor.guard import strict
from nla_monitor.records import AgentContext, Scalar
from nla_monitor_langchain.extract import CHAT_NLA_TYPE, PromptEncoder, fingerprint, prompt_encoder
from nla_monitor_langchain.lineage import Run, ToolResult, flat_text, result_needles, sequence_step, tool_of_messages
from nla_monitor_langchain.spans import current_traceparent, finder
from nla_monitor_langchain.tracker import ModelCall, Prompt, TrackerStats, tracker_for
from nla_monitor_langchain.visible import tell_answer, tell_messages, tell_text

last_started: ContextVar[str | None] = ContextVar("nla_monitor_langchain_last_started", default=None)
"""Run id of the chat model call started last in this context: LangChain passes no run id to ``_stream``."""


_CONVERSATION_KEYS = ("thread_id", "conversation_id", "session_id")


class NLACallbackHandler(BaseCallbackHandler):
    """Give it in ``config={"callbacks": [handler]}`` of an agent, chain or model over local weights.

    Each sample taken during a model call then carries ``agent_run_id``, ``parent_run_id``, ``root_run_id``, the tool
    and tool call whose result the model was reading, LangGraph node, conversation (``thread_id``) and the trace
    context; in a chat prompt also whose message its token stands in, and which tokens that message is. Works with
    ``invoke``, ``ainvoke``, ``stream``, ``astream``, ``batch`` and ``abatch``, from any number of threads: forward
    passes are recognised by the prompt's token ids, so streaming from a bare thread is no obstacle.

    The handler must know how the model tokenizes. With ``ChatNLAModel`` it needs nothing. With ``llm`` it runs the
    preprocessing of that very model (exact). With ``tokenizer``, or else the one the monitor was attached with, it
    encodes texts with the tokenizer's defaults and messages through its chat template. Where that differs from what
    the model was fed, no sample is misplaced: the call has none, which is counted in ``stats`` and said once.

    One instance serves sync and async, concurrently; it holds no state of a run. Two handlers of one monitor share
    their state, so a double installation takes no sample twice. No exception leaves it.

    Args:
        monitor: a ``Monitor`` attached to the model.
        llm: the LangChain model over local weights.
        tokenizer: its tokenizer, where the LangChain model is a wrapper unknown to us.

    Raises:
        ConfigError: ``llm`` has no local pipeline or tokenizer.
    """

    # Inline: on the event loop's thread and in order, instead of a hop to a thread pool with a copied context.
    run_inline = True

    def __init__(self, monitor: AgentMonitor, *, llm: Any | None = None, tokenizer: Any | None = None) -> None:
        super().__init__()
        self._monitor = monitor
        self._tracker = tracker_for(monitor)
        self._encoder: PromptEncoder | None = prompt_encoder(llm, tokenizer)
        # LangChain swallows what a handler raises; under NLA_MONITOR_STRICT (tests) a fault of ours shall be seen.
        self.raise_error = strict()

    def __copy__(self) -> NLACallbackHandler:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> NLACallbackHandler:
        return self

    @property
    def stats(self) -> TrackerStats:
        """Counters of all handlers and models of this monitor."""
        return self._tracker.stats

    # --- model calls --------------------------------------------------------------------------------------------

    def on_llm_start(
        self,
        serialized: dict[str, Any],
        prompts: list[str],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A text model is about to read ``prompts``."""
        with self._monitor.guard("langchain.on_llm_start"):
            params = _params(kwargs)
            if self._tracker.is_open(str(run_id)):
                return
            run, model_type = self._run(run_id, parent_run_id, tags), str(params.get("_type", ""))
            call = self._call(run, metadata, model_type, "\n".join(prompts), span=finder(run_id))
            tell_text(self._monitor, call.context, "\n".join(prompts))
            encoder = self._encoder_for(call.model_type, chat=False)
            if encoder is not None:
                fed = [Prompt(encoder.encode_text(prompt, params), prompt) for prompt in prompts]
                self._tracker.start_call(call, fed)

    def on_chat_model_start(
        self,
        serialized: dict[str, Any],
        messages: list[list[BaseMessage]],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A chat model is about to read ``messages``."""
        with self._monitor.guard("langchain.on_chat_model_start"):
            params = _params(kwargs)
            if self._tracker.is_open(str(run_id)):
                return
            flat = [message for conversation in messages for message in conversation]
            run, model_type = self._run(run_id, parent_run_id, tags), str(params.get("_type", ""))
            read, key = tool_of_messages(flat), fingerprint(flat)
            call = self._call(run, metadata, model_type, flat_text(flat), read=read, key=key, span=finder(run_id))
            tell_messages(self._monitor, call.context, flat)
            if call.model_type == CHAT_NLA_TYPE:
                last_started.set(str(run_id))
                self._tracker.start_call(call, (), claimable=True)
                return
            encoder = self._encoder_for(call.model_type, chat=True)
            if encoder is not None:
                self._tracker.start_call(call, [_chat_prompt(encoder, item, params) for item in messages])

    def on_llm_end(
        self, response: LLMResult, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """A model call has ended."""
        with self._monitor.guard("langchain.on_llm_end"):
            tell_answer(self._monitor, str(run_id), response)
            for tool_call_id in written_calls(response):
                self._tracker.wrote_call(tool_call_id, str(run_id))
            answers = [options[0].text for options in response.generations if options]
            self._tracker.end_call(str(run_id), answers)

    def on_llm_error(
        self, error: BaseException, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """A model call has failed or was cancelled."""
        with self._monitor.guard("langchain.on_llm_error"):
            self._tracker.end_call(str(run_id), failed=True)

    # --- chains and tools -----------------------------------------------------------------------------------------

    def on_chain_start(
        self,
        serialized: dict[str, Any],
        inputs: dict[str, Any],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A chain, graph or node has started."""
        with self._monitor.guard("langchain.on_chain_start"):
            self._tracker.start_run(self._run(run_id, parent_run_id, tags, kwargs.get("name")))

    def on_chain_end(
        self, outputs: dict[str, Any], *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """A chain, graph or node has ended."""
        with self._monitor.guard("langchain.on_chain_end"):
            self._tracker.end_run(str(run_id))

    def on_chain_error(
        self, error: BaseException, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """A chain, graph or node has failed."""
        with self._monitor.guard("langchain.on_chain_error"):
            self._tracker.end_run(str(run_id))

    def on_tool_start(
        self,
        serialized: dict[str, Any],
        input_str: str,
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        inputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A tool has started."""
        with self._monitor.guard("langchain.on_tool_start"):
            name = (serialized or {}).get("name") or kwargs.get("name")
            run = self._run(run_id, parent_run_id, tags, name, tool_call_id=kwargs.get("tool_call_id"))
            self._tracker.start_run(run)

    def on_tool_end(self, output: Any, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any) -> None:
        """A tool has returned: the next model call that reads its result carries its name."""
        with self._monitor.guard("langchain.on_tool_end"):
            run = self._tracker.end_run(str(run_id))
            if run is not None:
                result = ToolResult(
                    tool=run.name or "tool",
                    tool_run_id=run.run_id,
                    parent_run_id=run.parent_run_id,
                    step=run.step,
                    needles=result_needles(output),
                    tool_call_id=run.tool_call_id or getattr(output, "tool_call_id", None),
                )
                self._tracker.tool_result(run.root_run_id, result)

    def on_tool_error(
        self, error: BaseException, *, run_id: UUID, parent_run_id: UUID | None = None, **kwargs: Any
    ) -> None:
        """A tool has failed."""
        with self._monitor.guard("langchain.on_tool_error"):
            self._tracker.end_run(str(run_id))

    # --- inside -----------------------------------------------------------------------------------------------------

    def _run(
        self,
        run_id: UUID,
        parent: UUID | None,
        tags: Sequence[str] | None,
        name: str | None = None,
        *,
        tool_call_id: str | None = None,
    ) -> Run:
        run, parent_id = str(run_id), _text(parent)
        return Run(run, parent_id, self._tracker.root_of(run, parent_id), name, sequence_step(tags), tool_call_id)

    def _call(
        self,
        run: Run,
        metadata: Mapping[str, Any] | None,
        model_type: str,
        prompt: str,
        *,
        read: tuple[str | None, str | None] = (None, None),
        key: str | None = None,
        span: Callable[[], str | None] | None = None,
    ) -> ModelCall:
        reads = tuple(self._tracker.results_read(run, prompt))
        known = metadata or {}
        if read == (None, None) and reads:
            read = reads[-1].tool, reads[-1].tool_call_id
        context = AgentContext(
            agent_run_id=run.run_id,
            parent_run_id=run.parent_run_id,
            root_run_id=run.root_run_id,
            tool=read[0],
            tool_call_id=read[1],
            node=_text(known.get("langgraph_node")),
            conversation_id=conversation_of(known) or conversation_of(ensure_config().get("configurable") or {}),
        )
        return ModelCall(context, model_type, current_traceparent(), _attributes(model_type, reads), reads, key, span)

    def _encoder_for(self, model_type: str, *, chat: bool) -> PromptEncoder | None:
        encoder = self._encoder or self._monitor_encoder()
        if encoder is None or not encoder.serves(model_type, chat=chat):
            self._tracker.unwatched(model_type)
            return None
        return encoder

    def _monitor_encoder(self) -> PromptEncoder | None:
        # The monitor may be attached after the handler was made, so its tokenizer is asked for when first needed.
        tokenizer = getattr(self._monitor, "tokenizer", None)
        self._encoder = prompt_encoder(tokenizer=tokenizer)
        return self._encoder


def watch(llm: Any, monitor: AgentMonitor) -> Any:
    """``llm`` with a handler for it bound in: for code where the config of a call is out of reach.

    Samples carry run and parent ids, conversation and trace context. The root run and tool results in plain text
    are seen only by a handler that is given in the config of the whole agent: prefer that. Bind tools before.

    Raises:
        ConfigError: ``llm`` has no local pipeline or tokenizer.
    """
    return llm.with_config(callbacks=[NLACallbackHandler(monitor, llm=llm)])


def written_calls(response: LLMResult) -> list[str]:
    """Ids of the tool calls that a model call has asked for."""
    generations = (option for options in response.generations for option in options)
    messages = (getattr(generation, "message", None) for generation in generations)
    return [call["id"] for message in messages for call in getattr(message, "tool_calls", ()) if call["id"]]


def _chat_prompt(encoder: PromptEncoder, messages: Sequence[BaseMessage], params: Mapping[str, Any]) -> Prompt:
    ids, text = encoder.encode_messages(messages, params)
    return Prompt(ids, text, partial(encoder.outliner.spans, tuple(messages), text, ids))


def conversation_of(values: Mapping[str, Any]) -> str | None:
    """The conversation's id in a call's metadata or ``configurable``; None where it has none."""
    return next((str(values[key]) for key in _CONVERSATION_KEYS if values.get(key)), None)


def _params(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    params = kwargs.get("invocation_params")
    return params if isinstance(params, Mapping) else {}


def _attributes(model_type: str, reads: Sequence[ToolResult]) -> dict[str, Scalar]:
    attributes: dict[str, Scalar] = {"model_type": model_type} if model_type else {}
    return {**attributes, "tool_run_id": reads[-1].tool_run_id} if reads else attributes


def _text(value: object) -> str | None:
    return None if value is None else str(value)
