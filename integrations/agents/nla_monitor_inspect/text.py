"""Inspect's messages as the transcript of a conversation keeps them."""

from __future__ import annotations

from collections.abc import Sequence

from inspect_ai.model import ChatMessage, ChatMessageAssistant, ChatMessageTool

from nla_monitor.transcripts import Message


def visible_prompt(messages: Sequence[ChatMessage]) -> list[Message]:
    """What a model read, oldest first."""
    return [visible(message) for message in messages]


def visible(message: ChatMessage) -> Message:
    """One message: its text and tool calls, without images and other parts."""
    tool = message if isinstance(message, ChatMessageTool) else None
    calls = message.tool_calls or () if isinstance(message, ChatMessageAssistant) else ()
    return Message(
        role=message.role,
        text=message.text,
        name=None if tool is None else tool.function,
        tool_call_id=None if tool is None else tool.tool_call_id,
        tool_calls=tuple({"name": call.function, "args": call.arguments, "id": call.id} for call in calls),
    )
