"""What ``alerts.judge`` needs of a store, in memory: the matches and alerts of a replay. Nothing of it is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from nla_monitor.alerts.lifecycle import Event
from nla_monitor.records import Alert, AlertState, Match, Scalar
from nla_monitor.store.codec import group_key


class Ledger:
    """Matches that count, and the alerts that came of them, with the meaning of ``store.transaction``."""

    def __init__(self) -> None:
        self.alerts: dict[str, Alert] = {}
        """By id, in the order in which they fired."""
        self._matches: dict[tuple[str, str, str, str], list[Match]] = {}
        self._linked: dict[str, set[str]] = {}
        self._firing: dict[str, dict[str, Alert]] = {}

    def add_matches(self, matches: Iterable[Match]) -> None:
        """Matches that no control refuted."""
        for match in matches:
            key = (match.run_id, match.rule_id, match.rule_version, group_key(match.group))
            self._matches.setdefault(key, []).append(match)

    def firing_alerts(self, run_id: str) -> list[Alert]:
        """All firing alerts of a run, oldest first."""
        return sorted(self._firing.get(run_id, {}).values(), key=lambda alert: (alert.fired_at, alert.alert_id))

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
        """Matches of one rule, run and group, oldest first; see ``WorkerTransaction.window_matches``."""
        mine = self._matches.get((run_id, rule_id, rule_version, group_key(group)), [])
        found = [match for match in mine if _counts(match, since_step, since_time)]
        return sorted(found, key=_moment)

    def save_alert(self, alert: Alert, matches: Sequence[Match], _event: Event) -> Alert:
        """Keep an alert; its ``matches`` counts each match that was ever linked to it once."""
        linked = self._linked.setdefault(alert.alert_id, set())
        linked.update(match.match_id for match in matches)
        stored = dataclasses.replace(alert, matches=len(linked))
        self.alerts[alert.alert_id] = stored
        firing = self._firing.setdefault(alert.run_id, {})
        if stored.state is AlertState.FIRING:
            firing[stored.alert_id] = stored
        else:
            firing.pop(stored.alert_id, None)
        return stored

    def linked(self, alert_id: str) -> frozenset[str]:
        """Ids of the matches that speak for an alert."""
        return frozenset(self._linked[alert_id])


def _moment(match: Match) -> tuple[int, float, str]:
    return -1 if match.step is None else match.step, match.captured_at, match.match_id


def _counts(match: Match, since_step: int | None, since_time: float | None) -> bool:
    if since_step is None:
        return since_time is None or match.captured_at >= since_time
    if match.step is not None:
        return match.step >= since_step
    return since_time is not None and match.captured_at >= since_time
