"""Readings of stored vectors by another AV than the one that read them live."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Engine, exists, func, select

from nla_monitor.records import Reading
from nla_monitor.store.codec import reading_row
from nla_monitor.store.dialect import insert_new
from nla_monitor.store.engine import read, write
from nla_monitor.store.models import ReadingRow, RereadingRow, SampleRow
from nla_monitor.store.queries import reading_query, to_reading


def add_rereadings(engine: Engine, readings: Sequence[Reading]) -> int:
    """Keep readings beside the live ones; known ones stay as they are. Returns how many were new.

    Raises:
        StoreUnavailableError: read-only, full, locked or unreachable; nothing of the batch was kept.
    """
    rows = [reading_row(reading) | {"created_at": time.time()} for reading in readings]
    with write(engine) as connection:
        return insert_new(connection, RereadingRow, rows)


def count_unread(engine: Engine, run_ids: Sequence[str], av_hash: str) -> int:
    """How many samples of these runs, read live, this AV has not read."""
    query = select(func.count(ReadingRow.sample_id.distinct())).where(*_unread(run_ids, av_hash))
    with read(engine) as connection:
        return int(connection.execute(query).scalar_one())


def next_unread(engine: Engine, run_ids: Sequence[str], av_hash: str, *, after: str, limit: int) -> list[Reading]:
    """Live readings with their vectors that this AV has not read, by sample id, of samples behind ``after``.

    Raises:
        ActivationError: a stored vector fails its checksum.
    """
    query = reading_query().where(*_unread(run_ids, av_hash), SampleRow.sample_id > after)
    with read(engine) as connection:
        rows = connection.execute(query.order_by(SampleRow.sample_id).limit(limit)).mappings()
        return [*{row["sample_id"]: to_reading(row) for row in rows}.values()]


def scored_by(engine: Engine, run_ids: Sequence[str], av_hash: str) -> set[str | None]:
    """Hashes of the ARs that scored what this AV read again in these runs; None: without an AR."""
    query = select(RereadingRow.ar_hash).where(RereadingRow.run_id.in_(list(run_ids)), RereadingRow.av_hash == av_hash)
    with read(engine) as connection:
        return set(connection.execute(query.distinct()).scalars())


def stored_widths(engine: Engine, run_ids: Sequence[str]) -> set[int]:
    """``d_model`` of the runs' samples that were read."""
    query = select(SampleRow.d_model).where(SampleRow.run_id.in_(list(run_ids))).distinct()
    with read(engine) as connection:
        return set(connection.execute(query).scalars())


def _unread(run_ids: Sequence[str], av_hash: str) -> tuple[ColumnElement[bool], ...]:
    def read_by(model: Any) -> ColumnElement[bool]:
        other = model.__table__.alias()
        return exists().where(other.c.sample_id == ReadingRow.sample_id, other.c.av_hash == av_hash)

    return ReadingRow.run_id.in_(list(run_ids)), ~read_by(ReadingRow), ~read_by(RereadingRow)
