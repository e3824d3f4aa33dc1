"""Results of all controls with each match, calibrations, judgements.

Revision 0002, after 0001.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

DOCUMENT = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    """Add columns and tables; what is stored stays as it is."""
    with op.batch_alter_table("nla_matches") as table:
        table.add_column(sa.Column("controls", DOCUMENT, nullable=True))
        table.add_column(sa.Column("score", sa.Double(), nullable=True))
    op.create_table(
        "nla_calibrations",
        sa.Column("calibration_id", sa.String(), nullable=False),
        sa.Column("rule_id", sa.String(), nullable=False),
        sa.Column("rule_version", sa.String(), nullable=False),
        sa.Column("set_name", sa.String(), nullable=False),
        sa.Column("baseline_runs", DOCUMENT, nullable=False),
        sa.Column("av_hash", sa.String(), nullable=False),
        sa.Column("ar_hash", sa.String(), nullable=True),
        sa.Column("sequences", sa.BigInteger(), nullable=False),
        sa.Column("figures", DOCUMENT, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("calibration_id", name=op.f("pk_nla_calibrations")),
    )
    op.create_index(
        op.f("ix_nla_calibrations_rule_id_rule_version_set_name"),
        "nla_calibrations",
        ["rule_id", "rule_version", "set_name"],
    )
    op.create_table(
        "nla_judgements",
        sa.Column("judgement_id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("verdict", sa.String(), nullable=False),
        sa.Column("score", sa.Double(), nullable=True),
        sa.Column("quote", sa.Text(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("judgement_id", name=op.f("pk_nla_judgements")),
    )


def downgrade() -> None:
    """Take them away again, with what they hold."""
    op.drop_table("nla_judgements")
    op.drop_table("nla_calibrations")
    with op.batch_alter_table("nla_matches") as table:
        table.drop_column("score")
        table.drop_column("controls")
