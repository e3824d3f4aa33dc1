"""What judges and classifiers said, by the hash of definition and text: asked once, the same in every replay."""

from __future__ import annotations

import time
from collections.abc import Callable

from sqlalchemy import Engine, select

from nla_monitor.records import Judgement
from nla_monitor.store.codec import clean
from nla_monitor.store.dialect import insert_new
from nla_monitor.store.engine import read, write
from nla_monitor.store.models import JudgementRow


class SqlJudgements:
    """Judgements in the database. Safe for several threads and workers: the first answer to a question stays.

    Args:
        engine: from ``open_engine``.
        clock: Unix seconds.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._clock = clock

    def get(self, key: str) -> Judgement | None:
        """The answer, or None.

        Raises:
            StoreUnavailableError: the database cannot be read.
        """
        columns = (JudgementRow.kind, JudgementRow.verdict, JudgementRow.quote, JudgementRow.score, JudgementRow.model)
        with read(self._engine) as connection:
            row = connection.execute(select(*columns).where(JudgementRow.judgement_id == key)).one_or_none()
        return None if row is None else Judgement(*row)

    def put(self, key: str, judgement: Judgement) -> None:
        """Keep an answer.

        Raises:
            StoreUnavailableError: the database cannot be written.
        """
        row = {
            "judgement_id": key,
            "kind": judgement.kind,
            "verdict": judgement.verdict,
            "score": judgement.score,
            "quote": clean(judgement.quote),
            "model": clean(judgement.model),
            "created_at": self._clock(),
        }
        with write(self._engine) as connection:
            insert_new(connection, JudgementRow, [row])
