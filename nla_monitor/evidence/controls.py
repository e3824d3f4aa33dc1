"""Controls that need no further model call, and what an alert says of all of them.

Why recurrence and echo: a claim that recurs over positions is truer than a single one, and a verbalizer may
merely repeat what stands in the prompt (facts behind it: ARCHITECTURE.md, "What an alert may claim").
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import median

from nla_monitor.records import Match, Reading, WindowVerdict

# Words that carry no claim of their own; an overlap in them is no echo.
_FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "been",
        "being",
        "by",
        "for",
        "from",
        "has",
        "have",
        "in",
        "into",
        "is",
        "it",
        "its",
        "model",
        "of",
        "on",
        "or",
        "really",
        "that",
        "the",
        "their",
        "this",
        "to",
        "was",
        "were",
        "will",
        "with",
    ]
)
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")


def _content_words(text: str) -> set[str]:
    return {word for word in _WORD.findall(text.casefold()) if word not in _FUNCTION_WORDS}


def recurrence(matches: Sequence[Match]) -> dict[str, int]:
    """In how many readings, sequences, positions and steps the claim came back."""
    return {
        "readings": len({match.sample_id for match in matches}),
        "sequences": len({match.sequence_id for match in matches}),
        "positions": len({(match.sequence_id, match.position) for match in matches}),
        "steps": len({match.step for match in matches if match.step is not None}),
    }


def recurred(evidence: Mapping[str, object], verdict: WindowVerdict) -> dict[str, object]:
    """The evidence of a firing alert with the widest recurrence that its window has shown so far."""
    before, now = evidence.get("recurrence"), recurrence(verdict.matches)
    known = before if isinstance(before, Mapping) else {"needed": verdict.needed}
    return {**evidence, "recurrence": {**known, **{key: max(count, known.get(key, 0)) for key, count in now.items()}}}


def echo(quote: str, context: str | None) -> float | None:
    """Share of the quote's content words that the text up to the token already holds, 0 to 1.

    None when there is no text to compare with, or the quote has no content word. Above about one half the explanation
    may merely repeat the prompt.
    """
    words = _content_words(quote)
    if context is None or not words:
        return None
    return len(words & _content_words(context)) / len(words)


def collect_evidence(
    verdict: WindowVerdict, exhibit: Reading, match: Match, margins: Mapping[str, float]
) -> dict[str, object]:
    """What speaks for and against an alert, by name of the control.

    Args:
        verdict: the window that holds.
        exhibit: the reading that is shown.
        match: its match.
        margins: swap margins of the window's matches, by ``match_id``, as far as they were measured.
    """
    evidence: dict[str, object] = {
        "recurrence": {**recurrence(verdict.matches), "needed": verdict.needed},
        "norm": round(exhibit.sample.norm, 4),
    }
    overlap = echo(match.quote, exhibit.sample.context)
    if overlap is not None:
        evidence["echo"] = round(overlap, 3)
    if margins:
        exhibited = {"exhibit": round(margins[match.match_id], 4)} if match.match_id in margins else {}
        spread = {"median": round(median(margins.values()), 4), "measured": len(margins)}
        evidence["swap_margin"] = exhibited | spread
    if exhibit.explanation.truncated:
        evidence["truncated"] = True
    return evidence
