"""The first schema: runs, samples, spool, readings, rules, matches, alerts, labels, outbox, drops, workers.

Revision 0001, after nothing.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Spelled out here, not imported: a migration stays what it was when the models move on.
DOCUMENT = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create every table, those that others refer to first."""
    _alerts()
    _drops()
    _rules()
    _runs()
    _samples()
    _workers()
    _failures()
    _labels()
    _matches()
    _outbox()
    _readings()
    _spool()
    _alert_matches()


def downgrade() -> None:
    """Drop every table with its data, those that refer to others first."""
    op.drop_table("nla_alert_matches")
    op.drop_table("nla_spool")
    op.drop_table("nla_readings")
    op.drop_table("nla_outbox")
    op.drop_table("nla_matches")
    op.drop_table("nla_labels")
    op.drop_table("nla_failures")
    op.drop_table("nla_workers")
    op.drop_table("nla_samples")
    op.drop_table("nla_runs")
    op.drop_table("nla_rules")
    op.drop_table("nla_drops")
    op.drop_table("nla_alerts")


def _alerts() -> None:
    op.create_table(
        "nla_alerts",
        sa.Column("alert_id", sa.String(), nullable=False),
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("rule_id", sa.String(), nullable=False),
        sa.Column("rule_title", sa.String(), nullable=False),
        sa.Column("rule_version", sa.String(), nullable=False),
        sa.Column("severity", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("triage", sa.String(), nullable=False),
        sa.Column("group_values", DOCUMENT, nullable=False),
        sa.Column("first_step", sa.BigInteger(), nullable=True),
        sa.Column("last_step", sa.BigInteger(), nullable=True),
        sa.Column("fired_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.Column("resolved_at", sa.Double(), nullable=True),
        sa.Column("matches", sa.BigInteger(), nullable=False),
        sa.Column("sample_id", sa.String(), nullable=False),
        sa.Column("quote", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("context", sa.Text(), nullable=True),
        sa.Column("explanation", sa.Text(), nullable=False),
        sa.Column("cosine", sa.Double(), nullable=True),
        sa.Column("fve", sa.Double(), nullable=True),
        sa.Column("denominator_name", sa.String(), nullable=True),
        sa.Column("evidence", DOCUMENT, nullable=False),
        sa.Column("calibration", DOCUMENT, nullable=False),
        sa.Column("agent", DOCUMENT, nullable=True),
        sa.Column("runbook", sa.String(), nullable=True),
        sa.Column("traceparent", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("alert_id", name=op.f("pk_nla_alerts")),
    )
    op.create_index(op.f("ix_nla_alerts_fingerprint"), "nla_alerts", ["fingerprint"], unique=False)
    op.create_index(op.f("ix_nla_alerts_fired_at"), "nla_alerts", ["fired_at"], unique=False)
    op.create_index(op.f("ix_nla_alerts_run_id_state"), "nla_alerts", ["run_id", "state"], unique=False)
    op.create_index(
        "uq_nla_alerts_firing_fingerprint",
        "nla_alerts",
        ["fingerprint"],
        unique=True,
        sqlite_where=sa.text("state = 'firing'"),
        postgresql_where=sa.text("state = 'firing'"),
    )


def _drops() -> None:
    op.create_table(
        "nla_drops",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "reason", name=op.f("pk_nla_drops")),
    )


def _rules() -> None:
    op.create_table(
        "nla_rules",
        sa.Column("rule_id", sa.String(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("title", sa.String(), nullable=False),
        sa.Column("severity", sa.String(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("first_seen_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("rule_id", "version", name=op.f("pk_nla_rules")),
    )


def _runs() -> None:
    op.create_table(
        "nla_runs",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("layer", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("av_hash", sa.String(), nullable=True),
        sa.Column("ar_hash", sa.String(), nullable=True),
        sa.Column("config", DOCUMENT, nullable=False),
        sa.Column("host", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_nla_runs")),
    )
    op.create_index(op.f("ix_nla_runs_started_at"), "nla_runs", ["started_at"], unique=False)


def _samples() -> None:
    op.create_table(
        "nla_samples",
        sa.Column("sample_id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("layer", sa.Integer(), nullable=False),
        sa.Column("norm", sa.Double(), nullable=True),
        sa.Column("phase", sa.String(), nullable=False),
        sa.Column("sequence_id", sa.String(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("token_id", sa.BigInteger(), nullable=False),
        sa.Column("trigger", sa.String(), nullable=False),
        sa.Column("captured_at", sa.Double(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=True),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("token_text", sa.Text(), nullable=True),
        sa.Column("role", sa.String(), nullable=True),
        sa.Column("inclusion_probability", sa.Double(), nullable=True),
        sa.Column("traceparent", sa.String(), nullable=True),
        sa.Column("agent_run_id", sa.String(), nullable=True),
        sa.Column("agent_parent_run_id", sa.String(), nullable=True),
        sa.Column("agent_root_run_id", sa.String(), nullable=True),
        sa.Column("agent_tool", sa.String(), nullable=True),
        sa.Column("agent_node", sa.String(), nullable=True),
        sa.Column("agent_conversation_id", sa.String(), nullable=True),
        sa.Column("agent_generated", sa.Boolean(), nullable=True),
        sa.Column("agent_token_index", sa.BigInteger(), nullable=True),
        sa.Column("attributes", DOCUMENT, nullable=False),
        sa.Column("d_model", sa.Integer(), nullable=False),
        sa.Column("dtype", sa.String(), nullable=False),
        sa.Column("checksum", sa.BigInteger(), nullable=False),
        sa.Column("context", sa.Text(), nullable=True),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("sample_id", name=op.f("pk_nla_samples")),
    )
    op.create_index(op.f("ix_nla_samples_agent_run_id"), "nla_samples", ["agent_run_id"], unique=False)
    op.create_index(op.f("ix_nla_samples_captured_at"), "nla_samples", ["captured_at"], unique=False)
    op.create_index(op.f("ix_nla_samples_run_id_sequence_id"), "nla_samples", ["run_id", "sequence_id"], unique=False)
    op.create_index(op.f("ix_nla_samples_run_id_step"), "nla_samples", ["run_id", "step"], unique=False)


def _workers() -> None:
    op.create_table(
        "nla_workers",
        sa.Column("worker_id", sa.String(), nullable=False),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.Column("info", DOCUMENT, nullable=False),
        sa.PrimaryKeyConstraint("worker_id", name=op.f("pk_nla_workers")),
    )
    op.create_index(op.f("ix_nla_workers_seen_at"), "nla_workers", ["seen_at"], unique=False)


def _failures() -> None:
    op.create_table(
        "nla_failures",
        sa.Column("failure_id", KEY, nullable=False),
        sa.Column("sample_id", sa.String(), nullable=False),
        sa.Column("stage", sa.String(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("retryable", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["sample_id"], ["nla_samples.sample_id"], name=op.f("fk_nla_failures_sample_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("failure_id", name=op.f("pk_nla_failures")),
    )
    op.create_index(op.f("ix_nla_failures_sample_id"), "nla_failures", ["sample_id"], unique=False)


def _labels() -> None:
    op.create_table(
        "nla_labels",
        sa.Column("label_id", KEY, nullable=False),
        sa.Column("alert_id", sa.String(), nullable=False),
        sa.Column("triage", sa.String(), nullable=False),
        sa.Column("who", sa.String(), nullable=False),
        sa.Column("note", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["alert_id"], ["nla_alerts.alert_id"], name=op.f("fk_nla_labels_alert_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("label_id", name=op.f("pk_nla_labels")),
    )
    op.create_index(op.f("ix_nla_labels_alert_id"), "nla_labels", ["alert_id"], unique=False)


def _matches() -> None:
    op.create_table(
        "nla_matches",
        sa.Column("match_id", sa.String(), nullable=False),
        sa.Column("sample_id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("rule_id", sa.String(), nullable=False),
        sa.Column("rule_version", sa.String(), nullable=False),
        sa.Column("severity", sa.String(), nullable=False),
        sa.Column("group_key", sa.String(), nullable=False),
        sa.Column("group_values", DOCUMENT, nullable=False),
        sa.Column("hits", DOCUMENT, nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=True),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("sequence_id", sa.String(), nullable=False),
        sa.Column("captured_at", sa.Double(), nullable=False),
        sa.Column("swap_margin", sa.Double(), nullable=True),
        sa.Column("supported", sa.Boolean(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["sample_id"], ["nla_samples.sample_id"], name=op.f("fk_nla_matches_sample_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("match_id", name=op.f("pk_nla_matches")),
    )
    op.create_index(
        op.f("ix_nla_matches_run_id_rule_id_rule_version_group_key_step"),
        "nla_matches",
        ["run_id", "rule_id", "rule_version", "group_key", "step"],
        unique=False,
    )
    op.create_index(op.f("ix_nla_matches_sample_id"), "nla_matches", ["sample_id"], unique=False)


def _outbox() -> None:
    op.create_table(
        "nla_outbox",
        sa.Column("outbox_id", KEY, nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("alert_id", sa.String(), nullable=False),
        sa.Column("payload", DOCUMENT, nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("next_at", sa.Double(), nullable=False),
        sa.Column("delivered", DOCUMENT, nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("done_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["alert_id"], ["nla_alerts.alert_id"], name=op.f("fk_nla_outbox_alert_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("outbox_id", name=op.f("pk_nla_outbox")),
    )
    op.create_index(op.f("ix_nla_outbox_alert_id"), "nla_outbox", ["alert_id"], unique=False)
    op.create_index(op.f("ix_nla_outbox_state_next_at"), "nla_outbox", ["state", "next_at"], unique=False)


def _readings() -> None:
    op.create_table(
        "nla_readings",
        sa.Column("sample_id", sa.String(), nullable=False),
        sa.Column("av_hash", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=True),
        sa.Column("captured_at", sa.Double(), nullable=False),
        sa.Column("explanation", sa.Text(), nullable=False),
        sa.Column("truncated", sa.Boolean(), nullable=False),
        sa.Column("tokens", sa.Integer(), nullable=False),
        sa.Column("ar_hash", sa.String(), nullable=True),
        sa.Column("cosine", sa.Double(), nullable=True),
        sa.Column("mse_nrm", sa.Double(), nullable=True),
        sa.Column("fve", sa.Double(), nullable=True),
        sa.Column("denominator", sa.Double(), nullable=True),
        sa.Column("denominator_name", sa.String(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["sample_id"], ["nla_samples.sample_id"], name=op.f("fk_nla_readings_sample_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("sample_id", "av_hash", name=op.f("pk_nla_readings")),
    )
    op.create_index(op.f("ix_nla_readings_run_id_captured_at"), "nla_readings", ["run_id", "captured_at"], unique=False)
    op.create_index(op.f("ix_nla_readings_run_id_step"), "nla_readings", ["run_id", "step"], unique=False)


def _spool() -> None:
    op.create_table(
        "nla_spool",
        sa.Column("seq", KEY, nullable=False),
        sa.Column("sample_id", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("lease_owner", sa.String(), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("enqueued_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["sample_id"], ["nla_samples.sample_id"], name=op.f("fk_nla_spool_sample_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_nla_spool")),
        sa.UniqueConstraint("sample_id", name=op.f("uq_nla_spool_sample_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_nla_spool_state_seq"), "nla_spool", ["state", "seq"], unique=False)


def _alert_matches() -> None:
    op.create_table(
        "nla_alert_matches",
        sa.Column("alert_id", sa.String(), nullable=False),
        sa.Column("match_id", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["alert_id"], ["nla_alerts.alert_id"], name=op.f("fk_nla_alert_matches_alert_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["match_id"], ["nla_matches.match_id"], name=op.f("fk_nla_alert_matches_match_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("alert_id", "match_id", name=op.f("pk_nla_alert_matches")),
    )
    op.create_index(op.f("ix_nla_alert_matches_match_id"), "nla_alert_matches", ["match_id"], unique=False)
