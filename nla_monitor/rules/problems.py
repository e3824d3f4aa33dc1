"""What is wrong with a rule file, and where: collected first, raised (or listed by ``lint``) afterwards."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nla_monitor.errors import RuleError

Path = tuple[str | int, ...]
"""Where in a rule: ``("detection", "claim", "regex", 2)``."""

MAX_NAMES = 24


@dataclass(frozen=True, slots=True)
class Problem:
    """One error in a rule file."""

    file: str
    line: int | None
    key: str | None
    message: str

    def error(self) -> RuleError:
        """The exception that says so."""
        return RuleError(self.message, file=self.file, line=self.line, key=self.key)


class BadRule(Exception):  # noqa: N818 -- internal: becomes a RuleError once file and line are known
    """Raised while a rule is compiled; the loader adds file and line."""

    def __init__(self, path: Sequence[str | int], message: str) -> None:
        super().__init__(message)
        self.path: Path = tuple(path)
        self.message = message


def dotted(path: Sequence[str | int]) -> str:
    """``("tests", "positive", 0)`` as ``tests.positive[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def line_of(lines: Mapping[Path, int], path: Sequence[str | int]) -> int | None:
    """Line of the key, or of the nearest enclosing key that stands in the file."""
    for end in range(len(path), -1, -1):
        if (line := lines.get(tuple(path[:end]))) is not None:
            return line
    return None


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest valid one, or all of them."""
    names = sorted({str(item) for item in valid})
    found = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    if found:
        return f"did you mean {found[0]!r}?"
    shown = ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
    return f"valid: {shown}" if names else "there is none"
