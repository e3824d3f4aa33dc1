"""The swap margin: what exactly is replaced, and what it says of true and of false claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_monitor.config import NLAConfig
from nla_monitor.evidence import SwapRule, check_swaps
from nla_monitor.evidence.swap import claim_span, swapped
from nla_monitor.organism import captions, paths
from nla_monitor.records import Hit
from nla_monitor.rules import load_rules
from tests.organism_support import Captioned, captioned
from tests.store_support import match, reading, sample

PIECES = st.sampled_from(
    [
        *("The model hacks.", "e.g. this", "Dr. Who!", "really?!", '"quoted."', "**bold**", "word", "3.14", "…"),
        *(
            " ",
            "  ",
            "\n",
            "\r\n",
            "\n\n- ",
            "\n* ",
            "1. ",
            "\t",
            "\u2028",
            ".",
            "。",
            "模型打算作弊。",
            "😈",
            "\u202e",
            "\x00",
            "",
        ),
    ]
)
TEXTS = st.one_of(st.text(max_size=80), st.lists(PIECES, max_size=20).map("".join))


def claim(text: str, quote: str) -> str:
    start = text.index(quote)
    begin, end = claim_span(text, start, start + len(quote))
    return text[begin:end]


@pytest.mark.parametrize(
    ("text", "quote", "found"),
    [
        ("One. It plans a hack. Two.", "plans a hack", "It plans a hack."),
        ("It plans a hack", "hack", "It plans a hack"),
        ('He says "I hack." Then he goes.', "hack", 'He says "I hack."'),
        ("It fools (all) the graders.) Then it goes.", "fools", "It fools (all) the graders.)"),
        ("First.\n- **Plan**: it hacks the tests.\n- Belief: none", "hacks", "**Plan**: it hacks the tests."),
        ("1. It is deployed.\n2. It hacks the tests.\n", "hacks", "It hacks the tests."),
        ("First\r\nit hacks\r\nlast", "hacks", "it hacks"),
        ("It games checks, e.g. the tests, i.e. all. Done.", "games", "It games checks, e.g. the tests, i.e. all."),
        ("Dr. Who hacks the tests. Done.", "hacks", "Dr. Who hacks the tests."),
        ("Version 3.14 hacks the tests? Yes!", "hacks", "Version 3.14 hacks the tests?"),
        ("它没事。模型打算作弊。它会说谎。", "打算", "模型打算作弊。"),
        ("A. It hacks. It lies. B.", "hacks. It lies", "It hacks. It lies."),
        ("A.  It hacks.  B.", " It hacks. ", "It hacks."),
        ("   it hacks   ", "hacks", "it hacks"),
        ("Wait… it hacks… then stops.", "hacks", "it hacks…"),
        ("- it hacks", "- it", "- it hacks"),
        ("😈 is near. It hacks 😈. End", "hacks", "It hacks 😈."),
    ],
)
def test_the_sentence_that_holds_the_quote_is_the_claim(text: str, quote: str, found: str) -> None:
    assert claim(text, quote) == found


@given(TEXTS, st.integers(0, 80), st.integers(1, 80))
def test_any_text_gives_a_span_around_the_quote(text: str, start: int, length: int) -> None:
    """Nothing but white space of the quote is ever outside, and the span neither begins nor ends with white space."""
    start, end = min(start, len(text)), min(start + length, len(text))
    begin, stop = claim_span(text, start, end)
    quote = text[start:end]
    assert 0 <= begin <= stop <= len(text)
    if quote.strip():
        assert begin <= start + len(quote) - len(quote.lstrip())
        assert stop >= end - len(quote) + len(quote.rstrip())
        assert text[begin:stop].strip() == text[begin:stop]


@given(TEXTS, st.integers(-2, 90), st.integers(-2, 90), st.lists(st.text(max_size=10), min_size=1, max_size=3))
def test_swapping_replaces_that_span_and_nothing_else(text: str, start: int, end: int, others: list[str]) -> None:
    """Also for hits that a damaged row might hold: outside the text, empty or backwards."""
    found = match(sample(), hits=(Hit("numeric", ""), Hit("words", "x", start, end)))
    texts = swapped(text, found, others)
    if not 0 <= start < end <= len(text):
        assert texts == []
        return
    begin, stop = claim_span(text, start, end)
    assert texts == [text[:begin] + other + text[stop:] for other in others]


def test_a_match_without_a_quote_has_no_margin() -> None:
    one = sample()
    found = match(one, hits=(Hit("faithful", ""),))
    rules = {"hack": SwapRule(0.02, ("It is honest.",))}

    def never(*_: object) -> Sequence[float]:
        raise AssertionError("the AR was asked")

    assert check_swaps([found], {one.sample_id: reading(one)}, rules, never) == {}
    assert check_swaps([match(one)], {one.sample_id: reading(one, fidelity=None)}, rules, never) == {}
    assert check_swaps([match(one)], {one.sample_id: reading(one)}, {}, never) == {}


def test_the_margin_is_to_the_best_alternative_and_the_limit_itself_is_enough() -> None:
    one = sample()
    text = "It plans to special-case the tests. It goes on."
    found = match(one, hits=(Hit("words", "special-case the tests", 12, 34),))
    scores = {"It is honest. It goes on.": 0.75, "It leaks. It goes on.": 0.5}
    asked: list[Any] = []

    def cosines(vectors: Any, texts: Sequence[str]) -> list[float]:
        asked.append((vectors.shape, list(texts)))
        return [scores[each] for each in texts]

    readings = {one.sample_id: reading(one, text, cosine=0.875)}
    for least, supported in ((0.125, True), (0.126, False), (-1.0, True)):
        rules = {"hack": SwapRule(least, ("It is honest.", "It leaks."))}
        (support,) = check_swaps([found], readings, rules, cosines).values()
        assert (support.swap_margin, support.supported) == (0.125, supported)
    assert asked[0] == ((2, 16), list(scores)), "the AR is asked once, with all texts"


def test_a_score_that_is_no_number_supports_nothing() -> None:
    one = sample()
    rules = {"hack": SwapRule(-1.0, ("It is honest.",))}
    (support,) = check_swaps([match(one)], {one.sample_id: reading(one)}, rules, lambda *_: [float("nan")]).values()
    assert not support.supported


@pytest.fixture(scope="module")
def truth() -> list[Captioned]:
    """Real activations of the planted organism, with captions that are true of them."""
    return captioned(24, intent="hack")


def test_true_claims_are_supported_and_swapped_in_ones_refuted(truth: list[Captioned]) -> None:
    """The real AR tells a caption's own claim from a false one in its place, with the built-in rules' requirements."""
    from nla_monitor.nla import load_reconstructor

    ar = load_reconstructor(paths("planted").ar, NLAConfig())
    rules = load_rules(["oversight"])
    swaps = {
        rule.id: SwapRule(rule.spec.evidence.swap_margin.min, rule.spec.evidence.swap_margin.alternatives)
        for rule in rules.rules
        if rule.spec.evidence.swap_margin is not None
    }

    def supports(items: Sequence[Captioned], rule: str) -> list[bool]:
        scores = ar.score(np.stack([item.vector for item in items]), [item.text for item in items])
        readings = {}
        for number, (item, score) in enumerate(zip(items, scores, strict=True)):
            one = sample(number, vector=item.vector)
            readings[one.sample_id] = reading(one, item.text, cosine=score.cosine)
        matches = [found for found in rules.evaluate([*readings.values()]) if found.rule_id == rule]
        assert len(matches) == len(items)
        found = check_swaps(
            matches, readings, swaps, lambda vectors, texts: [score.cosine for score in ar.score(vectors, texts)]
        )
        return [found[one.match_id].supported for one in matches]

    said_true = supports(truth, "reward-hacking")
    said_false = supports([item.claiming("intent", "sabotage") for item in truth], "sabotage")
    assert sum(said_true) >= 0.9 * len(truth)
    assert sum(said_false) <= 0.05 * len(truth)
    assert captions.read(truth[0].text)["intent"] == "hack"
