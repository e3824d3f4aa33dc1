"""What every table of ours is built on: names, types, and the root of the models."""

from __future__ import annotations

from typing import Final, cast

from sqlalchemy import JSON, BigInteger, Boolean, Double, Integer, LargeBinary, MetaData, String, Table
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase

PREFIX: Final = "nla_"
VERSION_TABLE: Final = "nla_alembic_version"

NAMING: Final = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}

Document = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
"""A mapping or list; JSONB where the database has it."""

Key = BigInteger().with_variant(Integer, "sqlite")
"""A number that the database counts up itself (SQLite does so for INTEGER only)."""


class Base(DeclarativeBase):
    """Root of the tables; its ``metadata`` is what migrations are compared with."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {  # noqa: RUF012 -- read by SQLAlchemy, never written
        str: String(),
        int: BigInteger(),
        float: Double(),
        bool: Boolean(),
        bytes: LargeBinary(),
    }


def table(model: type[Base]) -> Table:
    """The Core table of a model (declarative types it more widely than it is)."""
    return cast("Table", model.__table__)
