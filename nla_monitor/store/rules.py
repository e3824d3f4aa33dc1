"""Rules as they were when they ran."""

from __future__ import annotations

from sqlalchemy import Engine, select

from nla_monitor.store.engine import read
from nla_monitor.store.models import RuleRow


def rule_sources(engine: Engine, rule_id: str, version: str = "") -> dict[str, str]:
    """The stored text of a rule's versions that start with ``version``, the oldest first.

    Raises:
        StoreUnavailableError: the database cannot be read.
    """
    query = select(RuleRow.version, RuleRow.source).where(
        RuleRow.rule_id == rule_id, RuleRow.version.startswith(version, autoescape=True)
    )
    with read(engine) as connection:
        rows = connection.execute(query.order_by(RuleRow.first_seen_at, RuleRow.version)).all()
    return {row.version: row.source for row in rows}
