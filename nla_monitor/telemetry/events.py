"""``gen_ai.evaluation.result`` events, in the context of the span that they judge; and who may see content.

Events are log records with an ``event_name``. The logs API still carries an underscore (``opentelemetry._logs``), so
this is the only module that imports it. Convention as of 2026-11, status Development.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from opentelemetry._logs import Logger, LoggerProvider, NoOpLoggerProvider, SeverityNumber, get_logger
from opentelemetry.context import Context
from opentelemetry.util.types import AttributeValue

from nla_monitor import semconv
from nla_monitor.records import PROXY, Alert, AlertState, Match, Reading, Severity, Support
from nla_monitor.telemetry import bounded

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


def match_attributes(
    match: Match, reading: Reading, support: Support | None = None, calibration: Mapping[str, object] | None = None
) -> Attributes:
    """Attributes of one match, without content. The score of a rule that has no soft score is 1: it matched.

    Args:
        match: the match.
        reading: that met the rule.
        support: what the controls measured of it.
        calibration: what stands behind the rule, as ``Alert.calibration``; None: it is not said.
    """
    sample = reading.sample
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
            **_checkpoints(reading),
            **_fidelity(reading),
            **_support(support),
            **_calibration(calibration),
        }
    )


def alert_attributes(alert: Alert, reading: Reading | None = None) -> Attributes:
    """Attributes of an alert, without content; on the span as well as on the event.

    Args:
        alert: as stored.
        reading: that it shows; says which checkpoints read it.
    """
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
            semconv.EVALUATION_NAME: alert.rule_id,
            semconv.EVALUATION_LABEL: alert.state.value,
            semconv.EVALUATION_SCORE: 1.0 if alert.state is AlertState.FIRING else 0.0,
            **(_checkpoints(reading) if reading is not None else {}),
            **_evidence(alert.evidence),
            **_calibration(alert.calibration),
        }
    )


_Found = dict[str, AttributeValue | None]

_CALIBRATION: Final = {
    "calibration_id": semconv.ATTR_CALIBRATION_ID,
    "set": semconv.ATTR_CALIBRATION_SET,
    "sequences": semconv.ATTR_CALIBRATION_SEQUENCES,
    "alpha": semconv.ATTR_CALIBRATION_ALPHA,
    "fpr_upper": semconv.ATTR_CALIBRATION_FPR,
    "confidence": semconv.ATTR_CALIBRATION_CONFIDENCE,
    "p_value": semconv.ATTR_CALIBRATION_P,
}
"""Figures of ``Alert.calibration`` that an event carries, by their key there."""


def _checkpoints(reading: Reading) -> _Found:
    ar_hash = reading.fidelity.ar_hash if reading.fidelity else None
    return {semconv.ATTR_AV_HASH: reading.explanation.av_hash, semconv.ATTR_AR_HASH: ar_hash}


def _fidelity(reading: Reading) -> _Found:
    fidelity = reading.fidelity
    if fidelity is None:
        return {}
    return {
        semconv.ATTR_COSINE: fidelity.cosine,
        semconv.ATTR_FVE: fidelity.fve,
        semconv.ATTR_FVE_DENOMINATOR: fidelity.denominator_name,
    }


def _support(support: Support | None) -> _Found:
    """Figures of one match's controls; the reasons why some are missing may hold content."""
    if support is None:
        return {}
    found: _Found = {f"{semconv.ATTR_EVIDENCE}.{control}": value for control, value in support.controls.items()}
    if support.failed:
        found[semconv.ATTR_EVIDENCE_FAILED] = sorted(support.failed)
    if support.not_run:
        found[semconv.ATTR_EVIDENCE_NOT_RUN] = sorted(support.not_run)
    return found


def _evidence(evidence: Mapping[str, object]) -> _Found:
    """The same of ``Alert.evidence`` (see ``evidence.collect_evidence``): of each control the exhibit's figure."""
    found: _Found = {}
    failed = []
    for control, result in evidence.items():
        if not isinstance(result, Mapping):
            continue
        if isinstance(value := result.get("exhibit"), int | float):
            found[f"{semconv.ATTR_EVIDENCE}.{control}"] = value
        if result.get("passed") is False:
            failed.append(control)
    recurrence, not_run = evidence.get("recurrence"), evidence.get("not_run")
    if isinstance(recurrence, Mapping) and isinstance(count := recurrence.get("readings"), int):
        found[semconv.ATTR_EVIDENCE_READINGS] = count
    if isinstance(not_run, Mapping) and not_run:
        found[semconv.ATTR_EVIDENCE_NOT_RUN] = sorted(map(str, not_run))
    if failed:
        found[semconv.ATTR_EVIDENCE_FAILED] = sorted(failed)
    if evidence.get(PROXY) is True:
        found[semconv.ATTR_EVIDENCE_PROXY] = True
    return found


def _calibration(calibration: Mapping[str, object] | None) -> _Found:
    if calibration is None:
        return {}
    found: _Found = {semconv.ATTR_CALIBRATION: str(calibration.get("status", "uncalibrated"))}
    for key, attribute in _CALIBRATION.items():
        if isinstance(value := calibration.get(key), str | int | float):
            found[attribute] = value
    return found


def _present(attributes: _Found) -> Attributes:
    return {
        key: bounded.name(value) if isinstance(value, str) else value
        for key, value in attributes.items()
        if value is not None
    }
