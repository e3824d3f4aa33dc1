"""Slack, PagerDuty, e-mail, Discord and a hundred more, through Apprise (extra ``notify``).

Their URLs hold tokens and passwords. They are never logged, stored or part of a message of ours; Apprise's own log
lines, which may quote them, are held back while it works for us.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from nla_monitor.alerts.base import DeliveryError
from nla_monitor.alerts.finding import IN_PROXY
from nla_monitor.alerts.webhook import annotations_of
from nla_monitor.errors import ConfigError, MissingExtraError
from nla_monitor.records import Alert, AlertState, Severity
from nla_monitor.untraced import untraced

_TALKERS: Final = ("apprise", "urllib3.connectionpool", "requests_oauthlib")
_PATIENCE: Final = 30.0
"""Seconds for one message. Apprise bounds each silence (4 s by HTTP, 15 s by SMTP), not the whole of an answer."""
_LONGEST_TITLE: Final = 200
_TOLD: Final = (
    "ended",
    "matches",
    "first_step",
    "last_step",
    "position",
    "fve",
    "fve_denominator",
    "calibration",
    "guarantee",
    "alert_id",
)


class AppriseSink:
    """Tells one service of each fired or resolved alert.

    The title of an alert is the same when it resolves: services that tie messages together by a title or a first line
    (PagerDuty with ``?action=map``) close what they opened, and two conditions of a rule stay two incidents.

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
        self._before: threading.Thread | None = None

    def send(self, kind: str, alert: Alert) -> None:
        """Deliver one item, within half a minute.

        Raises:
            DeliveryError: the service did not take it, or not in time; Apprise does not say whether trying again helps.
        """
        if self._before is not None and self._before.is_alive():
            raise DeliveryError(f"{self._service.service_name} has not answered the message before this one")
        ended = alert.state is AlertState.RESOLVED
        loud = alert.severity.rank >= Severity.HIGH.rank
        message = {
            "title": _title(alert),
            "body": _body(kind, alert, content=self._content),
            "notify_type": self._resolved if ended else self._types[loud],
        }
        answers: list[object] = []
        self._before = threading.Thread(
            target=self._tell, args=(message, answers.append), name=f"nla-monitor-{self.name}", daemon=True
        )
        self._before.start()
        self._before.join(_PATIENCE)
        if answers[:1] != [True]:
            why = f"({answers[0]})" if answers and answers[0] else "" if answers else "in time"
            raise DeliveryError(f"{self._service.service_name} did not take it {why}".rstrip())

    def _tell(self, message: dict[str, object], answer: Callable[[object], None]) -> None:
        """On a thread of its own: True, False, or the name of what went wrong; its text may quote the URL."""
        with _quiet(), untraced():
            try:
                answer(bool(self._service.notify(**message)))
            except Exception as error:  # noqa: BLE001 -- of a plug-in
                answer(type(error).__name__)


def _title(alert: Alert) -> str:
    return f"[{alert.severity.value}] {' '.join(alert.rule_title.split())[:_LONGEST_TITLE]} [{alert.fingerprint[:8]}]"


def _body(kind: str, alert: Alert, *, content: bool) -> str:
    facts = annotations_of(alert, content=content)
    wanted = [*_TOLD, *(("quote", "explanation") if content else ())]
    lines = [f"{kind}: rule {alert.rule_id}, run {alert.run_id}"]
    lines += [f"{name.replace('_', ' ')}: {facts[name]}" for name in wanted if name in facts]
    if "proxy" in facts:
        lines.append(IN_PROXY)
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
