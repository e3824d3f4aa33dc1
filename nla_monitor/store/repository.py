"""The store's front door: runs, drops, labels and the worker's transaction; questions are in ``queries``."""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Engine, and_, insert, select, update

from nla_monitor.errors import StoreError
from nla_monitor.records import Alert, RuleHeader, RunInfo, TriageState
from nla_monitor.store.codec import clean, run_row
from nla_monitor.store.dialect import insert_new, serialize, upsert
from nla_monitor.store.engine import write
from nla_monitor.store.models import AlertRow, DropRow, LabelRow, OutboxRow, RuleRow, RunRow, WorkerRow
from nla_monitor.store.outbox import Outbox
from nla_monitor.store.queries import Reader
from nla_monitor.store.transaction import WorkerTransaction


class Repository(Reader, Outbox):
    """Everything that is kept. Safe for several threads and processes; holds no state besides the engine.

    Args:
        engine: from ``store.session.open_engine``, its schema prepared.
        clock: Unix seconds.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        Reader.__init__(self, engine)
        Outbox.__init__(self, engine, clock)

    def dispose(self) -> None:
        """Give the database connections back. The repository opens new ones when it is used again."""
        self._engine.dispose()

    def start_run(self, info: RunInfo) -> None:
        """Store a run; a known ``run_id`` (resumed, or another rank's) keeps its start and is no longer ended.

        Raises:
            StoreUnavailableError: read-only, full, locked or unreachable.
        """
        with write(self._engine) as connection:
            row = run_row(info)
            again = {name: row[name] for name in ("av_hash", "ar_hash") if row[name] is not None} | {"ended_at": None}
            statement = upsert(connection, RunRow).values(row)
            connection.execute(statement.on_conflict_do_update(index_elements=["run_id"], set_=again))

    def end_run(self, run_id: str) -> None:
        """Note that a run is over."""
        with write(self._engine) as connection:
            connection.execute(update(RunRow).where(RunRow.run_id == run_id).values(ended_at=self._clock()))

    def add_drops(self, run_id: str, drops: Mapping[str, int]) -> None:
        """Add to the counts of samples that were never stored, by reason."""
        rows = [
            {"run_id": run_id, "reason": reason, "count": count} for reason, count in sorted(drops.items()) if count
        ]
        if not rows:
            return
        with write(self._engine) as connection:
            statement = upsert(connection, DropRow)
            added = DropRow.count + statement.excluded["count"]
            connection.execute(
                statement.on_conflict_do_update(index_elements=["run_id", "reason"], set_={"count": added}), rows
            )

    def save_rules(self, rules: Iterable[tuple[RuleHeader, str]]) -> None:
        """Keep each rule's YAML under its id and version, so that an alert's rule can always be shown as it was."""
        now = self._clock()
        rows = [
            {
                "rule_id": header.rule_id,
                "version": header.version,
                "title": clean(header.title),
                "severity": str(header.severity),
                "source": clean(source),
                "first_seen_at": now,
            }
            for header, source in rules
        ]
        with write(self._engine) as connection:
            insert_new(connection, RuleRow, rows)

    @contextmanager
    def transaction(self, run_ids: str | Iterable[str] = ()) -> Iterator[WorkerTransaction]:
        """One batch as one transaction: committed at the end of the block, undone by any exception.

        Args:
            run_ids: runs whose windows will be evaluated; other workers wait for them from here on.

        Raises:
            StoreUnavailableError: read-only, full, locked or unreachable; nothing of the block was kept.
        """
        with write(self._engine) as connection:
            yield WorkerTransaction(connection, [run_ids] if isinstance(run_ids, str) else run_ids)

    def label(self, alert_id: str, triage: TriageState, who: str, note: str | None = None) -> Alert:
        """Say what an alert was; returns it with the new label. Earlier labels are kept as history.

        Args:
            alert_id: the id, or a prefix that only one alert has.
            triage: the verdict.
            who: the person.
            note: why.

        Raises:
            StoreError: there is no such alert, or several start so.
        """
        found = self.alert(alert_id)
        if found is None:
            raise StoreError(f"there is no alert {alert_id!r}; see: nla-monitor alerts list")
        now = self._clock()
        with write(self._engine) as connection:
            connection.execute(update(AlertRow).where(AlertRow.alert_id == found.alert_id).values(triage=str(triage)))
            connection.execute(
                insert(LabelRow).values(
                    alert_id=found.alert_id, triage=str(triage), who=clean(who), note=clean(note), created_at=now
                )
            )
        labelled = self.alert(found.alert_id)
        if labelled is None:
            raise StoreError(f"alert {found.alert_id!r} was deleted while it was labelled")
        return labelled

    def add_evidence(self, alert: Alert, evidence: Mapping[str, Any]) -> Alert:
        """Complete the evidence of an alert that is stored already; what is not named stays as it is.

        A sink that has not been told of the alert yet gets it with the new evidence.

        Raises:
            StoreUnavailableError: the database cannot be written.
        """
        mine = AlertRow.alert_id == alert.alert_id
        with write(self._engine) as connection:
            serialize(connection, [alert.run_id])
            known = connection.execute(select(AlertRow.evidence).where(mine)).scalar_one_or_none() or {}
            told = {**known, **clean(evidence)}
            connection.execute(update(AlertRow).where(mine).values(evidence=told))
            waiting = and_(OutboxRow.alert_id == alert.alert_id, OutboxRow.state == "pending")
            for row in connection.execute(select(OutboxRow.outbox_id, OutboxRow.payload).where(waiting)).all():
                payload = row.payload | {"evidence": {**row.payload["evidence"], **clean(evidence)}}
                connection.execute(
                    update(OutboxRow).where(OutboxRow.outbox_id == row.outbox_id).values(payload=payload)
                )
        return dataclasses.replace(alert, evidence=told)

    def heartbeat(self, worker_id: str, started_at: float, info: Mapping[str, Any] | None = None) -> None:
        """Note that this process's worker is alive."""
        row = {
            "worker_id": worker_id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started_at": started_at,
            "seen_at": self._clock(),
            "info": clean(info or {}),
        }
        with write(self._engine) as connection:
            statement = upsert(connection, WorkerRow).values(row)
            changed = {"seen_at": row["seen_at"], "info": statement.excluded["info"]}
            connection.execute(statement.on_conflict_do_update(index_elements=["worker_id"], set_=changed))
