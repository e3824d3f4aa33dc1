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
ATTR_EVIDENCE: Final = "nla_monitor.evidence"  # prefix: a control's figure for the reading shown, as .swap_margin
ATTR_EVIDENCE_FAILED: Final = "nla_monitor.evidence.failed"  # names of required controls that are out of bounds
ATTR_EVIDENCE_NOT_RUN: Final = "nla_monitor.evidence.not_run"  # names of controls that have no figure (yet)
ATTR_EVIDENCE_READINGS: Final = "nla_monitor.evidence.readings"  # of the window, in which the claim came back
ATTR_EVIDENCE_PROXY: Final = "nla_monitor.evidence.proxy"  # not of the answering model's own pass
ATTR_CALIBRATION: Final = "nla_monitor.calibration.status"  # certified, uncertified, void or uncalibrated
ATTR_CALIBRATION_ID: Final = "nla_monitor.calibration.id"
ATTR_CALIBRATION_SET: Final = "nla_monitor.calibration.set"
ATTR_CALIBRATION_SEQUENCES: Final = "nla_monitor.calibration.sequences"  # benign ones that stand behind it
ATTR_CALIBRATION_ALPHA: Final = "nla_monitor.calibration.alpha"  # the false-alarm rate that was asked for
ATTR_CALIBRATION_FPR: Final = "nla_monitor.calibration.fpr_upper"  # what is certified: at most so many benign sequences
ATTR_CALIBRATION_CONFIDENCE: Final = "nla_monitor.calibration.confidence"
ATTR_CALIBRATION_P: Final = "nla_monitor.calibration.p_value"
ATTR_BATCH_SIZE: Final = "nla_monitor.batch.size"
ATTR_BATCH_SOURCES: Final = "nla_monitor.batch.sources"  # distinct source traces; links beyond the SDK's limit are lost
ATTR_REASON: Final = "reason"
ATTR_PLACE: Final = "place"
ATTR_OUTCOME: Final = "outcome"
ATTR_TRIAGE: Final = "label"
ATTR_STATE: Final = "state"
ATTR_SINK: Final = "sink"
ATTR_SIGNAL: Final = "signal"
ATTR_EXPORTER: Final = "exporter"

# Metrics (no ``_total``: exporters add it); unit beside the name
METRIC_SAMPLED: Final = "nla_monitor.activations.sampled"  # {activation}
METRIC_DROPPED: Final = "nla_monitor.activations.dropped"  # {activation}, by reason
METRIC_FAULTS: Final = "nla_monitor.faults"  # {fault}, by place
METRIC_VERBALIZATIONS: Final = "nla_monitor.verbalizations"  # {verbalization}, by outcome
METRIC_VERBALIZE_DURATION: Final = "nla_monitor.verbalization.duration"  # s, one leased batch
METRIC_DETECTION_DELAY: Final = "nla_monitor.detection.delay"  # s, from capture to alert, by severity
METRIC_CLOCK_SKEWED: Final = "nla_monitor.clock.skewed"  # {alert}, captured later than they fired: clocks disagree
METRIC_QUEUE_SIZE: Final = "nla_monitor.queue.size"  # {activation}
METRIC_MATCHES: Final = "nla_monitor.matches"  # {match}, by rule
METRIC_ALERTS: Final = "nla_monitor.alerts"  # {alert}, by rule and severity
METRIC_VOIDED: Final = "nla_monitor.guarantees.voided"  # {guarantee}, by rule: drift ended what a calibration promised
METRIC_UNJUDGED: Final = "nla_monitor.unjudged"  # {reading}, by rule: no judge or model could be asked
METRIC_FVE: Final = "nla_monitor.fidelity.fve"  # 1
METRIC_UNEXPLAINED: Final = "nla_monitor.fidelity.unexplained"  # 1, that is 1 - FVE: never negative
METRIC_CAPTURE_DURATION: Final = "nla_monitor.capture.overhead"  # s, host time per sampled forward
# What became of telemetry itself, where an application of ours exports it (telemetry.delivery)
METRIC_TELEMETRY_EMITTED: Final = "nla_monitor.telemetry.emitted"  # {record}, by signal and exporter
METRIC_TELEMETRY_EXPORTED: Final = "nla_monitor.telemetry.exported"  # {record}, that the receiver has acknowledged
METRIC_TELEMETRY_LOST: Final = "nla_monitor.telemetry.lost"  # {record}, by reason too
METRIC_TELEMETRY_FAULTS: Final = "nla_monitor.telemetry.faults"  # {fault}, by place: of providers and processors
# Levels that each worker reads from the store: the same in all workers of a database, so aggregate with max, not sum
METRIC_QUEUE_AGE: Final = "nla_monitor.queue.age"  # s, of the oldest sample that no worker has finished
METRIC_RUNS_ACTIVE: Final = "nla_monitor.runs.active"  # {run}
METRIC_STORE_DROPS: Final = "nla_monitor.store.drops"  # {activation}, by reason; all runs, only ever grows
METRIC_STORE_FAILURES: Final = "nla_monitor.store.failures"  # {activation}, given up by the workers
METRIC_ALERTS_FIRING: Final = "nla_monitor.alerts.firing"  # {alert}, by rule and severity
METRIC_ALERTS_LABELLED: Final = "nla_monitor.alerts.labelled"  # {alert}, by rule and label
METRIC_GUARANTEES_VOID: Final = "nla_monitor.guarantees.void"  # {guarantee}, by rule, of runs that go on
METRIC_GUARANTEES_STANDING: Final = "nla_monitor.guarantees.standing"  # {guarantee}, by rule, of runs that go on
METRIC_DELIVERIES: Final = "nla_monitor.deliveries"  # {delivery}, by sink and outcome; see Telemetry.delivery
METRIC_OUTBOX: Final = "nla_monitor.outbox.size"  # {message}, by state: pending or dead
METRIC_HEARTBEAT: Final = "nla_monitor.worker.heartbeat"  # s, Unix time of this worker's last look at the store
