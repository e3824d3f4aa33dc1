"""What spans of other people's instrumentation say: kind of step, names, messages.

Two vocabularies are in use: OpenTelemetry's GenAI conventions (``gen_ai.*``, status Development, as of 2026-11) and
OpenInference (``openinference.span.kind``, ``llm.*``; semantic conventions 0.1.42). Both are spelled out here, because
the packaged constants of the first are deprecated and the second should not be a dependency.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from nla_monitor import semconv

Attributes = Mapping[str, Any]

SESSION_ID: Final = "session.id"
"""OpenInference's conversation: an attribute, and the key of the context value that ``using_session`` sets."""

_OPENINFERENCE_KIND: Final = "openinference.span.kind"
_CONVERSATIONS: Final = (semconv.GEN_AI_CONVERSATION, SESSION_ID)
_AGENTS: Final = ("gen_ai.agent.name", "agent.name")
_NODES: Final = ("graph.node.name", "graph.node.id")
_MODELS: Final = (semconv.GEN_AI_REQUEST_MODEL, "llm.model_name", "gen_ai.response.model")
_TOOLS: Final = ("gen_ai.tool.name", "tool.name")
_TOOL_CALLS: Final = ("gen_ai.tool.call.id", "tool.id", "tool_call.id")
_SCOPES: Final = ("openinference.", "opentelemetry.instrumentation.genai", "opentelemetry.util.genai")
"""Instrumentation whose every span is a step of an agent, though some say so only when the span ends."""


class Kind(StrEnum):
    """What a step is."""

    MODEL = "model"
    TOOL = "tool"
    AGENT = "agent"
    """An agent, chain or workflow: a step around others."""
    OTHER = "other"
    """A step of an agent that tells no more, or not yet."""


_OPERATIONS: Final = {
    "chat": Kind.MODEL,
    "text_completion": Kind.MODEL,
    "generate_content": Kind.MODEL,
    "execute_tool": Kind.TOOL,
    "invoke_agent": Kind.AGENT,
    "create_agent": Kind.AGENT,
    "invoke_workflow": Kind.AGENT,
}
_KINDS: Final = {"LLM": Kind.MODEL, "TOOL": Kind.TOOL, "AGENT": Kind.AGENT, "CHAIN": Kind.AGENT}


def kind_of(attributes: Attributes, scope: str = "") -> Kind | None:
    """What step a span is, None where it is no agent's.

    Args:
        attributes: of the span, as far as they are set.
        scope: name of the instrumentation that made it.
    """
    said = attributes.get(_OPENINFERENCE_KIND)
    if said is not None:
        return _KINDS.get(str(said).upper(), Kind.OTHER)
    operation = attributes.get(semconv.GEN_AI_OPERATION)
    if operation is not None:
        return _OPERATIONS.get(str(operation), Kind.OTHER)
    if semconv.GEN_AI_REQUEST_MODEL in attributes:
        return Kind.MODEL
    if any(key.startswith("gen_ai.") for key in attributes) or scope.startswith(_SCOPES):
        return Kind.OTHER
    return None


def conversation_of(attributes: Attributes) -> str | None:
    """The conversation (session, thread) that a span belongs to."""
    return _first(attributes, _CONVERSATIONS)


def agent_of(attributes: Attributes) -> str | None:
    """Name of the agent that a span names."""
    return _first(attributes, _AGENTS)


def node_of(attributes: Attributes) -> str | None:
    """Node of the agent's graph."""
    return _first(attributes, _NODES)


def model_of(attributes: Attributes) -> str | None:
    """Name of the model that is called."""
    return _first(attributes, _MODELS)


def tool_of(attributes: Attributes) -> str | None:
    """Name of the tool that is run."""
    return _first(attributes, _TOOLS)


def tool_call_of(attributes: Attributes) -> str | None:
    """The model's id of the call that a tool answers."""
    return _first(attributes, _TOOL_CALLS)


def _first(attributes: Attributes, keys: Sequence[str]) -> str | None:
    return next((str(attributes[key]) for key in keys if attributes.get(key) not in (None, "")), None)


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat prompt."""

    role: str
    text: str
    tool: str | None = None
    """Tool whose result it is."""
    tool_call_id: str | None = None
    calls: tuple[tuple[str, str, Any], ...] = ()
    """Tool calls that it asks for: id, name, arguments."""

    def plain(self) -> dict[str, Any]:
        """As chat templates take it."""
        found: dict[str, Any] = {"role": self.role, "content": self.text}
        if self.tool is not None:
            found["name"] = self.tool
        if self.tool_call_id is not None:
            found["tool_call_id"] = self.tool_call_id
        if self.calls:
            found["tool_calls"] = [
                {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
                for call_id, name, arguments in self.calls
            ]
        return found


def prompt_messages(attributes: Attributes) -> list[Message]:
    """The chat prompt of a model call; empty where the span does not tell it (content is off, or not yet set)."""
    found = _gen_ai(attributes.get("gen_ai.input.messages"))
    if found:
        system = _gen_ai_text(_loaded(attributes.get("gen_ai.system_instructions")))
        return [Message("system", system), *found] if system else found
    return _openinference(attributes, "llm.input_messages.")


def prompt_text(attributes: Attributes) -> str | None:
    """The prompt of a call that takes text; None where the span does not tell it."""
    prompts = attributes.get("llm.prompts")
    if isinstance(prompts, Sequence) and not isinstance(prompts, str) and len(prompts) == 1:
        return str(prompts[0])
    text = attributes.get("llm.prompts.0.prompt.text")
    return str(text) if text is not None and "llm.prompts.1.prompt.text" not in attributes else None


def answer_messages(attributes: Attributes) -> list[Message]:
    """What a chat model answered: one message, or several where several were asked for."""
    return _gen_ai(attributes.get("gen_ai.output.messages")) or _openinference(attributes, "llm.output_messages.")


def answer_text(attributes: Attributes) -> str | None:
    """What the model answered; None where the span does not tell it, or the answer is more than text."""
    messages = answer_messages(attributes)
    if len(messages) == 1 and not messages[0].calls:
        return messages[0].text
    text = attributes.get("llm.choices.0.completion.text")
    if text is not None and "llm.choices.1.completion.text" not in attributes:
        return str(text)
    if attributes.get("output.mime_type", "text/plain") == "text/plain" and not messages:
        value = attributes.get("output.value")
        return None if value is None else str(value)
    return None


def result_read(messages: Sequence[Message]) -> Message | None:
    """The newest tool result that a prompt ends with: the last tool message after the last of the assistant."""
    for message in reversed(messages):
        if message.role == "assistant":
            return None
        if message.role == "tool":
            return message
    return None


def _loaded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:  # an instrumentation's own shape: it tells no messages
        return None


def _gen_ai(value: Any) -> list[Message]:
    """GenAI's ``gen_ai.input.messages``: ``[{"role": ..., "parts": [{"type": ..., ...}]}]``, as JSON or as it is."""
    names: dict[str, str] = {}
    found = []
    for one in _items(_loaded(value)):
        if not isinstance(one, Mapping):
            return []
        parts = [part for part in _items(one.get("parts")) if isinstance(part, Mapping)]
        calls = tuple(
            (str(part.get("id", "")), str(part.get("name", "")), part.get("arguments"))
            for part in parts
            if part.get("type") == "tool_call"
        )
        names.update({call_id: name for call_id, name, _ in calls})
        response = next((part for part in parts if part.get("type") == "tool_call_response"), None)
        if response is None:
            found.append(Message(str(one.get("role", "user")), _gen_ai_text(parts), calls=calls))
            continue
        call_id = str(response.get("id") or "") or None
        result = response.get("response", response.get("result", ""))
        found.append(Message("tool", _as_text(result), names.get(call_id or ""), call_id))
    return found


def _gen_ai_text(parts: Any) -> str:
    return "".join(
        str(part.get("content", ""))
        for part in _items(parts)
        if isinstance(part, Mapping) and part.get("type") == "text"
    )


def _items(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else ()


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _openinference(attributes: Attributes, prefix: str) -> list[Message]:
    """OpenInference's flattened messages: ``llm.input_messages.0.message.role`` and so on."""
    flat: dict[int, dict[str, Any]] = {}
    for key, value in attributes.items():
        if key.startswith(prefix):
            number, _, rest = key[len(prefix) :].partition(".")
            if number.isdecimal():
                flat.setdefault(int(number), {})[rest.removeprefix("message.")] = value
    names: dict[str, str] = {}
    found = []
    for _, fields in sorted(flat.items()):
        calls = _openinference_calls(fields)
        names.update({call_id: name for call_id, name, _ in calls})
        call_id = fields.get("tool_call_id")
        role = str(fields.get("role", "user"))
        tool = fields.get("name") or names.get(str(call_id)) if role == "tool" else None
        text = fields.get("content", fields.get("contents.0.message_content.text", ""))
        found.append(Message(role, str(text), tool, None if call_id is None else str(call_id), calls))
    return found


def _openinference_calls(fields: Mapping[str, Any]) -> tuple[tuple[str, str, Any], ...]:
    calls = []
    number = 0
    while (name := fields.get(f"tool_calls.{number}.tool_call.function.name")) is not None:
        at = f"tool_calls.{number}.tool_call"
        arguments = _loaded(fields.get(f"{at}.function.arguments"))
        calls.append((str(fields.get(f"{at}.id", "")), str(name), arguments))
        number += 1
    return tuple(calls)
