"""What a span tells of a model call's text, as the transcript of its conversation keeps it."""

from __future__ import annotations

from nla_monitor.transcripts import Message
from nla_monitor_opentelemetry import attributes as told
from nla_monitor_opentelemetry.attributes import Attributes


def prompt(said: Attributes) -> list[Message]:
    """What the model read, oldest first; empty where the span does not tell it."""
    messages = told.prompt_messages(said)
    if messages:
        return [_visible(message) for message in messages]
    text = told.prompt_text(said)
    return [] if text is None else [Message("prompt", text)]


def answer(said: Attributes) -> Message | None:
    """What it answered, tool calls included; None where the span does not tell it."""
    messages = told.answer_messages(said)
    if len(messages) == 1:
        return _visible(messages[0])
    text = told.answer_text(said)
    return None if text is None else Message("assistant", text)


def _visible(message: told.Message) -> Message:
    return Message(
        role=message.role,
        text=message.text,
        name=message.tool,
        tool_call_id=message.tool_call_id,
        tool_calls=tuple({"name": name, "args": args, "id": call_id} for call_id, name, args in message.calls),
    )
