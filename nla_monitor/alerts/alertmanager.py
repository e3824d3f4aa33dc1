"""Alerts posted to Alertmanager itself (``POST /api/v2/alerts``), for those who have no Prometheus in between.

Alertmanager forgets what is not told again: an alert that fires is posted anew every ``RESEND`` seconds with an
``endsAt`` a few minutes ahead, and once more with its end when it resolves. So a worker that dies leaves an alert that
ends by itself, and one that comes back goes on where the other stopped; two workers post the same labels, which is one
alert there (https://prometheus.io/docs/alerting/latest/clients/).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from nla_monitor.alerts.webhook import WebhookSink, annotations_of, labels_of, rfc3339
from nla_monitor.records import Alert, AlertState

RESEND: Final = 60.0
"""Seconds between two posts of an alert that fires."""
STAYS: Final = 5 * RESEND
"""Seconds after which Alertmanager takes an alert as resolved that nobody posted again."""
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
        clock: Unix seconds.

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
        if alerts:
            self.post([self._posted(alert) for alert in alerts])

    def _posted(self, alert: Alert) -> dict[str, Any]:
        ends = self._clock() + STAYS
        if alert.state is AlertState.RESOLVED and alert.resolved_at is not None:
            # A run's clock is that of its captures, perhaps on another machine: an end that lies ahead is now.
            ends = min(alert.resolved_at, self._clock())
        # Two conditions of a rule (two conversations, say) are two alerts: the fingerprint keeps them apart.
        labels = labels_of(alert) | {"fingerprint": alert.fingerprint}
        return {
            "labels": _cut(labels, _LONGEST_LABEL),
            "annotations": _cut(annotations_of(alert, content=self._content), _LONGEST_ANNOTATION),
            "startsAt": rfc3339(alert.fired_at),
            "endsAt": rfc3339(max(ends, alert.fired_at)),
            "generatorURL": self._external_url,
        }


def _cut(values: dict[str, str], length: int) -> dict[str, str]:
    # Alertmanager takes no empty label.
    return {name: value[:length] for name, value in values.items() if value}
