"""A model as one agent sees it: each call is announced before its forward, and over when it returns.

smolagents calls back only when a step has ended, when its forwards are long over, and several agents may share a model.
So the watched agent gets a shallow copy of its model (the same weights, tokenizer and streamer) whose two entry points
announce. ``TransformersModel`` streams from a bare thread: there the prompt's tokens tell, which its own preparation of
a call hands us.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

from smolagents.models import agglomerate_stream_deltas  # type: ignore[import-untyped]  # it ships no type information

MARK = "_nla_monitor_watched"


class Announcer(Protocol):
    """Who is told of a model call; nothing of it raises into the agent."""

    def begin(self, messages: Sequence[Any]) -> Any:
        """A call with these messages begins in the calling context; returns what ``fed`` and ``end`` take."""
        ...

    def fed(self, call: Any, prompt: Any) -> None:
        """Its prompt: a tensor of token ids ``[1, token]``."""
        ...

    def end(self, call: Any, answer: Callable[[], Any] | None, *, failed: bool) -> None:
        """It is over; ``answer`` gives the answer's ``ChatMessage``."""
        ...


_call: ContextVar[Any] = ContextVar("nla_monitor_smolagents_call", default=None)


def watched(model: Any, announcer: Announcer) -> Any:
    """A shallow copy of a smolagents model that announces its calls."""
    seen = copy.copy(model)
    setattr(seen, MARK, model)
    seen.generate = _announcing(seen.generate, announcer)
    if hasattr(model, "generate_stream"):
        seen.generate_stream = _announcing_stream(seen.generate_stream, announcer)
    if hasattr(model, "_prepare_completion_args"):
        seen._prepare_completion_args = _telling(seen._prepare_completion_args, announcer)  # noqa: SLF001 -- its tokens
    return seen


def original(model: Any) -> Any:
    """The model that was given to ``watched``; None for one that was not."""
    return getattr(model, MARK, None)


@contextmanager
def _current(call: Any) -> Iterator[None]:
    token = _call.set(call)
    try:
        yield
    finally:
        _call.reset(token)


def _announcing(generate: Callable[..., Any], announcer: Announcer) -> Callable[..., Any]:
    def announced(*args: Any, **kwargs: Any) -> Any:
        call, message = announcer.begin(_messages(args, kwargs)), None
        try:
            with _current(call):
                message = generate(*args, **kwargs)
            return message
        finally:
            announcer.end(call, None if message is None else lambda: message, failed=message is None)

    return announced


def _announcing_stream(generate: Callable[..., Iterator[Any]], announcer: Announcer) -> Callable[..., Iterator[Any]]:
    def announced(*args: Any, **kwargs: Any) -> Iterator[Any]:
        call, complete = announcer.begin(_messages(args, kwargs)), False
        deltas: list[Any] = []
        try:
            with closing(_steps(generate(*args, **kwargs), call)) as steps:
                for delta in steps:
                    deltas.append(delta)
                    yield delta
            complete = True
        finally:
            answer = partial(agglomerate_stream_deltas, deltas)
            announcer.end(call, answer if complete else None, failed=not complete)

    return announced


def _messages(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
    """Of a call of ``generate`` or ``generate_stream``: its first parameter."""
    messages = args[0] if args else kwargs.get("messages")
    return messages if isinstance(messages, Sequence) else ()


def _steps(stream: Iterator[Any], call: Any) -> Generator[Any]:
    """The stream, with the call current in each of its steps only: a generator's consumer shares its context."""
    try:
        while True:
            with _current(call):
                try:
                    delta = next(stream)
                except StopIteration:
                    return
            yield delta
    finally:
        close = getattr(stream, "close", None)
        if close is not None:
            close()


def _telling(prepare: Callable[..., Any], announcer: Announcer) -> Callable[..., Any]:
    def told(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        announcer.fed(_call.get(), prepared.get("inputs"))
        return prepared

    return told
