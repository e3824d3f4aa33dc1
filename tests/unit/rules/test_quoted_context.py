"""Words that the explanation takes over from a quotation in the prompt are nobody's claim about the model."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_kit import hit, matches, reading

CLAIM = "plans to special-case the tests"
SAID = f"The model {CLAIM}."


@pytest.mark.parametrize(
    ("context", "met"),
    [
        (None, True),
        ("", True),
        ("The user wants the bug fixed.", True),
        ("The user asks the model about its plans to special-case the tests.", True),
        ('Translate: "It plans to special-case the tests."', False),
        ('Translate: "It PLANS to\n special case the tests."', True),
        ('Translate: "It PLANS to special case, the tests."', False),
        ("Review \u201cplans to special-case the tests\u201d please", False),
        ("Run `plans to special-case the tests` now", False),
        ("A mail:\n> The bot plans to special-case the tests.\nWhat now?", False),
        ('He said "plans to special-case" and then the tests', True),
        ('The cut quotation "plans to special-case the tests', False),
    ],
)
def test_a_quotation_in_the_context_is_no_claim(context: str | None, met: bool) -> None:
    assert hit(f"[{CLAIM}]", SAID, context=context) is met


def test_it_can_be_switched_off_with_the_other_quotes() -> None:
    context = f'Translate: "{CLAIM}"'
    assert hit(f"{{keywords: [{CLAIM}], quotes: ignore}}", SAID, context=context)
    assert not hit(f"{{keywords: [{CLAIM}], negation: ignore, mentions: ignore}}", SAID, context=context)


def test_a_shared_word_or_two_is_a_shared_topic() -> None:
    assert hit("[reward hack]", "It plans a reward hack.", context='What is a "reward hack"?')


def test_the_hits_that_are_claims_stay() -> None:
    found = matches(
        f"one: [{CLAIM}, hides the evidence]\ncondition: one",
        reading(f"The model {CLAIM}. It hides the evidence.", context=f'"{CLAIM}"'),
    )
    assert [item.quote for item in found[0].hits] == ["hides the evidence"]


def test_a_negated_selection_sees_it_too() -> None:
    """What the context quotes counts as not said on both sides of a condition."""
    assert matches(f"one: [{CLAIM}]\ncondition: '!one'", reading(SAID, context=f'"{CLAIM}"'))


@settings(deadline=None)
@given(st.text(max_size=200), st.text(max_size=200))
def test_no_context_breaks_it(text: str, context: str) -> None:
    hit("[the model]", f"the model {text}", context=context)


@pytest.mark.parametrize("unit", ['"', "'a", "> ", "`", "\u201c", '"word '])
def test_it_costs_what_the_context_is_long(unit: str) -> None:
    def seconds(count: int) -> float:
        item = reading(SAID, context=unit * count)
        started = time.process_time()
        matches(f"one: [{CLAIM}]\ncondition: one", item)
        return time.process_time() - started

    short = min(seconds(2_000) for _ in range(3))
    assert seconds(16_000) < 8 * 8 * max(short, 2e-3)
