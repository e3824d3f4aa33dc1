"""Where each message of a chat prompt lies in its tokens: whose words, of which tool call, from where to where.

The prompt is rendered to text, each message's own words are looked for in it from left to right, and the tokenizer's
offsets turn characters into tokens. What the template puts before a message belongs to it, and so does what ends its
turn. Nothing is guessed: unless the tokens of the text are exactly those of the call, and the words are found, nothing
is said. All this takes a fraction of a millisecond, on the capture's own thread, with a private copy of the tokenizer.
"""

from __future__ import annotations

import copy
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, ToolMessage

from nla_monitor.records import MessageSpan

_ROLES = {"human": "user", "ai": "assistant", "function": "tool"}
_USER, _ANSWER = "QuestionXq1", "AnswerXq2"


class Outliner:
    """Finds messages in prompts that one tokenizer made.

    Args:
        tokenizer: of transformers; only a fast one knows offsets. Copied, since the host's is never used in our thread.
        separator: what stands between messages where there is no chat template.
    """

    def __init__(self, tokenizer: Any, separator: str = "\n") -> None:
        self._tokenizer = copy.deepcopy(tokenizer) if getattr(tokenizer, "is_fast", False) else None
        self._separator = separator
        self._lock = threading.Lock()
        self._endings: dict[str, str] | None = None

    def spans(self, messages: Sequence[BaseMessage], text: str, ids: Sequence[int]) -> tuple[MessageSpan, ...]:
        """The messages in order of position, and last the turn that the model is about to write.

        Args:
            messages: of the prompt.
            text: that it was rendered to.
            ids: ``[token]`` that the model was fed.

        Returns:
            Nothing where ``text`` does not give these very tokens.
        """
        with self._lock:
            offsets = None if self._tokenizer is None else _offsets(self._tokenizer, text, list(ids))
            if offsets is None:
                return ()
            if self._endings is None:
                self._endings = _endings(self._tokenizer, self._separator)
        ends = [end for _, end in offsets]
        regions = _regions(messages, text, self._endings)
        return _in_tokens(messages, regions, lambda place: bisect_right(ends, place) if place else 0)


def _offsets(tokenizer: Any, text: str, ids: list[int]) -> list[tuple[int, int]] | None:
    for special in (False, True):
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        if list(encoded["input_ids"]) == ids:
            return list(encoded["offset_mapping"])
    return None


def _endings(tokenizer: Any, separator: str) -> dict[str, str]:
    """What ends a turn, by role; empty where it cannot be told from what opens the next."""
    if not getattr(tokenizer, "chat_template", None):
        return dict.fromkeys(("user", "assistant"), separator)
    talk = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ANSWER}]
    try:
        whole = str(tokenizer.apply_chat_template(talk, tokenize=False))
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError):
        return {"user": "", "assistant": ""}  # a template of its own kind: turns end with their words
    after_answer = whole[whole.rfind(_ANSWER) + len(_ANSWER) :] if _ANSWER in whole else ""
    after_user = whole[whole.find(_USER) + len(_USER) :] if _USER in whole else ""
    common = next(
        (length for length, (one, other) in enumerate(zip(after_user, after_answer, strict=False)) if one != other),
        min(len(after_user), len(after_answer)),
    )
    return {"user": after_answer[:common], "assistant": after_answer}


@dataclass(frozen=True, slots=True)
class _Region:
    """Characters of the text: where a message begins and ends, and whether it was found."""

    start: int
    end: int
    found: bool


def _regions(messages: Sequence[BaseMessage], text: str, endings: dict[str, str]) -> list[_Region]:
    regions: list[_Region] = []
    place, known = 0, True
    for message in messages:
        words = _words(message)
        begin = text.find(words, place) if words else -1
        if begin < 0:
            regions.append(_Region(place, place, found=False))
            known = False
            continue
        end = begin + len(words)
        ending = endings["assistant" if role_of(message) == "assistant" else "user"]
        close = text.find(ending, end) if ending else -1
        end = end if close < 0 else close + len(ending)
        # Behind a message that was not found, nobody knows where its words end and this one's opening begins.
        regions.append(_Region(place if known else begin, end, found=True))
        place, known = end, True
    regions.append(_Region(place, len(text), found=known))
    return regions


def _in_tokens(
    messages: Sequence[BaseMessage], regions: Sequence[_Region], token_at: Callable[[int], int]
) -> tuple[MessageSpan, ...]:
    names = {call["id"]: call["name"] for item in messages if isinstance(item, AIMessage) for call in item.tool_calls}
    spans = [
        MessageSpan(token_at(region.start), token_at(region.end), role_of(message), *_call_of(message, names))
        for message, region in zip(messages, regions[:-1], strict=True)
        if region.found
    ]
    if any(one.end is None or one.end > other.start for one, other in pairwise(spans)):
        return ()
    if regions[-1].found:
        spans.append(MessageSpan(token_at(regions[-1].start), None, "assistant"))
    return tuple(spans)


def _words(message: BaseMessage) -> str:
    """What of a message is looked for: its text or, where it only asks for tools, the first tool's name."""
    words = message.text.strip()
    if not words and isinstance(message, AIMessage) and message.tool_calls:
        return message.tool_calls[0]["name"]
    return words


def _call_of(message: BaseMessage, names: dict[Any, str]) -> tuple[str | None, str | None]:
    """Name of the tool whose result the message is, and the id of the one call that it answers or asks for."""
    if isinstance(message, ToolMessage):
        return message.name or names.get(message.tool_call_id), message.tool_call_id
    if isinstance(message, AIMessage) and len(message.tool_calls) == 1:
        return None, message.tool_calls[0]["id"]
    return None, None


def role_of(message: BaseMessage) -> str:
    """``system``, ``user``, ``assistant`` or ``tool``; of a ``ChatMessage`` what it says itself."""
    return message.role if isinstance(message, ChatMessage) else _ROLES.get(message.type, message.type)
