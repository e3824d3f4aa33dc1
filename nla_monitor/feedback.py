"""Findings given back to the tool that traces the agent: as feedback on the very run that they were found in.

    give = functools.partial(langsmith.Client().create_feedback, session_id=PROJECT_ID)
    with Feedback(monitor, give):
        agent.invoke(...)

Opt-in. A thread of its own looks for new findings and gives them; nobody waits for it. One feedback per alert and run:
an alert that goes on in further runs is given there, too.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

from nla_monitor.decisions import Gated
from nla_monitor.errors import ConfigError, StoreError
from nla_monitor.records import Alert, Severity
from nla_monitor.store.findings import runs_of

__all__ = ["Feedback", "FeedbackStats", "Give"]

logger = logging.getLogger("nla_monitor")

KEY: Final = "nla_monitor."
"""Before a rule's id: the name of the feedback."""
_LOOK_SECONDS: Final = 2.0
_TRIES: Final = 3
_REMEMBERED: Final = 65_536
_ALERTS: Final = 10_000


class Give(Protocol):
    """Takes one feedback; ``langsmith.Client.create_feedback`` is one."""

    def __call__(
        self,
        run_id: Any,
        key: str,
        *,
        score: float | None,
        value: str | None,
        comment: str | None,
        extra: dict[str, Any] | None,
    ) -> Any:
        """Keep it, or raise: it is tried again."""
        ...


@dataclass(frozen=True, slots=True)
class FeedbackStats:
    """Counters since the start."""

    given: int
    failed: int
    """Given up after some tries."""
    by_rule: Mapping[str, int]


class Feedback:
    """Gives findings as feedback until it is closed.

    Args:
        monitor: attached to the model.
        give: called with the run's id (LangChain's, or the span's), the key ``nla_monitor.<rule>``, the severity as a
            score from 0 (info) to 1 (critical) and as a value, the alert's id, and a comment.
        severity: alerts of this severity or above.
        content: comment with the quoted words of the explanation. They leave the database with it.
        interval_seconds: between two looks.

    Raises:
        ConfigError: the severity is none.
    """

    def __init__(
        self,
        monitor: Gated,
        give: Give,
        *,
        severity: Severity | str = Severity.INFO,
        content: bool = False,
        interval_seconds: float = _LOOK_SECONDS,
    ) -> None:
        if severity not in set(Severity):
            raise ConfigError(f"severity={severity!r}: valid are {', '.join(Severity)}")
        self._monitor = monitor
        self._give = give
        self._severity = Severity(severity)
        self._content = content
        self._interval = interval_seconds
        self._stop = threading.Event()
        self._done: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._tries: Counter[tuple[str, str]] = Counter()
        self._seen: dict[str, float] = {}
        self._given: Counter[str] = Counter()
        self._failed = 0
        self._said: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="nla-monitor-feedback", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, timeout: float = 10.0) -> None:
        """Give what is known by now, and stop."""
        self._stop.set()
        self._thread.join(timeout)

    @property
    def stats(self) -> FeedbackStats:
        """Counters since the start."""
        return FeedbackStats(self._given.total(), self._failed, dict(self._given))

    def _run(self) -> None:
        while True:
            last = self._stop.wait(self._interval)
            with self._monitor.guard("feedback"):
                self._look()
            if last:
                return

    def _look(self) -> None:
        try:
            alerts = self._monitor.repository.alerts(run_id=self._monitor.run_id, limit=_ALERTS)
            for alert in alerts:
                if alert.severity.rank >= self._severity.rank and self._seen.get(alert.alert_id) != alert.updated_at:
                    self._tell(alert)
        except StoreError as error:
            self._say("store", f"findings cannot be looked up now, trying on: {error}")

    def _tell(self, alert: Alert) -> None:
        pending = False
        for run_id in runs_of(self._monitor.repository.engine, alert.alert_id):
            key = alert.alert_id, run_id
            if key not in self._done:
                pending = not self._told(alert, run_id) or pending
        if not pending:
            self._seen[alert.alert_id] = alert.updated_at

    def _told(self, alert: Alert, run_id: str) -> bool:
        """Whether it is settled: given, or given up."""
        key = alert.alert_id, run_id
        try:
            self._give(
                run_id,
                f"{KEY}{alert.rule_id}",
                score=alert.severity.rank / (len(Severity) - 1),
                value=alert.severity.value,
                comment=self._comment(alert),
                extra={"nla_monitor_alert": alert.alert_id},
            )
        except Exception as error:  # noqa: BLE001 -- somebody else's client: whatever it raises, it is tried again
            self._tries[key] += 1
            self._say("give", f"feedback could not be given: {error!r}")
            if self._tries[key] < _TRIES:
                return False
            self._failed += 1
        else:
            self._given[alert.rule_id] += 1
        self._tries.pop(key, None)
        self._done[key] = None
        if len(self._done) > _REMEMBERED:
            self._done.popitem(last=False)
        return True

    def _comment(self, alert: Alert) -> str:
        title = f"{alert.rule_title} (a hypothesis; nla-monitor alerts show {alert.alert_id})"
        return f"{title}: “{alert.quote}”" if self._content else title

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            logger.warning("nla_monitor: %s. Counted in stats, not said again", text)
