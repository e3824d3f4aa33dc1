"""Triggers: what a config names, resolved against a tokenizer before anything runs.

A trigger is a token or a short sequence of tokens, so that it can be matched where the ids are. A role trigger is found
by rendering a small conversation with the tokenizer's chat template and looking at what stands around the contents. A
text trigger is a regular expression on decoded text; text exists on the background thread only, see ``TextTriggers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import re2  # type: ignore[import-untyped]  # google-re2 ships no type information
from jinja2 import TemplateError

from nla_monitor.config import CaptureConfig, RoleTrigger
from nla_monitor.errors import ConfigError

MAX_TOKENS = 16
"""Tokens of the longest trigger."""
TEXT_WINDOW = 64
"""Tokens before a candidate, itself included, that text triggers see at least."""

_MAX_PATTERN = 10_000
_MAX_MEMORY = 8 << 20
_USER, _ANSWER, _RESULT = "QuestionXq1", "AnswerXq2", "ResultXq3"
_CALL = {"type": "function", "id": "callXq123", "function": {"name": "lookup", "arguments": {}}}
_Message = dict[str, Any]
_THINKING_ENDS = (
    "</think>",
    "</thinking>",
    "[/THINK]",
    "<|END_THINKING|>",
    "<|channel|>final<|message|>",
    "</reasoning>",
    "</thought>",
)
"""How open models end their thinking: DeepSeek-R1 and Qwen3, Magistral, Command A Reasoning, gpt-oss, and the rest."""


@dataclass(frozen=True, slots=True)
class Trigger:
    """A sequence of tokens after whose last a sample is taken."""

    name: str
    """As the config has it; ``ActivationSample.trigger``."""
    tokens: tuple[int, ...]


def resolve(config: CaptureConfig, tokenizer: Any, vocabulary: int | None) -> tuple[Trigger, ...]:
    """The token triggers and role triggers of a config.

    Args:
        config: its ``triggers`` and ``role_triggers``.
        tokenizer: gives text its tokens; None: triggers must be ids.
        vocabulary: number of tokens that the model knows; None: not known.

    Raises:
        ConfigError: a trigger can never match: no token of the vocabulary, too long, no such role in the template.
    """
    found = [Trigger(text, _tokens_of(text, tokenizer, vocabulary)) for text in config.triggers]
    found += [Trigger(role, _role_tokens(role, tokenizer)) for role in config.role_triggers]
    return tuple(found)


def _tokens_of(text: str, tokenizer: Any, vocabulary: int | None) -> tuple[int, ...]:
    if tokenizer is not None:
        known = tokenizer.get_vocab().get(text)
        if known is not None:
            return (int(known),)
        ids = _encode(tokenizer, text)
        unknown = getattr(tokenizer, "unk_token_id", None)
        if ids and unknown not in ids and (len(ids) == 1 or not text.isdecimal()):
            return _short_enough(text, ids)
        if not text.isdecimal():
            raise ConfigError(
                f"capture.triggers: {text!r} can never match: this tokenizer has no tokens for it. Use a text as the "
                "model sees it (for instance the turn-end token of the chat template), a token id, or "
                "capture.role_triggers"
            )
    if not text.isdecimal():
        raise ConfigError(
            f"capture.triggers: {text!r} cannot be resolved without a tokenizer. Give the tokenizer to attach(), "
            "or write the token id"
        )
    if vocabulary is not None and int(text) >= vocabulary:
        raise ConfigError(
            f"capture.triggers: token id {text} can never match: the vocabulary ends at {vocabulary - 1}. "
            "Write an id of this model's tokenizer, or the token's text"
        )
    return (int(text),)


def _short_enough(text: str, ids: Sequence[int]) -> tuple[int, ...]:
    if len(ids) > MAX_TOKENS:
        raise ConfigError(
            f"capture.triggers: {text!r} is {len(ids)} tokens for this tokenizer, at most {MAX_TOKENS} are possible. "
            "Use its last tokens, or capture.text_triggers"
        )
    return tuple(ids)


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of ``text`` as it stands inside a longer text: without SentencePiece's space in front."""
    ids = [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]
    first = tokenizer.convert_ids_to_tokens(ids[0]) if len(ids) > 1 else None
    return ids[1:] if first == "▁" and not text.startswith(" ") else ids


def _role_tokens(role: RoleTrigger, tokenizer: Any) -> tuple[int, ...]:
    if tokenizer is None:
        raise ConfigError(
            f"capture.role_triggers: {role!r} is found in the chat template of a tokenizer, and there is none. Give "
            "the tokenizer to attach(), or write the tokens under capture.triggers"
        )
    if role == "final_answer":
        return _thinking_end(tokenizer)
    finders = {"turn_end": _turn_end, "assistant": _assistant, "tool_call": _tool_call, "tool_result": _tool_result}
    tokens = finders[role](tokenizer)[-MAX_TOKENS:]
    if not tokens:
        raise ConfigError(
            f"capture.role_triggers: {role!r} is not marked in this tokenizer's chat template. Leave it out, or write "
            "the text that marks it under capture.triggers"
        )
    return tuple(tokens)


def _thinking_end(tokenizer: Any) -> tuple[int, ...]:
    """The token, or short text, by which a model ends its thinking: what follows is its answer."""
    vocabulary = tokenizer.get_vocab()
    for text in _THINKING_ENDS:
        if text in vocabulary:
            return (int(vocabulary[text]),)
    template = str(getattr(tokenizer, "chat_template", None) or "")
    for text in _THINKING_ENDS:
        if text in template:
            return _short_enough(text, _encode(tokenizer, text))
    raise ConfigError(
        "capture.role_triggers: 'final_answer' is the end of a model's thinking, and neither this tokenizer's "
        f"vocabulary nor its chat template has one of {', '.join(_THINKING_ENDS)}. Leave it out: the token before any "
        "answer (prompt_end) is sampled in every model call; or write the text that ends the thinking under "
        "capture.triggers"
    )


def _turn_end(tokenizer: Any) -> list[int]:
    """What follows every turn; where turns end differently, what follows the model's."""
    whole = _render(tokenizer, [_user(), _assistant_says()])
    after_user, after_answer = _between(whole, _USER, _ANSWER), _after(whole, _ANSWER)
    common = []
    for left, right in zip(_encode(tokenizer, after_user), _encode(tokenizer, after_answer), strict=False):
        if left != right:
            break
        common.append(left)
    tokens = common or _encode(tokenizer, after_answer.strip() or after_answer)
    # A newline after the turn's end is the template's, not the model's: a generation stops before it.
    while len(tokens) > 1 and not tokenizer.decode(tokens[-1:]).strip():
        tokens.pop()
    return tokens


def _assistant(tokenizer: Any) -> list[int]:
    """What the template adds before the model speaks."""
    asked = _render(tokenizer, [_user()])
    prompted = _render(tokenizer, [_user()], add_generation_prompt=True)
    if prompted.startswith(asked) and prompted != asked:
        return _encode(tokenizer, prompted.removeprefix(asked))
    answered = _render(tokenizer, [_user(), _assistant_says()])
    # Spaces around it become part of the tokens beside them.
    return _encode(tokenizer, _between(answered, _USER, _ANSWER).strip())


def _tool_call(tokenizer: Any) -> list[int]:
    """What opens a call of a tool in the model's own turn, up to its last special token where it has any."""
    whole = _render(tokenizer, [_user(), {"role": "assistant", "content": _ANSWER, "tool_calls": [_CALL]}])
    start, end = whole.find(_ANSWER), whole.find("lookup", max(whole.find(_ANSWER), 0))
    if start < 0 or end < start:  # templates that leave the words of such a turn out
        whole = _render(tokenizer, [_user(), {"role": "assistant", "content": "", "tool_calls": [_CALL]}])
        opening = _between(whole, _USER, "lookup")
        prompted = _between(_render(tokenizer, [_user()], add_generation_prompt=True) + "lookup", _USER, "lookup")
        opening = opening.removeprefix(prompted)
    else:
        opening = whole[start + len(_ANSWER) : end]
    tokens = _encode(tokenizer, opening.strip())
    added = set(tokenizer.get_added_vocab().values()) if hasattr(tokenizer, "get_added_vocab") else set()
    last = max((place for place, token in enumerate(tokens) if token in added), default=None)
    return tokens if last is None else tokens[: last + 1]


def _tool_result(tokenizer: Any) -> list[int]:
    """What stands between the model's turn and the result of a tool."""
    called: list[_Message] = [_user(), {"role": "assistant", "content": _ANSWER, "tool_calls": [_CALL]}]
    result = {"role": "tool", "name": "lookup", "tool_call_id": "callXq123", "content": _RESULT}
    before, whole = _render(tokenizer, called), _render(tokenizer, [*called, result])
    start = len(before) if whole.startswith(before) else 0
    end = whole.find(_RESULT)
    return _encode(tokenizer, whole[start:end]) if start < end else []


def _user() -> _Message:
    return {"role": "user", "content": _USER}


def _assistant_says() -> _Message:
    return {"role": "assistant", "content": _ANSWER}


def _render(tokenizer: Any, messages: list[_Message], **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"capture.role_triggers: this tokenizer's chat template cannot render the conversation that roles are "
            f"looked for in ({error}). Write the tokens under capture.triggers"
        ) from error


def _between(text: str, left: str, right: str) -> str:
    start, end = text.find(left), text.rfind(right)
    return text[start + len(left) : end] if 0 <= start < end else ""


def _after(text: str, left: str) -> str:
    start = text.rfind(left)
    return text[start + len(left) :] if start >= 0 else ""


class TextTriggers:
    """Regular expressions on decoded text, in linear time (RE2): without case unless a pattern says ``(?-i)``.

    Raises:
        ConfigError: a pattern is no RE2 syntax, too long, or matches everything.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = [(pattern, _compile(pattern)) for pattern in patterns]

    def first(self, text: str, start: int) -> str | None:
        """The first pattern with a match in ``text`` that ends behind character ``start``; None: there is none."""
        text = _utf8(text)
        return next((name for name, pattern in self._patterns if _ends_behind(pattern, text, start)), None)


def _ends_behind(pattern: Any, text: str, start: int) -> bool:
    """Whether any match, overlapping ones included, ends behind character ``start``; ``text`` is a short window."""
    match = pattern.search(text)
    while match is not None and match.end() <= start:
        match = pattern.search(text, match.start() + 1)
    return match is not None


def _utf8(text: str) -> str:
    """Half a character at the window's edge must not make google-re2, which works on UTF-8, fail."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _compile(pattern: str) -> Any:
    if len(pattern) > _MAX_PATTERN:
        raise ConfigError(
            f"capture.text_triggers: a pattern of {len(pattern)} characters, at most {_MAX_PATTERN} are possible. "
            "Split it into several"
        )
    options = re2.Options()
    options.case_sensitive, options.log_errors, options.max_mem = False, False, _MAX_MEMORY
    try:
        compiled = re2.compile(pattern, options)
    except re2.error as error:
        raise ConfigError(
            f"capture.text_triggers: {pattern!r} is no RE2 pattern ({error}); look-around and back-references are not "
            "possible in linear time. Write it without them"
        ) from error
    if compiled.search("") is not None:
        raise ConfigError(
            f"capture.text_triggers: {pattern!r} matches the empty text, hence everywhere. Name what must be there, or "
            "use capture.tokens_per_sequence"
        )
    return compiled
