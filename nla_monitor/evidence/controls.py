"""What an alert says of all its controls together: the exhibit's results, and the window's.

Why recurrence: a claim that comes back over positions is truer than a single one (facts behind it: ARCHITECTURE.md,
"What an alert may claim").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Final

from nla_monitor.evidence.bounds import Bound
from nla_monitor.records import IMPLAUSIBLE, PROXY, SOURCE, Match, Reading, Support, WindowVerdict

AWAITED: Final = "not measured yet; a worker does so once the alert is stored"
"""Why a control of a new alert has no result; whatever still says so when its worker is gone is completed later."""


def recurrence(matches: Sequence[Match]) -> dict[str, int]:
    """In how many readings, sequences, positions and steps the claim came back."""
    return {
        "readings": len({match.sample_id for match in matches}),
        "sequences": len({match.sequence_id for match in matches}),
        "positions": len({(match.sequence_id, match.position) for match in matches}),
        "steps": len({match.step for match in matches if match.step is not None}),
    }


def recurred(evidence: Mapping[str, object], verdict: WindowVerdict) -> dict[str, object]:
    """The evidence of a firing alert with the widest recurrence that its window has shown so far."""
    before, now = evidence.get("recurrence"), recurrence(verdict.matches)
    known = before if isinstance(before, Mapping) else {"needed": verdict.needed}
    return {**evidence, "recurrence": {**known, **{key: max(count, known.get(key, 0)) for key, count in now.items()}}}


def collect_evidence(
    verdict: WindowVerdict,
    exhibit: Reading,
    match: Match,
    supports: Mapping[str, Support],
    bounds: Mapping[str, Bound],
) -> dict[str, object]:
    """What speaks for and against an alert, as JSON.

    By name of the control: ``exhibit`` (the result for the reading that is shown), ``median`` and ``measured`` (over
    the window's matches), ``required`` and ``passed`` where the rule requires it. Beside them ``recurrence``,
    ``raw_norm`` (L2), ``not_run`` (by name, why the exhibit has no result), ``truncated``, and of an exhibit
    that was not taken in the answering model's own pass ``proxy`` and ``implausible`` (``records.PROXY``).

    Args:
        verdict: the window that holds.
        exhibit: the reading that is shown.
        match: its match.
        supports: what was measured of the window's matches, by ``match_id``.
        bounds: what the rule requires.
    """
    evidence: dict[str, object] = {
        "recurrence": {**recurrence(verdict.matches), "needed": verdict.needed},
        "raw_norm": round(exhibit.sample.norm, 4),
    }
    shown = supports.get(match.match_id) or Support(match.match_id, supported=True)
    measured = [supports[one.match_id].controls for one in verdict.matches if one.match_id in supports]
    for name in sorted({name for results in measured for name in results}):
        values = [results[name] for results in measured if name in results]
        spread = {"median": round(median(values), 4), "measured": len(values)}
        evidence[name] = _result(name, shown, bounds) | spread
    if exhibit.explanation.truncated:
        evidence["truncated"] = True
    attributes = exhibit.sample.attributes
    if SOURCE in attributes:
        evidence |= {name: True for name in (PROXY, IMPLAUSIBLE) if attributes.get(name) is True}
    return completed(evidence, shown, bounds)


def awaiting(evidence: Mapping[str, object], names: Iterable[str]) -> dict[str, object]:
    """The evidence of a new alert, which says of every control in ``names`` without a result that it is to come."""
    known = evidence.get("not_run")
    why = dict(known) if isinstance(known, Mapping) else {}
    found = {name: evidence.get(name) for name in names if name not in why}
    lacking = [name for name, result in found.items() if not isinstance(result, Mapping) or "exhibit" not in result]
    return {**evidence, "not_run": why | dict.fromkeys(lacking, AWAITED)}


def completed(evidence: Mapping[str, object], shown: Support, bounds: Mapping[str, Bound]) -> dict[str, object]:
    """The evidence of an alert with all that is known of its exhibit.

    Args:
        evidence: as collected so far.
        shown: what was measured of the exhibit's match.
        bounds: what the rule requires.
    """
    result = {name: value for name, value in evidence.items() if name != "not_run"}
    for name in shown.controls:
        before = result.get(name)
        result[name] = (dict(before) if isinstance(before, Mapping) else {}) | _result(name, shown, bounds)
    missing = {name: "it was not measured" for name in bounds if name not in shown.controls}
    result |= {name: _result(name, shown, bounds) for name in missing if name not in result}
    not_run = missing | {name: why for name, why in shown.not_run.items() if name not in shown.controls}
    return result | ({"not_run": not_run} if not_run else {})


def _result(name: str, shown: Support, bounds: Mapping[str, Bound]) -> dict[str, object]:
    """The exhibit's own result; nothing when it has none."""
    bound, value = bounds.get(name), shown.controls.get(name)
    found: dict[str, object] = {"required": bound.document()} if bound is not None else {}
    if value is not None:
        found["exhibit"] = round(value, 4)
        found |= {"passed": bound.holds(value)} if bound is not None else {}
    return found


def best_shown(pairs: Sequence[tuple[Reading, Match]]) -> tuple[Reading, Match]:
    """What an alert shows: the match whose explanation reconstructs best; ties go to the earliest.

    Raises:
        ValueError: there is none.
    """
    return max(pairs, key=lambda pair: pair[0].fidelity.cosine if pair[0].fidelity is not None else 0.0)
