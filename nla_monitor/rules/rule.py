"""A compiled rule: selections, condition, exceptions, window, version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np

from nla_monitor.records import ActivationSample, AgentContext, Explanation, Fidelity, Hit, Match, Reading, RuleHeader
from nla_monitor.rules.condition import Condition, check_name, compile_condition
from nla_monitor.rules.fields import GROUP_KEYS, META, group_value, variables
from nla_monitor.rules.matchers import Selection, Text, compile_selection
from nla_monitor.rules.problems import BadRule, Path, nearest
from nla_monitor.rules.schema import LOGIC, RuleSpec, Span, TestCase

EXCEPTION_NAME: Final = "exceptions[{}]"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, ready to evaluate."""

    spec: RuleSpec
    header: RuleHeader
    selections: tuple[Selection, ...]
    condition: Condition
    exceptions: tuple[Condition | Selection, ...]
    file: str
    """Where it was read from, for people."""
    lines: Mapping[Path, int]
    """Line of every key, for findings."""

    @property
    def id(self) -> str:
        """The rule's id."""
        return self.header.rule_id

    def match(self, reading: Reading, text: Text, known: Callable[[], Mapping[str, Any]]) -> Match | None:
        """The match of a reading, or None.

        Args:
            reading: What to look at.
            text: Its explanation, shared between rules.
            known: Its CEL variables, made on demand and shared between rules.
        """
        found = {selection.name: selection.hits(reading, text) for selection in self.selections}
        met = {name: hits is not None for name, hits in found.items()}
        if not self.condition.holds(met, known) or self._excepted(reading, text, met, known):
            return None
        return self._match(reading, tuple(hit for hits in found.values() if hits for hit in hits))

    def _excepted(
        self, reading: Reading, text: Text, met: Mapping[str, bool], known: Callable[[], Mapping[str, Any]]
    ) -> bool:
        return any(
            exception.holds(met, known)
            if isinstance(exception, Condition)
            else exception.hits(reading, text) is not None
            for exception in self.exceptions
        )

    def _match(self, reading: Reading, hits: tuple[Hit, ...]) -> Match:
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
        )


def match_id(sample_id: str, rule_id: str, version: str) -> str:
    """The same for the same sample, rule and version on any machine: a replay reproduces it."""
    return _digest([sample_id, rule_id, version])[:32]


def version_of(spec: RuleSpec) -> str:
    """Hash of what decides matches and alerts (``schema.LOGIC``); comments, prose, tests, line ends don't change it."""
    logic = spec.model_dump(mode="json", by_alias=True, include=set(LOGIC), exclude_defaults=True)
    return _digest(logic)[:16]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def compile_rule(spec: RuleSpec, file: str, lines: Mapping[Path, int]) -> Rule:
    """A rule from its checked form.

    Raises:
        BadRule: a selection, pattern, condition or group key means nothing.
    """
    selections = _selections(spec)
    names = [selection.name for selection in selections]
    condition = compile_condition(spec.detection["condition"], names, ("detection", "condition"), example_variables())
    _check_groups(spec)
    return Rule(spec, _header(spec), selections, condition, _exceptions(spec, names), file, lines)


def _selections(spec: RuleSpec) -> tuple[Selection, ...]:
    if "condition" not in spec.detection:
        raise BadRule(("detection",), "'condition' is missing: a CEL text over the selections")
    named = [(name, value) for name, value in spec.detection.items() if name != "condition"]
    if not named:
        raise BadRule(("detection",), "names no selection beside the condition")
    for name, _ in named:
        check_name(name, ("detection", name))
    return tuple(compile_selection(name, value, ("detection", name)) for name, value in named)


def _exceptions(spec: RuleSpec, names: Sequence[str]) -> tuple[Condition | Selection, ...]:
    found: list[Condition | Selection] = []
    for index, exception in enumerate(spec.exceptions):
        path: Path = ("exceptions", index)
        if exception.when is not None:
            found.append(compile_condition(exception.when, names, (*path, "when"), example_variables()))
        else:
            found.append(compile_selection(EXCEPTION_NAME.format(index), exception.selection, (*path, "selection")))
    return tuple(found)


def _check_groups(spec: RuleSpec) -> None:
    for index, key in enumerate(spec.window.group_by):
        if key not in GROUP_KEYS and not (key.startswith(META) and len(key) > len(META)):
            raise BadRule(
                ("window", "group_by", index), f"cannot group by {key!r}; {nearest(key, [*GROUP_KEYS, 'meta.<key>'])}"
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
    )


@cache
def example_variables() -> dict[str, Any]:
    """CEL variables of a reading in which every known field has a value."""
    case = TestCase(text="words", role="assistant", context="a word")
    found = variables(reading_of(case, "example"))
    words = dict.fromkeys(("agent_run_id", "parent_run_id", "root_run_id", "tool", "node", "conversation_id"), "name")
    return {
        **found,
        "agent": {**words, "generated": True, "token_index": 0},
        "inclusion_probability": 0.5,
        "token_text": "word",
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
        vector=np.ones(1, dtype=np.float32),  # rules never look at the vector
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
    )
