"""Tables of the store, all with the prefix ``nla_`` so that they can live beside another product's tables.

Only portable types: times are Unix seconds (double), mappings are JSON, vectors are raw little-endian float32 bytes.
Every change here needs a migration in ``migrations/versions``; a test compares the two.
"""

from __future__ import annotations

from typing import Any, Final

from sqlalchemy import ForeignKey, Index, Integer, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from nla_monitor.store.agent_models import DecisionRow, MessageRow
from nla_monitor.store.base import PREFIX, VERSION_TABLE, Base, Document, Key, table

__all__ = [
    "OURS",
    "PREFIX",
    "VERSION_TABLE",
    "AlertMatchRow",
    "AlertRow",
    "Base",
    "CalibrationRow",
    "DecisionRow",
    "Document",
    "DropRow",
    "FailureRow",
    "JudgementRow",
    "LabelRow",
    "MatchRow",
    "MessageRow",
    "OutboxRow",
    "ReadingRow",
    "RereadingRow",
    "RuleRow",
    "RunRow",
    "SampleRow",
    "SpoolRow",
    "TallyRow",
    "UnitMatchRow",
    "UnitRow",
    "WorkerRow",
    "table",
]


class RunRow(Base):
    """One monitored run."""

    __tablename__ = "nla_runs"

    run_id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    model: Mapped[str]
    layer: Mapped[int] = mapped_column(Integer)
    started_at: Mapped[float] = mapped_column(index=True)
    ended_at: Mapped[float | None]
    av_hash: Mapped[str | None]
    ar_hash: Mapped[str | None]
    config: Mapped[dict[str, Any]] = mapped_column(Document)
    host: Mapped[str]


class SampleRow(Base):
    """One activation. No foreign key to the run: a sample is never refused because its run row came late."""

    __tablename__ = "nla_samples"
    __table_args__ = (
        Index(None, "run_id", "step"),
        Index(None, "captured_at"),
        Index(None, "run_id", "sequence_id"),
        Index(None, "agent_run_id"),
        # Partial: a training run's samples have neither key, and pay nothing.
        *(
            Index(None, key, sqlite_where=text(f"{key} IS NOT NULL"), postgresql_where=text(f"{key} IS NOT NULL"))
            for key in ("agent_root_run_id", "agent_conversation_id")
        ),
    )

    sample_id: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[str]
    layer: Mapped[int] = mapped_column(Integer)
    norm: Mapped[float | None]
    """NULL is NaN (SQLite stores it so): one odd sample must not hold up its batch."""
    phase: Mapped[str]
    sequence_id: Mapped[str]
    position: Mapped[int]
    token_id: Mapped[int]
    trigger: Mapped[str]
    captured_at: Mapped[float]
    step: Mapped[int | None]
    rank: Mapped[int] = mapped_column(Integer)
    token_text: Mapped[str | None] = mapped_column(Text)
    role: Mapped[str | None]
    inclusion_probability: Mapped[float | None]
    traceparent: Mapped[str | None]
    agent_run_id: Mapped[str | None]
    agent_parent_run_id: Mapped[str | None]
    agent_root_run_id: Mapped[str | None]
    agent_tool: Mapped[str | None]
    agent_node: Mapped[str | None]
    agent_conversation_id: Mapped[str | None]
    agent_generated: Mapped[bool | None]
    agent_token_index: Mapped[int | None]
    attributes: Mapped[dict[str, Any]] = mapped_column(Document)
    d_model: Mapped[int] = mapped_column(Integer)
    dtype: Mapped[str]
    checksum: Mapped[int]
    """CRC-32 of ``vector``."""
    context: Mapped[str | None] = mapped_column(Text)
    model: Mapped[str | None]
    adapter: Mapped[str | None]
    priority: Mapped[float | None]
    """NULL is 0: stored before there were screens."""
    screens: Mapped[dict[str, Any] | None] = mapped_column(Document)
    # Last on purpose: SQLite reads a row from its start, so that queries on metadata never touch the bytes.
    vector: Mapped[bytes]


class SpoolRow(Base):
    """A sample that no worker has acknowledged. Acknowledging deletes the row, so that the table stays small."""

    __tablename__ = "nla_spool"
    __table_args__ = (Index(None, "state", "due_at", "seq"), {"sqlite_autoincrement": True})

    seq: Mapped[int] = mapped_column(Key, primary_key=True)
    """Order of arrival; never reused."""
    sample_id: Mapped[str] = mapped_column(ForeignKey("nla_samples.sample_id", ondelete="CASCADE"), unique=True)
    state: Mapped[str]
    """``waiting``, ``leased`` or ``failed``."""
    attempts: Mapped[int] = mapped_column(Integer)
    lease_owner: Mapped[str | None]
    lease_until: Mapped[float | None]
    enqueued_at: Mapped[float]
    due_at: Mapped[float] = mapped_column(server_default=text("0"))
    """Place in the queue: ``enqueued_at`` less the head start that its priority earns. What waits ages by itself."""


class ReadingRow(Base):
    """Explanation and fidelity of a sample by one AV. Run, step, phase and time are repeated for cheap counting."""

    __tablename__ = "nla_readings"
    __table_args__ = (Index(None, "run_id", "step"), Index(None, "run_id", "captured_at"), Index(None, "run_id", "seq"))

    sample_id: Mapped[str] = mapped_column(ForeignKey("nla_samples.sample_id", ondelete="CASCADE"), primary_key=True)
    av_hash: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[str]
    seq: Mapped[int]
    """Place in the order in which the run's readings were judged, from 0: a replay must see the same."""
    step: Mapped[int | None]
    captured_at: Mapped[float]
    explanation: Mapped[str] = mapped_column(Text)
    truncated: Mapped[bool]
    tokens: Mapped[int] = mapped_column(Integer)
    ar_hash: Mapped[str | None]
    """NULL: no AR was configured, the reading has no fidelity."""
    cosine: Mapped[float | None]
    mse_nrm: Mapped[float | None]
    fve: Mapped[float | None]
    denominator: Mapped[float | None]
    denominator_name: Mapped[str | None]
    created_at: Mapped[float]


class RereadingRow(Base):
    """A stored vector read again by another AV, for replays only: windows, reports and live alerts never look here."""

    __tablename__ = "nla_rereadings"

    sample_id: Mapped[str] = mapped_column(ForeignKey("nla_samples.sample_id", ondelete="CASCADE"), primary_key=True)
    av_hash: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[str]
    step: Mapped[int | None]
    captured_at: Mapped[float]
    explanation: Mapped[str] = mapped_column(Text)
    truncated: Mapped[bool]
    tokens: Mapped[int] = mapped_column(Integer)
    ar_hash: Mapped[str | None]
    cosine: Mapped[float | None]
    mse_nrm: Mapped[float | None]
    fve: Mapped[float | None]
    denominator: Mapped[float | None]
    denominator_name: Mapped[str | None]
    created_at: Mapped[float]


class FailureRow(Base):
    """A stage that could not do its work on a sample."""

    __tablename__ = "nla_failures"

    failure_id: Mapped[int] = mapped_column(Key, primary_key=True)
    sample_id: Mapped[str] = mapped_column(ForeignKey("nla_samples.sample_id", ondelete="CASCADE"), index=True)
    stage: Mapped[str]
    error: Mapped[str] = mapped_column(Text)
    retryable: Mapped[bool]
    created_at: Mapped[float]


class RuleRow(Base):
    """A rule's text as it was when it ran: what an alert's ``rule_version`` points at."""

    __tablename__ = "nla_rules"

    rule_id: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str] = mapped_column(primary_key=True)
    title: Mapped[str]
    severity: Mapped[str]
    source: Mapped[str] = mapped_column(Text)
    """The rule's YAML."""
    first_seen_at: Mapped[float]


class MatchRow(Base):
    """A rule's condition met by one reading."""

    __tablename__ = "nla_matches"
    __table_args__ = (Index(None, "run_id", "rule_id", "rule_version", "group_key", "step"),)

    match_id: Mapped[str] = mapped_column(primary_key=True)
    sample_id: Mapped[str] = mapped_column(ForeignKey("nla_samples.sample_id", ondelete="CASCADE"), index=True)
    run_id: Mapped[str]
    rule_id: Mapped[str]
    rule_version: Mapped[str]
    severity: Mapped[str]
    group_key: Mapped[str]
    """Canonical JSON of ``group_values``: what windows are looked up by."""
    group_values: Mapped[dict[str, Any]] = mapped_column(Document)
    hits: Mapped[list[Any]] = mapped_column(Document)
    step: Mapped[int | None]
    position: Mapped[int]
    sequence_id: Mapped[str]
    captured_at: Mapped[float]
    swap_margin: Mapped[float | None]
    """Null: the rule asks for none, or there was no AR."""
    supported: Mapped[bool | None]
    """False: refuted by a control that the rule requires; such a match counts in no window."""
    controls: Mapped[dict[str, Any] | None] = mapped_column(Document)
    """``{"results": {name: number}, "failed": [name], "not_run": {name: why}}``; null: no control was run."""
    score: Mapped[float | None]
    """What calibration ranks; null: the rule is not calibrated, or it could not be measured."""
    created_at: Mapped[float]


class AlertRow(Base):
    """A rule's condition held over its window."""

    __tablename__ = "nla_alerts"
    __table_args__ = (
        # One alert fires per condition at a time; the database holds it, whatever the workers do.
        Index(
            "uq_nla_alerts_firing_fingerprint",
            "fingerprint",
            unique=True,
            sqlite_where=text("state = 'firing'"),
            postgresql_where=text("state = 'firing'"),
        ),
        Index(None, "fingerprint"),
        Index(None, "run_id", "state"),
        Index(None, "fired_at"),
    )

    alert_id: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    run_id: Mapped[str]
    rule_id: Mapped[str]
    rule_title: Mapped[str]
    rule_version: Mapped[str]
    severity: Mapped[str]
    state: Mapped[str]
    triage: Mapped[str]
    group_values: Mapped[dict[str, Any]] = mapped_column(Document)
    first_step: Mapped[int | None]
    last_step: Mapped[int | None]
    fired_at: Mapped[float]
    updated_at: Mapped[float]
    resolved_at: Mapped[float | None]
    matches: Mapped[int]
    sample_id: Mapped[str]
    quote: Mapped[str] = mapped_column(Text)
    position: Mapped[int]
    context: Mapped[str | None] = mapped_column(Text)
    explanation: Mapped[str] = mapped_column(Text)
    cosine: Mapped[float | None]
    fve: Mapped[float | None]
    denominator_name: Mapped[str | None]
    evidence: Mapped[dict[str, Any]] = mapped_column(Document)
    calibration: Mapped[dict[str, Any]] = mapped_column(Document)
    agent: Mapped[dict[str, Any] | None] = mapped_column(Document)
    runbook: Mapped[str | None]
    traceparent: Mapped[str | None]


class AlertMatchRow(Base):
    """Which matches speak for an alert."""

    __tablename__ = "nla_alert_matches"

    alert_id: Mapped[str] = mapped_column(ForeignKey("nla_alerts.alert_id", ondelete="CASCADE"), primary_key=True)
    match_id: Mapped[str] = mapped_column(
        ForeignKey("nla_matches.match_id", ondelete="CASCADE"), primary_key=True, index=True
    )


class LabelRow(Base):
    """What a person said of an alert; the history of its triage."""

    __tablename__ = "nla_labels"

    label_id: Mapped[int] = mapped_column(Key, primary_key=True)
    alert_id: Mapped[str] = mapped_column(ForeignKey("nla_alerts.alert_id", ondelete="CASCADE"), index=True)
    triage: Mapped[str]
    who: Mapped[str]
    note: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float]


class CalibrationRow(Base):
    """What ``rules calibrate`` found for one rule on a baseline: sorted statistics, and what follows from them."""

    __tablename__ = "nla_calibrations"
    __table_args__ = (Index(None, "rule_id", "rule_version", "set_name"),)

    calibration_id: Mapped[str] = mapped_column(primary_key=True)
    """Hash of all the rest but the time: calibrating again on the same data changes nothing."""
    rule_id: Mapped[str]
    rule_version: Mapped[str]
    set_name: Mapped[str]
    baseline_runs: Mapped[list[Any]] = mapped_column(Document)
    av_hash: Mapped[str]
    ar_hash: Mapped[str | None]
    sequences: Mapped[int]
    """How many benign sequences stand behind it."""
    sampling: Mapped[dict[str, Any]] = mapped_column(Document)
    """How the baseline's tokens were sampled; it speaks of runs sampled alike only."""
    figures: Mapped[dict[str, Any]] = mapped_column(Document)
    """What the rule asked for, the scores, and the reference of the drift tests."""
    created_at: Mapped[float]


class UnitRow(Base):
    """One sequence of a run that is held against calibrations: a text at one step, or one call of an agent."""

    __tablename__ = "nla_units"

    run_id: Mapped[str] = mapped_column(primary_key=True)
    unit: Mapped[str] = mapped_column(primary_key=True)
    worst_cosine: Mapped[float | None]
    """Lowest fidelity so far; null: read without an AR."""


class UnitMatchRow(Base):
    """What one rule found in such a sequence so far."""

    __tablename__ = "nla_unit_matches"

    run_id: Mapped[str] = mapped_column(primary_key=True)
    rule_id: Mapped[str] = mapped_column(primary_key=True)
    rule_version: Mapped[str] = mapped_column(primary_key=True)
    unit: Mapped[str] = mapped_column(primary_key=True)
    supported: Mapped[bool]
    """A match that no control refuted."""
    refuted: Mapped[bool]
    """A match that a control refuted."""
    unscored: Mapped[bool]
    """A supported match whose score could not be measured."""
    score: Mapped[float | None]
    """Largest score of its supported matches."""


class TallyRow(Base):
    """One run against one calibration: the counts behind the run-level alarm and the drift tests."""

    __tablename__ = "nla_tallies"

    run_id: Mapped[str] = mapped_column(primary_key=True)
    calibration_id: Mapped[str] = mapped_column(primary_key=True)
    sequences: Mapped[int]
    matching: Mapped[int]
    hits: Mapped[int]
    refuted: Mapped[int]
    measured: Mapped[int]
    low: Mapped[int]
    alarm_step: Mapped[int | None]
    alarm_at: Mapped[float | None]
    """Null: the run-level test has not fired."""
    void_step: Mapped[int | None]
    void_at: Mapped[float | None]
    void_by: Mapped[str | None]
    """What drifted; null: the calibration stands."""


class JudgementRow(Base):
    """What a judge (LLM) or classifier said of a text, so that a replay need not ask again and says the same."""

    __tablename__ = "nla_judgements"

    judgement_id: Mapped[str] = mapped_column(primary_key=True)
    """Hash of the judge's definition and of the text."""
    kind: Mapped[str]
    verdict: Mapped[str]
    score: Mapped[float | None]
    quote: Mapped[str] = mapped_column(Text)
    model: Mapped[str]
    created_at: Mapped[float]


class OutboxRow(Base):
    """Something to tell the world, written in the transaction that made it true."""

    __tablename__ = "nla_outbox"
    __table_args__ = (Index(None, "state", "next_at"),)

    outbox_id: Mapped[int] = mapped_column(Key, primary_key=True)
    kind: Mapped[str]
    """``fired`` or ``resolved``."""
    alert_id: Mapped[str] = mapped_column(ForeignKey("nla_alerts.alert_id", ondelete="CASCADE"), index=True)
    payload: Mapped[dict[str, Any]] = mapped_column(Document)
    """The alert as it was at that moment."""
    state: Mapped[str]
    """``pending``, ``done`` or ``dead`` (given up, kept for inspection)."""
    attempts: Mapped[int] = mapped_column(Integer)
    next_at: Mapped[float]
    delivered: Mapped[list[Any]] = mapped_column(Document)
    """Names of the sinks that have it already: a retry does not tell them twice."""
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float]
    done_at: Mapped[float | None]


class DropRow(Base):
    """Samples that were never stored, counted by reason."""

    __tablename__ = "nla_drops"

    run_id: Mapped[str] = mapped_column(primary_key=True)
    reason: Mapped[str] = mapped_column(primary_key=True)
    count: Mapped[int]


class WorkerRow(Base):
    """Sign of life of a worker."""

    __tablename__ = "nla_workers"

    worker_id: Mapped[str] = mapped_column(primary_key=True)
    host: Mapped[str]
    pid: Mapped[int]
    started_at: Mapped[float]
    seen_at: Mapped[float] = mapped_column(index=True)
    info: Mapped[dict[str, Any]] = mapped_column(Document)


OURS: Final = frozenset(Base.metadata.tables) | {VERSION_TABLE}
"""Names of every table of ours."""
