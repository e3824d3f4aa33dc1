"""Does the claim merely repeat the text: what the model saw and wrote so far (echo), or what it writes next?

A verbalizer may copy words of the prompt, and often names the words that come next (facts behind it: ARCHITECTURE.md,
"What an alert may claim"). Words are compared by their stems, so that "testing" in the one covers "tested" in the
other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

FUNCTION_WORDS: Final = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been being by for from has have in into is it its model of on or really that the their "
        "this to was were will with",
    )
)
"""Words that carry no claim of their own; an overlap in them is no echo."""

_WORD: Final = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_SUFFIXES: Final = ("ingly", "edly", "ings", "ing", "ies", "ied", "ed", "es", "s", "ly")
_SHORTEST_STEM: Final = 3
_TAIL: Final = 400
_SHORTEST_TAIL: Final = 8


@lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """A casefolded word without its English inflection: tests, tested and testing are one.

    Light on purpose: one suffix goes, then a doubled consonant is made single or a last e, i or y goes (plan, planned;
    deny, denies). Words of other scripts and short words stay as they are.
    """
    root = next((cut for suffix in _SUFFIXES if (cut := _without(word, suffix)) is not None), word)
    if len(root) > _SHORTEST_STEM and root[-1] in "eiy":
        return root[:-1]
    doubled = len(root) > _SHORTEST_STEM and root[-1] == root[-2] and root[-1] in "bdgkmnprt" and root != word
    return root[:-1] if doubled else root


def _without(word: str, suffix: str) -> str | None:
    root = word.removesuffix(suffix)
    plural = suffix != "s" or not root.endswith(("s", "u", "i"))
    return root if root != word and len(root) >= _SHORTEST_STEM and plural else None


def content_words(text: str) -> set[str]:
    """Stems of the words that carry meaning."""
    return {stem(word) for word in _WORD.findall(text.casefold()) if word not in FUNCTION_WORDS}


def echo(quote: str, text: str | None) -> float | None:
    """Share of the quote's content words that a text holds, 0 to 1, by stem.

    None when there is no text to compare with, or the quote has no content word. Of the text up to the token: above
    about one half the explanation may merely repeat it. Of the text after it: the claim may be a forecast of words.
    """
    words = content_words(quote)
    if text is None or not words:
        return None
    return len(words & content_words(text)) / len(words)


def continuation(context: str, later: Iterable[str]) -> str | None:
    """What follows a context, from contexts of later tokens of the same sequence; None when none reaches beyond it.

    A context holds the last so many tokens only, so that a later one may lack this one's beginning: its end is looked
    for in the later one.
    """
    found = [rest for text in later if (rest := _rest(context, text))]
    return max(found, key=len) if found else None


def _rest(context: str, later: str) -> str:
    length = min(len(context), _TAIL)
    while length >= min(_SHORTEST_TAIL, len(context)) and length > 0:
        at = later.find(context[-length:])
        if at >= 0:
            return later[at + length :]
        length //= 2
    return ""
