"""smolagents' messages as the transcript of a conversation keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nla_monitor.transcripts import Message

_ROLES = {"tool-call": "assistant", "tool-response": "tool"}


def visible_prompt(messages: Sequence[Any]) -> list[Message]:
    """What a model read, oldest first."""
    return [visible(message) for message in messages]


def visible(message: Any) -> Message:
    """One ``ChatMessage``: its text and tool calls, without images."""
    role = str(getattr(message.role, "value", message.role))
    calls = tuple(
        {"name": call.function.name, "args": call.function.arguments, "id": call.id}
        for call in message.tool_calls or ()
    )
    return Message(_ROLES.get(role, role), _text(message.content), tool_calls=calls)


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content or () if part.get("type") == "text")
