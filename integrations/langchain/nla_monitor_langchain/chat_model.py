"""``ChatNLAModel``: a LangChain chat model over local weights, whose activations are tied to runs token for token."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, ToolCall
from langchain_core.messages.ai import UsageMetadata
from langchain_core.messages.tool import tool_call_chunk
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import ConfigDict, Field, PrivateAttr, SkipValidation
from transformers import GenerationConfig

from nla_monitor.records import AgentContext, Completion, uuid7
from nla_monitor_langchain.extract import CHAT_NLA_TYPE, Encoded, chat_text, fingerprint, token_list
from nla_monitor_langchain.generation import GumbelSampler, StopOnText, TextThread, cut_at_stop, hold_back, prompt_seed
from nla_monitor_langchain.handler import last_started
from nla_monitor_langchain.outline import Outliner
from nla_monitor_langchain.spans import current_traceparent, finder
from nla_monitor_langchain.tracker import ModelCall, Prompt, tracker_for, trackers


class ChatNLAModel(BaseChatModel):
    """A chat model on a local transformers model, for use with ``NLACallbackHandler``.

    The model itself opens the capture session, in the very thread that runs its forward passes: nothing is matched,
    so even identical prompts in concurrent runs never swap their samples.

        chat = ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=64)
        chat.invoke("hello", config={"callbacks": [NLACallbackHandler(monitor)]})

    Messages go through the tokenizer's chat template. A tokenizer without one gets ``prompt_format``; without that
    the contents of the messages, joined by line breaks (a base model knows no roles).
    Greedy by default. With ``temperature`` it samples from a random state of its own: torch's global one, which may
    belong to a training run, is never touched.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: SkipValidation[Any]
    """transformers causal LM; moved and put into eval mode by its owner."""
    tokenizer: SkipValidation[Any]
    max_new_tokens: int = Field(256, ge=1)
    temperature: float | None = Field(None, gt=0)
    """None: greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    """Same seed and prompt, same text; only with ``temperature``."""
    stop: list[str] | None = None
    """Texts that end a completion; they are not part of it. A call's ``stop`` takes their place."""
    prompt_format: SkipValidation[Callable[[list[BaseMessage]], str] | None] = None
    """Messages to prompt text; takes precedence over the chat template."""
    tool_parser: SkipValidation[Callable[[str], list[ToolCall]] | None] = None
    """Tool calls in a completion; what it raises reaches the caller."""
    monitor: SkipValidation[Any] = None
    """A ``Monitor``, for samples without any callback handler."""

    _outliner: Outliner = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Copies the tokenizer, so that nothing but the host's own calls ever uses the host's."""
        super().model_post_init(context)
        self._outliner = Outliner(self.tokenizer, "" if self.prompt_format else "\n")

    @property
    def _llm_type(self) -> str:
        return CHAT_NLA_TYPE

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {
            "model_name": self._name(),
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
        }

    def _name(self) -> str:
        return str(getattr(self.model, "name_or_path", "") or type(self.model).__name__)

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> Any:
        params = super()._get_ls_params(stop=stop, **kwargs)
        return {**params, "ls_provider": "transformers", "ls_model_name": self._name()}

    def bind_tools(self, tools: Sequence[Any], **kwargs: Any) -> Runnable[Any, AIMessage]:
        """The model with tools for its chat template; ``tool_parser`` reads the calls out of the text."""
        return self.bind(tools=[convert_to_openai_tool(tool) for tool in tools], **kwargs)

    def prompt_ids(self, messages: Sequence[BaseMessage], tools: Any = None) -> list[int]:
        """Token ids ``[token]`` of what the model is fed for these messages."""
        return self._encode(messages, tools).ids

    def prompt_text(self, messages: Sequence[BaseMessage], tools: Any = None) -> str:
        """The text that is tokenized for these messages."""
        if self._templated:
            return chat_text(self.tokenizer, messages, tools=tools)
        return self.prompt_format(list(messages)) if self.prompt_format else "\n".join(item.text for item in messages)

    @property
    def _templated(self) -> bool:
        return self.prompt_format is None and bool(getattr(self.tokenizer, "chat_template", None))

    def _encode(self, messages: Sequence[BaseMessage], tools: Any) -> Encoded:
        text = self.prompt_text(messages, tools)
        # A template writes the special tokens itself; a plain text gets the tokenizer's.
        return Encoded(token_list(self.tokenizer(text, add_special_tokens=not self._templated)["input_ids"]), text)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        (ids, fed), stops = self._encode(messages, kwargs.get("tools")), self._stops(stop)
        with self._sessions(messages, Encoded(ids, fed), run_manager, last_started.get()) as tell:
            written = self._decode(ids, stops, threading.Event(), kwargs)
            tell(written)
        text, stopped = cut_at_stop(self.tokenizer.decode(written, skip_special_tokens=True), stops)
        reason = "stop" if stopped or len(written) < self._limit(kwargs) else "length"
        usage = _usage(len(ids), len(written))
        message = AIMessage(content=text, tool_calls=self._tool_calls(text), usage_metadata=usage)
        return ChatResult(generations=[ChatGeneration(message=message, generation_info={"finish_reason": reason})])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        (ids, fed), stops = self._encode(messages, kwargs.get("tools")), self._stops(stop)
        hint, cancelled, written = last_started.get(), threading.Event(), 0

        def generate(streamer: TextThread) -> None:
            nonlocal written
            with self._sessions(messages, Encoded(ids, fed), run_manager, hint) as tell:
                tokens = self._decode(ids, stops, cancelled, kwargs, streamer)
                tell(tokens)
            written = len(tokens)

        text = ""
        for piece in hold_back(TextThread(self.tokenizer, generate, cancelled).pieces(), stops):
            text += piece
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
            if run_manager:
                run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk
        yield self._last_chunk(text, _usage(len(ids), written))

    def _last_chunk(self, text: str, usage: UsageMetadata) -> ChatGenerationChunk:
        calls = [
            tool_call_chunk(name=call["name"], args=json.dumps(call["args"]), id=call["id"], index=index)
            for index, call in enumerate(self._tool_calls(text))
        ]
        message = AIMessageChunk(content="", tool_call_chunks=calls, usage_metadata=usage, chunk_position="last")
        return ChatGenerationChunk(message=message)

    def _tool_calls(self, text: str) -> list[ToolCall]:
        return self.tool_parser(text) if self.tool_parser else []

    def _stops(self, stop: list[str] | None) -> list[str]:
        return list(stop if stop is not None else self.stop or [])

    def _limit(self, options: Mapping[str, Any]) -> int:
        return int(options.get("max_new_tokens") or self.max_new_tokens)

    def _decode(
        self,
        ids: Sequence[int],
        stops: Sequence[str],
        cancelled: threading.Event,
        options: Mapping[str, Any],
        streamer: TextThread | None = None,
    ) -> list[int]:
        """Ids ``[token]`` that the model writes after the prompt; end-of-sequence included."""
        prompt = torch.tensor([list(ids)], device=self.model.device)
        output = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=self._generation_config(self._limit(options)),
            logits_processor=self._sampler(ids, options),
            stopping_criteria=[StopOnText(self.tokenizer, stops, len(ids), cancelled)],
            streamer=streamer,
        )
        return token_list(output[0, len(ids) :])

    def _generation_config(self, limit: int) -> GenerationConfig:
        known = self.model.generation_config
        end = known.eos_token_id if known.eos_token_id is not None else self.tokenizer.eos_token_id
        pad = known.pad_token_id if known.pad_token_id is not None else self.tokenizer.pad_token_id
        if pad is None:
            pad = end[0] if isinstance(end, list) else end
        return GenerationConfig(  # type: ignore[no-untyped-call]  # transformers leaves it untyped
            max_new_tokens=limit, do_sample=False, eos_token_id=end, pad_token_id=pad
        )

    def _sampler(self, ids: Sequence[int], options: Mapping[str, Any]) -> list[GumbelSampler]:
        temperature = options.get("temperature", self.temperature)
        if not temperature:
            return []
        seed, top_p = options.get("seed", self.seed), float(options.get("top_p", self.top_p))
        own = None if seed is None else prompt_seed(int(seed), ids)
        return [GumbelSampler(float(temperature), own, top_p, self.model.device)]

    @contextmanager
    def _sessions(
        self,
        messages: Sequence[BaseMessage],
        fed: Encoded,
        run_manager: CallbackManagerForLLMRun | None,
        hint: str | None,
    ) -> Iterator[Callable[[list[int]], None]]:
        """Around the forward passes, in their thread: a session in each monitor whose handler announced the call.

        Yields:
            To be called with the ids that were written.
        """
        run_id = str(run_manager.run_id) if run_manager else None
        key = fingerprint(messages)
        prompt = Prompt(None, fed.text, partial(self._outliner.spans, tuple(messages), fed.text, fed.ids))
        with ExitStack() as stack:
            claims = [stack.enter_context(tracker.claim(run_id, key, hint, prompt)) for tracker in trackers()]
            if self.monitor is not None and not any(claims):
                context = AgentContext(run_id or uuid7(), _parent(run_manager), _parent(run_manager) or run_id)
                span = finder(run_manager.run_id) if run_manager else None
                call = ModelCall(context, CHAT_NLA_TYPE, current_traceparent(), span=span)
                claims.append(stack.enter_context(tracker_for(self.monitor).session(call, prompt)))

            def tell(written: list[int]) -> None:
                for claim in claims:
                    if claim is not None:
                        claim.completion = Completion(token_ids=tuple(written), prompt_ids=tuple(fed.ids))

            yield tell


def _parent(run_manager: CallbackManagerForLLMRun | None) -> str | None:
    return str(run_manager.parent_run_id) if run_manager and run_manager.parent_run_id else None


def _usage(prompt: int, written: int) -> UsageMetadata:
    return UsageMetadata(input_tokens=prompt, output_tokens=written, total_tokens=prompt + written)
