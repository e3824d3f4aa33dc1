"""Forgetting old samples, while what an alert rests on is kept."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Final

from sqlalchemy import ColumnElement, Connection, Engine, Select, delete, exists, func, select
from sqlalchemy.orm import aliased

from nla_monitor.store.engine import read, write
from nla_monitor.store.models import (
    AlertMatchRow,
    AlertRow,
    MatchRow,
    MessageRow,
    OutboxRow,
    ReadingRow,
    SampleRow,
    SpoolRow,
    UnitMatchRow,
    UnitRow,
)

_CHUNK: Final = 1000
"""Samples per transaction: the host's writes get their turn in between."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was forgotten, or would be."""

    samples: int = 0
    readings: int = 0
    matches: int = 0
    outbox: int = 0
    messages: int = 0


def prune(engine: Engine, before: float, *, dry_run: bool = False) -> Pruned:
    """Delete samples captured before a moment, with their readings, matches and failures, and delivered outbox rows.

    Messages of before go where no sample of their conversation is left. Kept whatever their age: samples that wait for
    a worker or were given up, those that an alert rests on, and what was decided.

    Args:
        engine: from ``open_engine``.
        before: Unix seconds.
        dry_run: only count.

    Raises:
        StoreUnavailableError: the database can't be written; what was deleted so far stays deleted.
    """
    if dry_run:
        with read(engine) as connection:
            return _counted(connection, _old(before), before)
    total = Pruned()
    while True:
        with write(engine) as connection:
            ids = list(connection.execute(_old(before).limit(_CHUNK)).scalars())
            if ids:
                chunk = _counted(connection, select(SampleRow.sample_id).where(SampleRow.sample_id.in_(ids)), 0.0)
                # Readings, matches and failures go with their sample (ON DELETE CASCADE).
                connection.execute(delete(SampleRow).where(SampleRow.sample_id.in_(ids)))
                total = _sum(total, chunk)
            else:
                delivered = connection.execute(
                    delete(OutboxRow).where(OutboxRow.state == "done", OutboxRow.done_at < before)
                ).rowcount
                _forget_units(connection)
                spoken = connection.execute(delete(MessageRow).where(*_unheard(before))).rowcount
                return replace(total, outbox=delivered, messages=spoken)
        time.sleep(0)


def _forget_units(connection: Connection) -> None:
    """Sequences of runs of which no sample is left; the sums over them stay."""
    left = select(SampleRow.run_id).distinct()
    for model in (UnitRow, UnitMatchRow):
        connection.execute(delete(model).where(model.run_id.not_in(left)))


def _unheard(before: float) -> tuple[ColumnElement[bool], ...]:
    """Messages of conversations of which no sample stays."""
    left = aliased(SampleRow)
    stays = left.sample_id.not_in(_old(before))
    named = exists().where(left.agent_conversation_id == MessageRow.conversation, stays)
    unnamed = exists().where(left.agent_root_run_id == MessageRow.conversation, stays)
    return MessageRow.created_at < before, ~named, ~unnamed


def _old(before: float) -> Select[str]:
    linked = (
        select(MatchRow.sample_id)
        .join(AlertMatchRow, AlertMatchRow.match_id == MatchRow.match_id)
        .where(MatchRow.sample_id == SampleRow.sample_id)
    )
    return select(SampleRow.sample_id).where(
        SampleRow.captured_at < before,
        ~exists().where(SpoolRow.sample_id == SampleRow.sample_id),
        ~exists().where(AlertRow.sample_id == SampleRow.sample_id),
        ~linked.exists(),
    )


def _counted(connection: Connection, ids: Select[str], before: float) -> Pruned:
    def count(query: Select[int]) -> int:
        return connection.execute(query).scalar_one()

    return Pruned(
        samples=count(select(func.count()).select_from(ids.subquery())),
        readings=count(select(func.count()).where(ReadingRow.sample_id.in_(ids))),
        matches=count(select(func.count()).where(MatchRow.sample_id.in_(ids))),
        outbox=count(select(func.count()).where(OutboxRow.state == "done", OutboxRow.done_at < before)),
        messages=count(select(func.count()).select_from(MessageRow).where(*_unheard(before))) if before else 0,
    )


def _sum(one: Pruned, other: Pruned) -> Pruned:
    return Pruned(
        one.samples + other.samples,
        one.readings + other.readings,
        one.matches + other.matches,
        one.outbox + other.outbox,
    )
