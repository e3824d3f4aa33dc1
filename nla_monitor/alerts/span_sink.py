"""What the sinks of trace UIs share: the alert's span, those that have none, and whether the receiver can be used."""

from __future__ import annotations

import http.client
import logging
import math
import urllib.error
import urllib.request
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import Final

from nla_monitor.alerts.base import DeliveryError
from nla_monitor.alerts.finding import Place, Unplaced, place_of
from nla_monitor.alerts.webhook import WebhookSink
from nla_monitor.records import Alert
from nla_monitor.untraced import untraced

logger = logging.getLogger("nla_monitor.alerts")

_KEYS_REFUSED: Final = (401, 403)


class SpanSink(WebhookSink):
    """Posts what fired onto the span that the alert's exhibit was captured in.

    Alerts without a span that the receiver could have (of a training run, or of a trace that was not sampled) are done
    at once. They are counted in ``passed_over``, and told of in the log at the first, the tenth, the hundredth.

    Args:
        base: the receiver's URL, without secrets and without a final slash.
        path: what is posted to.
        probe: what ``check`` asks for; needs the same keys.
        timeout: seconds of silence after which a post counts as failed.
        content: also send quote and explanation.
        headers: with the keys.
        name: by which the outbox remembers deliveries.
    """

    keys: str
    """Where the config says which keys are used; for messages."""

    def __init__(
        self, base: str, path: str, *, probe: str, timeout: float, content: bool, headers: Mapping[str, str], name: str
    ) -> None:
        super().__init__(base + path, timeout=timeout, content=content, headers=headers, name=name)
        self._probe = base + probe
        self.passed_over: Counter[str] = Counter()
        """Alerts without a span, by reason."""

    @abstractmethod
    def body(self, alert: Alert, place: Place) -> object:
        """What is posted."""

    def send(self, kind: str, alert: Alert) -> None:
        """Post the finding, if the alert has fired.

        Raises:
            DeliveryError: refused, unreachable or silent for too long.
        """
        if kind != "fired":
            return
        place = place_of(alert)
        if isinstance(place, Unplaced):
            self._pass_over(alert, place)
            return
        self.post(self.body(alert, place))

    def _pass_over(self, alert: Alert, why: Unplaced) -> None:
        self.passed_over[why.reason] += 1
        count = self.passed_over[why.reason]
        if math.log10(count).is_integer():
            said = "%s has nothing to show alert %s on, for it has %s (%d so far)"
            logger.info(said, self.name, alert.alert_id, why.reason, count)

    def _refused(self, code: int) -> DeliveryError:
        if code in _KEYS_REFUSED:  # a worker that is started with others may still deliver it
            return DeliveryError(f"{self._shown} refused the keys ({code}); see {self.keys}")
        return super()._refused(code)

    @untraced()
    def check(self) -> str:
        """Ask the receiver for something harmless; returns where it is.

        Raises:
            DeliveryError: it is away, refuses the keys, or is something else.
        """
        request = urllib.request.Request(self._probe, headers=self._headers)  # noqa: S310 -- scheme checked
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                kind = answer.headers.get_content_type()
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in _KEYS_REFUSED:
                raise self._refused(error.code) from error
            raise DeliveryError(f"{self._shown} answered {error.code}: it is away, or something else") from error
        except (OSError, http.client.HTTPException) as error:
            raise DeliveryError(f"{self._shown}: {getattr(error, 'reason', None) or type(error).__name__}") from error
        if kind != "application/json":
            raise DeliveryError(f"{self._shown} answers {kind}, no JSON: it is something else", permanent=True)
        return self._shown
