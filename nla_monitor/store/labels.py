"""What people said of alerts, counted."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Engine, func, select

from nla_monitor.records import TriageState
from nla_monitor.store.engine import read
from nla_monitor.store.models import AlertRow


def count_labels(engine: Engine, *, rule_ids: Collection[str] | None = None) -> list[tuple[str, str, TriageState, int]]:
    """How many alerts of each rule and version stand under each label: ``(rule, version, label, count)``.

    Raises:
        StoreUnavailableError: the database cannot be read.
    """
    columns = (AlertRow.rule_id, AlertRow.rule_version, AlertRow.triage)
    query = select(*columns, func.count()).group_by(*columns).order_by(*columns)
    if rule_ids is not None:
        query = query.where(AlertRow.rule_id.in_(sorted(rule_ids)))
    with read(engine) as connection:
        rows = connection.execute(query).all()
    return [(rule_id, version, TriageState(triage), int(count)) for rule_id, version, triage, count in rows]
