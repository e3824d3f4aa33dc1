"""What was said in a conversation, and what was decided on findings; both looked up by conversation.

Revision 0004, after 0003.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

DOCUMENT = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
AGENT_KEYS = ("agent_root_run_id", "agent_conversation_id")


def upgrade() -> None:
    """Two tables, and samples found by agent invocation and by conversation."""
    op.create_table(
        "nla_messages",
        sa.Column("message_id", sa.String(), nullable=False),
        sa.Column("parent_id", sa.String(), nullable=True),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("conversation", sa.String(), nullable=False),
        sa.Column("root_run_id", sa.String(), nullable=True),
        sa.Column("agent_run_id", sa.String(), nullable=False),
        sa.Column("node", sa.String(), nullable=True),
        sa.Column("place", sa.Integer(), nullable=False),
        sa.Column("written", sa.Boolean(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=True),
        sa.Column("tool_call_id", sa.String(), nullable=True),
        sa.Column("tool_calls", DOCUMENT, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("message_id", name=op.f("pk_nla_messages")),
    )
    op.create_index(op.f("ix_nla_messages_run_id_conversation"), "nla_messages", ["run_id", "conversation"])
    op.create_index(op.f("ix_nla_messages_conversation"), "nla_messages", ["conversation"])
    op.create_index(op.f("ix_nla_messages_created_at"), "nla_messages", ["created_at"])
    op.create_table(
        "nla_decisions",
        sa.Column("decision_id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("conversation", sa.String(), nullable=False),
        sa.Column("root_run_id", sa.String(), nullable=True),
        sa.Column("point", sa.String(), nullable=False),
        sa.Column("tool", sa.String(), nullable=True),
        sa.Column("tool_call_id", sa.String(), nullable=True),
        sa.Column("verdict", sa.String(), nullable=False),
        sa.Column("decided_by", sa.String(), nullable=False),
        sa.Column("alerts", DOCUMENT, nullable=False),
        sa.Column("rules", DOCUMENT, nullable=False),
        sa.Column("complete", sa.Boolean(), nullable=False),
        sa.Column("seconds", sa.Double(), nullable=False),
        sa.Column("note", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("decision_id", name=op.f("pk_nla_decisions")),
    )
    op.create_index(op.f("ix_nla_decisions_run_id_conversation"), "nla_decisions", ["run_id", "conversation"])
    for key in AGENT_KEYS:
        # Partial: a training run's samples have neither, and pay nothing.
        there = sa.text(f"{key} IS NOT NULL")
        name = op.f(f"ix_nla_samples_{key}")
        op.create_index(name, "nla_samples", [key], sqlite_where=there, postgresql_where=there)


def downgrade() -> None:
    """Take them away again, with what they hold."""
    for key in AGENT_KEYS:
        op.drop_index(op.f(f"ix_nla_samples_{key}"), table_name="nla_samples")
    op.drop_table("nla_decisions")
    op.drop_table("nla_messages")
