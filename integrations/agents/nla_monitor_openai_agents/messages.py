"""Messages as the SDK passes them: items of the Responses API, or of chat completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nla_monitor.transcripts import Message


@dataclass(frozen=True, slots=True)
class Read:
    """The tool result that a prompt ends with."""

    tool: str | None
    call_id: str | None


def result_read(items: Sequence[Any]) -> Read | None:
    """The newest tool result behind the last item of the assistant; None where the prompt ends otherwise."""
    last = items[-1] if items else None
    if not isinstance(last, Mapping):
        return None
    if last.get("type") != "function_call_output" and last.get("role") != "tool":
        return None
    call_id = last.get("call_id") or last.get("tool_call_id")
    return Read(_names(items).get(str(call_id)), None if call_id is None else str(call_id))


def _names(items: Sequence[Any]) -> dict[str, str]:
    """Tools by the id of the call that asked for them."""
    found: dict[str, str] = {}
    for item in items:
        if not isinstance(item, Mapping):
            continue
        if item.get("type") == "function_call":
            found[str(item.get("call_id"))] = str(item.get("name"))
        for call in item.get("tool_calls") or ():
            found[str(call.get("id"))] = str((call.get("function") or {}).get("name"))
    return found


def chat_messages(system: str | None, items: Sequence[Any]) -> list[dict[str, Any]]:
    """The items as chat templates take them: ``role``, ``content``, tool calls and their results."""
    found: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for item in items:
        if not isinstance(item, Mapping):
            continue
        if item.get("type") == "function_call":
            found.append({"role": "assistant", "content": "", "tool_calls": [_call(item)]})
        elif item.get("type") == "function_call_output":
            found.append({"role": "tool", "content": text_of(item.get("output")), "tool_call_id": item.get("call_id")})
        elif "role" in item:
            found.append({**item, "content": text_of(item.get("content"))})
    return found


def _call(item: Mapping[str, Any]) -> dict[str, Any]:
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    return {"id": item.get("call_id"), "type": "function", "function": function}


def visible_prompt(system: str | None, items: Sequence[Any]) -> list[Message]:
    """What a model read, as the transcript of a conversation keeps it."""
    names = _names(items)
    return [
        Message(
            role=str(one.get("role")),
            text=str(one.get("content") or ""),
            name=names.get(str(one.get("tool_call_id"))),
            tool_call_id=one.get("tool_call_id"),
            tool_calls=tuple(_visible_call(call) for call in one.get("tool_calls") or ()),
        )
        for one in chat_messages(system, items)
    ]


def _visible_call(call: Mapping[str, Any]) -> dict[str, object]:
    function = call.get("function") or {}
    return {"name": function.get("name"), "args": function.get("arguments"), "id": call.get("id")}


def visible_answer(output: Sequence[Any]) -> Message | None:
    """What it answered, text and tool calls together: items of the Responses API, or one chat message."""
    items = [item if isinstance(item, Mapping) else item.model_dump() for item in output]
    messages = visible_prompt(None, [{**item, "role": item.get("role", "assistant")} for item in items])
    calls = tuple(call for message in messages for call in message.tool_calls)
    text = "".join(message.text for message in messages)
    return Message("assistant", text, tool_calls=calls) if text or calls else None


def text_of(content: Any) -> str:
    """Text of a message's content: a text, or parts with texts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else ()
    return "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))


def answer_of(output: Any) -> str | None:
    """Text of a generation's output; None where it is more than one message of text."""
    if not isinstance(output, Sequence) or isinstance(output, str) or len(output) != 1:
        return None
    (message,) = output
    if not isinstance(message, Mapping) or message.get("tool_calls"):
        return None
    text = text_of(message.get("content"))
    return text or None
