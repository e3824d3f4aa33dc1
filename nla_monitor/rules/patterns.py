"""Text patterns over google-re2: linear in the text, whatever the pattern, so that no text can stall the worker."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import re2  # type: ignore[import-untyped]  # google-re2 ships no type information

from nla_monitor.rules.problems import BadRule, Path
from nla_monitor.rules.scope import Guards, Scope, holds_negation

MAX_PATTERN: Final = 4_000
MAX_HITS: Final = 16
"""Hits kept per pattern and text; more of the same say nothing new."""
MAX_TRIES: Final = 200
"""Guarded-away hits after which a pattern gives up on a text: bounds the cost on texts made of one phrase."""

_MAX_MEMORY: Final = 64 << 20
_GAP: Final = r"[\s*_\-\x{2010}-\x{2014}\"'`\x{2018}-\x{201D}]+"
_NOT_WORD: Final = r"[^\p{L}\p{M}\p{N}_]"
_SURROGATES: Final = re.compile("[\ud800-\udfff]")
_RUN: Final = re.compile(r"[!-&(-~]+")
_NAMED: Final = re.compile(r"\(\?P?<\w+>")
_LOOKAROUND: Final = re.compile(r"\(\?<?[=!]")


def readable(text: str) -> str:
    """The text with lone surrogates replaced (same length): google-re2 works on UTF-8."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


def compile_re2(pattern: str, path: Path) -> Any:
    """A user's pattern, compiled: case-insensitive unless it says ``(?-i)``.

    Raises:
        BadRule: not RE2 syntax (look-around and back-references are not linear-time), too long, or matching nothing.
    """
    if len(pattern) > MAX_PATTERN:
        raise BadRule(path, f"pattern of {len(pattern)} characters; at most {MAX_PATTERN}")
    compiled = _compile(readable(pattern), path, "is no RE2 pattern", hint=_hint(pattern))
    if compiled.search("") is not None:
        raise BadRule(path, "matches the empty text, hence everything")
    return compiled


def _compile(pattern: str, path: Path, complaint: str, *, hint: str = "") -> Any:
    try:
        return re2.compile(pattern, re2_options())
    except re2.error as error:
        raise BadRule(path, f"{complaint}: {_reason(error)}{hint}") from error


def re2_options() -> Any:
    """How every pattern is compiled: without case, bounded in memory, silent."""
    options = re2.Options()
    options.case_sensitive = False
    options.log_errors = False
    options.max_mem = _MAX_MEMORY
    return options


def _reason(error: Exception) -> str:
    reason = error.args[0] if error.args else error
    return reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)


def _hint(pattern: str) -> str:
    if _LOOKAROUND.search(pattern):
        return "; look-around is not available (RE2 is linear-time): use a second selection and the condition"
    return "; back-references are not available (RE2 is linear-time)" if re.search(r"\\[1-9]", pattern) else ""


class TextPattern:
    """One pattern with its guards; yields the stretches of a text that it claims.

    A group named ``quote`` (or group 1 of a keyword list) is the stretch that counts; without one, the whole hit.

    Args:
        compiled: the RE2 pattern.
        guards: what a hit must pass.
        group: the group that counts.
        source: the pattern as text.
        literals: of a keyword list: per phrase, what stands in every text that holds it, in lower case (empty: nothing
            is known); None for a regular expression.
    """

    def __init__(
        self, compiled: Any, guards: Guards, group: int, source: str, literals: tuple[str, ...] | None = None
    ) -> None:
        self._compiled = compiled
        self._guards = guards
        self._group = group
        self.source = source
        self.literals = literals

    def hits(self, text: str, scope: Scope) -> Iterator[tuple[int, int]]:
        """Spans of claimed hits, in order, at most ``MAX_HITS``."""
        position, found = 0, 0
        for _ in range(MAX_TRIES):
            hit = self._compiled.search(text, position)
            if hit is None or found >= MAX_HITS:
                return
            start, end = hit.span(self._group)
            if start < 0:  # the group took no part in this hit
                start, end = hit.span()
            if scope.claimed(start, end, self._guards):
                found += 1
                yield start, end
            position = max(end, position + 1)


def keyword_pattern(words: Sequence[str], guards: Guards, path: Path) -> TextPattern:
    """Case-insensitive whole-word phrases as one pattern.

    A space or hyphen in a phrase stands for any run of spaces, hyphens, quotation marks and emphasis; ``*`` at a word's
    edge for any rest of the word (``special-cas*``).

    Raises:
        BadRule: an empty phrase, or one without a letter or digit.
    """
    # Longest first: RE2 prefers the first alternative that fits, and the quote should be the whole phrase.
    ordered = sorted(range(len(words)), key=lambda index: -len(words[index]))
    choices = "|".join(_phrase(words[index], (*path, index)) for index in ordered)
    complaint = "these keywords are too many for one selection; split it"
    source = rf"(?:\A|{_NOT_WORD})({choices})(?:\z|{_NOT_WORD})"
    compiled = _compile(source, path, complaint)
    # A phrase holds no words but its own, so a negation inside a hit is always the phrase's.
    return TextPattern(compiled, replace(guards, own_negation=True), 1, source, tuple(map(_literal, words)))


def _phrase(phrase: str, path: Path) -> str:
    parts = [part for part in re.split(r"[\s\-]+", readable(phrase)) if part]
    if not any(char.isalnum() for char in phrase):
        raise BadRule(path, f"keyword {phrase!r} holds no letter or digit")
    return _GAP.join(_word(part) for part in parts)


def _literal(phrase: str) -> str:
    """The longest run of a phrase that stands in every text that holds it, in lower case.

    ASCII only: which other letters RE2 takes for the same is its own affair. Apostrophes have two forms, gaps many.
    """
    parts = (part.strip("*") for part in re.split(r"[\s\-]+", phrase))
    return max((run for part in parts for run in _RUN.findall(part)), key=len, default="").lower()


def _word(part: str) -> str:
    core = part.strip("*")
    before, after = (
        (r"[\p{L}\p{M}\p{N}_]*" if part[:1] == "*" else ""),
        (r"[\p{L}\p{M}\p{N}_]*" if part[-1:] == "*" else ""),
    )
    escaped = re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", core)
    return before + re.sub(r"['\u2019]", lambda _: r"['\x{2019}]", escaped) + after


def regex_pattern(pattern: str, guards: Guards, path: Path) -> TextPattern:
    """A regular expression, case-insensitive unless it says ``(?-i)``.

    Raises:
        BadRule: see ``compile_re2``.
    """
    compiled = compile_re2(pattern, path)
    own = replace(guards, own_negation=holds_negation(pattern))
    return TextPattern(compiled, own, compiled.groupindex.get("quote", 0), pattern)


class Screen:
    """Several patterns as one, without their guards: a quick no for the many texts that hold none of them."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled

    @classmethod
    def of(cls, patterns: Sequence[str]) -> Screen | None:
        """A screen for patterns that are valid one by one; None for a single one, or where no screen can be made."""
        if len(patterns) < 2 or not all(_names_are_groups(pattern) for pattern in patterns):
            return None
        # Group names may repeat from pattern to pattern, not within one.
        joined = "|".join(f"(?:{_NAMED.sub('(?:', readable(pattern))})" for pattern in patterns)
        try:
            return cls(_compile(joined, (), "together"))
        except BadRule:
            return None  # only the short cut is lost

    def may_match(self, text: str) -> bool:
        """False when no pattern matches."""
        return self._compiled.search(text) is not None


def _names_are_groups(pattern: str) -> bool:
    """Whether all that looks like a group's name is one, not an escaped bracket or part of a character class."""
    return len(_NAMED.findall(pattern)) == len(_compile(readable(pattern), (), "alone").groupindex)
