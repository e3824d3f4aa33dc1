"""``gen_ai.evaluation.result`` events, in the context of the span that they judge; and who may see content.

Events are log records with an ``event_name``. The logs API still carries an underscore (``opentelemetry._logs``), so
this is the only module that imports it. Convention as of 2026-11, status Development.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from typing import Final

from opentelemetry._logs import Logger, LoggerProvider, NoOpLoggerProvider, SeverityNumber, get_logger
from opentelemetry.context import Context
from opentelemetry.util.types import AttributeValue

from nla_monitor import semconv
from nla_monitor.records import Alert, AlertState, Match, Reading, Severity

__all__ = [
    "CapturedContent",
    "Logger",
    "LoggerProvider",
    "NoOpLoggerProvider",
    "alert_attributes",
    "emit_evaluation",
    "get_logger",
    "match_attributes",
]

_log = logging.getLogger("nla_monitor.telemetry")

_SEVERITY: Final = {
    Severity.INFO: SeverityNumber.INFO,
    Severity.LOW: SeverityNumber.INFO2,
    Severity.MEDIUM: SeverityNumber.WARN,
    Severity.HIGH: SeverityNumber.ERROR,
    Severity.CRITICAL: SeverityNumber.FATAL,
}

Attributes = dict[str, AttributeValue]


@dataclass(frozen=True, slots=True)
class CapturedContent:
    """Where explanation text may go besides the database; nowhere by default.

    An explanation is made from what users and models wrote, so it is content in the sense of the GenAI conventions.
    """

    spans: bool = False
    events: bool = False

    @classmethod
    def from_environment(cls) -> CapturedContent:
        """From ``OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT``.

        ``SPAN_ONLY``, ``EVENT_ONLY`` or ``SPAN_AND_EVENT``, in any case. Everything else, also the ``true`` of older
        conventions, means no content.
        """
        value = os.environ.get(semconv.CONTENT_VARIABLE, "").strip().upper()
        if value not in ("", "NO_CONTENT", "SPAN_ONLY", "EVENT_ONLY", "SPAN_AND_EVENT"):
            _log.warning(
                "%s=%s is not one of NO_CONTENT, SPAN_ONLY, EVENT_ONLY, SPAN_AND_EVENT; no content is sent",
                semconv.CONTENT_VARIABLE,
                value,
            )
        return cls(spans=value in ("SPAN_ONLY", "SPAN_AND_EVENT"), events=value in ("EVENT_ONLY", "SPAN_AND_EVENT"))


def emit_evaluation(logger: Logger, severity: Severity, attributes: Attributes, context: Context | None) -> None:
    """Emit one event; ``context`` is that of the source span, or None for the current one."""
    logger.emit(
        timestamp=time.time_ns(),
        context=context,
        severity_number=_SEVERITY[severity],
        severity_text=severity.value.upper(),
        attributes=attributes,
        event_name=semconv.EVENT_EVALUATION,
    )


def match_attributes(match: Match, reading: Reading) -> Attributes:
    """Attributes of one match, without content. The score of a rule that has no soft score is 1: it matched."""
    sample, fidelity = reading.sample, reading.fidelity
    return _present(
        {
            semconv.EVALUATION_NAME: match.rule_id,
            semconv.EVALUATION_LABEL: "match",
            semconv.EVALUATION_SCORE: 1.0,
            semconv.GEN_AI_CONVERSATION: sample.agent.conversation_id if sample.agent else None,
            semconv.ATTR_RUN: match.run_id,
            semconv.ATTR_SAMPLE: match.sample_id,
            semconv.ATTR_RULE: match.rule_id,
            semconv.ATTR_RULE_VERSION: match.rule_version,
            semconv.ATTR_SEVERITY: match.severity.value,
            semconv.ATTR_STEP: match.step,
            semconv.ATTR_POSITION: match.position,
            semconv.ATTR_LAYER: sample.layer,
            semconv.ATTR_PHASE: sample.phase.value,
            semconv.ATTR_AV_HASH: reading.explanation.av_hash,
            semconv.ATTR_AR_HASH: fidelity.ar_hash if fidelity else None,
            semconv.ATTR_COSINE: fidelity.cosine if fidelity else None,
            semconv.ATTR_FVE: fidelity.fve if fidelity else None,
            semconv.ATTR_FVE_DENOMINATOR: fidelity.denominator_name if fidelity else None,
        }
    )


def alert_attributes(alert: Alert) -> Attributes:
    """Attributes of an alert, without content; on the span as well as on the event."""
    return _present(
        {
            semconv.GEN_AI_CONVERSATION: alert.agent.conversation_id if alert.agent else None,
            semconv.ATTR_RUN: alert.run_id,
            semconv.ATTR_SAMPLE: alert.sample_id,
            semconv.ATTR_RULE: alert.rule_id,
            semconv.ATTR_RULE_VERSION: alert.rule_version,
            semconv.ATTR_SEVERITY: alert.severity.value,
            semconv.ATTR_ALERT: alert.alert_id,
            semconv.ATTR_ALERT_STATE: alert.state.value,
            semconv.ATTR_STEP: alert.last_step,
            semconv.ATTR_POSITION: alert.position,
            semconv.ATTR_COSINE: alert.cosine,
            semconv.ATTR_FVE: alert.fve,
            semconv.ATTR_FVE_DENOMINATOR: alert.denominator_name,
            semconv.ATTR_CALIBRATION: str(alert.calibration.get("status", "uncalibrated")),
            semconv.EVALUATION_NAME: alert.rule_id,
            semconv.EVALUATION_LABEL: alert.state.value,
            semconv.EVALUATION_SCORE: 1.0 if alert.state is AlertState.FIRING else 0.0,
        }
    )


def _present(attributes: dict[str, AttributeValue | None]) -> Attributes:
    return {key: value for key, value in attributes.items() if value is not None}
