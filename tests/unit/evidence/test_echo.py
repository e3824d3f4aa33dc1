"""Echo: words compared by their stems, with the text before the token and with what follows it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_monitor.evidence.echo import content_words, continuation, echo, stem


@pytest.mark.parametrize(
    ("quote", "context", "share"),
    [
        ("special-case the tests", "Please SPECIAL-CASE all Tests!", 1.0),
        ("special-case the tests", "Fix the parser", 0.0),
        ("plans to hack tests", "the tests", 1 / 3),
        ("the model is", "the model is", None),
        ("hack", None, None),
        ("", "text", None),
        ("hack", "", 0.0),
        ("Prüfung überlisten", "die PRÜFUNG", 0.5),
        ("作弊", "作弊", 1.0),
        ("😈", "😈", None),
        ("tests the hypothesis", "testing was planned", 0.5),
        ("planned", "it plans", 1.0),
    ],
)
def test_echo_is_the_share_of_words_that_stood_there_already(
    quote: str, context: str | None, share: float | None
) -> None:
    assert echo(quote, context) == (share if share is None else pytest.approx(share))


@given(st.text(max_size=60), st.none() | st.text(max_size=60))
def test_echo_is_a_share_or_nothing(quote: str, context: str | None) -> None:
    found = echo(quote, context)
    assert found is None or 0.0 <= found <= 1.0
    assert echo(quote, quote) in (None, 1.0)
    if found is not None and context is not None:
        assert (echo(quote, context + " " + quote) or 0.0) == 1.0


@pytest.mark.parametrize(
    "forms",
    [
        ("test", "tests", "tested", "testing"),
        ("plan", "plans", "planned", "planning"),
        ("hack", "hacks", "hacked", "hacking"),
        ("evaluate", "evaluates", "evaluated", "evaluating"),
        ("special-case", "special-cases", "special-cased", "special-casing"),
        ("deploy", "deploys", "deployed", "deploying"),
        ("pass", "passes", "passed", "passing"),
        ("deny", "denies", "denied", "denying"),
        ("secret", "secrets", "secretly"),
    ],
)
def test_forms_of_a_word_share_a_stem(forms: tuple[str, ...]) -> None:
    assert len({stem(form) for form in forms}) == 1, {form: stem(form) for form in forms}


@pytest.mark.parametrize(("one", "other"), [("test", "text"), ("string", "strong"), ("model", "mode"), ("red", "reed")])
def test_other_words_keep_their_own_stems(one: str, other: str) -> None:
    assert stem(one) != stem(other)


@given(st.text(max_size=30))
def test_a_stem_is_the_beginning_of_its_word(word: str) -> None:
    folded = word.casefold()
    assert folded.startswith(stem(folded))
    assert stem(folded) or not folded


@given(st.text(max_size=80), st.randoms())
def test_words_do_not_depend_on_their_order(text: str, random: object) -> None:
    parts = text.split()
    shuffled = sorted(parts, key=lambda _: random.random())  # type: ignore[attr-defined]
    assert content_words(" ".join(parts)) == content_words(" ".join(shuffled))


def test_a_continuation_is_what_later_contexts_add() -> None:
    own = "The task is to fix the login form."
    assert continuation(own, [own + " I will", own + " I will special-case it."]) == " I will special-case it."
    assert continuation(own, ["to fix the login form. Then"]) == " Then", "a later context has lost its beginning"
    assert continuation(own, ["Something else altogether"]) is None
    assert continuation(own, []) is None
    assert continuation(own, [own]) is None, "nothing was added"


@given(st.text(min_size=1, max_size=60), st.text(max_size=30))
def test_a_continuation_is_found_however_short_the_context(own: str, more: str) -> None:
    assert continuation(own, [own + more]) is not None or not more
