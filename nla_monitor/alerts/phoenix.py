"""Findings as annotations on spans in Arize Phoenix (``POST /v1/span_annotations``, Phoenix 20).

Plain HTTP on purpose: it is one POST, which needs neither Phoenix's client nor a further package in the worker.
``sync=true`` makes Phoenix answer once the annotation is stored, and with 404 while it does not have the span: spans
come to it by way of exporters and queues, often after the finding. Without it, Phoenix holds the annotation in memory,
says 200, and loses it in a restart.
"""

from __future__ import annotations

import os
from http import HTTPStatus
from typing import Any, Final

from nla_monitor.alerts.base import DeliveryError
from nla_monitor.alerts.finding import Place, facts_of, name_of, told
from nla_monitor.alerts.span_sink import SpanSink
from nla_monitor.errors import ConfigError
from nla_monitor.outlet_config import PhoenixConfig
from nla_monitor.records import Alert

KEY_VARIABLE: Final = "PHOENIX_API_KEY"


class PhoenixSink(SpanSink):
    """Annotates the span that an alert's exhibit was captured in.

    An annotation is known by span, name and identifier (the alert's id): a second post changes the first.

    Args:
        config: where Phoenix is, and what it is told.

    Raises:
        ConfigError: the named variable is not set, or holds no API key.
    """

    key = "alerts.phoenix.endpoint"
    keys = "alerts.phoenix.api_key_env"

    def __init__(self, config: PhoenixConfig) -> None:
        super().__init__(
            config.endpoint,
            "/v1/span_annotations?sync=true",
            probe="/v1/projects?limit=1",
            timeout=config.timeout_seconds,
            content=config.content,
            headers=_authorization(config),
            name="phoenix",
        )

    def body(self, alert: Alert, place: Place) -> object:
        """The annotation, as the only one of a list."""
        return {"data": [annotation(alert, place.span_id, content=self._content)]}

    def _refused(self, code: int) -> DeliveryError:
        if code == HTTPStatus.NOT_FOUND:
            return DeliveryError(f"{self._shown} does not have the alert's span yet (404)", alone=True)
        return super()._refused(code)


def annotation(alert: Alert, span_id: str, *, content: bool) -> dict[str, Any]:
    """One element of ``data``.

    Its score is 1: the rule's condition held. How sure that is, the explanation and the metadata say.

    Args:
        alert: that has fired.
        span_id: 16 hexadecimal digits.
        content: also tell quote and explanation.
    """
    return {
        "span_id": span_id,
        "name": name_of(alert),
        "annotator_kind": "LLM",
        "identifier": alert.alert_id,
        "result": {"label": alert.severity.value, "score": 1.0, "explanation": told(alert, content=content)},
        "metadata": facts_of(alert),
    }


def _authorization(config: PhoenixConfig) -> dict[str, str]:
    variable = config.api_key_env or KEY_VARIABLE
    key = os.environ.get(variable, "").strip()
    if not key:
        if config.api_key_env is None:
            return {}
        raise ConfigError(
            f"alerts.phoenix.api_key_env names the environment variable {variable}, which is not set here; set it "
            "where the worker runs, or leave api_key_env out if Phoenix asks for no key"
        )
    if not (key.isascii() and key.isprintable()):  # it could be no header, and a message about that would quote it
        raise ConfigError(f"the environment variable {variable} holds no API key: it has characters no key has")
    return {"Authorization": f"Bearer {key}"}
