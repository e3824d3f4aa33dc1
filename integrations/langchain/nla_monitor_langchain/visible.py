"""What people see of a model call, told to the monitor's transcript (``capture.store_transcript``).

In the host's thread nothing is copied but the list of messages; texts are made of it on the transcript's own thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, LLMResult

from nla_monitor.agent_calls import AgentMonitor
from nla_monitor.records import AgentContext
from nla_monitor.transcripts import Message, Transcripts

_ROLES = {"human": "user", "ai": "assistant", "AIMessageChunk": "assistant"}


def tell_messages(monitor: AgentMonitor, context: AgentContext, messages: Sequence[BaseMessage]) -> None:
    """A chat model is about to read ``messages``."""
    with monitor.guard("langchain.transcript"):  # apart: a fault here must not cost the capture session
        if (transcripts := _kept_by(monitor)) is not None:
            transcripts.prompt(context, partial(_prompt_messages, tuple(messages)))


def tell_text(monitor: AgentMonitor, context: AgentContext, prompt: str) -> None:
    """A text model is about to read ``prompt``."""
    with monitor.guard("langchain.transcript"):
        if (transcripts := _kept_by(monitor)) is not None:
            transcripts.prompt(context, partial(_prompt_text, prompt))


def tell_answer(monitor: AgentMonitor, run_id: str, response: LLMResult) -> None:
    """The model call has answered."""
    with monitor.guard("langchain.transcript"):
        if (transcripts := _kept_by(monitor)) is not None:
            transcripts.answer(run_id, partial(_answer, response))


def _kept_by(monitor: AgentMonitor) -> Transcripts | None:
    transcripts: Transcripts | None = getattr(monitor, "transcripts", None)
    return transcripts if transcripts is not None and transcripts.enabled else None


def _prompt_messages(messages: Sequence[BaseMessage]) -> list[Message]:
    return [visible(message) for message in messages]


def _prompt_text(prompt: str) -> list[Message]:
    return [Message("prompt", prompt)]


def _answer(response: LLMResult) -> Message | None:
    first: Any = next((options[0] for options in response.generations if options), None)
    if isinstance(first, ChatGeneration):
        return visible(first.message)
    return None if first is None else Message("assistant", str(first.text))


def visible(message: BaseMessage) -> Message:
    """A LangChain message as the transcript keeps it: its text and tool calls, without images and other parts."""
    return Message(
        role=_ROLES.get(message.type, message.type),
        text=str(message.text),
        name=message.name,
        tool_call_id=message.tool_call_id if isinstance(message, ToolMessage) else None,
        tool_calls=tuple(_calls(message)) if isinstance(message, AIMessage) else (),
    )


def _calls(message: AIMessage) -> list[dict[str, object]]:
    return [{"name": call["name"], "args": call["args"], "id": call["id"]} for call in message.tool_calls]
