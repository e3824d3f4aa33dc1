"""What an alert may set off in the host: ``response`` of its rule, or else what the config says for its severity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nla_monitor.alerts.finding import IN_PROXY
from nla_monitor.records import PROXY, Alert, RuleHeader, Severity


class Responses:
    """Decides, per alert, whether to log it, stop the run or tag the agent's run.

    Args:
        headers: of the rules in use, by id.
        log: whether alerts of rules without ``response`` are logged.
        stop_on: severity from which alerts of rules without ``response`` ask to stop; None: they never do.
    """

    def __init__(self, headers: Mapping[str, RuleHeader], *, log: bool, stop_on: Severity | None) -> None:
        self._named: dict[str, Sequence[str] | None] = {key: header.responses for key, header in headers.items()}
        self._log = log
        self._stop_on = stop_on
        self._tags: dict[str, dict[str, None]] = {}

    @property
    def may_stop(self) -> bool:
        """Whether any alert could ask to stop."""
        return self._stop_on is not None or any("stop" in named for named in self._named.values() if named is not None)

    def logs(self, alert: Alert) -> bool:
        """Whether to log it."""
        named = self._named.get(alert.rule_id)
        return self._log and (named is None or "log" in named)

    def stops(self, alert: Alert) -> bool:
        """Whether it asks to stop the run."""
        named = self._named.get(alert.rule_id)
        if named is not None:
            return "stop" in named
        return self._stop_on is not None and alert.severity.rank >= self._stop_on.rank

    def tag(self, alert: Alert) -> None:
        """Marks the agent's run (the training run without an agent), if the rule asks for it."""
        if "tag" not in (self._named.get(alert.rule_id) or ()):
            return
        runs = (alert.agent.agent_run_id, alert.agent.root_run_id) if alert.agent else (alert.run_id,)
        for run in runs:
            if run is not None:
                self._tags.setdefault(run, {})[alert.rule_id] = None

    def tags(self, run: str | None = None) -> tuple[str, ...]:
        """Ids of the rules that tagged a run (an agent's, or the monitored one), in order; of all runs without one."""
        marked = list(self._tags.items())  # another thread may tag meanwhile
        chosen = [tuple(rules) for key, rules in marked if run in {None, key}]
        return tuple(dict.fromkeys(rule for rules in chosen for rule in rules))


def describe(alert: Alert) -> str:
    """One line for a log: state, severity, rule, where, how sure."""
    where = f"step {alert.last_step}" if alert.last_step is not None else "no step"
    fidelity = f"FVE {alert.fve:.2f} ({alert.denominator_name})" if alert.fve is not None else "no fidelity"
    status = alert.calibration.get("status", "uncalibrated")
    proxy = f", {IN_PROXY}" if alert.evidence.get(PROXY) else ""
    return (
        f"nla_monitor alert {alert.state.value}: [{alert.severity.value}] {alert.rule_title} — {where}, "
        f"position {alert.position}, {alert.matches} matches, {fidelity}, {status}{proxy}; id {alert.alert_id}"
    )
