"""Stored readings as a stream, in the order in which the worker judged them: what replays and calibrations read.

Columns, not objects of an ORM, page by page: memory holds one page, and no transaction stays open between two.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

import numpy as np
from sqlalchemy import Engine, Select, exists, func, literal, select

from nla_monitor.records import ActivationSample, AgentContext, Explanation, Fidelity, Phase, Reading, Support, Vector
from nla_monitor.store.codec import attributes_of, more_of, stored_vector, support_of
from nla_monitor.store.engine import read
from nla_monitor.store.models import MatchRow, ReadingRow, RereadingRow, RunRow, SampleRow, table

BATCH: Final = 1_000

_PHASES: Final = {str(phase): phase for phase in Phase}
_SAMPLE: Final = (
    *("sample_id", "run_id", "layer", "norm", "phase", "sequence_id", "position", "token_id", "trigger", "captured_at"),
    *("step", "rank", "token_text", "context", "role", "inclusion_probability", "traceparent"),
    *("attributes", "agent_run_id", "agent_parent_run_id", "agent_root_run_id", "agent_tool", "agent_node"),
    *("agent_conversation_id", "agent_generated", "agent_token_index"),
    *("model", "adapter", "priority", "screens"),
)
"""In the order of the fields of ``ActivationSample`` and ``AgentContext``."""
_READING: Final = (
    *("explanation", "truncated", "tokens", "av_hash", "ar_hash", "cosine", "mse_nrm", "fve", "denominator"),
    "denominator_name",
)
_VECTOR: Final = ("vector", "dtype", "d_model", "checksum")
_LIVE: Final = table(ReadingRow)
_WIDTH: Final = len(_READING) + len(_SAMPLE)
_NO_VECTOR: Final = np.zeros(0, dtype=np.float32)


def stream_readings(
    engine: Engine,
    *,
    run_ids: Sequence[str] | None = None,
    av_hash: str | None = None,
    vectors: bool = True,
    batch: int = BATCH,
) -> Iterator[list[Reading]]:
    """Readings, run by run, each run's in the order in which they were judged; a list holds readings of one run.

    Args:
        engine: from ``store.session.open_engine``.
        run_ids: these runs, in this order; None: all, oldest first.
        av_hash: by this AV only: one that read the run live, or read its vectors again. None: as they were read live.
        vectors: False leaves each sample with an empty vector, and the bytes unread.
        batch: readings per list, at most.

    Raises:
        ActivationError: a stored vector fails its checksum.
        StoreUnavailableError: the database cannot be read.
    """
    for run_id in stored_runs(engine) if run_ids is None else run_ids:
        again = av_hash is not None and is_reread(engine, run_id, av_hash)
        query = _query(run_id, av_hash, again=again, vectors=vectors)
        yield from _pages(engine, query, run_id, batch)


def _pages(engine: Engine, query: Select[*tuple[Any, ...]], run_id: str, size: int) -> Iterator[list[Reading]]:
    """Pages by place: the index alone finds them, and rows that come meanwhile lie behind the end."""
    ends = select(func.min(_LIVE.c.seq), func.max(_LIVE.c.seq)).where(_LIVE.c.run_id == run_id)
    with read(engine) as connection:
        first, last = connection.execute(ends).one()
    if first is None:
        return
    for start in range(first, last + 1, size):
        page = query.where(_LIVE.c.seq >= start, _LIVE.c.seq < start + size).order_by(_LIVE.c.seq)
        with read(engine) as connection:
            rows = connection.execute(page).all()
        if rows:
            yield [_reading(row) for row in rows]


def count_readings(engine: Engine, *, run_ids: Sequence[str] | None = None, av_hash: str | None = None) -> int:
    """How many readings ``stream_readings`` will give."""
    total = 0
    for run_id in stored_runs(engine) if run_ids is None else run_ids:
        again = av_hash is not None and is_reread(engine, run_id, av_hash)
        found = _query(run_id, av_hash, again=again, vectors=False).subquery()
        with read(engine) as connection:
            total += connection.execute(select(func.count()).select_from(found)).scalar_one()
    return total


def stored_runs(engine: Engine) -> list[str]:
    """Runs that have readings, oldest first."""
    found = select(ReadingRow.run_id).distinct().subquery()
    started = func.coalesce(RunRow.started_at, literal(0.0))
    query = select(found.c.run_id).outerjoin(RunRow, RunRow.run_id == found.c.run_id)
    with read(engine) as connection:
        return list(connection.execute(query.order_by(started, found.c.run_id)).scalars())


def verbalizers(engine: Engine, run_id: str) -> dict[str, int]:
    """How many readings of a run each AV made, by its content hash: live ones first, then those that read it again."""
    found: dict[str, int] = {}
    with read(engine) as connection:
        for model in (ReadingRow, RereadingRow):
            query = select(model.av_hash, func.count()).where(model.run_id == run_id).group_by(model.av_hash)
            for av_hash, count in connection.execute(query.order_by(model.av_hash)):
                found.setdefault(av_hash, int(count))
    return found


def read_by(engine: Engine, run_ids: Sequence[str], av_hash: str | None) -> tuple[str, str | None] | None:
    """Hashes of the AV and AR that made the most readings of runs; None: there are none.

    Args:
        engine: from ``store.session.open_engine``.
        run_ids: these runs.
        av_hash: by this AV only.
    """
    found: Counter[tuple[str, str | None]] = Counter()
    with read(engine) as connection:
        for model in (ReadingRow, RereadingRow) if av_hash is not None else (ReadingRow,):
            columns = (model.av_hash, model.ar_hash)
            query = select(*columns, func.count()).where(model.run_id.in_(list(run_ids))).group_by(*columns)
            if av_hash is not None:
                query = query.where(model.av_hash == av_hash)
            for av, ar, count in connection.execute(query):
                found[av, ar] += int(count)
    return max(found, key=lambda key: (found[key], str(key)), default=None)


def is_reread(engine: Engine, run_id: str, av_hash: str) -> bool:
    """Whether an AV did not read the run live: its readings, if there are any, are of stored vectors."""
    live = exists().where(ReadingRow.run_id == run_id, ReadingRow.av_hash == av_hash)
    with read(engine) as connection:
        return not connection.execute(select(live)).scalar()


def stored_supports(engine: Engine, run_id: str, versions: Collection[tuple[str, str]]) -> dict[str, Support]:
    """What controls said of a run's live matches, by ``match_id``, for these rules and versions."""
    wanted = select(*table(MatchRow).c).where(MatchRow.run_id == run_id, MatchRow.supported.is_not(None))
    wanted = wanted.where(MatchRow.rule_id.in_(sorted({rule_id for rule_id, _ in versions})))
    with read(engine) as connection:
        rows = connection.execute(wanted).mappings().all()
    kept = (row for row in rows if (row["rule_id"], row["rule_version"]) in versions)
    return {row["match_id"]: support for row in kept if (support := support_of(row)) is not None}


def vectors_of(engine: Engine, sample_ids: Sequence[str]) -> dict[str, Vector]:
    """Stored vectors, by sample.

    Raises:
        ActivationError: a stored vector fails its checksum.
    """
    columns = table(SampleRow).c
    found: dict[str, Vector] = {}
    for start in range(0, len(sample_ids), BATCH):
        wanted = columns.sample_id.in_(sample_ids[start : start + BATCH])
        query = select(columns.sample_id, *(columns[name] for name in _VECTOR)).where(wanted)
        with read(engine) as connection:
            found |= {row[0]: stored_vector(*row) for row in connection.execute(query)}
    return found


def _query(run_id: str, av_hash: str | None, *, again: bool, vectors: bool) -> Select[*tuple[Any, ...]]:
    """Readings of a run, unordered; ``_reading`` knows the order of the columns."""
    source, samples = table(RereadingRow) if again else _LIVE, table(SampleRow)
    names = (*_SAMPLE, *(_VECTOR if vectors else ()))
    columns = (*(source.c[name] for name in _READING), *(samples.c[name] for name in names))
    query = select(*columns).select_from(_LIVE).join(samples, samples.c.sample_id == _LIVE.c.sample_id)
    query = query.where(_LIVE.c.run_id == run_id)
    if again:
        query = query.join(source, source.c.sample_id == _LIVE.c.sample_id)
    return query if av_hash is None else query.where(source.c.av_hash == av_hash)


def _reading(row: Sequence[Any]) -> Reading:
    """The record of a row. By position, one level deep: this runs for every stored reading of a replay."""
    text, truncated, tokens, av_hash, ar_hash, cosine, mse_nrm, fve, denominator, denominator_name = row[:10]
    sample_id, run_id, layer, norm, phase = row[10:15]
    vector = _NO_VECTOR if len(row) == _WIDTH else stored_vector(sample_id, *row[_WIDTH:])
    norm = math.nan if norm is None else norm
    agent = None if row[28] is None else AgentContext(*row[28:36], **more_of(row[27]))
    fields = (sample_id, run_id, layer, vector, norm, _PHASES[phase], *row[15:27], agent, attributes_of(row[27]))
    fields += (row[36], row[37], row[38] or 0.0, row[39] or {})
    sample = ActivationSample(*fields)
    fidelity = None
    if ar_hash is not None:
        cosine, mse_nrm = _nan(cosine), _nan(mse_nrm)
        fidelity = Fidelity(sample_id, cosine, mse_nrm, fve, denominator, denominator_name, ar_hash)
    return Reading(sample, Explanation(sample_id, text, truncated, tokens, av_hash), fidelity)


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
