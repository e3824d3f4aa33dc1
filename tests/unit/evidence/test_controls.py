"""Recurrence, echo, and what an alert says of its controls."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_monitor.evidence import collect_evidence, echo, recurred, recurrence
from nla_monitor.records import WindowVerdict
from tests.store_support import match, reading, sample


def test_recurrence_counts_what_is_distinct() -> None:
    one, again, other = sample(0), sample(1, position=10, step=0), sample(8, step=None)
    found = [match(one), match(one), match(again), match(other)]
    assert recurrence(found) == {"readings": 3, "sequences": 2, "positions": 2, "steps": 1}
    assert recurrence([]) == {"readings": 0, "sequences": 0, "positions": 0, "steps": 0}


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


def test_a_firing_alert_keeps_the_widest_recurrence_of_its_window() -> None:
    one, two, three = sample(0), sample(4), sample(8)
    wide = WindowVerdict(firing=True, matches=(match(one), match(two), match(three)), distinct=3, needed=2)
    narrow = WindowVerdict(firing=True, matches=(match(three),), distinct=1, needed=2)
    first = {"norm": 1.0, "recurrence": {**recurrence([match(one)]), "needed": 2}}
    for verdicts in ((wide, narrow), (narrow, wide)):
        found = first
        for verdict in verdicts:
            found = recurred(found, verdict)
        widest = {"readings": 3, "sequences": 3, "positions": 3, "steps": 3, "needed": 2}
        assert found == {"norm": 1.0, "recurrence": widest}
    assert first["recurrence"] == {**recurrence([match(one)]), "needed": 2}


def test_what_was_not_measured_is_absent() -> None:
    one = sample(context=None)
    verdict = WindowVerdict(firing=True, matches=(match(one),), distinct=1, needed=1)
    assert set(collect_evidence(verdict, reading(one), match(one), {})) == {"recurrence", "norm"}


def test_an_alert_tells_margins_echo_and_recurrence_as_json() -> None:
    one, other = sample(0, context="special-case"), sample(1)
    matches = (match(one), match(other))
    verdict = WindowVerdict(firing=True, matches=matches, distinct=2, needed=2)
    margins = {matches[0].match_id: 0.25, matches[1].match_id: 0.75}
    found = collect_evidence(verdict, reading(one), matches[0], margins)
    assert found["swap_margin"] == {"exhibit": 0.25, "median": 0.5, "measured": 2}
    assert found["recurrence"] == {"readings": 2, "sequences": 1, "positions": 2, "steps": 2, "needed": 2}
    assert found["echo"] == 0.5
    assert json.loads(json.dumps(found)) == found
    (left,) = [key for key in margins if key != matches[0].match_id]
    assert "exhibit" not in collect_evidence(verdict, reading(one), matches[0], {left: 0.1})["swap_margin"]  # type: ignore[operator]
