"""When an alert fires, goes on and resolves: a pure function of the window's verdict and the alert so far.

    no alert ── window holds ──▶ firing ── window holds no longer, and quiet for long enough ──▶ resolved
                                  ▲  │
                                  └──┘ window holds, or another match came

After a resolve, the same condition makes a new alert with the same fingerprint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from nla_monitor.records import Alert, AlertState, Match, Reading, RuleHeader, Scalar, TriageState, WindowVerdict

Event = Literal["fired", "updated", "resolved"]

_ROUNDING: Final = 1e-3
"""Seconds by which a sum of times may be taken too early."""

UNCALIBRATED: Final[Mapping[str, object]] = MappingProxyType({"status": "uncalibrated"})
"""Said of every alert whose rule no calibration set has certified."""


@dataclass(frozen=True, slots=True)
class Transition:
    """What became of an alert."""

    alert: Alert | None
    """The alert as it is now; None when there was and is none."""
    event: Event | None
    """What happened; None when nothing is to be stored."""


def fingerprint(rule_id: str, run_id: str, group: Mapping[str, Scalar]) -> str:
    """Identity of a condition: 32 hex digits over rule, run and group. Rule versions share it."""
    return _digest([rule_id, run_id, sorted(group.items())])


def advance(  # noqa: PLR0917 -- the condition, its verdict and its alert, in this order everywhere
    header: RuleHeader,
    group: Mapping[str, Scalar],
    run_id: str,
    verdict: WindowVerdict,
    current: Alert | None,
    exhibit: Reading | None,
    *,
    step: int | None,
    now: float,
    evidence: Mapping[str, object],
    calibration: Mapping[str, object] = UNCALIBRATED,
) -> Transition:
    """Next state of one condition. The same arguments always give the same alert, its id included.

    Args:
        header: the rule.
        group: values of the window's ``group_by`` keys.
        run_id: the run.
        verdict: what the window counted.
        current: the firing alert of this condition, if there is one.
        exhibit: the matching reading that shows it best; only looked at when an alert fires. None leaves the
            alert with its match's quote alone.
        step: how far the run is, in optimizer steps; None where there are none.
        now: how far the run is, Unix seconds.
        evidence: results of controls, for a new alert.
        calibration: what certifies the rule, for a new alert.
    """
    if current is None:
        if not verdict.firing or not verdict.matches:
            return Transition(None, None)
        alert = _opened(header, group, run_id, verdict, exhibit, now=now, evidence=evidence, calibration=calibration)
        return Transition(alert, "fired")
    seen = _seen(current, verdict)
    if verdict.firing:
        # Stored even if it looks the same: a match that came late and out of order has to be linked to it.
        return Transition(seen, "updated")
    if _quiet(header, seen, step, now):
        resolved = dataclasses.replace(seen, state=AlertState.RESOLVED, resolved_at=now)
        return Transition(resolved, "resolved")
    # Still held by keep_firing: worth storing only when a newer match came.
    newer = (seen.last_step, seen.updated_at) != (current.last_step, current.updated_at)
    return Transition(seen if newer else current, "updated" if newer else None)


def _opened(
    header: RuleHeader,
    group: Mapping[str, Scalar],
    run_id: str,
    verdict: WindowVerdict,
    exhibit: Reading | None,
    *,
    now: float,
    evidence: Mapping[str, object],
    calibration: Mapping[str, object],
) -> Alert:
    key = fingerprint(header.rule_id, run_id, group)
    match = match_of(verdict.matches, exhibit)
    steps = _steps(verdict.matches)
    fidelity = exhibit.fidelity if exhibit else None
    sample = exhibit.sample if exhibit else None
    return Alert(
        alert_id=_digest([key, [item.match_id for item in verdict.matches]])[:16],
        fingerprint=key,
        run_id=run_id,
        rule_id=header.rule_id,
        rule_title=header.title,
        rule_version=header.version,
        severity=header.severity,
        state=AlertState.FIRING,
        triage=TriageState.OPEN,
        group=dict(group),
        first_step=min(steps, default=None),
        last_step=max(steps, default=None),
        fired_at=now,
        updated_at=now,
        resolved_at=None,
        matches=len(verdict.matches),
        sample_id=match.sample_id,
        quote=match.quote,
        position=match.position,
        context=sample.context if sample else None,
        explanation=exhibit.explanation.text if exhibit else "",
        cosine=fidelity.cosine if fidelity else None,
        fve=fidelity.fve if fidelity else None,
        denominator_name=fidelity.denominator_name if fidelity else None,
        evidence=dict(evidence),
        calibration=dict(calibration),
        agent=sample.agent if sample else None,
        runbook=header.runbook,
        traceparent=sample.traceparent if sample else None,
    )


def match_of(matches: tuple[Match, ...], exhibit: Reading | None) -> Match:
    """The match of the reading that an alert shows; the newest one where it shows none."""
    if exhibit is None:
        return matches[-1]
    return next((match for match in matches if match.sample_id == exhibit.sample_id), matches[-1])


def _seen(current: Alert, verdict: WindowVerdict) -> Alert:
    """The alert with what the window shows; ``last_step`` and ``updated_at`` are those of its newest match."""
    newest = max((match.captured_at for match in verdict.matches), default=current.updated_at)
    return dataclasses.replace(
        current,
        last_step=max((*_steps(verdict.matches), *_known(current.last_step)), default=None),
        updated_at=max(current.updated_at, newest),
        # At least so many; the store, which knows each match that was ever linked, counts exactly.
        matches=max(current.matches, len(verdict.matches)),
    )


def _quiet(header: RuleHeader, alert: Alert, step: int | None, now: float) -> bool:
    """Whether ``keep_firing`` has run out, in steps and in seconds, since the last match."""
    if now - alert.updated_at < header.keep_firing_seconds:
        return False
    return step is None or alert.last_step is None or step - alert.last_step >= header.keep_firing_steps


def quiet_from(header: RuleHeader, alert: Alert, step: int | None, now: float) -> tuple[float, float]:
    """The step, or the time, from which on a firing alert whose window no longer holds may resolve."""
    due = alert.updated_at + header.keep_firing_seconds
    if now < due - _ROUNDING:
        return math.inf, due - _ROUNDING
    if step is None or alert.last_step is None:
        return -math.inf, -math.inf
    return float(alert.last_step + header.keep_firing_steps), math.inf


def _steps(matches: Iterable[Match]) -> list[int]:
    return [match.step for match in matches if match.step is not None]


def _known(step: int | None) -> tuple[int, ...]:
    return () if step is None else (step,)


def _digest(value: object) -> str:
    text = json.dumps(value, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
