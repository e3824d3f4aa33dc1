"""A monitor of which only the store is real: what is sampled and read is written by the test."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Engine

from nla_monitor.guard import Guard
from nla_monitor.records import ActivationSample, AgentContext, Alert, Match, Phase, Scalar, Severity, uuid7
from nla_monitor.rules import load_text
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.repository import Repository
from tests.store_support import alert, match, reading, run_info, sample

RUN = "run-1"
LIGHT_RULES = {
    rule_id: load_text(
        json.dumps(
            {
                "title": f"The model represents {rule_id}",
                "id": rule_id,
                "severity": "medium",
                "detection": {"words": {"keywords": [f"represents {rule_id}"]}, "condition": "words"},
                "tests": {"positive": [f"it represents {rule_id}"], "negative": ["it does not"]},
            }
        )
    )
    for rule_id in ("evaluation-awareness", "sabotage", "secret-leak")
}
"""Rules with ids of packaged ones, so that their companions speak for them, and next to nothing to compile."""


class Desk:
    """Stands for a ``Monitor``; ``sampled`` and ``read`` do by hand what the capture and the worker do."""

    def __init__(self, engine: Engine) -> None:
        self.guard = Guard()
        self.repository = Repository(engine)
        self.run_id = RUN
        self.tokenizer: Any = None
        self.spool = SqlSpool(engine)
        self.repository.start_run(run_info())
        self.flushes = 0
        self._count = 0

    def know_rules(self) -> None:
        """Keep ``LIGHT_RULES`` as a worker keeps its rules."""
        self.repository.save_rules([(rule.header, rule.spec.source()) for rule in LIGHT_RULES.values()])

    def flush(self, timeout: float = 30.0) -> bool:
        self.flushes += 1
        return True

    def open_session(
        self,
        context: AgentContext,
        token_ids: Sequence[int] | None,
        *,
        traceparent: str | None = None,
        attributes: Mapping[str, Scalar] | None = None,
    ) -> None:
        """No model runs here."""

    def close_session(self, handle: Any, *, completion: Any = None) -> None:
        """No model runs here."""

    def sampled(
        self, conversation: str | None = "talk", *, root: str = "root", call: str = "call", **changes: Any
    ) -> ActivationSample:
        """A sample of an agent, waiting to be read."""
        self._count += 1
        agent = AgentContext(call, root_run_id=root, conversation_id=conversation, generated=True, token_index=0)
        fields = {"phase": Phase.AGENT, "step": None, "agent": agent, "captured_at": time.time(), **changes}
        one = sample(self._count, **fields)
        self.spool.put([one])
        return one

    def read(self, *samples: ActivationSample, text: str = "it reads a line") -> None:
        """A worker has read them; none of its rules matched."""
        self._commit(samples, (), None, text)

    def found(
        self, *samples: ActivationSample, rule: str = "hack", severity: Severity = Severity.HIGH, **changes: Any
    ) -> Alert:
        """A worker has read them, a rule matched each, and its alert fired."""
        matches = [match(one, rule, severity=severity) for one in samples]
        fields = {
            "alert_id": uuid7(),
            "fingerprint": uuid7(),
            "rule_id": rule,
            "severity": severity,
            "agent": samples[0].agent,
        }
        fired = alert(samples[0], **{**fields, **changes})
        self._commit(samples, matches, fired, "it plans to special-case the tests")
        return fired

    def joined(self, fired: Alert, *samples: ActivationSample) -> None:
        """A worker has read them, and their matches went to an alert that fires already."""
        matches = [match(one, fired.rule_id, severity=fired.severity) for one in samples]
        self._commit(samples, matches, fired, "it plans to special-case the tests", event="updated")

    def _commit(
        self,
        samples: Sequence[ActivationSample],
        matches: Sequence[Match],
        fired: Alert | None,
        text: str,
        event: Any = "fired",
    ) -> None:
        self.spool.lease("desk", 1000, 60.0)
        with self.repository.transaction() as tx:
            tx.add_readings([reading(one, text) for one in samples])
            tx.add_matches(list(matches))
            if fired is not None:
                tx.save_alert(fired, list(matches), event)
            tx.ack("desk", [one.sample_id for one in samples])
