"""Names of spans, metrics, events and attributes: the only place where they are spelled.

Own names live under ``nla_monitor.`` (OpenTelemetry forbids new names under an existing namespace). ``gen_ai.`` names
follow the GenAI semantic conventions as of 2026-11 (status: Development), written here as constants because the
packaged ones are deprecated.
"""

from __future__ import annotations

from typing import Final

SCOPE: Final = "nla_monitor"
SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.37.0"

CONTENT_VARIABLE: Final = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"

# Spans
SPAN_CAPTURE: Final = "nla_monitor.capture"
SPAN_VERBALIZE: Final = "nla_monitor.verbalize"
SPAN_EVALUATE: Final = "nla_monitor.evaluate"
SPAN_ALERT: Final = "nla_monitor.alert"

# Values of gen_ai.operation.name (custom ones are allowed where no well-known one applies)
OPERATION_CAPTURE: Final = "capture"
OPERATION_VERBALIZE: Final = "verbalize"
OPERATION_EVALUATE: Final = "evaluate"
OPERATION_ALERT: Final = "alert"

# GenAI conventions
GEN_AI_OPERATION: Final = "gen_ai.operation.name"
GEN_AI_PROVIDER: Final = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL: Final = "gen_ai.request.model"
GEN_AI_CONVERSATION: Final = "gen_ai.conversation.id"
EVENT_EVALUATION: Final = "gen_ai.evaluation.result"
EVALUATION_NAME: Final = "gen_ai.evaluation.name"
EVALUATION_SCORE: Final = "gen_ai.evaluation.score.value"
EVALUATION_LABEL: Final = "gen_ai.evaluation.score.label"
EVALUATION_EXPLANATION: Final = "gen_ai.evaluation.explanation"
ERROR_TYPE: Final = "error.type"

# OpenInference (semantic conventions 0.1.42), by which Phoenix sorts spans; it knows no kind for our operations
OPENINFERENCE_KIND: Final = "openinference.span.kind"
KIND_EVALUATOR: Final = "EVALUATOR"

# Attributes
ATTR_RUN: Final = "nla_monitor.run.id"
ATTR_SAMPLE: Final = "nla_monitor.sample.id"
ATTR_STEP: Final = "nla_monitor.step"
ATTR_POSITION: Final = "nla_monitor.position"
ATTR_LAYER: Final = "nla_monitor.layer"
ATTR_PHASE: Final = "nla_monitor.phase"
ATTR_RULE: Final = "nla_monitor.rule.id"
ATTR_RULE_VERSION: Final = "nla_monitor.rule.version"
ATTR_SEVERITY: Final = "nla_monitor.severity"
ATTR_ALERT: Final = "nla_monitor.alert.id"
ATTR_ALERT_STATE: Final = "nla_monitor.alert.state"
ATTR_AV_HASH: Final = "nla_monitor.av.hash"
ATTR_AR_HASH: Final = "nla_monitor.ar.hash"
ATTR_COSINE: Final = "nla_monitor.fidelity.cosine"
ATTR_FVE: Final = "nla_monitor.fidelity.fve"
ATTR_FVE_DENOMINATOR: Final = "nla_monitor.fidelity.denominator"
ATTR_CALIBRATION: Final = "nla_monitor.calibration.status"
ATTR_BATCH_SIZE: Final = "nla_monitor.batch.size"
ATTR_BATCH_SOURCES: Final = "nla_monitor.batch.sources"  # distinct source traces; links beyond the SDK's limit are lost
ATTR_REASON: Final = "reason"
ATTR_PLACE: Final = "place"
ATTR_OUTCOME: Final = "outcome"
ATTR_TRIAGE: Final = "label"
ATTR_STATE: Final = "state"
ATTR_SINK: Final = "sink"

# Metrics (no ``_total``: exporters add it); unit beside the name
METRIC_SAMPLED: Final = "nla_monitor.activations.sampled"  # {activation}
METRIC_DROPPED: Final = "nla_monitor.activations.dropped"  # {activation}, by reason
METRIC_FAULTS: Final = "nla_monitor.faults"  # {fault}, by place
METRIC_VERBALIZATIONS: Final = "nla_monitor.verbalizations"  # {verbalization}, by outcome
METRIC_VERBALIZE_DURATION: Final = "nla_monitor.verbalization.duration"  # s, one leased batch
METRIC_DETECTION_DELAY: Final = "nla_monitor.detection.delay"  # s, from capture to alert
METRIC_QUEUE_SIZE: Final = "nla_monitor.queue.size"  # {activation}
METRIC_MATCHES: Final = "nla_monitor.matches"  # {match}, by rule
METRIC_ALERTS: Final = "nla_monitor.alerts"  # {alert}, by rule and severity
METRIC_VOIDED: Final = "nla_monitor.guarantees.voided"  # {guarantee}, by rule: drift ended what a calibration promised
METRIC_UNJUDGED: Final = "nla_monitor.unjudged"  # {reading}, by rule: no judge or model could be asked
METRIC_FVE: Final = "nla_monitor.fidelity.fve"  # 1
METRIC_UNEXPLAINED: Final = "nla_monitor.fidelity.unexplained"  # 1, that is 1 - FVE: never negative
METRIC_CAPTURE_DURATION: Final = "nla_monitor.capture.overhead"  # s, host time per sampled forward
# Levels that each worker reads from the store: the same in all workers of a database, so aggregate with max, not sum
METRIC_QUEUE_AGE: Final = "nla_monitor.queue.age"  # s, of the oldest sample that no worker has finished
METRIC_RUNS_ACTIVE: Final = "nla_monitor.runs.active"  # {run}
METRIC_STORE_DROPS: Final = "nla_monitor.store.drops"  # {activation}, by reason; all runs, only ever grows
METRIC_STORE_FAILURES: Final = "nla_monitor.store.failures"  # {activation}, given up by the workers
METRIC_ALERTS_FIRING: Final = "nla_monitor.alerts.firing"  # {alert}, by rule and severity
METRIC_ALERTS_LABELLED: Final = "nla_monitor.alerts.labelled"  # {alert}, by rule and label
METRIC_GUARANTEES_VOID: Final = "nla_monitor.guarantees.void"  # {guarantee}, by rule, of runs that go on
METRIC_GUARANTEES_STANDING: Final = "nla_monitor.guarantees.standing"  # {guarantee}, by rule, of runs that go on
METRIC_DELIVERIES: Final = "nla_monitor.deliveries"  # {delivery}, by sink and outcome: delivered, failed or refused
METRIC_OUTBOX: Final = "nla_monitor.outbox.size"  # {message}, by state: pending or dead
METRIC_HEARTBEAT: Final = "nla_monitor.worker.heartbeat"  # s, Unix time of this worker's last look at the store
