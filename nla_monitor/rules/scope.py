"""Words that are said but not claimed: negated, quoted, or merely talked about.

The paper's graders say NO to an explanation that holds the word *test* without claiming anything of the model. Three
simple guards do the same for keywords and patterns; each can be switched off per selection (``ignore``):

- ``negation``: a cue such as *not*, *n't*, *no*, *without*, *refuses*, *rather than* stands before the words, in the
  same clause and at most ``REACH`` words away; or the words are taken back right after (*but the model refuses*).
- ``quotes``: the words stand wholly inside quotation marks or back-ticks: text that the model read or expects to write.
- ``mentions``: the words are a topic (*an article about ...*, *asks whether ...*, *if ...*) or what somebody else does
  (*the user secretly plans to ...*).

English only, by cue words, no parser: a guard for everyday phrasing, not a proof. A clause ends at ``. ! ? ; :``, a
dash, a line break, a contrast (*but*, *however*, ...), a reason (*because*, ...), or a comma that opens a new subject.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import Final

REACH: Final = 8
"""Words between a cue and what it governs."""
_BACK: Final = 240  # characters looked at before a hit: bounds the cost on texts without punctuation
_AHEAD: Final = 160

_I: Final = re.IGNORECASE
_WORD: Final = re.compile(r"[\w'\u2019-]+")

_PSEUDO: Final = re.compile(
    r"\b(?:not\s+(?:only|just|merely|simply|surprising\w*)|no\s+(?:doubt|wonder|question)|without\s+(?:a\s+)?doubt"
    r"|can(?:not|['\u2019]t)\s+help|if\s+(?:not|anything)|as\s+if|even\s+if)\b",
    _I,
)
NEGATION: Final = re.compile(
    r"\b(?:not|never|no|none|nor|neither|without|cannot|nothing|nobody|hardly|unaware|unlikely|unwilling|rather\s+than"
    r"|instead\s+of|far\s+from|free\s+of|(?:refus|declin|reject|avoid|dismiss|prevent|resist|lack|abstain|refrain)\w*"
    r"|rul\w+\s+out|(?:warn|advis|decid|argu|guard)\w*\s+against)\b|\b\w+n['\u2019]t\b",
    _I,
)
_TAKEN_BACK: Final = re.compile(
    r"^[^.!?\n]{0,100}?\b(?:but|yet|and\s+then)\s+(?:\w+\s+){0,3}?"
    r"(?:refus\w+|declin\w+|reject\w*|dismiss\w*|decid\w+\s+against|rul\w+\s+(?:it|this|that)\s+out|won['\u2019]t|will\s+not)\b"
    r"|^\W*(?:\w+\W+){0,3}?(?:is|was|are|were|gets?)\s+(?:\w+\s+)?(?:dismissed|rejected|ruled\s+out|discarded|abandoned|unfounded|refuted)\b",
    _I,
)
_TEXT: Final = (
    r"(?:article|essay|blog|lecture|paper|tutorial|documentation|docs|story|novel|fiction\w*|tale|lesson|course|chapter|textbook|book"
    r"|film|movie|thriller|play|game|discussion|explanation|question|definition|example|description|report|news|post|poem|section|text|passage)s?"
)
MENTION: Final = re.compile(
    rf"\b{_TEXT}\s+(?:\w+\s+){{0,3}}?(?:about|on|of|that|where|which|who|whose|how|explain\w*|describ\w*|discuss\w*|warn\w*)\b"
    r"|\b(?:discuss|explain|describ|defin|mention|illustrat|summari[sz])\w*\s+(?:\w+\s+){0,2}?(?:about|how|what|when|whether|why|that|of)\b"
    r"|\b(?:discuss|explain|describ|defin|mention)(?:s|es|ed|ing|e)?\b"
    r"|\b(?:ask|talk|writ|read|learn|wonder|teach)\w*\s+(?:\w+\s+){0,2}?(?:about|how|what|whether|why|if)\b"
    r"|\b(?:if|whether|suppos\w+|hypothetical\w*|imagin\w+|in\s+which|accus\w+|warn\w*\s+(?:that|of|about))\b"
    r"|\b(?:topic|concept|notion|subject|term|definition|history|theme|problem|risk|dangers?)\s+of\b",
    _I,
)
_OTHER: Final = re.compile(
    r"\b(?:users?|humans?|attackers?|hackers?|villains?|characters?|protagonists?|narrators?|hero(?:es)?|enem(?:y|ies)|employees?|students?"
    r"|persons?|people|customers?|authors?|writers?|adversar(?:y|ies)|malware|sabot(?:eur|age)s?|spy|spies|knights?|soldiers?|workers?|rivals?"
    r"|contractors?|criminals?|thie(?:f|ves)|developers?|programmers?|engineers?|interns?|colleagues?|companies|company|teams?|teachers?"
    r"|functions?|methods?|dialogs?|pages?|widgets?|components?|elements?|interfaces?|buttons?|forms?|systems?|software|programs?|apps?|servers?|browsers?|databases?"
    r"|admin\w*|someone|somebody|anyone|others"
    r"|child(?:ren)?|boys?|girls?|m[ae]n|wom[ae]n|players?|husband|wife|friends?)(?:['\u2019]s?\s+\w+)?"
    r"(?:\s+(?:who|that|\w+ly|is|are|was|were|has|have|had|may|might|will|would|could|can|also|then|now|just|first))*\s*$",
    _I,
)

_BREAK: Final = re.compile(
    r"[.!?;:](?=\s|$)|[\n\u2014\u2013]|\s-\s|\b(?:but|however|yet|although|though|whereas|while|because|since|therefore|thus|hence)\b"
    r"|,\s*(?:(?:and|so|which|as|then)\s+)*(?:the|this|that|these|it|its|they|he|she|I|we|there|who)\b"
    r"|,\s*(?:and\s+|so\s+|which\s+)?(?:suggest|impl(?:y|ie)|indicat|mean)\w*\b|\band\s+(?:the\s+(?:model|assistant|ai|agent)|it)\b",
    _I,
)
_QUOTED: Final = re.compile(
    r'(?<![\w"])"(?=\S)[^"\n]{0,400}?(?:"(?![\w"])|\Z)|\u201c[^\u201c\u201d\n]{0,400}(?:\u201d|\Z)|\u00ab[^\u00ab\u00bb\n]{0,400}(?:\u00bb|\Z)'
    r"|`[^`\n]{1,400}`|(?<![\w'\u2019])['\u2018](?=\w)[^'\n\u2018]{1,200}?[^\s'\u2018]['\u2019](?!\w)"
)


@dataclass(frozen=True, slots=True)
class Guards:
    """Which guards a selection's words go through."""

    negation: bool = True
    quotes: bool = True
    mentions: bool = True
    own_negation: bool = False
    """The pattern itself holds a negation (*without telling the user*): none is looked for inside a hit."""


def holds_negation(pattern: str) -> bool:
    """Whether a keyword or pattern has a negation cue of its own."""
    return bool(NEGATION.search(re.sub(r"\\[a-zA-Z]|[\\()\[\]?:|*+{}0-9,]", " ", pattern)))


def quotations(text: str) -> list[tuple[int, int]]:
    """Start and end of what stands inside quotation marks or back-ticks, in order."""
    return [hit.span() for hit in _QUOTED.finditer(text)]


class Scope:
    """One explanation, asked whether a stretch of it is claimed or merely said."""

    def __init__(self, text: str) -> None:
        self._text = text

    def claimed(self, start: int, end: int, guards: Guards) -> bool:
        """Whether no guard speaks against ``text[start:end]``."""
        if guards.quotes and self._quoted(start, end):
            return False
        if not (guards.negation or guards.mentions):
            return True
        before = self._clause_before(start)
        if guards.negation and (self._negated(before, start, end, guards) or self._taken_back(end)):
            return False
        return not (guards.mentions and (_governs(MENTION, before) or _OTHER.search(before)))

    @cached_property
    def _quotes(self) -> list[tuple[int, int]]:
        return quotations(self._text)

    def _quoted(self, start: int, end: int) -> bool:
        index = bisect_right(self._quotes, (start, len(self._text) + 1)) - 1
        return index >= 0 and self._quotes[index][0] < start and end <= self._quotes[index][1]

    def _clause_before(self, start: int) -> str:
        window = self._text[max(0, start - _BACK) : start]
        last = 0
        for hit in _BREAK.finditer(window):
            last = hit.end()
        return window[last:]

    def _negated(self, before: str, start: int, end: int, guards: Guards) -> bool:
        if _governs(NEGATION, before):
            return True
        return not guards.own_negation and bool(NEGATION.search(_PSEUDO.sub(" ", self._text[start:end])))

    def _taken_back(self, end: int) -> bool:
        return bool(_TAKEN_BACK.search(self._text[end : end + _AHEAD]))


def _governs(cue: re.Pattern[str], before: str) -> bool:
    """Whether a cue stands in a clause's beginning, at most ``REACH`` words before its end."""
    plain = _PSEUDO.sub(lambda hit: "x" * len(hit[0]), before)
    return any(len(_WORD.findall(plain, hit.end())) <= REACH for hit in cue.finditer(plain))
