"""Alerts posted to Alertmanager itself (``POST /api/v2/alerts``), for those who have no Prometheus in between.

Alertmanager forgets what is not told again: an alert that fires is posted anew every ``RESEND`` seconds, and once more
with its end when it resolves. So a worker that dies leaves an alert that ends by itself, and one that comes back goes
on where the other stopped; two workers post the same labels, which is one alert there
(https://prometheus.io/docs/alerting/latest/clients/).

Its clock and ours may differ. An alert that fires is posted without ``endsAt``: Alertmanager then adds its own
``resolve_timeout`` (five minutes unless configured) to its own time. With an end by our clock, a worker ten minutes
slow would post only alerts that are over already, which reach nobody. A start or an end that lies in Alertmanager's
future is refused, or keeps the alert alive: what we know of its clock we know from the ``Date`` of its answers, and
where that changes, the post is made again by its clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from nla_monitor.alerts.base import DeliveryError
from nla_monitor.alerts.webhook import WebhookSink, annotations_of, labels_of, rfc3339
from nla_monitor.records import Alert, AlertState

RESEND: Final = 60.0
"""Seconds between two posts of an alert that fires; well below Alertmanager's ``resolve_timeout``."""
_ROUNDED: Final = 2.0
"""Seconds by which a ``Date`` (whole seconds, and some time on the way) may differ from a clock that is right."""
_LONGEST_LABEL: Final = 256
_LONGEST_ANNOTATION: Final = 4096


class AlertmanagerSink(WebhookSink):
    """Posts to one Alertmanager. Replicas of a cluster each get a sink of their own: they merge what they are told.

    Args:
        url: base URL, such as ``http://localhost:9093``; a user and password in it become a header.
        number: which of several, from 0.
        timeout: seconds of silence after which a post counts as failed.
        content: also send quote, explanation and context.
        external_url: where a person finds the monitor; the ``generatorURL``.
        clock: ours, in Unix seconds.

    Raises:
        ConfigError: the URL is no http(s) URL.
    """

    key = "alerts.alertmanager"

    def __init__(
        self,
        url: str,
        *,
        number: int = 0,
        timeout: float = 5.0,
        content: bool = False,
        external_url: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(
            url.rstrip("/") + "/api/v2/alerts",
            timeout=timeout,
            content=content,
            external_url=external_url,
            name=f"alertmanager:{number}",
        )
        self._clock = clock
        self._ahead = 0.0

    def send(self, kind: str, alert: Alert) -> None:
        """Deliver one item.

        Raises:
            DeliveryError: refused, unreachable or silent for too long.
        """
        del kind  # the alert's state says it
        self.remind([alert])

    def remind(self, alerts: Sequence[Alert]) -> None:
        """Post alerts as they stand, in one request.

        Raises:
            DeliveryError: refused, unreachable or silent for too long.
        """
        if not alerts:
            return
        believed = self._ahead
        try:
            self._post_all(alerts)
        except DeliveryError as error:
            if not error.permanent or abs(self._ahead - believed) <= _ROUNDED:
                raise
        if abs(self._ahead - believed) > _ROUNDED:
            self._post_all(alerts)

    def _post_all(self, alerts: Sequence[Alert]) -> None:
        now = self._clock() - self._ahead
        self.post([self._posted(alert, now) for alert in alerts])

    def _heard(self, date: float | None) -> None:
        if date is not None:
            ahead = self._clock() - date
            self._ahead = ahead if abs(ahead) > _ROUNDED else 0.0

    def _posted(self, alert: Alert, now: float) -> dict[str, Any]:
        # Two conditions of a rule (two conversations, say) are two alerts: the fingerprint keeps them apart.
        labels = labels_of(alert) | {"fingerprint": alert.fingerprint}
        ends = {"endsAt": rfc3339(_end(alert, now))} if alert.state is AlertState.RESOLVED else {}
        return {
            "labels": _cut(labels, _LONGEST_LABEL),
            "annotations": _cut(annotations_of(alert, content=self._content), _LONGEST_ANNOTATION),
            "startsAt": rfc3339(_start(alert, now)),
            "generatorURL": self._external_url,
            **ends,
        }


def _start(alert: Alert, now: float) -> float:
    """A run's clock is that of its captures, perhaps on another machine: what lies ahead is now."""
    return min(alert.fired_at, now)


def _end(alert: Alert, now: float) -> float:
    """Of a resolved alert; Alertmanager refuses an end before the start."""
    ended = now if alert.resolved_at is None else alert.resolved_at
    return max(min(ended, now), _start(alert, now))


def _cut(values: dict[str, str], length: int) -> dict[str, str]:
    # Alertmanager takes no empty label.
    return {name: value[:length] for name, value in values.items() if value}
