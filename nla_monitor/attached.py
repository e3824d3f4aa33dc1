"""The monitors that are attached to a model in this process, for integrations that are switched on from outside."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final

from nla_monitor.errors import MissingExtraError

logger = logging.getLogger("nla_monitor")

LANGCHAIN_VARIABLE: Final = "NLA_MONITOR_LANGCHAIN"
"""Set to 1, it gives every LangChain run of the process a handler for each attached monitor."""

_lock = threading.Lock()
_attached: tuple[Any, ...] = ()


def attached() -> Sequence[Any]:
    """The attached monitors that are not closed, in order."""
    return _attached


def announce(monitor: Any) -> None:
    """A monitor has been attached; what the environment asks for is installed.

    Held until ``withdraw``: a monitor that is attached lives until it is closed, at the latest at the process's exit.
    """
    global _attached  # noqa: PLW0603 -- replaced as a whole, so that readers need no lock
    with _lock:
        if monitor not in _attached:
            _attached = (*_attached, monitor)
    if os.environ.get(LANGCHAIN_VARIABLE, "") in ("", "0", "false", "False"):  # as LangChain reads its own
        return
    try:
        import_module("nla_monitor_langchain")  # registers itself
    except MissingExtraError as error:
        logger.warning("nla_monitor: %s is set, and nothing can be watched: %s", LANGCHAIN_VARIABLE, error)


def withdraw(monitor: Any) -> None:
    """A monitor is closed."""
    global _attached  # noqa: PLW0603 -- as above
    with _lock:
        _attached = tuple(known for known in _attached if known is not monitor)
