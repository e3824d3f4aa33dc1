"""A compiled rule: selections, condition, exceptions, window, version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path as FilePath
from typing import Any, Final

import numpy as np

from nla_monitor.records import ActivationSample, AgentContext, Explanation, Fidelity, Hit, Match, Reading, RuleHeader
from nla_monitor.rules.condition import Condition, check_name, compile_condition
from nla_monitor.rules.deferred import MAX_DEFERRED, Outcome, ProbeTest, Question, Resolved, Special, resolve, wanted
from nla_monitor.rules.fields import GROUP_KEYS, META, Variables, group_value, variables
from nla_monitor.rules.matchers import Selection, Text, compile_selection
from nla_monitor.rules.problems import BadRule, Path, nearest
from nla_monitor.rules.quoted import unquoted
from nla_monitor.rules.schema import LOGIC, RuleSpec, Span, TestCase, Window
from nla_monitor.rules.specials import compile_special, is_special, logical

EXCEPTION_NAME: Final = "exceptions[{}]"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, ready to evaluate."""

    spec: RuleSpec
    """As written, with probes and local models pinned to full paths and the hash of their content."""
    header: RuleHeader
    selections: tuple[Selection, ...]
    """Those of words and fields."""
    specials: tuple[Special, ...]
    """Those with a probe, a classifier or a judge; exceptions of that kind among them."""
    condition: Condition
    exceptions: tuple[Condition | Selection | Special, ...]
    quoting: frozenset[str]
    """Selections that take quotations for claims (``quotes: ignore``)."""
    file: str
    """Where it was read from, for people."""
    lines: Mapping[Path, int]
    """Line of every key, for findings."""

    @property
    def id(self) -> str:
        """The rule's id."""
        return self.header.rule_id

    @property
    def questions(self) -> tuple[Question, ...]:
        """What it may ask judges and classifiers."""
        return tuple(question for special in self.specials for question in special.questions)

    @property
    def probes(self) -> tuple[ProbeTest, ...]:
        """Its probes; with any, it reads the sample's vector."""
        return tuple(part.probe for special in self.specials for part in special.parts if part.probe is not None)

    def probe_value(self, reading: Reading) -> float | None:
        """Value of its first probe, as a score (larger speaks for the rule); None without a probe that can read it."""
        for test in self.probes:
            value = test.probe.read(reading.sample)
            return None if isinstance(value, str) else value if test.spec.upward else -value
        return None

    def match(self, reading: Reading, text: Text, known: Variables) -> Match | None:
        """The match of a reading, or None. Judges and classifiers are asked only where the outcome hangs on them.

        Args:
            reading: What to look at.
            text: Its explanation, shared between rules.
            known: Its CEL variables, shared between rules.
        """
        if self.specials:
            return self.judged(reading, text, known, {})[0]
        found = self._found(reading, text)
        met = {name: hits is not None for name, hits in found.items()}
        if not self.condition.holds(met, known) or self._excepted(reading, text, met, known):
            return None
        return self._match(reading, _together(found))

    def judged(
        self, reading: Reading, text: Text, known: Variables, given: Mapping[str, bool]
    ) -> tuple[Match | None, Mapping[str, str]]:
        """The match or None, and which selections could not be looked at though the outcome hangs on them.

        Args:
            reading: What to look at.
            text: Its explanation.
            known: Its CEL variables.
            given: What special selections are to say, by name: these are not looked at (embedded tests).
        """
        found = self._found(reading, text)
        outcome = self._outcome(reading, text, known, found)
        resolved = resolve(self.specials, outcome, reading, text, given=given)
        if not outcome(resolved.met()):
            return None, resolved.unjudged
        return self._match(reading, _together(self._ordered(found, resolved)), resolved.unjudged), resolved.unjudged

    def wanted(self, reading: Reading) -> Iterator[tuple[Question, str]]:
        """What it would ask about a reading first, and of which text; asks nothing."""
        text = Text(reading.explanation.text)
        found = self._found(reading, text)
        outcome = self._outcome(reading, text, Variables(reading), found)
        yield from wanted(self.specials, outcome, reading, text)

    def _found(self, reading: Reading, text: Text) -> Mapping[str, tuple[Hit, ...] | None]:
        found = {selection.name: selection.hits(reading, text) for selection in self.selections}
        return unquoted(found, reading, self.quoting)

    def _outcome(
        self, reading: Reading, text: Text, known: Variables, found: Mapping[str, tuple[Hit, ...] | None]
    ) -> Outcome:
        plain = {name: hits is not None for name, hits in found.items()}

        def outcome(special: Mapping[str, bool]) -> bool:
            met = {**plain, **special}
            return self.condition.holds(met, known) and not self._excepted(reading, text, met, known)

        return outcome

    def _excepted(self, reading: Reading, text: Text, met: Mapping[str, bool], known: Variables) -> bool:
        return any(
            exception.holds(met, known)
            if isinstance(exception, Condition)
            else met[exception.name]
            if isinstance(exception, Special)
            else exception.hits(reading, text) is not None
            for exception in self.exceptions
        )

    def _ordered(
        self, found: Mapping[str, tuple[Hit, ...] | None], resolved: Resolved
    ) -> dict[str, tuple[Hit, ...] | None]:
        """Hits in the order of the file."""
        both = {**found, **resolved.hits}
        return {name: both[name] for name in self.spec.detection if name in both}

    def _match(self, reading: Reading, hits: tuple[Hit, ...], unjudged: Mapping[str, str] | None = None) -> Match:
        sample = reading.sample
        return Match(
            match_id=match_id(sample.sample_id, self.header.rule_id, self.header.version),
            sample_id=sample.sample_id,
            run_id=sample.run_id,
            rule_id=self.header.rule_id,
            rule_version=self.header.version,
            severity=self.header.severity,
            group={key: group_value(key, reading, self.header.rule_id) for key in self.spec.window.group_by},
            hits=hits,
            step=sample.step,
            position=sample.position,
            sequence_id=sample.sequence_id,
            captured_at=sample.captured_at,
            unjudged=dict(unjudged or {}),
        )


def _together(found: Mapping[str, tuple[Hit, ...] | None]) -> tuple[Hit, ...]:
    return tuple(hit for hits in found.values() if hits for hit in hits)


def match_id(sample_id: str, rule_id: str, version: str) -> str:
    """The same for the same sample, rule and version on any machine: a replay reproduces it."""
    return _digest([sample_id, rule_id, version])[:32]


def version_of(spec: RuleSpec) -> str:
    """Hash of what decides matches and alerts (``schema.LOGIC``); comments, prose, tests, line ends don't change it.

    Probes and local models count by their content, judges by question and model, not by where they are.
    """
    logic = spec.model_dump(mode="json", by_alias=True, include=set(LOGIC), exclude_defaults=True)
    logic["detection"] = {name: _decisive(value) for name, value in logic["detection"].items()}
    for exception in logic.get("exceptions", []):
        if "selection" in exception:
            exception["selection"] = _decisive(exception["selection"])
    return _digest(logic)[:16]


def _decisive(selection: Any) -> Any:
    return logical(selection) if is_special(selection) else selection


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def compile_rule(spec: RuleSpec, file: str, lines: Mapping[Path, int]) -> Rule:
    """A rule from its checked form.

    Raises:
        BadRule: a selection, pattern, condition or group key means nothing, or a probe or model is not there.
    """
    builder = _Builder(spec, FilePath(file).parent)
    condition = compile_condition(
        spec.detection["condition"], builder.names, ("detection", "condition"), example_variables()
    )
    exceptions = builder.exceptions()
    _check_groups(spec)
    _check_scope(spec)
    spec = builder.pinned()
    specials = tuple(item for item in (*builder.selections.values(), *exceptions) if isinstance(item, Special))
    deferred = sum(bool(special.questions) for special in specials)
    if deferred > MAX_DEFERRED:
        raise BadRule(("detection",), f"{deferred} selections ask a model; at most {MAX_DEFERRED} may")
    _check_given(spec, {special.name for special in specials})
    plain = tuple(item for item in builder.selections.values() if isinstance(item, Selection))
    quoting = frozenset(name for name, value in spec.detection.items() if _ignores_quotes(value))
    return Rule(spec, _header(spec), plain, specials, condition, exceptions, quoting, file, lines)


class _Builder:
    """Compiles the selections of a spec, and keeps what its probes and models were pinned to."""

    def __init__(self, spec: RuleSpec, folder: FilePath) -> None:
        self._spec = spec
        self._folder = folder
        self._pins: dict[str, Any] = {}
        if "condition" not in spec.detection:
            raise BadRule(("detection",), "'condition' is missing: a CEL text over the selections")
        self.names = [name for name in spec.detection if name != "condition"]
        if not self.names:
            raise BadRule(("detection",), "names no selection beside the condition")
        for name in self.names:
            check_name(name, ("detection", name))
        self.selections = {
            name: self._selection(name, spec.detection[name], ("detection", name)) for name in self.names
        }

    def _selection(self, name: str, value: Any, path: Path) -> Selection | Special:
        if not is_special(value):
            return compile_selection(name, value, path)
        special, self._pins[name] = compile_special(name, value, path, self._folder)
        return special

    def exceptions(self) -> tuple[Condition | Selection | Special, ...]:
        """The compiled exceptions."""
        found: list[Condition | Selection | Special] = []
        for index, exception in enumerate(self._spec.exceptions):
            path: Path = ("exceptions", index)
            if exception.when is not None:
                found.append(compile_condition(exception.when, self.names, (*path, "when"), example_variables()))
            else:
                name = EXCEPTION_NAME.format(index)
                found.append(self._selection(name, exception.selection, (*path, "selection")))
        return tuple(found)

    def pinned(self) -> RuleSpec:
        """The spec with probes and models pinned."""
        if not self._pins:
            return self._spec
        detection = {name: self._pins.get(name, value) for name, value in self._spec.detection.items()}
        exceptions = tuple(
            exception.model_copy(
                update={"selection": self._pins.get(EXCEPTION_NAME.format(index), exception.selection)}
            )
            for index, exception in enumerate(self._spec.exceptions)
        )
        return self._spec.model_copy(update={"detection": detection, "exceptions": exceptions})


def _ignores_quotes(value: Any) -> bool:
    blocks = value if isinstance(value, list) else [value]
    return any(isinstance(block, Mapping) and block.get("quotes") == "ignore" for block in blocks)


def _check_given(spec: RuleSpec, names: set[str]) -> None:
    """Embedded tests may state only what special selections say."""
    for kind in ("positive", "negative"):
        for index, case in enumerate(getattr(spec.tests, kind)):
            _check_case(case, names, ("tests", kind, index))
    for index, window in enumerate(spec.tests.window):
        for number, case in enumerate(window.readings):
            _check_case(case, names, ("tests", "window", index, "readings", number))


def _check_case(case: TestCase, names: set[str], path: Path) -> None:
    for name in case.given:
        if name not in names:
            hint = nearest(name, names) if names else "this rule has none; other selections are always looked at"
            raise BadRule(
                (*path, "given", name), f"{name!r} is no selection with a probe, a classifier or a judge; {hint}"
            )


def _check_groups(spec: RuleSpec) -> None:
    for index, key in enumerate(spec.window.group_by):
        if key not in GROUP_KEYS and not (key.startswith(META) and len(key) > len(META)):
            raise BadRule(
                ("window", "group_by", index), f"cannot group by {key!r}; {nearest(key, [*GROUP_KEYS, 'meta.<key>'])}"
            )


def _check_scope(spec: RuleSpec) -> None:
    """An alarm for the whole run has a test of its own in the window's place."""
    if spec.calibration is None or spec.calibration.scope != "run":
        return
    window = spec.window
    if window != Window(keep_firing_for=window.keep_firing_for):
        raise BadRule(
            ("window",),
            "calibration.scope is run: one alert for the whole run, raised by its test and not by a window; "
            "leave out group_by, count, distinct, within and for, or set scope to sequence",
        )


def _header(spec: RuleSpec) -> RuleHeader:
    keep = spec.window.keep_firing_for or Span.model_construct()
    return RuleHeader(
        rule_id=spec.id,
        title=spec.title,
        version=version_of(spec),
        severity=spec.severity,
        runbook=spec.runbook,
        keep_firing_steps=keep.steps or 0,
        keep_firing_seconds=keep.seconds or 0.0,
        responses=spec.responses,
    )


@cache
def example_variables() -> dict[str, Any]:
    """CEL variables of a reading in which every known field has a value."""
    case = TestCase(text="words", role="assistant", context="a word")
    found = variables(reading_of(case, "example"))
    names = ("agent_run_id", "parent_run_id", "root_run_id", "tool", "node", "conversation_id")
    words = dict.fromkeys((*names, "tool_call_id", "message_role"), "name")
    return {
        **found,
        "agent": {**words, "generated": True, "token_index": 0, "span_start": 0, "span_end": 1},
        "inclusion_probability": 0.5,
        "token_text": "word",
        "model": "policy",
        "adapter": "default",
    }


def reading_of(case: TestCase, sample_id: str, run_id: str = "test-run") -> Reading:
    """The reading that a test case describes."""
    fidelity = (
        Fidelity(sample_id, case.cosine, 2 * (1 - case.cosine), case.fve, case.denominator, "test", "test")
        if case.fidelity
        else None
    )
    return Reading(
        _sample_of(case, sample_id, run_id),
        Explanation(sample_id, case.text, case.truncated, case.tokens, "test"),
        fidelity,
    )


def _sample_of(case: TestCase, sample_id: str, run_id: str) -> ActivationSample:
    return ActivationSample(
        sample_id=sample_id,
        run_id=run_id,
        layer=case.layer,
        vector=np.ones(1, dtype=np.float32),  # no test holds a vector: what a probe says is `given`
        norm=case.norm,
        phase=case.phase,
        sequence_id=case.sequence_id,
        position=case.position,
        token_id=0,
        trigger=case.trigger,
        captured_at=case.seconds,
        step=case.step,
        rank=case.rank,
        token_text=case.token_text,
        context=case.context,
        role=case.role,
        agent=AgentContext(**case.agent.model_dump()) if case.agent else None,
        attributes=dict(case.meta),
        model=case.model,
        adapter=case.adapter,
        screens=dict(case.screen),
    )
