"""Handlers that nobody passes around: ``with monitor.langchain():`` and the variable ``NLA_MONITOR_LANGCHAIN=1``.

LangChain asks registered context variables for handlers whenever it configures a run (``register_configure_hook``), so
that every run started inside the block, or in the process, is watched without any ``config``. Runs inside a run inherit
its handlers. A bare thread has a context of its own: a run started there is not inside the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.tracers.context import register_configure_hook

from nla_monitor.agent_calls import AgentMonitor
from nla_monitor.attached import LANGCHAIN_VARIABLE, attached
from nla_monitor.guard import strict
from nla_monitor_langchain.handler import NLACallbackHandler

_FORWARDED = (
    *("on_llm_start", "on_chat_model_start", "on_llm_end", "on_llm_error", "on_chain_start", "on_chain_end"),
    *("on_chain_error", "on_tool_start", "on_tool_end", "on_tool_error"),
)


class _Several(BaseCallbackHandler):
    """Passes every event on to several handlers.

    Args:
        handlers: asked at every event.
    """

    run_inline = True

    def __init__(self, handlers: Callable[[], Sequence[NLACallbackHandler]]) -> None:
        self._handlers = handlers
        self.raise_error = strict()

    def __copy__(self) -> _Several:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Several:
        return self


def _forwarding(event: str) -> Callable[..., None]:
    def forward(self: _Several, *args: Any, **kwargs: Any) -> None:
        for handler in self._handlers():
            getattr(handler, event)(*args, **kwargs)

    forward.__name__ = event
    return forward


for _event in _FORWARDED:
    setattr(_Several, _event, _forwarding(_event))


class EnvironmentHandler(_Several):
    """What LangChain makes for a process with ``NLA_MONITOR_LANGCHAIN=1``: a handler for each attached monitor."""

    def __init__(self) -> None:
        super().__init__(_of_attached)


_made: dict[int, NLACallbackHandler] = {}


def _of_attached() -> list[NLACallbackHandler]:
    monitors = attached()
    if len(_made) > len(monitors):
        alive = {id(monitor) for monitor in monitors}
        for gone in [key for key in _made if key not in alive]:
            _made.pop(gone, None)
    return [
        _made.get(id(monitor)) or _made.setdefault(id(monitor), NLACallbackHandler(monitor)) for monitor in monitors
    ]


_inside: ContextVar[BaseCallbackHandler | None] = ContextVar("nla_monitor_langchain_inside", default=None)
_from_environment: ContextVar[BaseCallbackHandler | None] = ContextVar(
    "nla_monitor_langchain_environment", default=None
)
"""Never set: LangChain makes the handler of its class where the environment variable says so."""

register_configure_hook(_inside, inheritable=True)
register_configure_hook(
    _from_environment, inheritable=True, handle_class=EnvironmentHandler, env_var=LANGCHAIN_VARIABLE
)


@contextmanager
def watching(
    monitor: AgentMonitor, *, llm: Any | None = None, tokenizer: Any | None = None
) -> Iterator[NLACallbackHandler]:
    """Every LangChain run that begins inside the block has a handler for this monitor; blocks of several may nest.

    Args:
        monitor: attached to the model.
        llm: as of ``NLACallbackHandler``.
        tokenizer: the same.

    Raises:
        ConfigError: ``llm`` has no local pipeline or tokenizer.
    """
    handler = NLACallbackHandler(monitor, llm=llm, tokenizer=tokenizer)
    outer = _inside.get()
    around: Sequence[NLACallbackHandler] = outer._handlers() if isinstance(outer, _Several) else ()  # noqa: SLF001 -- of this module
    together = [*around, handler]
    token = _inside.set(_Several(lambda: together))
    try:
        yield handler
    finally:
        _inside.reset(token)
