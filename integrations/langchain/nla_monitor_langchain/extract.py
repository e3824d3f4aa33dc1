"""Token ids of exactly what a model will be fed, from what LangChain tells a callback.

A callback gets prompt texts or messages, never the model and never tensors. A forward pass is tied to a run by its
token ids (``HuggingFacePipeline`` streams from a bare thread, where no context variable reaches), so the ids here must
be those of the model's own preprocessing: with ``llm=`` we run that preprocessing itself, on a private copy of the
tokenizer (tokenizers carry mutable padding and truncation state: the host's must not be touched from a callback).
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

from langchain_core.messages import BaseMessage, convert_to_openai_messages
from langchain_core.runnables import RunnableBinding

from nla_monitor.errors import ConfigError
from nla_monitor_langchain.outline import Outliner

CHAT_NLA_TYPE = "nla-chat"
"""``_llm_type`` of ``ChatNLAModel``: it opens its own sessions, with the ids that it feeds."""

HUGGINGFACE_CHAT_TYPE = "huggingface-chat-wrapper"
"""``_llm_type`` of ``ChatHuggingFace``: it renders the chat template to text, which the pipeline tokenizes again."""


class Encoded(NamedTuple):
    """A chat prompt as the model is fed it."""

    ids: list[int]
    """``[token]``."""
    text: str
    """What was tokenized."""


class PromptEncoder(Protocol):
    """Turns what LangChain tells into the token ids that the model is fed."""

    @property
    def outliner(self) -> Outliner:
        """Finds the messages of a prompt in its tokens."""
        ...

    def encode_text(self, prompt: str, params: Mapping[str, Any]) -> list[int]:
        """Ids of a text prompt; ``params`` are the call's ``invocation_params``."""
        ...

    def encode_messages(self, messages: Sequence[BaseMessage], params: Mapping[str, Any]) -> Encoded:
        """Ids and text of a chat prompt."""
        ...

    def serves(self, model_type: str, *, chat: bool) -> bool:
        """Whether this encoder speaks for a model of this ``_llm_type`` that is given messages (``chat``) or text."""
        ...


def prompt_encoder(llm: Any | None = None, tokenizer: Any | None = None) -> PromptEncoder | None:
    """The most exact encoder that the arguments allow; None without any.

    Args:
        llm: LangChain model: ``HuggingFacePipeline``, ``ChatHuggingFace`` over one, ``ChatNLAModel``, or a binding of
            these (``llm.bind_tools(...)``, ``llm.with_config(...)``).
        tokenizer: transformers tokenizer, for other models over local weights.

    Raises:
        ConfigError: ``llm`` has no local pipeline or tokenizer to encode with.
    """
    if llm is not None:
        return LLMPromptEncoder(llm)
    return None if tokenizer is None else TokenizerPromptEncoder(tokenizer)


class TokenizerPromptEncoder:
    """Plain ``tokenizer(prompt)``; for messages its chat template with a generation prompt."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)
        self._lock = threading.Lock()
        self.outliner = Outliner(tokenizer)

    def encode_text(self, prompt: str, params: Mapping[str, Any]) -> list[int]:
        """Ids of a text prompt with the tokenizer's default special tokens."""
        with self._lock:
            return token_list(self._tokenizer(prompt)["input_ids"])

    def encode_messages(self, messages: Sequence[BaseMessage], params: Mapping[str, Any]) -> Encoded:
        """The template's tokens; with the tokenizer's special tokens around it where the wrapper tokenizes a text."""
        again = params.get("_type") == HUGGINGFACE_CHAT_TYPE
        with self._lock:
            text = chat_text(self._tokenizer, messages, tools=None if again else params.get("tools"))
            return Encoded(token_list(self._tokenizer(text, add_special_tokens=again)["input_ids"]), text)

    def serves(self, model_type: str, *, chat: bool) -> bool:
        """A tokenizer can't tell whose it is: any model is tried, except that messages need a chat template."""
        return not chat or bool(getattr(self._tokenizer, "chat_template", None))


class LLMPromptEncoder:
    """The preprocessing of a given LangChain model itself.

    Raises:
        ConfigError: the model has no local pipeline, tokenizer or prompt encoding of its own.
    """

    def __init__(self, llm: Any) -> None:
        model = unwrap(llm)
        self._type = str(getattr(model, "_llm_type", type(model).__name__))
        self._chat = model if hasattr(model, "_to_chat_prompt") else None
        self._own = model if hasattr(model, "prompt_ids") else None
        self._holder = getattr(model, "llm", model)
        self._copied: Any = None
        self._pipeline: Any = None
        self._constructed_with = getattr(self._holder, "pipeline_kwargs", None)
        self._lock = threading.Lock()
        self._outliner = Outliner(self._own.tokenizer) if self._own is not None else None
        if self._own is None:
            self._keep_up(type(model).__name__)

    @property
    def outliner(self) -> Outliner:
        """Finds the messages of a prompt in its tokens."""
        if self._outliner is None:
            raise ConfigError(f"a model of type {self._type!r} has no tokenizer to find messages with")
        return self._outliner

    def _keep_up(self, name: str) -> None:
        """A copy of the pipeline that the model has now: its owner may have put another in its place."""
        live = getattr(self._holder, "pipeline", None)
        if live is not self._copied or self._pipeline is None:
            self._pipeline = _private_pipeline(live, name)
            self._copied, self._outliner = live, Outliner(self._pipeline.tokenizer)

    def serves(self, model_type: str, *, chat: bool) -> bool:
        """Whether a call is of the class of model that was given."""
        return model_type in ("", self._type)

    def encode_text(self, prompt: str, params: Mapping[str, Any]) -> list[int]:
        """Ids that ``pipeline.preprocess`` makes of the prompt.

        With the pipeline's parameters and, when streaming, the call's. LangChain doesn't tell a callback the
        ``pipeline_kwargs`` of a single ``invoke``: if those change the tokenization, the call has no samples and is
        counted.
        """
        if self._own is not None:
            raise ConfigError(f"a model of type {self._type!r} takes messages, not a text prompt")
        extra = params.get("pipeline_kwargs") or {}
        if extra == self._constructed_with:
            extra = {}  # LangChain reports the constructor's here, which the pipeline has already, or never sees
        with self._lock:
            self._keep_up(self._type)
            preprocess, _, _ = self._pipeline._sanitize_parameters(**extra)  # noqa: SLF001 -- Pipeline.__call__ does so
            settings = {**self._pipeline._preprocess_params, **preprocess}  # noqa: SLF001 -- and this
            inputs = self._pipeline.preprocess(prompt, **settings)
        return token_list(inputs["input_ids"])

    def encode_messages(self, messages: Sequence[BaseMessage], params: Mapping[str, Any]) -> Encoded:
        """The chat prompt as the model renders and tokenizes it."""
        if self._own is not None:
            tools = params.get("tools")
            return Encoded(self._own.prompt_ids(list(messages), tools), self._own.prompt_text(list(messages), tools))
        if self._chat is None:
            raise ConfigError(f"a model of type {self._type!r} takes a text prompt, not messages")
        # Template rendering only: no tokenizer state is touched, so the chat model's own tokenizer may do it.
        text = str(self._chat._to_chat_prompt(list(messages)))  # noqa: SLF001 -- what it feeds
        return Encoded(self.encode_text(text, {}), text)


def unwrap(llm: Any) -> Any:
    """The model inside bindings (``bind``, ``bind_tools``, ``with_config``)."""
    while isinstance(llm, RunnableBinding):
        llm = llm.bound
    return llm


def _private_pipeline(pipeline: Any, name: str) -> Any:
    if getattr(pipeline, "tokenizer", None) is None or not hasattr(pipeline, "preprocess"):
        raise ConfigError(
            f"llm={name} has no local transformers pipeline: its activations cannot be read. Give a "
            "HuggingFacePipeline, a ChatHuggingFace over one, or a ChatNLAModel; for another wrapper of local weights "
            "give tokenizer=... instead"
        )
    private = copy.copy(pipeline)
    private.tokenizer = copy.deepcopy(pipeline.tokenizer)
    return private


def token_list(ids: Any) -> list[int]:
    """Flat ids ``[token]`` of one prompt, from a list, a ``[1, token]`` nesting or a tensor of either."""
    values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    return values[0] if _nested(values) else values


def _nested(values: list[Any]) -> TypeGuard[list[list[int]]]:
    return bool(values) and isinstance(values[0], list)


def plain_messages(messages: Sequence[BaseMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: ``role`` and ``content``, tool calls with arguments as objects."""
    plain = convert_to_openai_messages(list(messages))
    for message in plain:
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = _as_object(call["function"]["arguments"])
    return plain


def _as_object(arguments: Any) -> Any:
    # OpenAI's wire form is a JSON string; chat templates of open models iterate over an object.
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError:
        return arguments


def chat_text(tokenizer: Any, messages: Sequence[BaseMessage], tools: Any = None) -> str:
    """A chat prompt as the tokenizer's template renders it, with the generation prompt."""
    return str(
        tokenizer.apply_chat_template(plain_messages(messages), tools=tools, add_generation_prompt=True, tokenize=False)
    )


def fingerprint(messages: Sequence[BaseMessage]) -> str:
    """Hash of a chat prompt: the same before and after LangChain's own normalisation of ids and metadata."""
    digest = hashlib.blake2b(digest_size=16)
    for message in messages:
        digest.update(f"{message.type}\0{message.text}\0".encode())
    return digest.hexdigest()
