"""Slack, PagerDuty, e-mail, Discord and a hundred more, through Apprise (extra ``notify``).

Their URLs hold tokens and passwords. They are never logged, stored or part of a message of ours; Apprise's own log
lines, which may quote them, are held back while it works for us.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from nla_monitor.alerts.base import DeliveryError
from nla_monitor.alerts.webhook import annotations_of
from nla_monitor.errors import ConfigError, MissingExtraError
from nla_monitor.records import Alert, AlertState, Severity

_TALKERS: Final = ("apprise", "urllib3.connectionpool", "requests_oauthlib")
_TOLD: Final = ("matches", "first_step", "last_step", "position", "fve", "fve_denominator", "calibration", "alert_id")


class AppriseSink:
    """Tells one service of each fired or resolved alert.

    Args:
        url: as Apprise writes it, such as ``slack://TOKEN_A/TOKEN_B/TOKEN_C``; see https://github.com/caronc/apprise.
        number: which of several, from 0; part of the name by which the outbox remembers deliveries.
        content: also send quote, explanation and context.

    Raises:
        ConfigError: Apprise does not know the URL's service, or something is missing in it.
        MissingExtraError: Apprise is not installed.
    """

    def __init__(self, url: str, *, number: int = 0, content: bool = False) -> None:
        self.name = f"notify:{number}"
        self._content = content
        try:
            import apprise  # noqa: PLC0415 -- optional extra
        except ImportError as error:
            raise MissingExtraError("apprise", "notify", "alerts.notify") from error
        with _quiet(), warnings.catch_warnings():
            # Its plug-ins are imported now, and with some of them modules that Python deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            service: Any = apprise.Apprise.instantiate(url, suppress_exceptions=True)
        if service is None:
            scheme = url.partition("://")[0] if "://" in url else "none"
            raise ConfigError(
                f"alerts.notify[{number}] is no URL that Apprise understands (service {scheme[:32]!r}); the service "
                "may be unknown, or a token missing: see https://github.com/caronc/apprise/wiki"
            )
        self._service = service
        self._types = {True: apprise.NotifyType.FAILURE, False: apprise.NotifyType.WARNING}
        self._resolved = apprise.NotifyType.SUCCESS

    def send(self, kind: str, alert: Alert) -> None:
        """Deliver one item; Apprise's own timeouts (4 s to connect, 4 s of silence) bound it.

        Raises:
            DeliveryError: the service did not take it; Apprise does not say whether trying again helps.
        """
        ended = alert.state is AlertState.RESOLVED
        loud = alert.severity.rank >= Severity.HIGH.rank
        with _quiet():
            try:
                taken = self._service.notify(
                    title=f"[{alert.severity.value}] {alert.rule_title} ({kind})",
                    body=_body(alert, content=self._content),
                    notify_type=self._resolved if ended else self._types[loud],
                )
            except Exception as error:  # noqa: BLE001 -- of a plug-in; its text may quote the URL
                raise DeliveryError(f"{self._service.service_name}: {type(error).__name__}") from None
        if not taken:
            raise DeliveryError(f"{self._service.service_name} did not take it")


def _body(alert: Alert, *, content: bool) -> str:
    facts = annotations_of(alert, content=content)
    wanted = [*_TOLD, *(("quote", "explanation") if content else ())]
    lines = [f"rule {alert.rule_id}, run {alert.run_id}"]
    lines += [f"{name.replace('_', ' ')}: {facts[name]}" for name in wanted if name in facts]
    lines.append(f"nla-monitor alerts show {alert.alert_id}")
    return "\n".join(lines)


class _Hold(logging.Filter):
    """Drops records of threads that are inside ``_quiet``; everybody else's pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        del record
        return not getattr(self.inside, "depth", 0)


_hold: Final = _Hold()


@contextmanager
def _quiet() -> Iterator[None]:
    for name in _TALKERS:
        logging.getLogger(name).addFilter(_hold)  # adding it again changes nothing
    _hold.inside.depth = getattr(_hold.inside, "depth", 0) + 1
    try:
        yield
    finally:
        _hold.inside.depth -= 1
