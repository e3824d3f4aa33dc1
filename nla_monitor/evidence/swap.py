"""The swap margin: does the claim itself reconstruct the activation, or would any other claim do as well?

``margin = cosine(v, AR(text)) - max over alternatives of cosine(v, AR(text with the claim replaced))``. Whole-text
cosine certifies no claim, since the rest of the text carries it; a confabulated claim may be swapped at no cost, a
supported one may not. Pure functions: whoever has an AR passes its scores in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nla_monitor.records import Match, Reading, Support

Cosines = Callable[[npt.NDArray[np.float32], Sequence[str]], Sequence[float]]
"""Cosine of each text's reconstruction to its vector ``[batch, d_model]``, in order."""

# A sentence ends before white space (in scripts without it: at once), a line at its end; closing marks belong to it.
_ABBREVIATIONS = "".join(
    rf"(?<!\b{word})" for word in (r"e\.g\.", r"i\.e\.", r"vs\.", r"cf\.", r"Mr\.", r"Mrs\.", r"Dr\.")
)
_BOUNDARY = re.compile(
    rf"(?<=[.!?\u2026]){_ABBREVIATIONS}[\"'\u2019\u201d)\]*_]*\s+|(?<=[\u3002\uff01\uff1f])|[\r\n\u2028\u2029]+"
)
_BULLET = re.compile(r"\s*(?:[-*+\u2022\u2013]\s+|\d{1,3}[.)]\s+)?")


@dataclass(frozen=True, slots=True)
class SwapRule:
    """What a rule requires."""

    least: float
    alternatives: tuple[str, ...]


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


def swapped(text: str, match: Match, alternatives: Sequence[str]) -> list[str]:
    """The explanation with the claim of the match's first quote replaced by each alternative; empty without a quote."""
    hit = next((hit for hit in match.hits if hit.quote and 0 <= hit.start < hit.end <= len(text)), None)
    if hit is None:
        return []
    begin, stop = claim_span(text, hit.start, hit.end)
    return [text[:begin] + other + text[stop:] for other in alternatives]


def check_swaps(
    matches: Sequence[Match], readings: Mapping[str, Reading], rules: Mapping[str, SwapRule], cosines: Cosines
) -> dict[str, Support]:
    """What the swap margin says of each match whose rule requires it.

    Args:
        matches: candidates.
        readings: by ``sample_id``; those without fidelity are left out (no AR, no margin).
        rules: requirements, by rule id.
        cosines: the AR; called once, with all texts.
    """
    jobs: list[tuple[Match, Reading, list[str]]] = []
    for match in matches:
        reading, rule = readings[match.sample_id], rules.get(match.rule_id)
        if rule is not None and reading.fidelity is not None:
            texts = swapped(reading.explanation.text, match, rule.alternatives)
            if texts:
                jobs.append((match, reading, texts))
    if not jobs:
        return {}
    vectors = np.stack([reading.sample.vector for _, reading, texts in jobs for _ in texts])
    scores = iter(cosines(vectors, [text for _, _, texts in jobs for text in texts]))
    found = {}
    for match, reading, texts in jobs:
        best = max(next(scores) for _ in texts)
        stated = reading.fidelity.cosine if reading.fidelity is not None else 0.0
        margin = float(stated - best)
        supported = margin >= rules[match.rule_id].least
        failed = () if supported else ("swap_margin",)
        found[match.match_id] = Support(match.match_id, supported, {"swap_margin": margin}, failed, score=margin)
    return found
