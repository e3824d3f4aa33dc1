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

PLACES = """
UPDATE nla_readings SET seq = places.place FROM (
    SELECT sample_id, av_hash, row_number() OVER (
        PARTITION BY run_id ORDER BY created_at, captured_at, sample_id, av_hash
    ) - 1 AS place FROM nla_readings
) AS places
WHERE places.sample_id = nla_readings.sample_id AND places.av_hash = nla_readings.av_hash
"""
"""Readings of before are judged in the order in which their batches were stored, as far as that is known."""


def upgrade() -> None:
    """Add columns and tables; what is stored stays as it is."""
    with op.batch_alter_table("nla_matches") as table:
        table.add_column(sa.Column("controls", DOCUMENT, nullable=True))
        table.add_column(sa.Column("score", sa.Double(), nullable=True))
    with op.batch_alter_table("nla_readings") as table:
        table.add_column(sa.Column("seq", sa.BigInteger(), nullable=True))
    op.execute(PLACES)
    with op.batch_alter_table("nla_readings") as table:
        table.alter_column("seq", existing_type=sa.BigInteger(), nullable=False)
    op.create_index(op.f("ix_nla_readings_run_id_seq"), "nla_readings", ["run_id", "seq"])
    op.create_table(
        "nla_rereadings",
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
            ["sample_id"], ["nla_samples.sample_id"], name=op.f("fk_nla_rereadings_sample_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("sample_id", "av_hash", name=op.f("pk_nla_rereadings")),
    )
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
        sa.Column("sampling", DOCUMENT, nullable=False),
        sa.Column("figures", DOCUMENT, nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("calibration_id", name=op.f("pk_nla_calibrations")),
    )
    op.create_index(
        op.f("ix_nla_calibrations_rule_id_rule_version_set_name"),
        "nla_calibrations",
        ["rule_id", "rule_version", "set_name"],
    )
    _create_counts()
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


def _create_counts() -> None:
    """What the tests of a run count: sequences, what rules found in them, and the sums."""
    op.create_table(
        "nla_units",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("unit", sa.String(), nullable=False),
        sa.Column("worst_cosine", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("run_id", "unit", name=op.f("pk_nla_units")),
    )
    op.create_table(
        "nla_unit_matches",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("rule_id", sa.String(), nullable=False),
        sa.Column("rule_version", sa.String(), nullable=False),
        sa.Column("unit", sa.String(), nullable=False),
        sa.Column("supported", sa.Boolean(), nullable=False),
        sa.Column("refuted", sa.Boolean(), nullable=False),
        sa.Column("unscored", sa.Boolean(), nullable=False),
        sa.Column("score", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("run_id", "rule_id", "rule_version", "unit", name=op.f("pk_nla_unit_matches")),
    )
    counts = ("sequences", "matching", "hits", "refuted", "measured", "low")
    op.create_table(
        "nla_tallies",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("calibration_id", sa.String(), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in counts),
        sa.Column("alarm_step", sa.BigInteger(), nullable=True),
        sa.Column("alarm_at", sa.Double(), nullable=True),
        sa.Column("void_step", sa.BigInteger(), nullable=True),
        sa.Column("void_at", sa.Double(), nullable=True),
        sa.Column("void_by", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("run_id", "calibration_id", name=op.f("pk_nla_tallies")),
    )


def downgrade() -> None:
    """Take them away again, with what they hold."""
    op.drop_table("nla_judgements")
    for name in ("nla_tallies", "nla_unit_matches", "nla_units"):
        op.drop_table(name)
    op.drop_table("nla_calibrations")
    op.drop_table("nla_rereadings")
    op.drop_index(op.f("ix_nla_readings_run_id_seq"), table_name="nla_readings")
    with op.batch_alter_table("nla_readings") as table:
        table.drop_column("seq")
    with op.batch_alter_table("nla_matches") as table:
        table.drop_column("score")
        table.drop_column("controls")
