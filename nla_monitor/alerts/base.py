"""What a sink is, and how it says that it could not deliver."""

from __future__ import annotations

from typing import Protocol

from nla_monitor.errors import NLAMonitorError
from nla_monitor.records import Alert


class DeliveryError(NLAMonitorError):
    """A sink could not take an alert.

    Args:
        message: what happened, without secrets.
        permanent: trying again would not help (the receiver refused it).
        alone: only this item has to wait; the receiver is well and can be given others.
    """

    def __init__(self, message: str, *, permanent: bool = False, alone: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent
        self.alone = alone


class Sink(Protocol):
    """Somewhere that alerts go. Called from one thread at a time; must return within a bounded time."""

    name: str
    """Unique among the sinks of a worker; the outbox remembers deliveries by it."""

    def send(self, kind: str, alert: Alert) -> None:
        """Deliver an alert that has ``fired`` or ``resolved``. At least once: an item may come again after a crash.

        Raises:
            DeliveryError: not delivered; it is tried again later unless ``permanent``.
        """
        ...
