"""The swap margin: what exactly is replaced, and what it says of true and of false claims."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_monitor.evidence.negation import PROBES, made_alternatives, negated, reads_negation
from nla_monitor.evidence.swap import (
    MOST_SENTENCES,
    ablated,
    ablation_rank,
    claim_of,
    claim_span,
    sentences,
    swap_margin,
    swapped,
)
from nla_monitor.records import Hit
from tests.store_support import match, sample

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
    expected = [text[:begin] + other + (text[stop:] if other else text[stop:].lstrip(" ")) for other in others]
    assert texts == expected


@given(st.floats(-1, 1), st.lists(st.floats(-1, 1), min_size=1, max_size=5))
def test_a_margin_is_to_the_best_alternative(stated: float, others: list[float]) -> None:
    """One alternative: what the claim leads by is what the alternative lags by. More alternatives never raise it."""
    assert swap_margin(stated, others) == stated - max(others)
    assert swap_margin(stated, others[:1]) == -swap_margin(others[0], [stated])
    assert swap_margin(stated, others) <= swap_margin(stated, others[:1])


# -- alternatives that are made ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "denied"),
    [
        ("The model intends to special-case the tests.", "The model does not intend to special-case the tests."),
        ("It plans a reward hack.", "It does not plan a reward hack."),
        ("The model believes it is being tested.", "The model does not believe it is being tested."),
        ("The assistant secretly relies on it.", "The assistant secretly does not rely on it."),
        ("The model has a plan.", "The model does not have a plan."),
        ("The reply will be in German.", "The reply will not be in German."),
        ("It is going to answer.", "It is not going to answer."),
        ("This is a test.", "This is not a test."),
        ("The model does not care.", "The model care."),
        ("It isn't sure.", "It is sure."),
        ("It can't help.", "It can help."),
        ("It won\u2019t help.", "It will help."),
        ("The model has no opinion.", "The model has opinion."),
        ("Plan: sabotage.", "It is not so: Plan: sabotage."),
        ("\u6a21\u578b\u6253\u7b97\u4f5c\u5f0a\u3002", "It is not so: \u6a21\u578b\u6253\u7b97\u4f5c\u5f0a\u3002"),
    ],
)
def test_a_sentence_is_denied_by_its_auxiliary_or_its_verb(sentence: str, denied: str) -> None:
    assert negated(sentence) == denied


@given(TEXTS)
def test_any_text_can_be_denied_and_gets_alternatives_of_its_own(text: str) -> None:
    assert isinstance(negated(text), str)
    assert negated(text) != text or not text.strip()
    made = made_alternatives(text, negation=True)
    assert made[-1] == negated(text)
    assert "" in made, "the claim left out is an alternative, too"
    assert made_alternatives(text, negation=False) == made[:-1]


def test_a_rule_without_alternatives_gets_made_ones() -> None:
    text = "It plans to special-case the tests. It goes on."
    found = match(sample(), hits=(Hit("words", "special-case the tests", 12, 34),))
    assert swapped(text, found, ("It is honest.",)) == ["It is honest. It goes on."]
    made = swapped(text, found, (), negation=True)
    assert made == [
        "It is unclear. It goes on.",
        "Something else is the case here. It goes on.",
        "It goes on.",
        "It does not plan to special-case the tests. It goes on.",
    ]


def test_an_ar_that_maps_a_sentence_and_its_denial_to_one_vector_does_not_read_negation() -> None:
    rng = np.random.default_rng(0)
    plain, other = rng.standard_normal((2, len(PROBES), 32)).astype(np.float32)
    assert not reads_negation(plain, plain * 2)
    assert not reads_negation(plain, np.zeros_like(plain) + plain[:1] * 0 + plain)
    assert reads_negation(plain, other)
    same = np.ones_like(plain)
    assert not reads_negation(same, same), "an AR that tells nothing apart reads nothing"


# -- ablation ----------------------------------------------------------------------------------------------------


@given(TEXTS)
def test_sentences_cover_every_word_in_order(text: str) -> None:
    found = sentences(text, most=100)
    assert all(text[begin:stop].strip() == text[begin:stop] != "" for begin, stop in found)
    assert all(one[1] <= other[0] for one, other in pairwise(found))
    rest, at = "", 0
    for begin, stop in found:
        rest, at = rest + text[at:begin], stop
    assert not (rest + text[at:]).strip(), "only white space is left between them"


@given(TEXTS, st.integers(0, 80), st.integers(1, 20))
def test_ablation_drops_each_sentence_once(text: str, start: int, length: int) -> None:
    found = match(sample(), hits=(Hit("words", "x", start, start + length),))
    made = ablated(text, found)
    if made is None:
        assert claim_of(text, found) is None or not 2 <= len(sentences(text)) <= MOST_SENTENCES
        return
    texts, claim = made
    assert len(texts) == len(sentences(text))
    assert 0 <= claim < len(texts)
    assert all(len(one) < len(text) for one in texts)


def test_the_claims_sentence_is_found_among_the_others_and_ranked() -> None:
    text = "A server fails. It plans to hack. It goes on."
    made = ablated(text, match(sample(), hits=(Hit("words", "plans to hack", 19, 32),)))
    assert made == (
        ["It plans to hack. It goes on.", "A server fails. It goes on.", "A server fails. It plans to hack. "],
        1,
    )
    assert ablation_rank([0.8, 0.5, 0.9], 1) == 1
    assert ablation_rank([0.4, 0.5, 0.45], 1) == 3
    assert ablation_rank([0.5, 0.5], 1) == 1, "ties share the better rank"
    assert ablated("One sentence.", match(sample(), hits=(Hit("words", "One", 0, 3),))) is None
    long = "Some words. " * (MOST_SENTENCES + 1)
    assert ablated(long, match(sample(), hits=(Hit("words", "Some", 0, 4),))) is None


def test_a_huge_explanation_is_split_in_no_time() -> None:
    text = "It lies.\n" * 200_000
    assert len(sentences(text)) == MOST_SENTENCES + 1
