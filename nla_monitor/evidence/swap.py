"""The swap margin and its kin: explanations with one claim exchanged or dropped, and what their scores say.

``margin = cosine(v, AR(text)) - max over alternatives of cosine(v, AR(text with the claim replaced))``. Whole-text
cosine certifies no claim, since the rest of the text carries it; a confabulated claim may be swapped at no cost, a
supported one may not. Dropping sentences in turn (ablation) tells less: a text without one of its sentences is
unusual whatever the sentence said, so only the rank among the sentences is kept. Pure functions: whoever has an AR
passes its scores in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from nla_monitor.evidence.negation import made_alternatives
from nla_monitor.records import Hit, Match

MOST_SENTENCES: Final = 24
"""Ablation costs one reconstruction a sentence; longer explanations are not ablated."""

# A sentence ends before white space (in scripts without it: at once), a line at its end; closing marks belong to it.
_ABBREVIATIONS = "".join(
    rf"(?<!\b{word})" for word in (r"e\.g\.", r"i\.e\.", r"vs\.", r"cf\.", r"Mr\.", r"Mrs\.", r"Dr\.")
)
_BOUNDARY = re.compile(
    rf"(?<=[.!?\u2026]){_ABBREVIATIONS}[\"'\u2019\u201d)\]*_]*\s+|(?<=[\u3002\uff01\uff1f])|[\r\n\u2028\u2029]+"
)
_BULLET = re.compile(r"\s*(?:[-*+\u2022\u2013]\s+|\d{1,3}[.)]\s+)?")


def claim_span(text: str, start: int, end: int) -> tuple[int, int]:
    """Start and end of the sentence (or line) that holds ``text[start:end]``, or of the sentences that it spans.

    White space around it and the bullet of a list are no part of it, unless the quote itself begins there.
    """
    quote = text[start:end]
    if quote.strip():
        start, end = start + len(quote) - len(quote.lstrip()), end - len(quote) + len(quote.rstrip())
    begin, stop = 0, len(text)
    for boundary in _BOUNDARY.finditer(text):
        if boundary.end() <= start:
            begin = boundary.end()
        elif boundary.start() >= end:
            stop = boundary.start() + len(boundary[0].rstrip())
            break
    lead = _BULLET.match(text, begin, start)
    begin = lead.end() if lead is not None else begin
    return begin, max(end, begin + len(text[begin:stop].rstrip()))


def quoted(text: str, match: Match) -> Hit | None:
    """The match's first hit whose quote stands in the text; None for a match on numbers alone."""
    return next((hit for hit in match.hits if hit.quote and 0 <= hit.start < hit.end <= len(text)), None)


def claim_of(text: str, match: Match) -> tuple[int, int] | None:
    """Where the match's claim stands: the sentence around its first quote."""
    hit = quoted(text, match)
    return None if hit is None else claim_span(text, hit.start, hit.end)


def swapped(text: str, match: Match, alternatives: Sequence[str], *, negation: bool = False) -> list[str]:
    """The explanation with the claim replaced by each alternative; empty without a quote.

    Args:
        text: the explanation.
        match: whose first quote marks the claim.
        alternatives: sentences; made (see ``made_alternatives``) when there are none.
        negation: whether the claim's negation is among the made ones.
    """
    span = claim_of(text, match)
    if span is None:
        return []
    begin, stop = span
    others = alternatives or made_alternatives(text[begin:stop], negation=negation)
    return [_replaced(text, begin, stop, other) for other in others]


def _replaced(text: str, begin: int, stop: int, other: str) -> str:
    return text[:begin] + other + (text[stop:] if other else text[stop:].lstrip(" "))


def swap_margin(stated: float, others: Sequence[float]) -> float:
    """Cosine of the explanation as stated, less the best with an alternative in the claim's place."""
    return stated - max(others)


def sentences(text: str, most: int = MOST_SENTENCES) -> list[tuple[int, int]]:
    """Start and end of every sentence or line that holds more than white space, in order; at most ``most + 1``."""
    found: list[tuple[int, int]] = []
    begin = 0
    for boundary in _BOUNDARY.finditer(text):
        _add(found, text, begin, boundary.start() + len(boundary[0].rstrip()))
        begin = boundary.end()
        if len(found) > most:
            return found
    _add(found, text, begin, len(text))
    return found


def _add(found: list[tuple[int, int]], text: str, begin: int, stop: int) -> None:
    part = text[begin:stop]
    if part.strip():
        found.append((begin + len(part) - len(part.lstrip()), begin + len(part.rstrip())))


def ablated(text: str, match: Match) -> tuple[list[str], int] | None:
    """The explanation without each of its sentences in turn, and which of them holds the claim.

    None when there is no quote, fewer than two sentences, or more than ``MOST_SENTENCES``.
    """
    span, parts = claim_of(text, match), sentences(text)
    if span is None or not 2 <= len(parts) <= MOST_SENTENCES:
        return None
    claim = next((number for number, (_, stop) in enumerate(parts) if stop > span[0]), len(parts) - 1)
    return [_replaced(text, begin, stop, "") for begin, stop in parts], claim


def ablation_rank(without: Sequence[float], claim: int) -> int:
    """Rank of the claim's sentence by what dropping it costs: 1 costs the most cosine; ties share the better rank.

    Args:
        without: cosine of the explanation without each sentence.
        claim: number of the claim's sentence.
    """
    return 1 + sum(cosine < without[claim] for cosine in without)
