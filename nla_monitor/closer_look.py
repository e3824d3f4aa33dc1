"""Agents in whose runs something was found are looked at more closely: brings new matches back to the capture.

An alert fires once for its group, however many runs add to it; a match is of one model call. So matches are asked for.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Engine, func, or_, select

from nla_monitor.store.engine import read
from nla_monitor.store.models import MatchRow, SampleRow, table

_MANY: Final = 1_000


class CloserLook:
    """Which agents' runs had a match since the last time it was asked.

    Args:
        engine: of the run's database.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._since: float | None = None
        self._at_since: frozenset[str] = frozenset()

    def roots(self, run_id: str) -> set[str]:
        """Ids of the outermost runs with a new match that no control refuted.

        Raises:
            StoreError: the database cannot be read.
        """
        matches, samples = table(MatchRow).c, table(SampleRow).c
        root = func.coalesce(samples.agent_root_run_id, samples.agent_run_id)
        query = (
            select(matches.match_id, matches.created_at, root)
            .join(table(SampleRow), samples.sample_id == matches.sample_id)
            .where(matches.run_id == run_id, samples.agent_run_id.is_not(None))
            .where(or_(matches.supported.is_(None), matches.supported))
            .order_by(matches.created_at.desc())
            .limit(_MANY)
        )
        if self._since is not None:
            query = query.where(matches.created_at >= self._since)
        with read(self._engine) as connection:
            rows = connection.execute(query).all()
        if not rows:
            return set()
        # A match of the same moment may be committed after the look that saw the others.
        seen, self._since = self._at_since, rows[0][1]
        self._at_since = frozenset(match_id for match_id, created_at, _ in rows if created_at == self._since)
        return {str(name) for match_id, _, name in rows if match_id not in seen}
