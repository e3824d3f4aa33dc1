"""Headers of other standards, unchanged: Sigma 2.1 and ATR 1.0 (Agent Threat Rules).

Most keys stand in ``schema.Header`` as they are. What the standards spell differently is put in its place here:
Sigma's ``level`` is our ``severity``, ATR's ``test_cases`` are our ``tests``. What they look at (Windows events, tool
calls) is no explanation of an activation, so their ``logsource`` and ``detection`` are refused, with the way to turn
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from nla_monitor.rules.document import Document
from nla_monitor.rules.problems import BadRule, Path

IMPORT_HINT: Final = "turn it with: nla-monitor rules import FILE -o OUT"
_OURS: Final = {"product": "nla", "category": "activation_explanation"}
_INPUTS: Final = ("input", "tool_response", "agent_output", "content")
_LISTS: Final = {"true_positives": "triggered", "true_negatives": "not_triggered"}
_HOMES: Final = {"triggered": "positive", "not_triggered": "negative"}


def adopt(document: Document) -> None:
    """Puts what the standards spell differently in its place, lines and all.

    Raises:
        BadRule: the rule looks at something else than explanations, or its test cases hold no text.
    """
    _level(document)
    _refuse_foreign(document.data)
    if "test_cases" in document.data and "tests" not in document.data:
        _test_cases(document)


def _level(document: Document) -> None:
    """With both given, ``level`` stays and is refused as unknown."""
    if "level" in document.data and "severity" not in document.data:
        document.data["severity"] = document.data.pop("level")
        document.lines[("severity",)] = document.lines[("level",)]


def standard_of(data: Mapping[str, Any]) -> str | None:
    """Which standard a rule's detection follows: ``atr``, ``sigma``, or None for ours."""
    detection = data.get("detection")
    if isinstance(detection, Mapping) and "conditions" in detection and "agent_source" in data:
        return "atr"
    source = data.get("logsource")
    if isinstance(source, Mapping) and any(source.get(key, value) != value for key, value in _OURS.items()):
        return "sigma"
    return None


def _refuse_foreign(data: Mapping[str, Any]) -> None:
    standard = standard_of(data)
    if standard == "atr":
        kind = data["agent_source"].get("type") if isinstance(data["agent_source"], Mapping) else None
        raise BadRule(
            ("detection", "conditions"),
            f"this is an ATR detection for {kind or 'agent events'}; we look at explanations of activations;"
            f" {IMPORT_HINT}",
        )
    if standard == "sigma":
        key = next(key for key, value in _OURS.items() if data["logsource"].get(key, value) != value)
        raise BadRule(
            ("logsource", key),
            f"this Sigma rule reads other logs ({key}: {data['logsource'][key]!r}); ours is {{product: 'nla', category:"
            f" 'activation_explanation'}}; {IMPORT_HINT}",
        )


def _test_cases(document: Document) -> None:
    given = document.data.pop("test_cases")
    document.lines[("tests",)] = document.lines[("test_cases",)]
    document.data["tests"] = cases = tests_of(given)
    for home, found in cases.items():
        for index, case in enumerate(found):
            path: Path = case.pop("path")
            line = document.lines.get(path, document.lines[("tests",)])
            document.lines[("tests", home, index)] = line
        document.lines.setdefault(("tests", home), document.lines[("tests",)])


def tests_of(given: Any) -> dict[str, list[dict[str, Any]]]:
    """ATR's ``test_cases`` as our ``tests``; each case also says its ``path`` in the file.

    Raises:
        BadRule: no mapping of the two lists, or a case without a text.
    """
    if not isinstance(given, Mapping):
        raise BadRule(("test_cases",), f"must hold true_positives and true_negatives, found {given!r}")
    found: dict[str, list[dict[str, Any]]] = {"positive": [], "negative": []}
    for name, expected in _LISTS.items():
        cases = given.get(name, [])
        if not isinstance(cases, Sequence) or isinstance(cases, str):
            raise BadRule(("test_cases", name), f"must be a list of cases, found {cases!r}")
        for index, case in enumerate(cases):
            path: Path = ("test_cases", name, index)
            text, wanted, note = _case(case, path, expected)
            found[_HOMES[wanted]].append({"text": text, **({"note": note} if note else {}), "path": path})
    return found


def _case(case: Any, path: Path, expected: str) -> tuple[str, str, str | None]:
    if isinstance(case, str):
        return case, expected, None
    if not isinstance(case, Mapping):
        raise BadRule(path, f"must be a mapping with an input, found {case!r}")
    text = next((case[name] for name in _INPUTS if isinstance(case.get(name), str)), None)
    if text is None:
        raise BadRule(path, f"holds no text; one of {', '.join(_INPUTS)} is wanted")
    wanted = case.get("expected", expected)
    if wanted not in _HOMES:
        raise BadRule((*path, "expected"), f"{wanted!r} is neither 'triggered' nor 'not_triggered'")
    note = case.get("description")
    return text, wanted, note if isinstance(note, str) else None
