"""The reading side: what the CLI, the report, the demo and a UI ask of the store. Changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, Engine, Select, Text, cast, distinct, func, or_, select
from sqlalchemy.dialects.postgresql import JSONB

from nla_monitor.errors import StoreError
from nla_monitor.records import (
    AgentContext,
    Alert,
    AlertState,
    Explanation,
    Fidelity,
    Match,
    Phase,
    Reading,
    RunInfo,
    Scalar,
    Severity,
    TriageState,
)
from nla_monitor.store import codec
from nla_monitor.store.codec import Row, agent_of, alert_of, explanation_of, fidelity_of, match_of, run_of, sample_of
from nla_monitor.store.dialect import is_postgresql
from nla_monitor.store.engine import read
from nla_monitor.store.models import (
    AlertMatchRow,
    AlertRow,
    DropRow,
    FailureRow,
    LabelRow,
    MatchRow,
    ReadingRow,
    RuleRow,
    RunRow,
    SampleRow,
    SpoolRow,
    WorkerRow,
    table,
)

_METADATA = tuple(column for column in table(SampleRow).c if column.name != "vector")
_READING = tuple(
    ReadingRow.__table__.c[name]
    for name in (
        "av_hash",
        "explanation",
        "truncated",
        "tokens",
        "ar_hash",
        "cosine",
        "mse_nrm",
        "fve",
        "denominator",
        "denominator_name",
    )
)


@dataclass(frozen=True, slots=True)
class SampleView:
    """A sample without its vector, with its explanation and fidelity once it has been read."""

    sample_id: str
    run_id: str
    layer: int
    d_model: int
    norm: float | None
    phase: Phase
    sequence_id: str
    position: int
    token_id: int
    token_text: str | None
    role: str | None
    trigger: str
    captured_at: float
    step: int | None
    rank: int
    context: str | None
    agent: AgentContext | None
    attributes: Mapping[str, Scalar]
    traceparent: str | None
    model: str | None
    adapter: str | None
    priority: float
    screens: Mapping[str, float]
    state: str
    """``waiting``, ``leased``, ``failed``, ``read``, or ``stored`` (kept, never meant to be read)."""
    explanation: Explanation | None
    fidelity: Fidelity | None
    error: str | None
    """Text of the newest failure of a sample that has no reading."""


@dataclass(frozen=True, slots=True)
class RunSummary:
    """A run and what it has come to."""

    info: RunInfo
    ended_at: float | None
    samples: int
    readings: int
    alerts: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Counts:
    """How many samples stand where, of one run or of all."""

    samples: int
    waiting: int
    leased: int
    failed: int
    readings: int
    matches: int
    alerts: int


@dataclass(frozen=True, slots=True)
class Label:
    """What a person said of an alert, and when (Unix seconds)."""

    triage: TriageState
    who: str
    note: str | None
    created_at: float


@dataclass(frozen=True, slots=True)
class WorkerSign:
    """A worker's newest sign of life."""

    worker_id: str
    host: str
    pid: int
    started_at: float
    seen_at: float
    info: Mapping[str, object]


def not_refuted() -> ColumnElement[bool]:
    """Matches that count: no control was required, or none refuted them."""
    return or_(MatchRow.supported.is_(None), MatchRow.supported.is_(True))


def reading_query() -> Select[*tuple[Any, ...]]:
    """Samples with their readings, one row each; ``to_reading`` makes records of the rows."""
    return select(*table(SampleRow).c, *_READING).join(ReadingRow, ReadingRow.sample_id == SampleRow.sample_id)


def to_reading(row: Row) -> Reading:
    """The reading of a row of ``reading_query``.

    Raises:
        ActivationError: the stored vector fails its checksum.
    """
    return Reading(sample_of(row), explanation_of(row), fidelity_of(row))


class Reader:
    """Questions to the store. Safe for several threads; every answer is one consistent state of the database.

    All methods raise ``StoreUnavailableError`` when the database can't be read, and ``SchemaVersionError`` when its
    tables are not this version's.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def engine(self) -> Engine:
        """The engine in use."""
        return self._engine

    def runs(self, limit: int = 100) -> list[RunSummary]:
        """Runs, newest first."""
        with read(self._engine) as connection:
            query = select(*table(RunRow).c).order_by(RunRow.started_at.desc(), RunRow.run_id).limit(limit)
            rows = connection.execute(query).mappings().all()
            return _summaries(connection, rows)

    def run(self, run_id: str) -> RunSummary | None:
        """One run, by its id."""
        with read(self._engine) as connection:
            rows = connection.execute(select(*table(RunRow).c).where(RunRow.run_id == run_id)).mappings().all()
            return next(iter(_summaries(connection, rows)), None)

    def drops(self, run_id: str | None = None) -> dict[str, int]:
        """Samples that were never stored, by reason; of all runs when none is named."""
        query = select(DropRow.reason, func.sum(DropRow.count)).group_by(DropRow.reason).order_by(DropRow.reason)
        if run_id is not None:
            query = query.where(DropRow.run_id == run_id)
        with read(self._engine) as connection:
            return {reason: int(count) for reason, count in connection.execute(query)}

    def alerts(
        self,
        run_id: str | None = None,
        *,
        state: AlertState | None = None,
        severity: Severity | None = None,
        rule: str | None = None,
        since: float | None = None,
        triage: TriageState | None = None,
        limit: int = 100,
    ) -> list[Alert]:
        """Alerts, newest first.

        Args:
            run_id: of this run only.
            state: firing or resolved only.
            severity: this severity or above.
            rule: of this rule only.
            since: fired at this moment or later, Unix seconds.
            triage: with this label only.
            limit: at most so many.
        """
        wanted: list[ColumnElement[bool]] = []
        if run_id is not None:
            wanted.append(AlertRow.run_id == run_id)
        if state is not None:
            wanted.append(AlertRow.state == state)
        if severity is not None:
            wanted.append(AlertRow.severity.in_([str(level) for level in Severity if level.rank >= severity.rank]))
        if rule is not None:
            wanted.append(AlertRow.rule_id == rule)
        if since is not None:
            wanted.append(AlertRow.fired_at >= since)
        if triage is not None:
            wanted.append(AlertRow.triage == triage)
        query = select(*table(AlertRow).c).where(*wanted).order_by(AlertRow.fired_at.desc(), AlertRow.alert_id)
        with read(self._engine) as connection:
            return [alert_of(row) for row in connection.execute(query.limit(limit)).mappings()]

    def alert(self, id_or_prefix: str) -> Alert | None:
        """An alert by its id, or by a prefix that only one alert has.

        Raises:
            StoreError: several alerts start so; the message lists them.
        """
        with read(self._engine) as connection:
            return _one_alert(connection, id_or_prefix)

    def alerts_saying(self, text: str) -> list[Alert]:
        """Alerts in whose evidence a text stands, oldest first; a letter that JSON escapes is not found."""
        says = cast(AlertRow.evidence, Text).contains(text, autoescape=True)
        query = select(*table(AlertRow).c).where(says).order_by(AlertRow.fired_at, AlertRow.alert_id)
        with read(self._engine) as connection:
            return [alert_of(row) for row in connection.execute(query).mappings()]

    def alert_readings(self, alert_id: str) -> list[Reading]:
        """The readings that speak for an alert, oldest first."""
        linked = select(MatchRow.sample_id).join(AlertMatchRow, AlertMatchRow.match_id == MatchRow.match_id)
        query = reading_query().where(SampleRow.sample_id.in_(linked.where(AlertMatchRow.alert_id == alert_id)))
        query = query.order_by(func.coalesce(SampleRow.step, -1), SampleRow.captured_at, SampleRow.sample_id)
        with read(self._engine) as connection:
            return [to_reading(row) for row in connection.execute(query).mappings()]

    def alert_matches(self, alert_id: str) -> list[Match]:
        """The matches that speak for an alert, oldest first."""
        query = select(*table(MatchRow).c).join(AlertMatchRow, AlertMatchRow.match_id == MatchRow.match_id)
        query = query.where(AlertMatchRow.alert_id == alert_id)
        query = query.order_by(func.coalesce(MatchRow.step, -1), MatchRow.captured_at, MatchRow.match_id)
        with read(self._engine) as connection:
            return [match_of(row) for row in connection.execute(query).mappings()]

    def labels(self, alert_id: str) -> list[Label]:
        """What people said of an alert, oldest first."""
        query = select(*table(LabelRow).c).where(LabelRow.alert_id == alert_id).order_by(LabelRow.label_id)
        with read(self._engine) as connection:
            return [
                Label(TriageState(row["triage"]), row["who"], row["note"], row["created_at"])
                for row in connection.execute(query).mappings()
            ]

    def samples(
        self,
        run_id: str | None = None,
        *,
        phase: Phase | None = None,
        step: int | None = None,
        since: float | None = None,
        sequence_id: str | None = None,
        agent_run_id: str | None = None,
        contains: str | None = None,
        matched_by: str | None = None,
        read_only: bool = False,
        newest_first: bool = True,
        limit: int = 100,
    ) -> list[SampleView]:
        """Samples with what was read from them.

        Args:
            run_id: of this run only.
            phase: of this kind of forward pass only.
            step: of this optimizer step only.
            since: captured at this moment or later, Unix seconds.
            sequence_id: of this sequence only.
            agent_run_id: of this model call, or of the agent invocation with this root.
            contains: whose explanation holds this text (ASCII letters in either case).
            matched_by: that this rule matched.
            read_only: with an explanation only.
            newest_first: else oldest first.
            limit: at most so many.
        """
        wanted: list[ColumnElement[bool]] = []
        for column, value in (
            (SampleRow.run_id, run_id),
            (SampleRow.phase, phase),
            (SampleRow.step, step),
            (SampleRow.sequence_id, sequence_id),
        ):
            if value is not None:
                wanted.append(column == value)
        if since is not None:
            wanted.append(SampleRow.captured_at >= since)
        if agent_run_id is not None:
            wanted.append(or_(SampleRow.agent_run_id == agent_run_id, SampleRow.agent_root_run_id == agent_run_id))
        if contains is not None:
            wanted.append(ReadingRow.explanation.icontains(contains, autoescape=True))
        if matched_by is not None:
            wanted.append(SampleRow.sample_id.in_(select(MatchRow.sample_id).where(MatchRow.rule_id == matched_by)))
        if read_only:
            wanted.append(ReadingRow.sample_id.is_not(None))
        order = (SampleRow.captured_at, SampleRow.sample_id)
        query = sample_query().where(*wanted).order_by(*(key.desc() if newest_first else key for key in order))
        with read(self._engine) as connection:
            return [view_of(row) for row in connection.execute(query.limit(limit)).mappings()]

    def reading_counts(self, run_id: str | None = None) -> Counts:
        """How many samples stand where, of one run or of all."""
        with read(self._engine) as connection:
            queue = select(SpoolRow.state, func.count()).join(SampleRow, SampleRow.sample_id == SpoolRow.sample_id)
            if run_id is not None:
                queue = queue.where(SampleRow.run_id == run_id)
            states = {state: int(count) for state, count in connection.execute(queue.group_by(SpoolRow.state))}
            return Counts(
                samples=_count(connection, SampleRow.run_id, run_id),
                waiting=states.get("waiting", 0),
                leased=states.get("leased", 0),
                failed=states.get("failed", 0),
                readings=_count(connection, ReadingRow.run_id, run_id),
                matches=_count(connection, MatchRow.run_id, run_id),
                alerts=_count(connection, AlertRow.run_id, run_id),
            )

    def match_rate(
        self,
        run_id: str,
        rule_id: str,
        *,
        phase: Phase | None = None,
        trigger: str | None = None,
        attributes: Mapping[str, Scalar] | None = None,
        by_step: bool = True,
    ) -> list[tuple[int | None, int, int]]:
        """How many of the samples that were read met a rule, unrefuted: ``(step, matched, read)``, by step or in all.

        Args:
            run_id: the run.
            rule_id: the rule, in any version.
            phase: of this kind of forward pass only.
            trigger: taken for this reason only.
            attributes: whose attributes have these values (None: lack the key or hold null).
            by_step: one row per optimizer step; else one row with step None.
        """
        met = (
            select(MatchRow.sample_id)
            .where(MatchRow.run_id == run_id, MatchRow.rule_id == rule_id, not_refuted())
            .distinct()
            .subquery()
        )
        step = SampleRow.step if by_step else func.nullif(0, 0)
        query = (
            select(step, func.count(distinct(met.c.sample_id)), func.count(distinct(SampleRow.sample_id)))
            .join(ReadingRow, ReadingRow.sample_id == SampleRow.sample_id)
            .outerjoin(met, met.c.sample_id == SampleRow.sample_id)
            .where(ReadingRow.run_id == run_id)
        )
        if phase is not None:
            query = query.where(SampleRow.phase == phase)
        if trigger is not None:
            query = query.where(SampleRow.trigger == trigger)
        if by_step:
            query = query.group_by(step).order_by(func.coalesce(step, -1))
        with read(self._engine) as connection:
            query = query.where(*(_has(connection, key, value) for key, value in (attributes or {}).items()))
            return [(at, int(matched), int(total)) for at, matched, total in connection.execute(query)]

    def rule_source(self, rule_id: str, version: str) -> str | None:
        """A rule's YAML as it was when it ran."""
        query = select(RuleRow.source).where(RuleRow.rule_id == rule_id, RuleRow.version == version)
        with read(self._engine) as connection:
            return connection.execute(query).scalar_one_or_none()

    def workers(self, since: float = 0.0) -> list[WorkerSign]:
        """Workers seen at ``since`` (Unix seconds) or later, newest sign of life first."""
        query = select(*table(WorkerRow).c).where(WorkerRow.seen_at >= since).order_by(WorkerRow.seen_at.desc())
        with read(self._engine) as connection:
            return [WorkerSign(**row) for row in connection.execute(query).mappings()]


def _has(connection: Connection, key: str, value: Scalar) -> ColumnElement[bool]:
    """Whether a sample's attribute has a value, compared in the value's own type."""
    column = table(SampleRow).c.attributes
    item = column[key]
    condition: ColumnElement[bool]
    if value is None:
        condition = item.as_string().is_(None)
    elif is_postgresql(connection):
        # Containment: a cast would fail on the first sample whose attribute is of another type.
        condition = cast(column, JSONB).contains({key: value})
    else:
        typed = {bool: item.as_boolean, int: item.as_integer, float: item.as_float}.get(type(value), item.as_string)
        condition = typed() == value
    return condition


def _one_alert(connection: Connection, id_or_prefix: str) -> Alert | None:
    query = select(*table(AlertRow).c).where(AlertRow.alert_id.startswith(id_or_prefix, autoescape=True))
    rows = connection.execute(query.order_by(AlertRow.alert_id).limit(6)).mappings().all()
    exact = [row for row in rows if row["alert_id"] == id_or_prefix]
    if len(rows) > 1 and not exact:
        listed = ", ".join(row["alert_id"] for row in rows)
        raise StoreError(f"several alerts start with {id_or_prefix!r}: {listed}; give more of the id")
    return next((alert_of(row) for row in exact or rows), None)


def sample_query() -> Select[*tuple[Any, ...]]:
    """Samples without their vectors, what was read of them, where they stand; ``view_of`` makes records of them."""
    newest = (
        select(FailureRow.error)
        .where(FailureRow.sample_id == SampleRow.sample_id)
        .order_by(FailureRow.failure_id.desc())
        .limit(1)
        .scalar_subquery()
    )
    return (
        select(*_METADATA, *_READING, SpoolRow.state.label("queue_state"), newest.label("error"))
        .outerjoin(ReadingRow, ReadingRow.sample_id == SampleRow.sample_id)
        .outerjoin(SpoolRow, SpoolRow.sample_id == SampleRow.sample_id)
    )


def view_of(row: Row) -> SampleView:
    """The sample of a row of ``sample_query``."""
    was_read = row["explanation"] is not None
    same = {
        name: row[name] for name in SampleView.__slots__ if name not in ("agent", "state", "explanation", "fidelity")
    }
    same["phase"], same["attributes"] = Phase(row["phase"]), codec.attributes_of(row["attributes"])
    same["priority"], same["screens"] = row["priority"] or 0.0, row["screens"] or {}
    same["error"] = None if was_read else row["error"]
    return SampleView(
        **same,
        agent=agent_of(row),
        state=row["queue_state"] or ("read" if was_read else "stored"),
        explanation=explanation_of(row) if was_read else None,
        fidelity=fidelity_of(row) if was_read else None,
    )


def _count(connection: Connection, column: Any, run_id: str | None) -> int:
    query = select(func.count(column))
    return int(connection.execute(query if run_id is None else query.where(column == run_id)).scalar_one())


def _summaries(connection: Connection, rows: Any) -> list[RunSummary]:
    ids = [row["run_id"] for row in rows]

    def per_run(column: Any, value: Any) -> dict[str, int]:
        query = select(column, value).where(column.in_(ids)).group_by(column)
        return {run_id: int(count) for run_id, count in connection.execute(query)}

    samples = per_run(SampleRow.run_id, func.count())
    readings = per_run(ReadingRow.run_id, func.count())
    alerts = per_run(AlertRow.run_id, func.count())
    dropped = per_run(DropRow.run_id, func.sum(DropRow.count))
    return [
        RunSummary(
            info=run_of(row),
            ended_at=row["ended_at"],
            samples=samples.get(row["run_id"], 0),
            readings=readings.get(row["run_id"], 0),
            alerts=alerts.get(row["run_id"], 0),
            dropped=dropped.get(row["run_id"], 0),
        )
        for row in rows
    ]
