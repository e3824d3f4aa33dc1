"""Which model and adapter a sample is of, what screens found, and a queue that reads the unusual first.

Revision 0003, after 0002.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

DOCUMENT = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
NEW = ("model", "adapter", "priority", "screens")


def upgrade() -> None:
    """Samples gain nullable columns; what waits keeps its place in the queue."""
    # SQLite reads a row from its start: columns behind the vector would cost its pages whenever they are read.
    rebuild = "always" if op.get_bind().dialect.name == "sqlite" else "never"
    with op.batch_alter_table("nla_samples", recreate=rebuild) as table:
        place = {"insert_before": "vector"} if rebuild == "always" else {}
        table.add_column(sa.Column("model", sa.String(), nullable=True), **place)
        table.add_column(sa.Column("adapter", sa.String(), nullable=True), **place)
        table.add_column(sa.Column("priority", sa.Double(), nullable=True), **place)
        table.add_column(sa.Column("screens", DOCUMENT, nullable=True), **place)
    op.drop_index(op.f("ix_nla_spool_state_seq"), table_name="nla_spool")
    op.add_column("nla_spool", sa.Column("due_at", sa.Double(), server_default=sa.text("0"), nullable=False))
    op.execute("UPDATE nla_spool SET due_at = enqueued_at")
    op.create_index(op.f("ix_nla_spool_state_due_at_seq"), "nla_spool", ["state", "due_at", "seq"])


def downgrade() -> None:
    """Take them away again, with what they hold."""
    op.drop_index(op.f("ix_nla_spool_state_due_at_seq"), table_name="nla_spool")
    with op.batch_alter_table("nla_spool", table_kwargs={"sqlite_autoincrement": True}) as table:
        table.drop_column("due_at")
    op.create_index(op.f("ix_nla_spool_state_seq"), "nla_spool", ["state", "seq"])
    with op.batch_alter_table("nla_samples") as table:
        for name in reversed(NEW):
            table.drop_column(name)
