"""The condition of a rule: CEL over the names of its selections and what is known of the reading.

Checked at load: syntax, unknown names and functions, and that the result is true or false. CEL has no loops; its list
macros are refused, so that a condition costs what its text is long. A condition that cannot be decided because a value
is missing (``fidelity.fve >= 0.3`` without an AR, ``meta.x`` that nobody set) is not met; write
``fidelity.fve == null || fidelity.fve >= 0.3`` to let such readings pass.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import cel

from nla_monitor.rules.fields import APART, FIELDS, OPEN, PREFIXES, TOP_LEVEL, Variables, unknown_field
from nla_monitor.rules.problems import BadRule, Path, nearest

logger = logging.getLogger(__name__)

MAX_LENGTH: Final = 4_000
FUNCTIONS: Final = ("matches", "contains", "startsWith", "endsWith", "size", "int", "uint", "double", "string", "has")
RESERVED: Final = frozenset(
    (
        *("as", "break", "const", "continue", "else", "false", "for", "function", "if", "import", "in", "let", "loop"),
        *("namespace", "null", "package", "return", "true", "var", "void", "while"),
    )
)
NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

_MACROS: Final = re.compile(r"\.\s*(all|exists|exists_one|map|filter)\s*\(")
_STRING: Final = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'|//[^\n]*")
_DOTTED: Final = re.compile(r"(?<![.\w])(fidelity|explanation|agent)\s*\.\s*([A-Za-z_]\w*)")
_SIGMA_OF: Final = re.compile(r"\b(all|any|[1-9][0-9]*)\s+of\s+(them\b|[\w*]+)")
_SIGMA_WORD: Final = re.compile(r"(?<![.\w])(and|or|not)\b", re.IGNORECASE)
_CEL_WORDS: Final = {"and": "&&", "or": "||", "not": "!"}
_UNDECIDED: Final = (TypeError, LookupError, ValueError, RuntimeError, ArithmeticError)
_MEMO: Final = 4_096


class Condition:
    """A compiled condition."""

    def __init__(self, source: str, program: Any, selections: frozenset[str], names: frozenset[str]) -> None:
        self.source = source
        self.needs_reading = bool(names - selections)
        """False when it only combines selections: its results are then remembered."""
        self._program = program
        self._fields = sorted(names - selections)
        self._flat = _flattened(source, self._fields)
        self._used = tuple(sorted(names & selections))
        self._memo: dict[tuple[bool, ...], bool] = {}
        self._undecided = False

    def holds(self, met: Mapping[str, bool], known: Variables) -> bool:
        """Whether the condition is met, given which selections are.

        Args:
            met: selection name -> whether the reading meets it.
            known: the CEL variables of the reading.
        """
        if self.needs_reading:
            return self._of_reading(met, known)
        key = tuple(met[name] for name in self._used)
        if (remembered := self._memo.get(key)) is not None:
            return remembered
        result = self._decide(dict(met))
        if len(self._memo) < _MEMO:
            self._memo[key] = result
        return result

    def decided(self, met: Mapping[str, bool]) -> bool | None:
        """What it comes to whatever the reading's fields are, given which selections are met; None: that depends."""
        if not self.needs_reading:
            return self._decide(dict(met))
        return self._without(met)

    def _without(self, met: Mapping[str, bool]) -> bool | None:
        """The result that these selections alone decide.

        CEL's ``&&`` and ``||`` have a result where one side decides, even if the other cannot be evaluated; so what is
        not given here did not matter to a result.
        """
        try:
            return self._program.execute(dict(met)) is True
        except _UNDECIDED:
            return None

    def _of_reading(self, met: Mapping[str, bool], known: Variables) -> bool:
        mine = {name: met[name] for name in self._used}
        if self._flat is not None:
            try:
                return self._flat.execute(mine, known) is True
            except _UNDECIDED:
                if self._undecided:
                    return False
        # Only what it uses: a value that CEL cannot hold must not spoil conditions that never look at it.
        return self._decide({**{name: known[name] for name in self._fields}, **mine})

    def _decide(self, values: dict[str, Any]) -> bool:
        try:
            return self._program.execute(values) is True
        except _UNDECIDED as error:
            if not self._undecided:
                self._undecided = True
                logger.info(
                    "condition %r cannot be decided for some readings and counts as not met there: %s",
                    self.source,
                    error,
                )
            return False

    def refuted_without(self, absent: Collection[str]) -> bool:
        """Whether it is false where these selections are unmet, whatever all other selections and fields are."""
        return self._without(dict.fromkeys(absent, False)) is False

    def decidable(self, values: Mapping[str, Any]) -> bool:
        """Whether the condition has a result for these values (for ``lint``)."""
        try:
            self._program.execute(dict(values))
        except _UNDECIDED:
            return False
        return True


@dataclass(frozen=True, slots=True)
class _Flat:
    """The same condition with ``fidelity__fve`` for ``fidelity.fve``: no mapping is made or copied, 6 µs saved."""

    program: Any
    names: tuple[str, ...]
    meta: tuple[str, ...]
    """Names of keys of ``meta`` and ``screen``, which need not be there."""

    def execute(self, met: dict[str, bool], known: Variables) -> Any:
        """The result; a key that is not there is an unknown name, an error in CEL as well."""
        values: dict[str, Any] = met
        for name in self.names:
            values[name] = known[name]
        for name in self.meta:
            with suppress(KeyError):
                values[name] = known[name]
        return self.program.execute(values)


_UNFLATTENED: Final = re.compile(r"\bhas\s*\(|\b[bBrR]{1,2}[\"']|\"{3}|'{3}")
"""The macro on members, and strings in which a backslash or a quotation mark is no escape or end."""
_TOKEN: Final = re.compile(rf"({_STRING.pattern})|(?<![.\w])({'|'.join(PREFIXES)})\s*\.\s*([A-Za-z_]\w*)\b(?!\s*\()")


def _flattened(source: str, fields: Sequence[str]) -> _Flat | None:
    """None where a condition asks for a mapping as a whole, or whether it has a key."""
    members: set[str] = set()

    def flat(found: re.Match[str]) -> str:
        if found[1] is not None:
            return found[1]
        members.add(name := f"{found[2]}{APART}{found[3]}")
        return name

    text = _TOKEN.sub(flat, source)
    mappings = {name for name in fields if name in PREFIXES}
    if not members or APART in source or _UNFLATTENED.search(source):
        return None
    program = cel.compile(text)
    if mappings & set(program.variables()):
        return None
    plain = tuple(name for name in fields if name not in PREFIXES)
    meta = {name for name in members if name.partition(APART)[0] in OPEN}
    return _Flat(program, (*plain, *sorted(members - meta)), tuple(sorted(meta)))


def compile_condition(source: Any, selections: Sequence[str], path: Path, example: Mapping[str, Any]) -> Condition:
    """A condition from its text.

    Args:
        source: The CEL text.
        selections: Names of the rule's selections.
        path: Where it stands.
        example: Variables of a reading with every value known, to try the condition on.

    Raises:
        BadRule: no text, too long, no CEL (Sigma's idioms get a hint), an unknown name or function, or no truth value.
    """
    if not isinstance(source, str) or not source.strip():
        raise BadRule(
            path, f"a condition is a CEL text such as {' || '.join(selections[:2]) or 'selection'!r}, found {source!r}"
        )
    if len(source) > MAX_LENGTH:
        raise BadRule(path, f"condition of {len(source)} characters; at most {MAX_LENGTH}")
    bare = _STRING.sub('""', source)
    if macro := _MACROS.search(bare):
        raise BadRule(path, f"the list macro {macro[1]!r} is not available in conditions")
    program = _parse(source, bare, selections, path)
    names = frozenset(program.variables())
    _check_names(names, bare, selections, path)
    _check_functions(program.functions(), path)
    _check_result(program, names, selections, example, path)
    return Condition(source.strip(), program, frozenset(selections), names)


def _parse(source: str, bare: str, selections: Sequence[str], path: Path) -> Any:
    try:
        return cel.compile(source)
    except ValueError as error:
        if hint := _sigma(bare, selections):
            raise BadRule(path, hint) from error
        detail = re.sub(r"\s+", " ", str(error).partition("ERROR:")[2] or str(error)).strip()
        raise BadRule(path, f"is no CEL expression: {detail[:300]}") from error


def _sigma(bare: str, selections: Sequence[str]) -> str | None:
    """What to write instead of an idiom of Sigma's."""
    if found := _SIGMA_OF.search(bare):
        pattern = found[2].replace("*", ".*")
        names = [name for name in selections if found[2] == "them" or re.fullmatch(pattern, name)]
        if found[1] in {"all", "any", "1"} and names:
            return f"{found[0]!r} is Sigma's; in CEL write {(' && ' if found[1] == 'all' else ' || ').join(names)!r}"
        if names:
            counted = " + ".join(f"({name} ? 1 : 0)" for name in names)
            return f"{found[0]!r} is Sigma's; in CEL write '{counted} >= {found[1]}'"
        return f"{found[0]!r} is Sigma's, and no selection is named so; {nearest(found[2], selections)}"
    if found := _SIGMA_WORD.search(bare):
        return f"{found[0]!r} is Sigma's; CEL writes {_CEL_WORDS[found[0].lower()]!r}"
    return None


def _check_names(names: frozenset[str], bare: str, selections: Sequence[str], path: Path) -> None:
    for name in sorted(names - set(selections) - set(TOP_LEVEL)):
        raise BadRule(path, f"unknown selection or field {name!r}; {nearest(name, [*selections, *TOP_LEVEL])}")
    for found in _DOTTED.finditer(bare):
        name = f"{found[1]}.{found[2]}"
        if name not in FIELDS:
            hint = "; use a keywords or regex selection" if name == "explanation.text" else ""
            raise BadRule(path, unknown_field(name) + hint)


def _check_functions(functions: Sequence[str], path: Path) -> None:
    for name in functions:
        if NAME.fullmatch(name.lstrip("@")) and name not in FUNCTIONS and not name.startswith(("_", "@")):
            raise BadRule(path, f"unknown function {name!r}; {nearest(name, FUNCTIONS)}")


def _check_result(
    program: Any, names: frozenset[str], selections: Sequence[str], example: Mapping[str, Any], path: Path
) -> None:
    for answer in (True, False):
        values = {**example, **dict.fromkeys(selections, answer)}
        try:
            result = program.execute(values)
        except _UNDECIDED as error:
            if names & set(OPEN):
                continue  # what the host will pass, and which screens it has, is not known here
            raise BadRule(path, f"cannot be evaluated: {str(error).partition('.')[0]}") from error
        if not isinstance(result, bool):
            raise BadRule(path, f"must be true or false, gives {result!r}")


def check_name(name: str, path: Path) -> None:
    """Raises ``BadRule`` when a selection may not be called so."""
    if not NAME.fullmatch(name):
        hint = "; CEL reads '-' as minus, use '_'" if "-" in name else ""
        raise BadRule(path, f"selection name {name!r} must be letters, digits and underscores{hint}")
    if name in RESERVED or name in TOP_LEVEL or name in PREFIXES or name in FUNCTIONS:
        raise BadRule(path, f"selection name {name!r} is taken by CEL or by a field; choose another")
