"""What stands around a sample: what the controls of a candidate ask of the store. Changes nothing."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Engine, Select, and_, exists, or_, select

from nla_monitor.records import ActivationSample, Reading, Vector
from nla_monitor.store.codec import sample_of, stored_vector
from nla_monitor.store.engine import read
from nla_monitor.store.models import ReadingRow, SampleRow, table
from nla_monitor.store.queries import reading_query, to_reading

_NORMS = 256
_CONTEXTS = 64


class Surroundings:
    """Answers for one sample at a time; a few dozen rows each. Safe for several threads.

    All methods raise ``StoreUnavailableError`` when the database can't be read.

    Args:
        engine: from ``store.session.open_engine``, its schema prepared.
        av_hash: readings of this AV only, where the same samples were read by several; None: of any.
    """

    def __init__(self, engine: Engine, av_hash: str | None = None) -> None:
        self._engine = engine
        self._av_hash = av_hash

    def near(self, sample: ActivationSample, within: int) -> list[Reading]:
        """Readings of the same pass over the same sequence, at most ``within`` tokens away, its own left out."""
        query = self._readings().where(_same_pass(sample), _within(sample, within))
        return self._fetch(query.order_by(SampleRow.position, SampleRow.sample_id))

    def unread_near(self, sample: ActivationSample, within: int) -> list[ActivationSample]:
        """Samples of the same pass, at most ``within`` tokens away, that have no reading (of this AV)."""
        mine = ReadingRow.sample_id == SampleRow.sample_id
        if self._av_hash is not None:
            mine = and_(mine, ReadingRow.av_hash == self._av_hash)
        query = select(*table(SampleRow).c).where(_same_pass(sample), _within(sample, within), ~exists().where(mine))
        with read(self._engine) as connection:
            rows = connection.execute(query.order_by(SampleRow.position, SampleRow.sample_id)).mappings()
            return [sample_of(row) for row in rows]

    def later_contexts(self, sample: ActivationSample) -> list[str]:
        """Contexts of the next tokens of the same pass over the same sequence that were sampled."""
        query = select(SampleRow.context).where(
            _same_pass(sample), SampleRow.position > sample.position, SampleRow.context.is_not(None)
        )
        with read(self._engine) as connection:
            return [*connection.execute(query.order_by(SampleRow.position).limit(_CONTEXTS)).scalars()]

    def usual_norms(self, sample: ActivationSample) -> list[float]:
        """Raw norms of the run's newest samples of the same layer, up to this one and with it."""
        upto = or_(_before(sample), SampleRow.sample_id == sample.sample_id)
        query = select(SampleRow.norm).where(
            SampleRow.run_id == sample.run_id, SampleRow.layer == sample.layer, SampleRow.norm.is_not(None), upto
        )
        with read(self._engine) as connection:
            return [*connection.execute(_newest(query).limit(_NORMS)).scalars()]

    def recent(self, sample: ActivationSample, limit: int) -> list[Reading]:
        """The newest readings of other sequences of the run and layer, before this sample."""
        query = self._readings().where(
            SampleRow.run_id == sample.run_id,
            SampleRow.layer == sample.layer,
            SampleRow.sequence_id != sample.sequence_id,
            _before(sample),
        )
        return self._fetch(_newest(query).limit(limit))

    def other_layers(self, sample: ActivationSample, limit: int) -> list[Vector]:
        """Vectors ``[d_model]`` of the run's samples of other layers, the newest before this one."""
        query = select(
            SampleRow.sample_id, SampleRow.vector, SampleRow.dtype, SampleRow.d_model, SampleRow.checksum
        ).where(SampleRow.run_id == sample.run_id, SampleRow.layer != sample.layer, _before(sample))
        with read(self._engine) as connection:
            return [stored_vector(*row) for row in connection.execute(_newest(query).limit(limit))]

    def _readings(self) -> Select[*tuple[Any, ...]]:
        return reading_query() if self._av_hash is None else reading_query().where(ReadingRow.av_hash == self._av_hash)

    def _fetch(self, query: Select[*tuple[Any, ...]]) -> list[Reading]:
        with read(self._engine) as connection:
            return [to_reading(row) for row in connection.execute(query).mappings()]


def _same_pass(sample: ActivationSample) -> ColumnElement[bool]:
    """Other samples of the same sequence and step: a sequence that is trained on again is another pass."""
    return and_(
        SampleRow.run_id == sample.run_id,
        SampleRow.sequence_id == sample.sequence_id,
        SampleRow.step.is_(None) if sample.step is None else SampleRow.step == sample.step,
        SampleRow.layer == sample.layer,
        SampleRow.sample_id != sample.sample_id,
    )


def _within(sample: ActivationSample, tokens: int) -> ColumnElement[bool]:
    return SampleRow.position.between(sample.position - tokens, sample.position + tokens)


def _before(sample: ActivationSample) -> ColumnElement[bool]:
    """Captured earlier, or at the same moment with a smaller id: an order that no batching changes."""
    earlier = SampleRow.captured_at < sample.captured_at
    return or_(earlier, and_(SampleRow.captured_at == sample.captured_at, SampleRow.sample_id < sample.sample_id))


def _newest(query: Select[*tuple[Any, ...]]) -> Select[*tuple[Any, ...]]:
    return query.order_by(SampleRow.captured_at.desc(), SampleRow.sample_id.desc())
