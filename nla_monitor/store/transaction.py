"""One worker batch as one transaction: readings, failures, matches, alerts, outbox, acknowledgement; or nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import count
from typing import Literal

from sqlalchemy import Connection, and_, delete, func, insert, or_, select, update

from nla_monitor.errors import StoreError
from nla_monitor.records import Alert, AlertState, Match, Reading, Scalar, StageFailure, Support
from nla_monitor.store.calibrations import Tallies
from nla_monitor.store.codec import alert_of, alert_row, clean, group_key, match_of, match_row, reading_row, support_of
from nla_monitor.store.dialect import insert_new, locked, serialize, server_time, upsert
from nla_monitor.store.models import (
    AlertMatchRow,
    AlertRow,
    FailureRow,
    MatchRow,
    OutboxRow,
    ReadingRow,
    SampleRow,
    SpoolRow,
    table,
)
from nla_monitor.store.queries import not_refuted, reading_query, to_reading

AlertEvent = Literal["fired", "updated", "resolved"]

_KEPT_ON_UPDATE = frozenset({"alert_id", "triage"})
"""Columns of an alert that a worker never overwrites: its key, and what people said meanwhile."""


class WorkerTransaction:
    """What a worker may do inside ``Repository.transaction``. Nothing is visible to others before the commit.

    Belongs to one thread; unusable after the ``with`` block.
    """

    def __init__(self, connection: Connection, run_ids: Iterable[str] = ()) -> None:
        self._connection = connection
        self._now = server_time(connection)
        serialize(connection, run_ids)

    @property
    def tallies(self) -> Tallies:
        """Counts of runs against calibrations."""
        return Tallies(self._connection)

    def still_owned(self, owner: str, sample_ids: Sequence[str]) -> set[str]:
        """Those samples whose lease is still this owner's; the others were given to another worker meanwhile.

        Windows are evaluated for one batch of a run at a time: the samples' runs are locked until the commit.
        """
        query = select(SpoolRow.sample_id).where(
            SpoolRow.sample_id.in_(list(sample_ids)), SpoolRow.lease_owner == owner, SpoolRow.state == "leased"
        )
        owned = set(self._connection.execute(locked(self._connection, query)).scalars())
        runs = select(SampleRow.run_id).where(SampleRow.sample_id.in_(owned)).distinct()
        serialize(self._connection, self._connection.execute(runs).scalars())
        return owned

    def ack(self, owner: str, sample_ids: Collection[str]) -> int:
        """Take samples out of the queue for good; those no longer leased by ``owner`` are left alone."""
        return self._connection.execute(
            delete(SpoolRow).where(
                SpoolRow.sample_id.in_(list(sample_ids)), SpoolRow.lease_owner == owner, SpoolRow.state == "leased"
            )
        ).rowcount

    def add_readings(self, readings: Sequence[Reading]) -> int:
        """Store readings in the order in which they are judged; one that exists for the sample and AV stays as it is.

        Returns:
            How many were new.
        """
        runs = sorted({reading.sample.run_id for reading in readings})
        places = {run_id: count(self._judged(run_id)) for run_id in runs}
        rows = [
            reading_row(reading) | {"seq": next(places[reading.sample.run_id]), "created_at": self._now}
            for reading in readings
        ]
        return insert_new(self._connection, ReadingRow, rows)

    def _judged(self, run_id: str) -> int:
        """The next place in the run's order. Workers wait for each other here: the run is locked until the commit."""
        last = self._connection.execute(select(func.max(ReadingRow.seq)).where(ReadingRow.run_id == run_id)).scalar()
        return 0 if last is None else last + 1

    def add_failures(self, failures: Sequence[StageFailure], max_attempts: int) -> set[str]:
        """Store failures; their samples go back into the queue, or are set aside as failed.

        Returns:
            The samples that will be tried again: retryable, with attempts left.
        """
        if not failures:
            return set()
        self._connection.execute(
            insert(FailureRow),
            [
                {
                    "sample_id": failure.sample_id,
                    "stage": failure.stage,
                    "error": clean(failure.error),
                    "retryable": failure.retryable,
                    "created_at": self._now,
                }
                for failure in failures
            ],
        )
        final = {failure.sample_id for failure in failures if not failure.retryable}
        attempts = select(SpoolRow.sample_id, SpoolRow.attempts).where(
            SpoolRow.sample_id.in_([failure.sample_id for failure in failures])
        )
        found = {key: int(count) for key, count in self._connection.execute(attempts)}
        retrying = {key for key, count in found.items() if key not in final and count < max_attempts}
        self._requeue(retrying, "waiting")
        self._requeue(found.keys() - retrying, "failed")
        return retrying

    def _requeue(self, sample_ids: Collection[str], state: str) -> None:
        if sample_ids:
            self._connection.execute(
                update(SpoolRow)
                .where(SpoolRow.sample_id.in_(list(sample_ids)))
                .values(state=state, lease_owner=None, lease_until=None)
            )

    def add_matches(self, matches: Sequence[Match], supports: Mapping[str, Support] | None = None) -> int:
        """Store matches with what controls said of them; a known ``match_id`` is ignored. Returns how many were new."""
        rows = [match_row(match, (supports or {}).get(match.match_id)) for match in matches]
        return insert_new(self._connection, MatchRow, [row | {"created_at": self._now} for row in rows])

    def supports(self, match_ids: Collection[str]) -> dict[str, Support]:
        """What the controls said of matches, by ``match_id``, as far as any was run."""
        query = select(*table(MatchRow).c).where(MatchRow.match_id.in_(list(match_ids)))
        found = [support_of(row) for row in self._connection.execute(query).mappings()]
        return {support.match_id: support for support in found if support is not None}

    def window_matches(
        self,
        rule_id: str,
        rule_version: str,
        run_id: str,
        group: Mapping[str, Scalar],
        *,
        since_step: int | None = None,
        since_time: float | None = None,
    ) -> list[Match]:
        """Matches of one rule, run and group that no control refuted, this transaction's included, oldest first.

        Args:
            rule_id: the rule.
            rule_version: its content hash; other versions count for themselves.
            run_id: the run.
            group: values of the window's ``group_by`` keys.
            since_step: first optimizer step that counts.
            since_time: first moment of capture that counts, Unix seconds; with both, for matches without a step only.
        """
        query = select(*table(MatchRow).c).where(
            MatchRow.run_id == run_id,
            MatchRow.rule_id == rule_id,
            MatchRow.rule_version == rule_version,
            MatchRow.group_key == group_key(group),
            not_refuted(),
        )
        if since_step is not None and since_time is not None:
            timed = and_(MatchRow.step.is_(None), MatchRow.captured_at >= since_time)
            query = query.where(or_(MatchRow.step >= since_step, timed))
        elif since_step is not None:
            query = query.where(MatchRow.step >= since_step)
        elif since_time is not None:
            query = query.where(MatchRow.captured_at >= since_time)
        # Steps first: several ranks and workers deliver out of order, and a replay must see one order.
        query = query.order_by(func.coalesce(MatchRow.step, -1), MatchRow.captured_at, MatchRow.match_id)
        return [match_of(row) for row in self._connection.execute(query).mappings()]

    def progress(self, run_id: str) -> tuple[int | None, float]:
        """How far the run's readings reach: highest step (None: no steps), newest capture (0.0: no readings)."""
        query = select(func.max(ReadingRow.step), func.max(ReadingRow.captured_at)).where(ReadingRow.run_id == run_id)
        step, captured_at = self._connection.execute(query).one()
        return step, captured_at or 0.0

    def current_alert(self, fingerprint: str) -> Alert | None:
        """The firing alert of a condition, if there is one."""
        query = select(*table(AlertRow).c).where(
            AlertRow.fingerprint == fingerprint, AlertRow.state == AlertState.FIRING
        )
        row = self._connection.execute(query).mappings().one_or_none()
        return alert_of(row) if row else None

    def firing_alerts(self, run_id: str) -> list[Alert]:
        """All firing alerts of a run, oldest first."""
        query = select(*table(AlertRow).c).where(AlertRow.run_id == run_id, AlertRow.state == AlertState.FIRING)
        query = query.order_by(AlertRow.fired_at, AlertRow.alert_id)
        return [alert_of(row) for row in self._connection.execute(query).mappings()]

    def reading(self, sample_id: str) -> Reading | None:
        """The newest reading of a sample."""
        query = reading_query().where(SampleRow.sample_id == sample_id).order_by(ReadingRow.created_at.desc()).limit(1)
        row = self._connection.execute(query).mappings().one_or_none()
        return to_reading(row) if row else None

    def save_alert(self, alert: Alert, matches: Sequence[Match], event: AlertEvent) -> Alert:
        """Store an alert with the matches that speak for it, and tell the outbox when it fired or resolved.

        ``matches`` of the stored alert counts each match once, however often a window showed it; what people said of
        the alert is kept.

        Returns:
            The alert as stored.

        Raises:
            StoreError: another alert is firing for the same condition.
        """
        self._write_alert(alert)
        insert_new(
            self._connection,
            AlertMatchRow,
            [{"alert_id": alert.alert_id, "match_id": match.match_id} for match in matches],
        )
        stored = self._recounted(alert.alert_id)
        if event != "updated":
            self._tell(stored, event)
        return stored

    def _write_alert(self, alert: Alert) -> None:
        other = self.current_alert(alert.fingerprint)
        if alert.state is AlertState.FIRING and other is not None and other.alert_id != alert.alert_id:
            raise StoreError(f"alert {other.alert_id} is firing for this condition already; update or resolve it first")
        row = alert_row(alert)
        statement = upsert(self._connection, AlertRow).values(row)
        changed = {name: statement.excluded[name] for name in row if name not in _KEPT_ON_UPDATE}
        self._connection.execute(statement.on_conflict_do_update(index_elements=["alert_id"], set_=changed))

    def _recounted(self, alert_id: str) -> Alert:
        linked = select(func.count()).where(AlertMatchRow.alert_id == alert_id).scalar_subquery()
        mine = AlertRow.alert_id == alert_id
        self._connection.execute(update(AlertRow).where(mine).values(matches=linked))
        return alert_of(self._connection.execute(select(*table(AlertRow).c).where(mine)).mappings().one())

    def _tell(self, alert: Alert, event: AlertEvent) -> None:
        self._connection.execute(
            insert(OutboxRow).values(
                kind=event,
                alert_id=alert.alert_id,
                payload=alert_row(alert),
                state="pending",
                attempts=0,
                next_at=self._now,
                delivered=[],
                created_at=self._now,
            )
        )
