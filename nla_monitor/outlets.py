"""Where a worker's alerts go, as the config names it; and who must be told again while an alert fires."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from nla_monitor.alerts.alertmanager import RESEND, AlertmanagerSink
from nla_monitor.alerts.langfuse import LangfuseSink
from nla_monitor.alerts.notify import AppriseSink
from nla_monitor.alerts.phoenix import PhoenixSink
from nla_monitor.alerts.sinks import DeliveryError, LogSink, Sink, WebhookSink, may_tell
from nla_monitor.config import MonitorConfig
from nla_monitor.records import Alert
from nla_monitor.store.health import standing_alerts
from nla_monitor.store.repository import Repository

logger = logging.getLogger("nla_monitor.alerts")

_MANY: Final = 500
"""Alerts in one post to an Alertmanager."""


def sinks_of(config: MonitorConfig) -> list[Sink]:
    """The sinks that a config names.

    Raises:
        ConfigError: a URL is none, or of a service that nobody knows; a key is not in the environment.
        MissingExtraError: ``alerts.notify`` is used without the extra ``notify``.
    """
    alerts = config.alerts
    sinks: list[Sink] = [LogSink()]
    if alerts.webhook is not None:
        sinks.append(WebhookSink(alerts.webhook))
    sinks += [AlertmanagerSink(url, number=number) for number, url in enumerate(alerts.alertmanager)]
    sinks += [AppriseSink(url, number=number) for number, url in enumerate(alerts.notify)]
    if alerts.phoenix is not None:
        sinks.append(PhoenixSink(alerts.phoenix))
    if alerts.langfuse is not None:
        sinks.append(LangfuseSink(alerts.langfuse))
    return sinks


class Reminder:
    """Posts what fires to the Alertmanagers again, every ``RESEND`` seconds.

    It reads the store, so that a restart of the worker changes nothing.

    Args:
        repository: what fires.
        sinks: of which the Alertmanagers are reminded.
        responses: by rule id, what its alerts may set off: a rule that names no webhook reaches no Alertmanager.
        tell: hears of each post: the sink's name, and ``delivered``, ``failed`` or ``refused``.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        repository: Repository,
        sinks: Sequence[Sink],
        *,
        responses: Mapping[str, Sequence[str] | None] | None = None,
        tell: Callable[[str, str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._repository = repository
        self._sinks = [sink for sink in sinks if isinstance(sink, AlertmanagerSink)]
        self._responses = responses or {}
        self._tell = tell
        self._clock = clock
        self._due = clock()
        self._down: set[str] = set()

    def tick(self) -> None:
        """Remind them, if it is time. One that is down costs its timeout, and is told of in the log once.

        Raises:
            StoreUnavailableError: the store can't be read.
        """
        if not self._sinks or self._clock() < self._due:
            return
        up = list(self._sinks)
        for alerts in standing_alerts(self._repository.engine, _MANY):
            up = [
                sink
                for sink in up
                if self._remind(sink, [alert for alert in alerts if may_tell(sink, alert, self._responses)])
            ]
            if not up:
                break
        self._due = self._clock() + RESEND

    def _remind(self, sink: AlertmanagerSink, alerts: Sequence[Alert]) -> bool:
        """Post one page; whether the sink is worth being given the next."""
        if not alerts:
            return True
        try:
            sink.remind(alerts)
        except DeliveryError as error:
            if sink.name not in self._down:
                logger.warning("%s is not reminded of what fires, trying on: %s", sink.name, error)
            self._down.add(sink.name)
            outcome = "refused" if error.permanent else "failed"
        else:
            self._down.discard(sink.name)
            outcome = "delivered"
        if self._tell is not None:
            self._tell(sink.name, outcome)
        return outcome != "failed"
