"""Which run belongs to which agent invocation, and which tool's result a model call reads.

LangChain tells a handler of each run's start and end with its ``run_id`` and ``parent_run_id``. From that alone the
root (one agent invocation) follows. Which tool result a model call reads is decided by evidence, strongest first:

1. messages: ``ToolMessage`` after the last ``AIMessage`` of the prompt;
2. sequence: the tool ran as an earlier step of the very ``RunnableSequence`` that runs the model;
3. text: a tool of the same agent invocation returned text that stands in the prompt, and no model call that ended
   has read it yet.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, ToolMessage

NEEDLE_CHARACTERS = 512
"""How much of a tool's result is looked for in a prompt: agents cut long results, seldom this short."""

SHORT_CHARACTERS = 8

RESULTS_PER_ROOT = 64
"""Unread tool results remembered per agent invocation."""

_SEQUENCE_STEP = re.compile(r"^seq:step:(\d+)$")


@dataclass(frozen=True, slots=True)
class Run:
    """One LangChain run that has started and not ended."""

    run_id: str
    parent_run_id: str | None
    root_run_id: str
    name: str | None
    step: int | None
    """Its place in the ``RunnableSequence`` that is its parent; None elsewhere."""
    tool_call_id: str | None = None
    """Of a tool's run: which call it answers."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool returned."""

    tool: str
    tool_run_id: str
    parent_run_id: str | None
    step: int | None
    needles: tuple[str, ...]
    """Texts by which the result is recognised in a prompt."""
    tool_call_id: str | None = None


class ToolLedger:
    """Tool results of one agent invocation that no finished model call has read.

    Not thread-safe: the tracker that owns it holds a lock.
    """

    def __init__(self) -> None:
        self._unread: deque[ToolResult] = deque(maxlen=RESULTS_PER_ROOT)

    def add(self, result: ToolResult) -> None:
        """A tool has ended."""
        self._unread.append(result)

    def read_by(self, prompt: str, parent_run_id: str | None, step: int | None) -> list[ToolResult]:
        """Unread results that a model call with this prompt and place reads, oldest first."""
        return [
            result
            for result in self._unread
            if _precedes(result, parent_run_id, step) or any(_occurs(needle, prompt) for needle in result.needles)
        ]

    def consume(self, results: Sequence[ToolResult]) -> None:
        """The model call that read them has ended."""
        for result in results:
            if result in self._unread:
                self._unread.remove(result)


def _precedes(result: ToolResult, parent_run_id: str | None, step: int | None) -> bool:
    same_sequence = parent_run_id is not None and result.parent_run_id == parent_run_id
    return same_sequence and step is not None and result.step is not None and result.step < step


def _occurs(needle: str, prompt: str) -> bool:
    """A long text anywhere; a short one ("3") only as a word of its own, or it would be found in every prompt."""
    if len(needle) >= SHORT_CHARACTERS:
        return needle in prompt
    return re.search(rf"(?<!\w){re.escape(needle)}(?!\w)", prompt) is not None


def sequence_step(tags: Sequence[str] | None) -> int | None:
    """The place in a ``RunnableSequence`` that LangChain writes into a child's tags (``seq:step:2``)."""
    for tag in tags or ():
        found = _SEQUENCE_STEP.match(tag)
        if found:
            return int(found.group(1))
    return None


def result_needles(output: Any) -> tuple[str, ...]:
    """Texts by which a tool's output is recognised in a later prompt; empty for an empty output.

    An object may be put into a prompt as ``str(x)`` or as JSON, so both are looked for.
    """
    content = getattr(output, "content", output)
    texts = [content] if isinstance(content, str) else [str(content), *_as_json(content)]
    return tuple(dict.fromkeys(text.strip()[:NEEDLE_CHARACTERS] for text in texts if text.strip()))


def _as_json(value: Any) -> list[str]:
    try:
        return [json.dumps(value)]
    except (TypeError, ValueError, RecursionError):  # not every result is JSON; its str() is looked for all the same
        return []


def tool_of_messages(messages: Sequence[BaseMessage]) -> tuple[str | None, str | None]:
    """Tool and call id of the result that a chat prompt reads: the last message of a tool after the model's."""
    names: dict[str, str] = {}
    last: ToolMessage | None = None
    for message in messages:
        if isinstance(message, AIMessage):
            last = None
            names.update({call["id"]: call["name"] for call in message.tool_calls if call["id"]})
        elif isinstance(message, ToolMessage):
            last = message
    return (None, None) if last is None else (last.name or names.get(last.tool_call_id), last.tool_call_id)


def flat_text(messages: Sequence[BaseMessage]) -> str:
    """The contents of a chat prompt as one text, for finding tool results in it."""
    return "\n".join(
        message.content if isinstance(message.content, str) else str(message.content) for message in messages
    )
