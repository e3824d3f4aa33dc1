"""An alert as a finding on the span in which it was found, for trace UIs and for notes on a run.

Only what fired is told there. A span lies in the past: that the window over it has ended since takes nothing back.
What the model said or read (quote, explanation) is content, and part of it only when asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from nla_monitor.records import PROXY, Alert

PREFIX: Final = "nla/"
"""Before the rule's id: apart from other people's annotations (Phoenix keeps ``note`` for itself)."""
SHORT: Final = 200
"""Characters of a title, a name or a figure."""
LONG: Final = 8000
"""Characters of an explanation, and of a guarantee."""
IN_PROXY: Final = "read in a proxy of the model that answered"
"""For a person: the activations are another model's, which was given the same text."""
_TRACEPARENT: Final = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_CONTROLS: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


class Place(NamedTuple):
    """A span that its backend has, or will have."""

    trace_id: str
    """32 hexadecimal digits."""
    span_id: str
    """16 hexadecimal digits."""


class Unplaced(NamedTuple):
    """Why there is no such span."""

    reason: str


def place_of(alert: Alert) -> Place | Unplaced:
    """The span that the alert's exhibit was captured in, by its W3C ``traceparent`` (version 00)."""
    if not alert.traceparent:
        return Unplaced("no trace context")
    found = _TRACEPARENT.fullmatch(alert.traceparent)
    if found is None or not int(found[1], 16) or not int(found[2], 16):
        return Unplaced("no valid trace context")
    if not int(found[3], 16) & 1:
        return Unplaced("a trace that was not sampled, so no backend has it")
    return Place(found[1], found[2])


def name_of(alert: Alert) -> str:
    """Name of an annotation, a score or a note: the rule's, so that findings of one rule are seen together."""
    return tidy(PREFIX + alert.rule_id, SHORT)


def facts_of(alert: Alert) -> dict[str, Any]:
    """Figures of the finding by name, for a program; no content in them.

    Every way out tells these, so that none says less than another of how sure the finding is.
    """
    facts: dict[str, object] = {
        "alert_id": alert.alert_id,
        "run_id": alert.run_id,
        "sample_id": alert.sample_id,
        "rule": alert.rule_id,
        "rule_title": alert.rule_title,
        "rule_version": alert.rule_version,
        "severity": alert.severity.value,
        "matches": alert.matches,
        "first_step": alert.first_step,
        "last_step": alert.last_step,
        "position": alert.position,
        "cosine": alert.cosine,
        "fve": alert.fve,
        "fve_denominator": alert.denominator_name,
        "calibration": alert.calibration.get("status", "uncalibrated"),
        "guarantee": alert.calibration.get("says"),
        "proxy": True if alert.evidence.get(PROXY) else None,
        "runbook": alert.runbook,
    }
    bounds = {"guarantee": LONG}
    return {name: _plain(value, bounds.get(name, SHORT)) for name, value in facts.items() if value is not None}


def guarantee(facts: Mapping[str, object]) -> str:
    """For a person: what stands behind the finding, in the sentence of its calibration if it has one."""
    status, says = str(facts["calibration"]), str(facts.get("guarantee", ""))
    return says if says.startswith(status) else ": ".join(part for part in (status, says) if part)


def told(alert: Alert, *, content: bool) -> str:
    """The finding in a few lines, for a person."""
    lines = [f"[{alert.severity.value}] {tidy(alert.rule_title, SHORT)}", _how_sure(alert)]
    if alert.evidence.get(PROXY):
        lines.append(f"{IN_PROXY.capitalize()}.")
    if content:
        lines += [f"Quote: {alert.quote}", f"Explanation: {alert.explanation}"]
    lines.append(f"A hypothesis until a person labels it: nla-monitor alerts show {alert.alert_id}")
    if alert.runbook:
        lines.append(tidy(alert.runbook, 2 * SHORT))
    return tidy("\n".join(lines), LONG)


def headline(alert: Alert) -> str:
    """The finding in one line, with its state as it is now; no content in it."""
    title = tidy(alert.rule_title, SHORT)
    line = f"{alert.state.value}: [{alert.severity.value}] {title} — {_how_sure(alert)}; id {alert.alert_id}"
    return " ".join(line.split())


def _how_sure(alert: Alert) -> str:
    matches = "1 match" if alert.matches == 1 else f"{alert.matches} matches"
    fidelity = "no fidelity"
    if alert.fve is not None:
        fidelity = f"FVE {alert.fve:.2f} ({tidy(alert.denominator_name or 'unnamed denominator', SHORT)})"
    where = f"step {alert.last_step}, " if alert.last_step is not None else ""
    status = tidy(str(alert.calibration.get("status", "uncalibrated")), SHORT)
    return f"{where}position {alert.position}, {matches}, {fidelity}, {status}"


def tidy(text: str, length: int) -> str:
    """``text`` without characters that JSON receivers and their databases refuse, and not longer than ``length``."""
    clean = _CONTROLS.sub("\ufffd", text)
    return clean if len(clean) <= length else clean[: length - 1] + "…"


def _plain(value: object, length: int) -> object:
    """A value that is JSON for everybody: NaN and infinities are not."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return tidy(value, length) if isinstance(value, str) else value
