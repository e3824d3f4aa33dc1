"""Alerts as JSON by HTTP, in the shape of Alertmanager's webhook (version 4), which many receivers understand.

Labels hold only what is stable and has few values; everything else is an annotation. What the model said or read
(quote, explanation, context) leaves the machine only when asked for.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final
from urllib.parse import quote, urlsplit, urlunsplit

from nla_monitor.alerts.base import DeliveryError
from nla_monitor.alerts.finding import facts_of
from nla_monitor.errors import ConfigError
from nla_monitor.records import ENDED, Alert, AlertState
from nla_monitor.untraced import untraced

_NEVER: Final = "0001-01-01T00:00:00Z"
_AGAIN: Final = frozenset({401, 403, 404, 407, 408, 425, 429})
"""Refusals (4xx) that may end without another message: by themselves, or when a person mends a token or an address."""
_LONGEST_ANSWER: Final = 10.0
"""Seconds from the end of a post to the end of the answer's headers, or the sink's timeout if that is longer: one that
drips must not hold up others."""
_NOT_SAID: Final = frozenset({"rule", "rule_title", "run_id", "severity", "runbook"})
"""Facts that are no annotations of their own name: they are labels, or annotations of the name that receivers know."""
_UNTOUCHED: Final = "/%:@!$&'()*+,;=?~-._[]"
"""What a path or query may hold as it is; whatever else is escaped."""


class WebhookSink:
    """Posts each fired or resolved alert to a URL.

    Safe for several threads. Redirects are not followed: they would turn the POST into a GET. A receiver that was told
    twice (a worker died between the post and its note of it) knows by ``fingerprint``, ``startsAt`` and ``status``.

    Args:
        url: ``http://`` or ``https://``; a user and password in it become a Basic ``Authorization`` header.
        timeout: seconds of silence after which a delivery counts as failed; an answer that drips has as long, and ten
            seconds at least.
        content: also send quote, explanation and context.
        headers: sent along, for instance ``Authorization``.
        external_url: where a person finds the monitor; the ``generatorURL``.
        name: how the outbox remembers that this sink has an item.

    Raises:
        ConfigError: the URL is no http(s) URL, or a header cannot be sent.
    """

    key = "alerts.webhook"
    """Where the config has the URL; for messages."""

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 5.0,
        content: bool = False,
        headers: Mapping[str, str] | None = None,
        external_url: str = "",
        name: str = "webhook",
    ) -> None:
        self.name = name
        self._timeout = timeout
        self._content = content
        self._external_url = external_url
        self._headers = {"Content-Type": "application/json", "User-Agent": "nla-monitor"}
        self._url, self._shown = self._split(url)
        self._headers |= self._sendable(headers or {})
        self._opener = urllib.request.build_opener(_NoRedirect, _Http, _Https)

    def _split(self, url: str) -> tuple[str, str]:
        try:
            parts = urlsplit(url.strip())
            port = parts.port
            host = (parts.hostname or "").encode("idna").decode()
        except ValueError:  # not chained: what urllib says quotes the URL
            raise ConfigError(f"{self.key} is no URL; give http://HOST/PATH or https://HOST/PATH") from None
        if parts.scheme not in ("http", "https") or not host:
            raise ConfigError(f"{self.key} must be an http:// or https:// URL with a host")
        if parts.username is not None:
            pair = base64.b64encode(f"{parts.username}:{parts.password or ''}".encode()).decode()
            self._headers["Authorization"] = f"Basic {pair}"
        bare = f"[{host}]" if ":" in host else host
        place = f"{bare}:{port}" if port else bare
        # Paths and queries of webhooks hold tokens: only the host is ever shown.
        path, query = (quote(part, safe=_UNTOUCHED) for part in (parts.path, parts.query))
        return urlunsplit((parts.scheme, place, path, query, "")), f"{parts.scheme}://{place}"

    def _sendable(self, headers: Mapping[str, str]) -> Mapping[str, str]:
        for name, value in headers.items():
            if not (name + value).isascii() or not (name + value).isprintable():
                raise ConfigError(f"{self.key}: header {name!a} holds what HTTP cannot send; give printable ASCII")
        return headers

    def send(self, kind: str, alert: Alert) -> None:
        """Deliver one item.

        Raises:
            DeliveryError: refused, unreachable or silent for too long.
        """
        del kind  # the alert's state says it
        self.post(payload(alert, content=self._content, external_url=self._external_url))

    @untraced()
    def post(self, body: object) -> None:
        """Post something as JSON.

        Raises:
            DeliveryError: refused, unreachable or silent for too long.
        """
        data = json.dumps(body).encode()
        request = urllib.request.Request(self._url, data=data, headers=self._headers, method="POST")  # noqa: S310 -- scheme checked above
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                self._heard(_moment(answer.headers.get("Date")))
        except urllib.error.HTTPError as error:
            self._heard(_moment(error.headers.get("Date")))
            error.close()
            raise self._refused(error.code) from error
        except OSError as error:
            reason = getattr(error, "reason", None) or error
            raise DeliveryError(f"{self._shown}: {reason or type(error).__name__}") from error
        except (http.client.HTTPException, ValueError) as error:  # their text may quote the URL or the answer
            raise DeliveryError(f"{self._shown}: {type(error).__name__}") from None

    def _heard(self, date: float | None) -> None:
        """What the receiver's clock said when it answered, in Unix seconds (whole ones); None: nothing."""

    def _refused(self, code: int) -> DeliveryError:
        if 300 <= code < 400:
            return DeliveryError(f"{self._shown} answered {code}: redirects are not followed, give the final URL")
        return DeliveryError(f"{self._shown} answered {code}", permanent=400 <= code < 500 and code not in _AGAIN)


class _Bounded(http.client.HTTPConnection):
    """An answer's headers have ``_LONGEST_ANSWER`` seconds or ``timeout``, however they drip.

    ``timeout`` alone would be between two bytes.
    """

    def getresponse(self) -> http.client.HTTPResponse:
        over = threading.Timer(max(_LONGEST_ANSWER, self.timeout or 0.0), self._cut)
        over.daemon = True
        over.start()
        try:
            return super().getresponse()
        finally:
            over.cancel()

    def _cut(self) -> None:
        if (open_socket := self.sock) is not None:
            with contextlib.suppress(OSError):  # closed meanwhile
                open_socket.shutdown(socket.SHUT_RDWR)


class _BoundedTls(_Bounded, http.client.HTTPSConnection):
    """The same by TLS."""


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Bounded, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_BoundedTls, req)


def _moment(date: str | None) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp() if date else None
    except ValueError:  # no date: the receiver's affair
        return None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        """Follow none: urllib then raises the redirect as an error."""


def payload(alert: Alert, *, content: bool = False, external_url: str = "") -> dict[str, Any]:
    """The webhook's JSON (https://prometheus.io/docs/alerting/latest/configuration/#webhook_config)."""
    labels = labels_of(alert)
    annotations = annotations_of(alert, content=content)
    return {
        "version": "4",
        "groupKey": f'{{}}:{{alertname="{labels["alertname"]}", fingerprint="{alert.fingerprint}"}}',
        "truncatedAlerts": 0,
        "status": str(alert.state),
        "receiver": "nla_monitor",
        "groupLabels": {"alertname": labels["alertname"]},
        "commonLabels": labels,
        "commonAnnotations": annotations,
        "externalURL": external_url,
        "alerts": [
            {
                "status": str(alert.state),
                "labels": labels,
                "annotations": annotations,
                "startsAt": rfc3339(alert.fired_at),
                "endsAt": rfc3339(alert.resolved_at) if alert.state is AlertState.RESOLVED else _NEVER,
                "generatorURL": external_url,
                "fingerprint": alert.fingerprint,
            }
        ],
    }


def labels_of(alert: Alert) -> dict[str, str]:
    """What identifies an alert: stable, and of few values."""
    return {
        "alertname": "NlaMonitorRuleFired",
        "rule": alert.rule_id,
        "severity": str(alert.severity),
        "run": alert.run_id,
        "source": "agent" if alert.agent else "train",
    }


def annotations_of(alert: Alert, *, content: bool = False) -> dict[str, str]:
    """What is told of an alert; quote, explanation and context only when asked for."""
    facts: dict[str, object] = {
        **{name: value for name, value in facts_of(alert).items() if name not in _NOT_SAID},
        "summary": alert.rule_title,
        "runbook_url": alert.runbook,
        "group": json.dumps(dict(alert.group), sort_keys=True, default=str) if alert.group else None,
        "traceparent": alert.traceparent,
        "ended": alert.evidence.get(ENDED),
    }
    if content:
        facts |= {"quote": alert.quote, "explanation": alert.explanation, "context": alert.context}
    # As JSON writes it, which is what the trace UIs get: a flag is "true".
    plain = {name: str(value).lower() if isinstance(value, bool) else value for name, value in facts.items()}
    return {name: str(value) for name, value in plain.items() if value is not None}


def rfc3339(seconds: float | None) -> str:
    """A moment as Alertmanager writes it; None: the moment that stands for never."""
    if seconds is None:
        return _NEVER
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
