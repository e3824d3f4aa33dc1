"""Words that the explanation takes over from a quotation in the text that the model read.

The explanation guards (``scope``) see quotation marks in the explanation only. An AV often repeats what the prompt
quotes without them; such words are what somebody else said, not a claim about the model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

from nla_monitor.records import Hit, Reading
from nla_monitor.rules.scope import quotations

FEWEST_WORDS: Final = 3
"""Words that a hit must have to be taken for a quotation: a shared word or two is a shared topic."""
_WORD: Final = re.compile(r"\w+")
_QUOTED_LINE: Final = re.compile(r"^[ \t]*>.*$", re.MULTILINE)


def unquoted(
    found: Mapping[str, tuple[Hit, ...] | None], reading: Reading, exempt: Collection[str]
) -> Mapping[str, tuple[Hit, ...] | None]:
    """The hits of each selection without those that the sample's context quotes; None where none is left.

    Args:
        found: hits by selection.
        reading: whose context is looked at.
        exempt: selections that take quotations for claims (``quotes: ignore``).
    """
    context = reading.sample.context
    if not context or not any(hits for hits in found.values()):
        return found
    quoted = _quoted(context)
    if not quoted:
        return found
    return {name: hits if name in exempt else _left(hits, quoted) for name, hits in found.items()}


def _left(hits: tuple[Hit, ...] | None, quoted: list[str]) -> tuple[Hit, ...] | None:
    if not hits:
        return hits
    return tuple(hit for hit in hits if not _stands_in(hit.quote, quoted)) or None


def _stands_in(quote: str, quoted: list[str]) -> bool:
    words = _WORD.findall(quote.casefold())
    return len(words) >= FEWEST_WORDS and any(_joined(words) in text for text in quoted)


def _quoted(context: str) -> list[str]:
    """Each quotation (marks, back-ticks, lines that begin with ``>``) as its words."""
    spans = [*quotations(context), *(hit.span() for hit in _QUOTED_LINE.finditer(context))]
    return [_joined(_WORD.findall(context[start:end].casefold())) for start, end in spans]


def _joined(words: list[str]) -> str:
    return f" {' '.join(words)} "
