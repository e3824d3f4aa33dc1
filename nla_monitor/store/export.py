"""Samples with their vectors and newest live readings, page by page: what an export writes and denominators are of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from sqlalchemy import ColumnElement, Engine, exists, func, select

from nla_monitor.records import ActivationSample, Explanation, Fidelity, Phase
from nla_monitor.store.codec import explanation_of, fidelity_of, sample_of
from nla_monitor.store.engine import read
from nla_monitor.store.models import MatchRow, ReadingRow, RunRow, SampleRow, table
from nla_monitor.store.queries import not_refuted

PAGE: Final = 512


class StoredSample(NamedTuple):
    """A sample and what was read in it; None where nothing was."""

    sample: ActivationSample
    explanation: Explanation | None
    fidelity: Fidelity | None


@dataclass(frozen=True, slots=True)
class Choice:
    """Which samples; each field narrows the choice."""

    run_ids: Sequence[str] | None = None
    rule: str | None = None
    """Those that this rule matched, refuted matches left out."""
    phase: Phase | None = None
    layer: int | None = None
    read_only: bool = False
    """Those that have a reading."""

    def conditions(self) -> list[ColumnElement[bool]]:
        """The same as SQL."""
        wanted: list[ColumnElement[bool]] = []
        if self.run_ids is not None:
            wanted.append(SampleRow.run_id.in_(list(self.run_ids)))
        if self.rule is not None:
            matched = exists().where(MatchRow.sample_id == SampleRow.sample_id, MatchRow.rule_id == self.rule)
            wanted.append(matched.where(not_refuted()))
        if self.phase is not None:
            wanted.append(SampleRow.phase == str(self.phase))
        if self.layer is not None:
            wanted.append(SampleRow.layer == self.layer)
        if self.read_only:
            wanted.append(exists().where(ReadingRow.sample_id == SampleRow.sample_id))
        return wanted


class Extent(NamedTuple):
    """What a choice holds."""

    samples: int
    layers: tuple[int, ...]
    widths: tuple[int, ...]
    models: tuple[str, ...]
    """Models of the runs."""


def extent(engine: Engine, choice: Choice) -> Extent:
    """How many samples a choice holds, and of what layers, widths and models.

    Raises:
        StoreUnavailableError: the database cannot be read.
    """
    columns = (SampleRow.run_id, SampleRow.layer, SampleRow.d_model)
    query = select(*columns, func.count()).where(*choice.conditions()).group_by(*columns)
    with read(engine) as connection:
        rows = connection.execute(query).all()
        runs = sorted({row[0] for row in rows})
        models = connection.execute(select(RunRow.model).where(RunRow.run_id.in_(runs)).distinct()).scalars().all()
    layers, widths = sorted({row[1] for row in rows}), sorted({row[2] for row in rows})
    return Extent(sum(row[3] for row in rows), tuple(layers), tuple(widths), tuple(sorted(models)))


def stored_samples(
    engine: Engine, choice: Choice, *, limit: int | None = None, page: int = PAGE
) -> Iterator[list[StoredSample]]:
    """Samples of a choice in the order in which they were taken; memory holds one page, no transaction stays open.

    Raises:
        ActivationError: a stored vector fails its checksum.
        StoreUnavailableError: the database cannot be read.
    """
    after, left = "", limit
    while left is None or left > 0:
        size = page if left is None else min(page, left)
        query = select(*table(SampleRow).c).where(*choice.conditions(), SampleRow.sample_id > after)
        with read(engine) as connection:
            rows = connection.execute(query.order_by(SampleRow.sample_id).limit(size)).mappings().all()
            ids = [row["sample_id"] for row in rows]
            readings = select(*table(ReadingRow).c).where(ReadingRow.sample_id.in_(ids)).order_by(ReadingRow.created_at)
            told = {row["sample_id"]: row for row in connection.execute(readings).mappings()}
        if not rows:
            return
        after, left = ids[-1], None if left is None else left - len(rows)
        yield [
            StoredSample(
                sample_of(row),
                explanation_of(told[row["sample_id"]]) if row["sample_id"] in told else None,
                fidelity_of(told[row["sample_id"]]) if row["sample_id"] in told else None,
            )
            for row in rows
        ]
