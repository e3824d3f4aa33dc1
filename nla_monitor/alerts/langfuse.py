"""Findings as scores on observations in Langfuse (``POST /api/public/scores``, Basic auth).

Plain HTTP on purpose: it is one POST of one object, which every version of Langfuse takes, while its SDK brings a
tracer of its own. Langfuse stores what it is told whether the span is there yet or not.
"""

from __future__ import annotations

import base64
import os
from typing import Any, Final

from nla_monitor.alerts.finding import Place, facts_of, name_of, told
from nla_monitor.alerts.span_sink import SpanSink
from nla_monitor.alerts.webhook import rfc3339
from nla_monitor.errors import ConfigError
from nla_monitor.outlet_config import LangfuseConfig, checked_url
from nla_monitor.records import Alert

HOST_VARIABLES: Final = ("LANGFUSE_BASE_URL", "LANGFUSE_HOST")
"""In the order in which Langfuse's own SDK reads them."""


class LangfuseSink(SpanSink):
    """Scores the observation (span) that an alert's exhibit was captured in.

    A score is known by its id and timestamp, both the alert's: a second post changes the first.

    Args:
        config: where Langfuse is, which variables hold its keys, and what it is told.

    Raises:
        ConfigError: no host, or a key that is not set.
    """

    key = "alerts.langfuse.host"
    keys = "alerts.langfuse.public_key_env and secret_key_env"

    def __init__(self, config: LangfuseConfig) -> None:
        super().__init__(
            _host(config),
            "/api/public/scores",
            probe="/api/public/projects",
            timeout=config.timeout_seconds,
            content=config.content,
            headers=_authorization(config),
            name="langfuse",
        )

    def body(self, alert: Alert, place: Place) -> object:
        """The score."""
        return score(alert, place, content=self._content)


def score(alert: Alert, place: Place, *, content: bool) -> dict[str, Any]:
    """The request's body: that the rule's condition held, as a boolean; how sure that is in comment and metadata.

    Args:
        alert: that has fired.
        place: its span; Langfuse calls spans observations.
        content: also tell quote and explanation.
    """
    return {
        "id": f"nla-{alert.alert_id}",
        "traceId": place.trace_id,
        "observationId": place.span_id,
        "name": name_of(alert),
        "dataType": "BOOLEAN",
        "value": 1,
        "comment": told(alert, content=content),
        "metadata": facts_of(alert),
        "timestamp": rfc3339(alert.fired_at),
    }


def _host(config: LangfuseConfig) -> str:
    if config.host is not None:
        return config.host
    variable = next((name for name in HOST_VARIABLES if os.environ.get(name, "").strip()), None)
    if variable is None:
        raise ConfigError(
            f"alerts.langfuse has no host, and none of {', '.join(HOST_VARIABLES)} is set; say where Langfuse is, such "
            "as host: https://cloud.langfuse.com"
        )
    try:
        return checked_url(os.environ[variable].strip())
    except ValueError:  # its value is not repeated: it may hold a password
        raise ConfigError(
            f"the environment variable {variable} must be an http:// or https:// URL with a host, without user, "
            "password or query"
        ) from None


def _authorization(config: LangfuseConfig) -> dict[str, str]:
    names = {"public_key_env": config.public_key_env, "secret_key_env": config.secret_key_env}
    keys = {option: os.environ.get(variable, "").strip() for option, variable in names.items()}
    missing = [f"{names[option]} ({option})" for option, key in keys.items() if not key]
    if missing:
        raise ConfigError(
            f"alerts.langfuse needs the environment variables {' and '.join(missing)}, which are not set here; set "
            "them where the worker runs"
        )
    pair = base64.b64encode(":".join(keys.values()).encode()).decode()
    return {"Authorization": f"Basic {pair}"}
