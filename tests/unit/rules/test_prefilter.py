"""The prefilter changes the time, never the result: random rules and texts, both ways."""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_monitor.records import Reading
from nla_monitor.rules import RuleSet, load_rules, load_text, pack_names
from nla_monitor.rules.evaluate import evaluate_rules
from nla_monitor.rules.patterns import readable
from nla_monitor.rules.prefilter import Prefilter, folded, regex_filter, screen
from nla_monitor.rules.rule import reading_of
from nla_monitor.rules.schema import TestCase as Case
from nla_monitor.rules.screening import ScreeningPool

WORDS = [
    *("test", "tests", "hack", "reward hack", "special-cas*", "AI", "don't", "Kelvin", "was", "straße", "тест", "c++"),
    *("*ing", "a", "naïve", "Σίσυφος", "hard-code the values", "x.y", "C#", "ÅNGSTRÖM"),
]
PATTERNS = [
    *(
        r"\btests?\b",
        r"reward\s+hack",
        r"special[- ]cas\w*",
        r"\d{2,}",
        r"(?-i)Hack",
        r"s[ks]+",
        r"[^a-z]x",
        r"K",
        r"ß",
    ),
    *(
        r"(?P<quote>hack)\w*\s+the",
        r"(?:model|it)\s+(?:is|was)\s+[^.]{0,20}test",
        r"\p{Greek}+",
        r"a|b|cd",
        r"\x{17F}",
        r".{40}",
    ),
]
CONDITIONS = [
    *("one", "one && two", "one || two", "!one && two", "one && !two", "one ? two : false", "!one", "!(one || two)"),
    *("one && fidelity.fve >= 0.3", "one || fidelity.fve >= 0.3", "fidelity.cosine > 0.5 && !two", 'phase == "train"'),
    *("(one ? 1 : 0) + (two ? 1 : 0) >= 1", "one && meta.score > 2", "meta.score > 2 || two", "true", "false || one"),
    *(
        "has(meta.score) && one",
        'role == "fidelity.fve" || one',
        "two == one",
        'one && meta["score"] > 2',
        "null == step || one",
    ),
]
GUARDS = {"negation": "ignore", "quotes": "ignore", "mentions": "ignore"}


def block() -> st.SearchStrategy[dict[str, Any]]:
    words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3)
    patterns = st.lists(st.sampled_from(PATTERNS), min_size=1, max_size=3)
    text = st.one_of(
        st.fixed_dictionaries({"keywords": words}),
        st.fixed_dictionaries({"keywords|all": words}),
        st.fixed_dictionaries({"regex": patterns}),
        st.fixed_dictionaries({"regex|all": patterns}),
    )
    guards = st.lists(st.sampled_from(sorted(GUARDS)), unique=True).map(lambda keys: {key: GUARDS[key] for key in keys})
    values = st.sampled_from([{}, {"norm|gt": 5}, {"fidelity.fve|gte|or_missing": 0.5}, {"role": ["user", "system"]}])
    texts = st.builds(lambda *parts: {key: item for part in parts for key, item in part.items()}, text, guards, values)
    return st.one_of(texts, values.filter(bool))


SELECTION = st.one_of(block(), st.lists(block(), min_size=1, max_size=2), st.lists(st.sampled_from(WORDS), min_size=1))


@st.composite
def rules(draw: st.DrawFn) -> RuleSet:
    found = []
    for number in range(draw(st.integers(1, 4))):
        spec: dict[str, Any] = {
            "title": "A random rule",
            "id": f"rule-{number}",
            "severity": "low",
            "detection": {
                "one": draw(SELECTION),
                "two": draw(SELECTION),
                "condition": draw(st.sampled_from(CONDITIONS)),
            },
            "tests": {"positive": ["x"], "negative": ["y"]},
        }
        if draw(st.booleans()):
            spec["exceptions"] = [
                draw(st.sampled_from([{"when": "two"}, {"selection": ["hack"]}, {"when": "norm > 8.0"}]))
            ]
        found.append(load_text(yaml.safe_dump(spec, allow_unicode=True)))
    return RuleSet(found)


PIECES = [
    *(
        "test",
        "TESTS",
        "te\u017fts",
        "hack",
        "Reward  hack",
        "reward-hack",
        "special-casing",
        "AI",
        "don\u2019t",
        "DON'T",
    ),
    *(
        "\u212aelvin",
        "wa\u017f",
        "STRASSE",
        "STRAẞE",
        "straße",
        "\u0422\u0415\u0421\u0422",
        "c++",
        "C#",
        "running",
        "naïve",
        "NAÏVE",
        "ΣΊΣΥΦΟΣ",
    ),
    *(
        "the model is not",
        "it was",
        '"',
        "`",
        ".",
        ", ",
        "\n",
        "without",
        "the user",
        "\ud800",
        "\x00",
        "İ",
        "12",
        "Ångström",
    ),
    *("hard-code the values", "x.y", "xxy", "hacking the", "a", "b", "ss", "k", "\u0130stanbul", "😀"),
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join),
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
    st.text(),
)
READINGS = st.builds(
    lambda text, norm, fve, fidelity, role, step, meta: reading_of(
        Case(text=text, norm=norm, fve=fve, fidelity=fidelity, role=role, step=step, meta=meta), "sample"
    ),
    TEXTS,
    st.sampled_from([1.0, 6.0, 9.0]),
    st.sampled_from([None, 0.1, 0.9]),
    st.booleans(),
    st.sampled_from([None, "user"]),
    st.sampled_from([None, 3]),
    st.sampled_from([{}, {"score": 3}, {"score": "high"}, {"score": None}]),
)


@settings(max_examples=120, deadline=None)
@given(rules(), st.lists(READINGS, min_size=1, max_size=6))
def test_screened_and_plain_give_the_same_matches(found: RuleSet, readings: list[Reading]) -> None:
    """Ids, hits, quotes and order; guards, exceptions, conditions over anything; equal texts twice."""
    plain = [match for reading in [*readings, *readings] for match in evaluate_rules(found.rules, reading)]
    assert found.evaluate([*readings, *readings]) == plain


def test_every_kind_of_selection_gives_the_same_matches_on_every_piece_of_text() -> None:
    """All keywords and patterns, alone, in pairs of blocks and ``all`` of two, on all pieces and pairs of pieces."""
    rest = {**GUARDS, "norm|gt": 0}
    single = [{"keywords": [word]} for word in WORDS] + [{"regex": [pattern]} for pattern in PATTERNS]
    blocks = [{**one, **rest} for one in single]
    pairs = [[one, other] for one, other in zip(blocks, [*blocks[7:], *blocks[:7]], strict=True)]
    every = [{"keywords|all": [one, other], **rest} for one, other in itertools.pairwise(WORDS)]
    every += [{"regex|all": [one, other], **rest} for one, other in itertools.pairwise(PATTERNS)]
    detections = [{"one": value, "condition": "one"} for value in (*blocks, *pairs, *every)]
    detections += [{"one": one, "two": two, "condition": "one && !two"} for one, two in itertools.pairwise(blocks)]
    found = RuleSet([spec(f"rule-{number}", **detection) for number, detection in enumerate(detections)])
    texts = [*PIECES, *(f"{one} {other}" for one, other in itertools.product(PIECES, PIECES[::3]))]
    readings = [reading_of(Case(text=text), text) for text in texts]
    plain = [match for reading in readings for match in evaluate_rules(found.rules, reading)]
    assert found.evaluate(readings) == plain
    assert len({match.rule_id for match in plain}) > 0.8 * len(found)


def test_the_packs_give_the_same_matches_on_their_own_tests_and_each_others() -> None:
    packs = load_rules(pack_names())
    cases = [case for rule in packs.rules for case in (*rule.spec.tests.positive, *rule.spec.tests.negative)]
    readings = [reading_of(case, f"case-{number}") for number, case in enumerate(cases)]
    plain = [match for reading in readings for match in evaluate_rules(packs.rules, reading)]
    assert packs.evaluate(readings) == plain
    assert len(plain) > len(packs)


def test_a_screening_pool_says_what_the_prefilter_itself_finds() -> None:
    """Also where there is nothing to screen, and for texts with lone surrogates."""
    packs = load_rules(pack_names())
    cases = [case for rule in packs.rules for case in rule.spec.tests.positive]
    readings = [reading_of(case, f"case-{number}") for number, case in enumerate([*cases, Case(text="\ud800")])]
    with ScreeningPool(packs.regexes, 1) as pool:
        screened = pool.submit([readable(reading.explanation.text) for reading in readings]).result()
    assert RuleSet(packs.rules).evaluate(readings, screened) == packs.evaluate(readings)
    assert screen(regex_filter([]), "text") is ...


def spec(key: str = "rule", **detection: Any) -> Any:
    return load_text(
        yaml.safe_dump(
            {
                "title": "A rule",
                "id": key,
                "severity": "low",
                "detection": detection,
                "tests": {"positive": ["x"], "negative": ["y"]},
            },
            allow_unicode=True,
        )
    )


@pytest.mark.parametrize(
    ("detection", "passed_over"),
    [
        ({"one": ["hack"], "condition": "one"}, True),
        ({"one": ["hack"], "condition": "!one"}, False),
        ({"one": ["hack"], "condition": "one && fidelity.fve >= 0.3"}, True),
        ({"one": ["hack"], "condition": "one || fidelity.fve >= 0.3"}, False),
        ({"one": ["hack"], "two": {"norm|gt": 5}, "condition": "one && two"}, True),
        ({"one": ["hack"], "two": {"norm|gt": 5}, "condition": "one || two"}, False),
        ({"one": {"regex": r"reward\s+hack"}, "two": ["excuse"], "condition": "one && !two"}, True),
        ({"one": ["тест"], "condition": "one"}, False),
    ],
)
def test_a_rule_is_passed_over_just_where_its_condition_needs_words_that_are_not_there(
    detection: dict[str, Any], passed_over: bool
) -> None:
    _, candidates = Prefilter([spec("rule", **detection)]).look("It plans an honest fix.")
    assert (candidates == ()) is passed_over


def test_folding_keeps_what_google_re2_takes_for_ascii_letters() -> None:
    assert folded("TE\u017fT \u212a") == "test k"


def test_a_hundred_rules_cost_little_more_than_one_where_no_word_of_theirs_is_there() -> None:
    """A ratio, generous, of the best of several runs: the plain path needs about a hundred times as long."""
    many = RuleSet(
        [
            dataclasses.replace(rule, header=dataclasses.replace(rule.header, rule_id=f"rule-{number}"))
            for number in range(100)
            for rule in [spec(one=[f"word{number} phrase{number}", f"term{number}"], condition="one")]
        ]
    )
    readings = [reading_of(Case(text=f"The passage number {n} describes a recipe. " * 8), str(n)) for n in range(300)]

    def seconds(found: RuleSet) -> float:
        found.evaluate(readings[:1])
        best = 1e9
        for _ in range(5):
            found = RuleSet(found.rules)  # no memo of texts
            found.evaluate(readings[:1])
            started = time.perf_counter()
            found.evaluate(readings)
            best = min(best, time.perf_counter() - started)
        return best

    assert seconds(many) < 12 * seconds(RuleSet(many.rules[:1]))
