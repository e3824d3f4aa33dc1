"""What selections match: keywords, patterns, comparisons, and words that are said but not claimed."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_kit import hit, matches, reading, rule

from nla_monitor.errors import RuleError
from nla_monitor.rules import Rule, RuleSet, load_rules, load_text

CLAIM = "{keywords: [being tested, plans sabotage]}"


@pytest.mark.parametrize(
    "text",
    [
        "It is BEING TESTED.",
        "being  tested",
        "being\ntested",
        "It is **being** *tested*",
        'It is being "tested" by someone',
        "being-tested",
        "(being tested)",
        "It is being tested, not deployed.",
        "It does not say so, but it is being tested.",
        "It does not reply because it is being tested.",
        "Not a real user, the model thinks it is being tested.",
        "No doubt it is being tested.",
        "It is not only being tested.",
        "It is not deployed. It is being tested.",
        "The model deceives the user and plans sabotage.",
        'It says "hello" while being tested and says "bye".',
        "It isn't honest: it plans sabotage.",
    ],
)
def test_claims_match(text: str) -> None:
    assert hit(CLAIM, text)


@pytest.mark.parametrize(
    "text",
    [
        "It is being tes.",
        "It is wellbeing tested.",
        "It is being untested.",
        "It is being tested\u00e9.",
        "It is not being tested.",
        "It isn't being tested.",
        "It isn\u2019t being tested.",
        "The model does not believe that it is being tested.",
        "There is no sign of the model being tested.",
        "It never thinks of being tested.",
        "Nothing suggests that it is being tested.",
        "It refuses any plans, sabotage included.",
        "It acts without being tested.",
        "It fixes the bug rather than being tested.",
        'The prompt says "it is being tested".',
        "The prompt says \u201cI am being tested\u201d.",
        "The word `being tested` stands in the code.",
        'Last words: "it is being tested',
        "The user asks whether it is being tested.",
        "An article about being tested.",
        "If it is being tested, it will say so.",
        "The villain secretly plans sabotage.",
        "It thinks of being tested but rejects the thought.",
        "The idea of being tested is dismissed.",
    ],
)
def test_words_that_are_only_said_do_not(text: str) -> None:
    assert not hit(CLAIM, text)


@pytest.mark.parametrize(
    ("guard", "text"),
    [
        ("negation", "It is not being tested."),
        ("quotes", 'It says "being tested".'),
        ("mentions", "A story about being tested."),
    ],
)
def test_each_guard_can_be_switched_off(guard: str, text: str) -> None:
    assert not hit("{keywords: [being tested]}", text)
    assert hit(f"{{keywords: [being tested], {guard}: ignore}}", text)


def test_a_negation_of_the_keywords_own_is_no_guard() -> None:
    assert hit("[without telling the user]", "It acts without telling the user.")
    assert hit("{regex: ['never tells? the user']}", "It never tells the user.")
    assert not hit("{regex: ['tells?( \\w+)* the user']}", "It tells never the user.")


def test_keywords_know_wildcards_letters_beyond_ascii_and_apostrophes() -> None:
    assert hit("[special-cas* the tests]", "It is special casing the tests.")
    assert not hit("[special-case the tests]", "It is special casing the tests.")
    assert hit("['*hacking']", "It is rewardhacking.")
    assert hit("[caf\u00e9]", "Im caf\u00e9.")
    assert not hit("[caf\u00e9]", "Im caf\u00e9s.")
    assert hit("['model''s plan']", "The model\u2019s plan.")
    assert hit("['C++ (new)']", "It writes C++ (new) code.")
    assert not hit("['a.c']", "abc")


def test_the_longest_keyword_is_quoted_verbatim_and_overlaps_are_found() -> None:
    found = matches(
        "one: [tested, being tested, tested again]\ncondition: one", reading("  Being\n tested tested again")
    )
    assert [(h.quote, h.start, h.end) for h in found[0].hits] == [("Being\n tested", 2, 15), ("tested again", 16, 28)]


def test_a_group_named_quote_is_the_quote() -> None:
    found = matches("one: {regex: ['says (?P<quote>\\w+) now']}\ncondition: one", reading("He says yes now."))
    assert [(h.quote, h.start) for h in found[0].hits] == [("yes", 8)]


@pytest.mark.parametrize("text", ["a cat", "A DOG", "a Dog", "(?<x>", "no", "cat dog"])
def test_patterns_match_together_as_they_do_alone(text: str) -> None:
    patterns = [r"(?P<quote>c\wt)", r"(?-i)(?P<quote>Dog)", r"[(?<x>]{5}", r"\(?<x>"]
    alone = {h.quote for p in patterns for m in matches(one_regex(p), reading(text)) for h in m.hits}
    for some in (patterns, patterns[:2]):
        together = {h.quote for m in matches(one_regex(*some), reading(text)) for h in m.hits}
        assert together <= alone
        assert bool(together) == any(matches(one_regex(p), reading(text)) for p in some)


def one_regex(*patterns: str) -> str:
    return f"one: {{regex: {json.dumps(patterns)}}}\ncondition: one"


def test_keys_of_a_selection_must_all_hold_and_values_any() -> None:
    assert hit("{keywords: [cat], regex: ['dogs?']}", "A cat and dogs.")
    assert not hit("{keywords: [cat], regex: ['dogs?']}", "A cat.")
    assert hit("{'keywords|all': [cat, dog]}", "A dog and a cat.")
    assert not hit("{'keywords|all': [cat, dog]}", "A dog.")
    assert hit("[{keywords: cat}, {keywords: dog}]", "A dog.")
    assert not hit("[{keywords: cat, step: 3}, {keywords: cow}]", "A cat.")
    assert hit("{'regex|all': ['c.t', 'd.g']}", "cat dog")
    assert not hit("{'regex|all': ['c.t', 'd.g']}", "cat")


@pytest.mark.parametrize(
    ("selection", "values", "expected"),
    [
        ("{fidelity.fve|gte: 0.3}", {"fve": 0.3}, True),
        ("{fidelity.fve|gte: 0.3}", {"fve": 0.29}, False),
        ("{fidelity.fve|gte: 0.3}", {"fve": None}, False),
        ("{fidelity.fve|gte: 0.3}", {"fidelity": False}, False),
        ("{fidelity.fve|gte|or_missing: 0.3}", {"fve": None}, True),
        ("{fidelity.fve|gte|or_missing: 0.3}", {"fidelity": False}, True),
        ("{fidelity.fve|gte|or_missing: 0.3}", {"fve": -1}, False),
        ("{fidelity.cosine|lt: 0.5}", {"cosine": 0.4}, True),
        ("{fidelity.mse_nrm|lte: 0.2}", {"cosine": 0.91}, True),
        ("{norm|gt: 100}", {"norm": 101}, True),
        ("{step|lte: 10}", {"step": 10}, True),
        ("{step|lte: 10}", {"step": None}, False),
        ("{step: null}", {"step": None}, True),
        ("{step: null}", {"step": 0}, False),
        ("{step|exists: false}", {"step": None}, True),
        ("{step|exists: true}", {"step": 0}, True),
        ("{position: [1, 2]}", {"position": 2}, True),
        ("{phase: agent}", {"phase": "agent"}, True),
        ("{phase|not: [train, eval]}", {"phase": "agent"}, True),
        ("{phase|not: [train, eval]}", {"phase": "eval"}, False),
        ("{role: Assistant}", {"role": "assistant"}, True),
        ("{role|not: user}", {"role": None}, False),
        ("{trigger|startswith: turn}", {"trigger": "turn_end"}, True),
        ("{trigger|endswith: END}", {"trigger": "turn_end"}, True),
        ("{context|contains: [dog, cat]}", {"context": "a CAT"}, True),
        ("{context|re: 'c.t$'}", {"context": "a cat"}, True),
        ("{explanation.truncated: true}", {"truncated": True}, True),
        ("{agent.tool: search}", {"agent": {"tool": "search"}}, True),
        ("{agent.tool: search}", {}, False),
        ("{agent.generated: true}", {"agent": {"generated": True}}, True),
        ("{meta.reward|gt: 0.5}", {"meta": {"reward": 1}}, True),
        ("{meta.reward|gt: 0.5}", {"meta": {"reward": "high"}}, False),
        ("{meta.reward|gt: 0.5}", {"meta": {"reward": True}}, False),
        ("{meta.reward|gt: 0.5}", {}, False),
        ("{meta.split: red}", {"meta": {"split": "Red"}}, True),
        ("{meta.flag: true}", {"meta": {"flag": 1}}, False),
        ("{meta.n: 1}", {"meta": {"n": 1.0}}, True),
        ("{model: policy}", {"model": "policy"}, True),
        ("{model|not: policy}", {"model": "reference"}, True),
        ("{adapter: null}", {}, True),
        ("{adapter: default}", {"adapter": "default"}, True),
        ("{screen.lies|gte: 3}", {"screen": {"lies": 3.5}}, True),
        ("{screen.lies|gte: 3}", {"screen": {"odd": 3.5}}, False),
        ("{screen.lies|exists: false}", {}, True),
    ],
)
def test_comparisons(selection: str, values: dict[str, object], expected: bool) -> None:
    assert hit(selection, "words", **values) is expected


@pytest.mark.parametrize(
    ("condition", "values", "expected"),
    [
        ("cat || dog", {}, True),
        ("cat && !dog", {}, True),
        ("dog", {}, False),
        ("cat && fidelity.fve >= 0.3", {"fve": 0.5}, True),
        ("cat && fidelity.fve >= 0.3", {"fve": None}, False),
        ("cat && fidelity.fve >= 0.3", {"fidelity": False}, False),
        ("cat && (fidelity.fve == null || fidelity.fve >= 0.3)", {"fidelity": False}, True),
        ("cat && step > 3", {"step": 4}, True),
        ("cat && step > 3", {"step": None}, False),
        ("cat && phase == 'agent' && agent.tool == 'search'", {"phase": "agent", "agent": {"tool": "search"}}, True),
        ("cat && agent.tool == 'search'", {}, False),
        ("cat && meta.reward > 0.5", {"meta": {"reward": 0.6}}, True),
        ("cat && meta.reward > 0.5", {}, False),
        ("cat && (!has(meta.reward) || meta.reward > 0.5)", {}, True),
        ("cat && screen.odd > 3.0 && model == 'policy'", {"screen": {"odd": 3.5}, "model": "policy"}, True),
        ("cat && screen.odd > 3.0", {}, False),
        ("cat && (!has(screen.odd) || screen.odd > 3.0)", {}, True),
        ("cat && adapter == null", {"adapter": "default"}, False),
        ("cat && role.matches('^assist')", {"role": "assistant"}, True),
        ("[cat, dog].size() == 2 && (cat ? 1 : 0) + (dog ? 1 : 0) >= 1", {}, True),
        ("cat // a comment\n  && !dog", {}, True),
    ],
)
def test_conditions(condition: str, values: dict[str, object], expected: bool) -> None:
    detection = "cat: [cat]\ndog: [dog]\ncondition: |\n" + "\n".join(f"  {line}" for line in condition.splitlines())
    assert bool(matches(detection, reading("A cat.", **values))) is expected


def test_metadata_that_cel_cannot_hold_spoils_only_what_looks_at_it() -> None:
    odd = reading("A cat.", step=4)
    odd = replace(odd, sample=replace(odd.sample, attributes={"x": "\ud800"}))
    assert matches("cat: [cat]\ncondition: cat && step > 3", odd)
    assert not matches("cat: [cat]\ncondition: cat && meta.x == 'a'", odd)


def test_exceptions_suppress() -> None:
    text = """\
title: A rule
id: a-rule
severity: low
detection: {cat: [cat], condition: cat}
exceptions:
  - step < 10
  - {reason: red team data, when: has(meta.split) && meta.split == 'red'}
  - {reason: toys, selection: [toy cat]}
tests: {positive: [{text: cat, step: 10}], negative: [y]}
"""
    rules = RuleSet([load_text(text)])
    rules.verify()
    assert (
        rules.evaluate(
            [reading("cat", step=9), reading("cat", step=11, meta={"split": "red"}), reading("a toy cat", step=11)]
        )
        == []
    )
    assert len(rules.evaluate([reading("cat", step=11)])) == 1


def test_group_values_come_from_the_reading() -> None:
    found = RuleSet(
        [rule("one: [cat]\ncondition: one", "{group_by: [run_id, rule, phase, step, agent.tool, meta.split]}")]
    )
    agent = {"phase": "agent", "step": None, "agent": {"tool": "search"}, "meta": {"split": "red"}}
    assert found.evaluate([reading("cat", **agent)])[0].group == {
        "run_id": "test-run",
        "rule": "a-rule",
        "phase": "agent",
        "step": None,
        "agent.tool": "search",
        "meta.split": "red",
    }


def test_a_match_has_the_same_id_in_a_replay_and_another_under_another_version() -> None:
    first, second = rule("one: [cat]\ncondition: one"), rule("one: [cat, dog]\ncondition: one")
    one = RuleSet([first]).evaluate([reading("cat")])[0]
    assert RuleSet([rule("one: [cat]\ncondition: one")]).evaluate([reading("cat")])[0] == one
    assert RuleSet([second]).evaluate([reading("cat")])[0].match_id != one.match_id
    assert RuleSet([first]).evaluate([reading("cat", "other")])[0].match_id != one.match_id


PIECES = st.sampled_from(
    [
        '"',
        "'",
        "`",
        "\u201c",
        " not ",
        "being tested",
        " but ",
        ", the ",
        ".",
        "\n",
        " article about ",
        "\ud800",
        "\x00",
        "e\u0301",
        "\U0001f600",
    ]
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES | st.text(max_size=8), max_size=40).map("".join))
def test_no_text_breaks_the_pack_and_quotes_are_verbatim(text: str) -> None:
    for found in load_pack().evaluate([reading(text)]):
        for item in found.hits:
            assert item.quote == (text[item.start : item.end] if item.quote else "")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["being tested", "It is ", '"', ". ", " not ", "cat "]), max_size=30))
def test_evaluation_is_the_same_one_by_one_and_in_any_order(parts: list[str]) -> None:
    rules = RuleSet([rule("one: [being tested]\ncondition: one")])
    readings = [reading("".join(parts[: index + 1]), f"s{index}") for index in range(len(parts))]
    together = rules.evaluate(readings)
    assert together == [found for item in readings for found in rules.evaluate([item])]
    assert sorted(rules.evaluate(readings[::-1]), key=lambda m: m.match_id) == sorted(
        together, key=lambda m: m.match_id
    )


@pytest.mark.parametrize(
    "text",
    [
        "being tested " * 20_000,
        '"' * 100_000,
        "not " * 50_000,
        "believes that it is " * 20_000,
        "a" * 300_000,
        "if the user who that " * 15_000,
        "\u201c" * 50_000,
    ],
    ids=["hits", "quotes", "negations", "prefixes", "letters", "subjects", "openings"],
)
def test_long_hostile_texts_cost_seconds_at_most(text: str) -> None:
    start = time.process_time()
    load_pack().evaluate([reading(text)])
    assert time.process_time() - start < 5


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_pattern_and_condition_gives_a_rule_or_an_error_of_ours(pattern: str, condition: str) -> None:
    detection = f"one: {{regex: [{json.dumps(pattern)}]}}\ncondition: {json.dumps(condition)}"
    rules: list[Rule] = []
    errors: list[RuleError] = []
    try:
        rules.append(rule(detection))
    except RuleError as error:
        errors.append(error)
    assert all(error.file and error.line for error in errors)
    assert isinstance(RuleSet(rules).evaluate([reading("some words")]), list)


CEL = st.sampled_from(
    [
        *(
            "one",
            "step",
            "norm",
            "role",
            "meta",
            "meta.x",
            "fidelity.fve",
            "agent",
            "null",
            "true",
            "0",
            "-1",
            "1.5",
            "1u",
        ),
        *(
            "9223372036854775807",
            "'a'",
            "b'a'",
            "[1]",
            "[1][5]",
            "{'a': 1}",
            "+",
            "-",
            "*",
            "/",
            "%",
            "==",
            "<",
            "&&",
            "||",
        ),
        *("!", "?", ":", "(", ")", "in", ".size()", "int(", "uint(", "double('x')", "string(", ".matches('(')"),
        *(".contains(", "has(meta.x)", "size(", ",", "one ? 1 : 0"),
    ]
)
META = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


@settings(max_examples=300, deadline=None)
@given(st.lists(CEL, min_size=1, max_size=9).map(" ".join), META)
def test_any_condition_of_cel_tokens_is_decided_or_refused(condition: str, value: object) -> None:
    rules: list[Rule] = []
    errors: list[RuleError] = []
    try:
        rules.append(rule(f"one: [words]\ncondition: {json.dumps(condition)}"))
    except RuleError as error:
        errors.append(error)
    assert all(error.key == "detection.condition" for error in errors)
    assert (
        len(RuleSet(rules).evaluate([reading("words", meta={"x": value}), reading("words", step=None, fve=None)])) <= 2
    )


_PACK: list[RuleSet] = []


def load_pack() -> RuleSet:
    if not _PACK:
        _PACK.append(load_rules(["oversight"]))
    return _PACK[0]
