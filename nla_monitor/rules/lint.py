"""What is wrong with rules, and what is merely unwise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Final, Literal

from nla_monitor.errors import NLAMonitorError, RuleError
from nla_monitor.rules.deferred import Special
from nla_monitor.rules.embedded import run_rule_tests
from nla_monitor.rules.fields import OPEN, variables
from nla_monitor.rules.loader import check_file, find_files
from nla_monitor.rules.problems import Path, Problem, dotted, line_of
from nla_monitor.rules.rule import Rule, reading_of
from nla_monitor.rules.schema import Span, TestCase
from nla_monitor.rules.window import DEFAULT_SECONDS

MIN_TESTS: Final = 5
MIN_KEYWORD: Final = 4
GENERIC: Final = frozenset(
    (
        *("test", "tests", "tested", "testing", "evaluation", "evaluations", "eval", "benchmark", "simulation"),
        *("simulated", "scenario", "dataset", "exam", "grade", "grader", "graded", "hack", "hacks"),
        *("hacking", "cheat", "secret", "secrets", "password", "hide", "hidden", "conceal", "lie"),
        *("lies", "sabotage", "damage", "leak", "leaks", "deceive", "monitor", "monitored", "oversight"),
        *("model", "training", "reward", "score"),
    )
)
"""Words that say nothing of the model by themselves: the paper's graders answer NO to them."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One remark of the linter."""

    file: str
    line: int | None
    key: str | None
    severity: Literal["error", "warning"]
    code: str
    message: str


def lint(path: str | FilePath | Iterable[str | FilePath]) -> list[Finding]:
    """Errors and warnings for pack names, rule files or folders, in the order of files and lines.

    Never raises for what a file holds: a malformed rule is a finding.
    """
    paths = [path] if isinstance(path, str | FilePath) else list(path)
    found: list[Finding] = []
    seen: dict[str, str] = {}
    for name in paths:
        try:
            files = find_files(str(name))
        except RuleError as error:
            found.append(Finding(str(name), None, None, "error", "not-found", str(error)))
            continue
        for file in files:
            found += _lint_file(file, seen)
    return found


def _lint_file(file: FilePath, seen: dict[str, str]) -> list[Finding]:
    rule, problems = check_file(file)
    if rule is None:
        return [_error(problem) for problem in problems]
    found = [*_advice(rule), *_failed_tests(rule)]
    if (other := seen.setdefault(rule.id, str(file))) != str(file):
        found.append(_finding(rule, ("id",), "duplicate-id", f"id {rule.id!r} is also used in {other}", error=True))
    return sorted(found, key=lambda finding: (finding.line or 0, finding.code))


def _error(problem: Problem) -> Finding:
    return Finding(problem.file, problem.line, problem.key, "error", "malformed", problem.message)


def _finding(rule: Rule, path: Path, code: str, message: str, *, error: bool = False) -> Finding:
    severity: Literal["error", "warning"] = "error" if error else "warning"
    return Finding(rule.file, line_of(rule.lines, path), dotted(path), severity, code, message)


def _failed_tests(rule: Rule) -> Iterator[Finding]:
    for result in run_rule_tests(rule):
        if not result.passed:
            yield Finding(
                result.file, result.line, result.key, "error", "test-failed", f"{result.text[:80]!r} {result.message}"
            )


def _advice(rule: Rule) -> Iterator[Finding]:
    yield from _header(rule)
    yield from _tests(rule)
    yield from _window(rule)
    yield from _detection(rule)
    yield from _keywords(rule)
    yield from _dear(rule)
    yield from _probes(rule)
    yield from _evidence(rule)


def _header(rule: Rule) -> Iterator[Finding]:
    if not rule.spec.runbook:
        yield _finding(
            rule, ("runbook",), "no-runbook", "no runbook: who is woken needs to know what to check and how to label it"
        )
    if not rule.spec.description:
        yield _finding(rule, ("description",), "no-description", "no description")
    if not rule.spec.falsepositives:
        yield _finding(
            rule, ("falsepositives",), "no-falsepositives", "no falsepositives: name what looks alike and is harmless"
        )


def _tests(rule: Rule) -> Iterator[Finding]:
    for kind, cases in (("positive", rule.spec.tests.positive), ("negative", rule.spec.tests.negative)):
        if len(cases) < MIN_TESTS:
            yield _finding(
                rule, ("tests", kind), "few-tests", f"{len(cases)} {kind} tests; at least {MIN_TESTS} are wanted"
            )


def _window(rule: Rule) -> Iterator[Finding]:
    window = rule.spec.window
    if window.count == 1:
        yield _finding(
            rule,
            ("window", "count"),
            "no-recurrence",
            "one match makes an alert; null vectors alone meet keyword rules in 5-36 % of readings: ask for recurrence",
        )
    elif window.within is None:
        yield _finding(
            rule,
            ("window", "within"),
            "no-within",
            f"{window.count} matches ever: any long run collects them; name a span",
        )
    elif window.within.seconds is None:
        yield _finding(
            rule,
            ("window", "within"),
            "no-seconds",
            f"no seconds: agents have no steps and get {DEFAULT_SECONDS:.0f} s",
        )
    if window.hold and window.within:
        yield from _axes(rule, window.hold, window.within)


def _axes(rule: Rule, hold: Span, within: Span) -> Iterator[Finding]:
    if (hold.steps is None) != (within.steps is None):
        yield _finding(
            rule,
            ("window", "for"),
            "mixed-spans",
            "'for' and 'within' name different units; 'for' counts only in its own",
        )


def _detection(rule: Rule) -> Iterator[Finding]:
    bare = variables(reading_of(TestCase(text="words", fidelity=False, step=None), "lint"))
    named = [name for name in rule.spec.detection if name != "condition"]
    met = dict.fromkeys(named, True)
    if not any(name in rule.condition.source for name in OPEN) and not rule.condition.decidable({**bare, **met}):
        yield _finding(
            rule,
            ("detection", "condition"),
            "needs-values",
            "cannot be decided without an AR, a step or an agent and then never matches; compare with null first,"
            " or use 'field|gte|or_missing' in a selection",
        )
    for name in named:
        if name not in _names(rule):
            yield _finding(
                rule, ("detection", name), "unused-selection", f"selection {name!r} is not used in the condition"
            )


def _names(rule: Rule) -> set[str]:
    sources = [rule.condition.source, *(exception.when for exception in rule.spec.exceptions if exception.when)]
    return {name for source in sources for name in _words(source)}


def _words(source: str) -> list[str]:
    return "".join(char if char.isalnum() or char == "_" else " " for char in source).split()


def _keywords(rule: Rule) -> Iterator[Finding]:
    for name, value in rule.spec.detection.items():
        if name != "condition":
            for path, word in _listed(value, ("detection", name)):
                if word.casefold().strip("*") in GENERIC or len(word.strip("*")) < MIN_KEYWORD:
                    yield _finding(
                        rule, path, "generic-keyword", f"keyword {word!r} alone says nothing of the model; use a phrase"
                    )


def _listed(value: Any, path: Path) -> Iterator[tuple[Path, str]]:
    """Keywords of a selection with their paths."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        yield from _listed(value.get("keywords", []), (*path, "keywords"))
    elif isinstance(value, Sequence):
        for index, item in enumerate(value):
            yield from _listed(item, (*path, index))


def _dear(rule: Rule) -> Iterator[Finding]:
    """Selections that ask a model: can it be asked here, and is it asked about few readings only?"""
    for special in rule.specials:
        for part in special.parts:
            for question in part.questions:
                try:
                    question.oracle.check()
                except NLAMonitorError as error:
                    yield _finding(rule, _place(special), "cannot-ask", str(error))
                if part.plain is None and part.probe is None and _asks_always(rule, special):
                    yield _finding(
                        rule,
                        _place(special),
                        f"unguarded-{question.oracle.kind}",
                        "is asked about every reading; put keywords, a probe or a cheap selection before it"
                        f" (claim && {special.name}), so that it sees candidates only",
                    )


def _place(special: Special) -> Path:
    if special.name.startswith("exceptions["):
        return ("exceptions", int(special.name.removeprefix("exceptions[").removesuffix("]")), "selection")
    return ("detection", special.name)


def _asks_always(rule: Rule, special: Special) -> bool:
    """Whether a harmless reading would have it asked."""
    harmless = reading_of(TestCase(text="The text is about the weather."), "lint")
    asked = {id(question) for question, _ in rule.wanted(harmless)}
    return any(id(question) in asked for question in special.questions)


def _probes(rule: Rule) -> Iterator[Finding]:
    for special in rule.specials:
        for part in special.parts:
            if part.probe is not None and part.probe.probe.layer is None:
                yield _finding(
                    rule,
                    (*_place(special), "probe"),
                    "probe-without-layer",
                    "the probe file does not say which layer it was made on; activations of any layer are taken."
                    " Write the metadata 'layer'",
                )


def _evidence(rule: Rule) -> Iterator[Finding]:
    evidence, calibration = rule.spec.evidence, rule.spec.calibration
    wants_words = any(test for selection in rule.selections for block in selection.blocks for test in block.texts)
    if calibration is not None and calibration.score in {"swap_margin", "claim_probability"} and not wants_words:
        yield _finding(
            rule,
            ("calibration", "score"),
            "score-without-words",
            f"{calibration.score} is measured on a quote, and no selection quotes words; use probe or matches",
        )
    if calibration is not None and calibration.score == "probe" and not rule.probes:
        yield _finding(rule, ("calibration", "score"), "score-without-probe", "the rule has no probe to score by")
    if wants_words and evidence.swap_margin is None and evidence.claim_probability is None:
        yield _finding(
            rule,
            ("evidence",),
            "no-evidence",
            "neither swap_margin nor claim_probability is required: a confabulated claim counts like a true one",
        )
    yield from _alternatives(rule)


def _alternatives(rule: Rule) -> Iterator[Finding]:
    swap, claim = rule.spec.evidence.swap_margin, rule.spec.evidence.claim_probability
    if swap is not None and not swap.alternatives:
        yield _finding(
            rule,
            ("evidence", "swap_margin"),
            "no-alternatives",
            "no alternatives: they are made by negation, which an AR tells apart less well than what else could be so",
        )
    if claim is not None and not claim.alternatives and (swap is None or not swap.alternatives):
        yield _finding(
            rule, ("evidence", "claim_probability"), "no-alternatives", "no alternatives: they are made by negation"
        )
