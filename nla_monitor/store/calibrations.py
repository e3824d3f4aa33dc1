"""Calibrations, and the counts by which a run is held against them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, TypeAlias

from sqlalchemy import ColumnElement, Connection, Engine, and_, func, or_, select, true

from nla_monitor.records import Support
from nla_monitor.store.codec import clean, support_of
from nla_monitor.store.dialect import upsert
from nla_monitor.store.engine import read, write
from nla_monitor.store.models import CalibrationRow, MatchRow, ReadingRow, TallyRow, UnitMatchRow, UnitRow, table

Counts: TypeAlias = dict[str, Any]
"""A tally's columns by name, without its key."""

_CHUNK: Final = 500
"""Ids in one query: databases limit the number of parameters."""
_TALLY_KEY: Final = ("run_id", "calibration_id")
_MATCH_KEY: Final = ("run_id", "rule_id", "rule_version", "unit")


@dataclass(frozen=True, slots=True)
class CalibrationRecord:
    """A stored calibration. What the figures mean is not the store's business."""

    calibration_id: str
    rule_id: str
    rule_version: str
    set_name: str
    baseline_runs: list[str]
    av_hash: str
    ar_hash: str | None
    sequences: int
    sampling: Mapping[str, Any]
    figures: Mapping[str, Any]
    created_at: float


@dataclass(frozen=True, slots=True)
class UnitMatch:
    """What one rule found in one sequence so far."""

    supported: bool = False
    refuted: bool = False
    unscored: bool = False
    score: float | None = None


def save_calibrations(engine: Engine, records: Iterable[CalibrationRecord]) -> None:
    """Keep calibrations; one that is known becomes the newest again.

    Raises:
        StoreUnavailableError: the database cannot be written; none was kept.
    """
    with write(engine) as connection:
        for record in records:
            statement = upsert(connection, CalibrationRow).values(clean(asdict(record)))
            newest = {"created_at": statement.excluded["created_at"]}
            connection.execute(statement.on_conflict_do_update(index_elements=["calibration_id"], set_=newest))


def calibrations(
    engine: Engine, *, rule_ids: Collection[str] | None = None, ids: Collection[str] | None = None
) -> list[CalibrationRecord]:
    """Stored calibrations, newest first.

    Args:
        engine: the database.
        rule_ids: of these rules only.
        ids: with these ids only.
    """
    query = select(*table(CalibrationRow).c).order_by(CalibrationRow.created_at.desc(), CalibrationRow.calibration_id)
    if rule_ids is not None:
        query = query.where(CalibrationRow.rule_id.in_(list(rule_ids)))
    if ids is not None:
        query = query.where(CalibrationRow.calibration_id.in_(list(ids)))
    with read(engine) as connection:
        return [CalibrationRecord(**row) for row in connection.execute(query).mappings()]


def calibration_stamp(engine: Engine) -> tuple[int, float]:
    """Changes whenever a calibration is stored: how many there are, and when the newest came."""
    with read(engine) as connection:
        count, newest = connection.execute(select(func.count(), func.max(CalibrationRow.created_at))).one()
    return int(count), float(newest or 0.0)


def run_tallies(engine: Engine, run_id: str) -> dict[str, Counts]:
    """All tallies of a run, by calibration id."""
    with read(engine) as connection:
        return Tallies(connection).tallies(run_id)


@dataclass(frozen=True, slots=True)
class Readers:
    """Which AV and AR read a run."""

    run_id: str
    av_hash: str
    ar_hash: str | None


def readers_of(engine: Engine, run_ids: Collection[str]) -> list[Readers]:
    """Which AVs and ARs read these runs live, by run."""
    columns = (ReadingRow.run_id, ReadingRow.av_hash, ReadingRow.ar_hash)
    query = select(*columns).where(ReadingRow.run_id.in_(list(run_ids))).distinct().order_by(*columns)
    with read(engine) as connection:
        return [Readers(*row) for row in connection.execute(query)]


def stored_supports(engine: Engine, match_ids: Collection[str]) -> dict[str, Support]:
    """What the controls said of matches when they were made, by match id, as far as any was run."""
    ids, found = list(match_ids), {}
    columns = [table(MatchRow).c[name] for name in ("match_id", "supported", "controls", "swap_margin", "score")]
    with read(engine) as connection:
        for start in range(0, len(ids), _CHUNK):
            query = select(*columns).where(MatchRow.match_id.in_(ids[start : start + _CHUNK]))
            for row in connection.execute(query).mappings():
                support = support_of(row)
                if support is not None:
                    found[row["match_id"]] = support
    return found


class Tallies:
    """The counts of runs, inside a worker's transaction, whose lock on the run makes them add up."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def units(self, run_id: str, units: Collection[str]) -> dict[str, float | None]:
        """The known ones among these sequences, with their lowest fidelity."""
        query = select(UnitRow.unit, UnitRow.worst_cosine).where(
            UnitRow.run_id == run_id, UnitRow.unit.in_([clean(unit) for unit in units])
        )
        return {row.unit: row.worst_cosine for row in self._connection.execute(query)}

    def unit_matches(self, run_id: str, units: Collection[str]) -> dict[tuple[str, str, str], UnitMatch]:
        """What rules found in these sequences so far, by (rule id, rule version, sequence)."""
        query = select(*table(UnitMatchRow).c).where(
            UnitMatchRow.run_id == run_id, UnitMatchRow.unit.in_([clean(unit) for unit in units])
        )
        names = [field.name for field in fields(UnitMatch)]
        return {
            (row["rule_id"], row["rule_version"], row["unit"]): UnitMatch(**{name: row[name] for name in names})
            for row in self._connection.execute(query).mappings()
        }

    def tallies(self, run_id: str) -> dict[str, Counts]:
        """The counts of a run, by calibration id."""
        query = select(*table(TallyRow).c).where(TallyRow.run_id == run_id)
        return {row["calibration_id"]: _counts(row) for row in self._connection.execute(query).mappings()}

    def recount(
        self, run_id: str, rule: tuple[str, str], *, threshold: float | None, floor: float | None
    ) -> dict[str, int]:
        """The counts from what is known of all sequences of the run; for a calibration that is new to it.

        Args:
            run_id: the run.
            rule: id and version.
            threshold: a hit's score must exceed it; None: every supported match is a hit.
            floor: cosine below which fidelity is low; None: never.
        """
        low: ColumnElement[bool] = UnitRow.worst_cosine < floor if floor is not None else true().is_(False)
        units = select(
            func.count(),
            func.count(UnitRow.worst_cosine),
            func.count().filter(low),
        ).where(UnitRow.run_id == run_id)
        above = true() if threshold is None else or_(UnitMatchRow.unscored, UnitMatchRow.score > threshold)
        found = select(
            func.count().filter(UnitMatchRow.supported),
            func.count().filter(and_(UnitMatchRow.supported, above)),
            func.count().filter(UnitMatchRow.refuted),
        ).where(UnitMatchRow.run_id == run_id, UnitMatchRow.rule_id == rule[0], UnitMatchRow.rule_version == rule[1])
        sequences, measured, below = self._connection.execute(units).one()
        matching, hits, refuted = self._connection.execute(found).one()
        names = ("sequences", "measured", "low", "matching", "hits", "refuted")
        return dict(zip(names, map(int, (sequences, measured, below, matching, hits, refuted)), strict=True))

    def save_units(self, run_id: str, units: Mapping[str, float | None]) -> None:
        """Keep sequences as they are now."""
        rows = [{"run_id": run_id, "unit": clean(unit), "worst_cosine": cosine} for unit, cosine in units.items()]
        self._put(UnitRow, rows, ("run_id", "unit"))

    def save_unit_matches(self, run_id: str, found: Mapping[tuple[str, str, str], UnitMatch]) -> None:
        """Keep what rules found in sequences, by (rule id, rule version, sequence)."""
        rows = [
            {"run_id": run_id, "rule_id": rule, "rule_version": version, "unit": clean(unit), **asdict(state)}
            for (rule, version, unit), state in found.items()
        ]
        self._put(UnitMatchRow, rows, _MATCH_KEY)

    def save_tallies(self, run_id: str, tallies: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep the counts of a run, by calibration id."""
        rows = [{"run_id": run_id, "calibration_id": key, **counts} for key, counts in tallies.items()]
        self._put(TallyRow, rows, _TALLY_KEY)

    def _put(
        self, model: type[UnitRow | UnitMatchRow | TallyRow], rows: list[dict[str, Any]], key: Collection[str]
    ) -> None:
        if not rows:
            return
        statement = upsert(self._connection, model)
        changed = {name: statement.excluded[name] for name in rows[0] if name not in key}
        self._connection.execute(statement.on_conflict_do_update(index_elements=list(key), set_=changed), rows)


class MemoryTallies:
    """Counts that are kept nowhere: for replays and benchmarks."""

    def __init__(self) -> None:
        self._units: dict[str, dict[str, float | None]] = defaultdict(dict)
        self._found: dict[str, dict[tuple[str, str, str], UnitMatch]] = defaultdict(dict)
        self._tallies: dict[str, dict[str, Counts]] = defaultdict(dict)

    def units(self, run_id: str, units: Collection[str]) -> dict[str, float | None]:
        """The known ones among these sequences."""
        known = self._units[run_id]
        return {unit: known[unit] for unit in units if unit in known}

    def unit_matches(self, run_id: str, units: Collection[str]) -> dict[tuple[str, str, str], UnitMatch]:
        """What rules found in these sequences so far."""
        wanted = set(units)
        return {key: state for key, state in self._found[run_id].items() if key[2] in wanted}

    def tallies(self, run_id: str) -> dict[str, Counts]:
        """The counts of a run, by calibration id."""
        return self._tallies[run_id]

    def recount(
        self, run_id: str, rule: tuple[str, str], *, threshold: float | None, floor: float | None
    ) -> dict[str, int]:
        """The counts from all that is known of the run."""
        cosines = [cosine for cosine in self._units[run_id].values() if cosine is not None]
        found = [state for key, state in self._found[run_id].items() if key[:2] == rule]
        above = [
            state.supported
            and (threshold is None or state.unscored or (state.score is not None and state.score > threshold))
            for state in found
        ]
        return {
            "sequences": len(self._units[run_id]),
            "measured": len(cosines),
            "low": sum(floor is not None and cosine < floor for cosine in cosines),
            "matching": sum(state.supported for state in found),
            "hits": sum(above),
            "refuted": sum(state.refuted for state in found),
        }

    def save_units(self, run_id: str, units: Mapping[str, float | None]) -> None:
        """Keep sequences as they are now."""
        self._units[run_id].update(units)

    def save_unit_matches(self, run_id: str, found: Mapping[tuple[str, str, str], UnitMatch]) -> None:
        """Keep what rules found."""
        self._found[run_id].update(found)

    def save_tallies(self, run_id: str, tallies: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep the counts of a run, by calibration id."""
        self._tallies[run_id].update({key: dict(counts) for key, counts in tallies.items()})


def _counts(row: Mapping[Any, Any]) -> Counts:
    return {name: value for name, value in row.items() if name not in _TALLY_KEY}
