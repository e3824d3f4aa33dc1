"""Selections: keywords, patterns and comparisons, compiled once, evaluated purely.

As in Sigma: the keys of a selection must all hold, of a list of values any may; a list of mappings holds when one does;
a plain list of texts is a list of keywords. A comparison is ``field|modifier: value``. A field without a value (no AR,
no step, ...) meets no comparison, unless ``|or_missing`` is added.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from nla_monitor.records import Hit, Phase, Reading, Scalar
from nla_monitor.rules.fields import Field, find_field, unknown_field
from nla_monitor.rules.patterns import Screen, TextPattern, compile_re2, keyword_pattern, readable, regex_pattern
from nla_monitor.rules.problems import BadRule, Path, nearest
from nla_monitor.rules.scope import Guards, Scope

TEXT_KEYS: Final = ("keywords", "keywords|all", "regex", "regex|all")
GUARD_KEYS: Final = ("negation", "quotes", "mentions")
_GUARD_VALUES: Final = {"respect": True, "ignore": False}
_ORDER: Final[dict[str, Callable[[float, float], bool]]] = {
    "gt": operator.gt,
    "gte": operator.ge,
    "lt": operator.lt,
    "lte": operator.le,
}
_TEXTUAL: Final[dict[str, Callable[[str, str], bool]]] = {
    "contains": lambda value, part: part in value,
    "startswith": lambda value, part: value.startswith(part),
    "endswith": lambda value, part: value.endswith(part),
}
MODIFIERS: Final = (*_ORDER, *_TEXTUAL, "not", "re", "exists", "or_missing")


class Text:
    """An explanation with its guards' bookkeeping and what was found in it, shared by all rules that look at it."""

    __slots__ = ("_found", "_possible", "_screened", "scope", "text")

    def __init__(self, text: str) -> None:
        self.text = readable(text)
        self.scope = Scope(self.text)
        self._screened: frozenset[int] = frozenset()
        self._possible: frozenset[int] = frozenset()
        self._found: dict[int, list[tuple[int, int]]] = {}

    def tell(self, screened: frozenset[int], possible: frozenset[int]) -> None:
        """Of the ``screened`` tests (by ``id``) only the ``possible`` ones can hold here; the others are not run."""
        self._screened = screened
        self._possible = possible

    def spans(self, test: TextTest) -> list[tuple[int, int]]:
        """Claimed stretches that meet a test, found once."""
        key = id(test)
        if key not in self._screened:  # a test of another set of rules: its id may come back with another's
            return test.search(self)
        if key not in self._possible:
            return []
        if (found := self._found.get(key)) is None:
            found = self._found[key] = test.search(self)
        return found


Test = Callable[[Scalar], bool]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One ``field|modifier: value``."""

    field: Field
    test: Test
    or_missing: bool

    def holds(self, reading: Reading) -> bool:
        """Whether the reading's value passes."""
        value = self.field.get(reading)
        return self.or_missing if value is None else self.test(value)


@dataclass(frozen=True, slots=True)
class TextTest:
    """A list of keywords or patterns: any of them, or all."""

    patterns: tuple[TextPattern, ...]
    every: bool
    screen: Screen | None = None
    """One search that says whether any pattern can match at all; most texts stop there."""

    def search(self, text: Text) -> list[tuple[int, int]]:
        """Claimed stretches; empty where the test does not hold."""
        if self.screen is not None and not self.screen.may_match(text.text):
            return []
        found: list[tuple[int, int]] = []
        for pattern in self.patterns:
            spans = list(pattern.hits(text.text, text.scope))
            if self.every and not spans:
                return []
            found += spans
        return sorted(set(found))


@dataclass(frozen=True, slots=True)
class Block:
    """One mapping of a selection: all of its tests must hold."""

    comparisons: tuple[Comparison, ...]
    texts: tuple[TextTest, ...]

    def spans(self, reading: Reading, text: Text) -> list[tuple[int, int]] | None:
        """Where the words stand (none for comparisons only); None when the block does not hold."""
        if not all(comparison.holds(reading) for comparison in self.comparisons):
            return None  # the cheap tests first
        found: list[tuple[int, int]] = []
        for test in self.texts:
            spans = text.spans(test)
            if not spans:
                return None
            found += spans
        return sorted(set(found))


@dataclass(frozen=True, slots=True)
class Selection:
    """A named selection of a rule."""

    name: str
    blocks: tuple[Block, ...]

    def hits(self, reading: Reading, text: Text) -> tuple[Hit, ...] | None:
        """What meets the selection, quotes verbatim; None when nothing does."""
        met = [spans for block in self.blocks if (spans := block.spans(reading, text)) is not None]
        if not met:
            return None
        spans = sorted({span for found in met for span in found})
        if not spans:
            return (Hit(self.name, ""),)
        original = reading.explanation.text
        return tuple(Hit(self.name, original[start:end], start, end) for start, end in spans)


def compile_selection(name: str, spec: Any, path: Path) -> Selection:
    """A selection from its YAML value.

    Raises:
        BadRule: a shape, key, modifier or value that means nothing.
    """
    if isinstance(spec, str):
        spec = [spec]
    if isinstance(spec, Mapping):
        return Selection(name, (_block(spec, path),))
    if not isinstance(spec, Sequence) or not spec:
        raise BadRule(path, f"a selection is a mapping, a list of keywords or a list of mappings, found {spec!r}")
    if all(isinstance(item, Mapping) for item in spec):
        return Selection(name, tuple(_block(item, (*path, index)) for index, item in enumerate(spec)))
    return Selection(
        name, (Block((), (TextTest((keyword_pattern(_texts(spec, path), Guards(), path),), every=False),)),)
    )


def _block(spec: Mapping[str, Any], path: Path) -> Block:
    guards = guards_of(spec, path)
    texts, comparisons = [], []
    for key, value in spec.items():
        if key in GUARD_KEYS:
            continue
        if key in TEXT_KEYS:
            texts.append(_text_test(key, value, guards, (*path, key)))
        else:
            comparisons.append(_comparison(key, value, (*path, key)))
    if not texts and not comparisons:
        raise BadRule(path, "an empty selection would match everything; name keywords, regex or a field")
    if not texts and (guard := next((key for key in GUARD_KEYS if key in spec), None)):
        raise BadRule((*path, guard), f"{guard!r} is for keywords and regex; this selection has none")
    return Block(tuple(comparisons), tuple(texts))


def guards_of(spec: Mapping[str, Any], path: Path) -> Guards:
    """Which guards a block switches off.

    Raises:
        BadRule: neither ``respect`` nor ``ignore``.
    """
    chosen = {}
    for key in GUARD_KEYS:
        value = spec.get(key, "respect")
        if not isinstance(value, str) or value not in _GUARD_VALUES:
            raise BadRule((*path, key), f"{value!r} is neither 'respect' nor 'ignore'")
        chosen[key] = _GUARD_VALUES[value]
    return Guards(**chosen)


def _texts(value: Any, path: Path) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values:
        raise BadRule(path, f"must be a text or a list of texts, found {value!r}")
    for index, item in enumerate(values):
        if not isinstance(item, str) or not item.strip():
            raise BadRule((*path, index), f"must be a text, found {item!r}; quote it")
    return values


def _text_test(key: str, value: Any, guards: Guards, path: Path) -> TextTest:
    kind, _, every = key.partition("|")
    values = _texts(value, path)
    if kind == "regex":
        patterns = tuple(regex_pattern(item, guards, (*path, index)) for index, item in enumerate(values))
        return TextTest(patterns, bool(every), Screen.of(values))
    if every:
        return TextTest(tuple(keyword_pattern([item], guards, path) for item in values), every=True)
    return TextTest((keyword_pattern(values, guards, path),), every=False)


def _comparison(key: str, value: Any, path: Path) -> Comparison:
    name, *modifiers = key.split("|")
    field = find_field(name)
    if field is None:
        raise BadRule(path, unknown_field(name, (*TEXT_KEYS, *GUARD_KEYS)))
    for modifier in modifiers:
        if modifier not in MODIFIERS:
            raise BadRule(path, f"unknown modifier {modifier!r}; {nearest(modifier, MODIFIERS)}")
    main = [modifier for modifier in modifiers if modifier != "or_missing"]
    if len(main) > 1:
        raise BadRule(path, f"takes one modifier beside or_missing, found {' and '.join(main)}")
    if main == ["exists"]:
        return _exists(field, value, path)
    if value is None:
        return Comparison(field, lambda _: False, or_missing=True)
    return Comparison(field, _test(field, main[0] if main else "", value, path), "or_missing" in modifiers)


def _exists(field: Field, value: Any, path: Path) -> Comparison:
    if not isinstance(value, bool):
        raise BadRule(path, f"exists takes true or false, found {value!r}")
    return Comparison(field, lambda _: value, or_missing=not value)


def _test(field: Field, modifier: str, value: Any, path: Path) -> Test:
    if modifier in _ORDER:
        return _ordered(field, modifier, value, path)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise BadRule(path, "an empty list matches nothing")
    for index, item in enumerate(values):
        _check_value(field, item, (*path, index) if isinstance(value, list) else path)
    if modifier in {*_TEXTUAL, "re"}:
        return _textual(field, modifier, values, path)
    folded = [_fold(item) for item in values]
    if modifier == "not":
        return lambda found: _fold(found) not in folded
    return lambda found: _fold(found) in folded


def _ordered(field: Field, modifier: str, value: Any, path: Path) -> Test:
    if field.kind not in {"number", "any"}:
        raise BadRule(path, f"{field.name} is {field.kind}; {modifier} compares numbers")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRule(path, f"{modifier} takes a number, found {value!r}")
    compare = _ORDER[modifier]
    if field.kind == "number":
        return cast("Test", lambda found: compare(found, value))
    return lambda found: isinstance(found, int | float) and not isinstance(found, bool) and compare(found, value)


def _textual(field: Field, modifier: str, values: list[Any], path: Path) -> Test:
    if field.kind not in {"text", "any"} or not all(isinstance(item, str) for item in values):
        raise BadRule(path, f"{modifier} compares texts; {field.name} is {field.kind}")
    if modifier == "re":
        patterns = [compile_re2(item, path) for item in values]
        return lambda found: isinstance(found, str) and any(p.search(readable(found)) is not None for p in patterns)
    compare, parts = _TEXTUAL[modifier], [item.casefold() for item in values]
    return lambda found: isinstance(found, str) and any(compare(found.casefold(), part) for part in parts)


def _check_value(field: Field, value: Any, path: Path) -> None:
    kinds: dict[str, tuple[type, ...]] = {
        "number": (int, float),
        "text": (str,),
        "bool": (bool,),
        "any": (str, bool, int, float),
    }
    if not isinstance(value, kinds[field.kind]) or (isinstance(value, bool) and field.kind == "number"):
        raise BadRule(path, f"{field.name} is {field.kind}, found {value!r}")
    if field.choices and str(value).casefold() not in field.choices:
        raise BadRule(path, f"{field.name} is never {value!r}; {nearest(str(value), field.choices)}")


def _fold(value: Scalar) -> tuple[str, Scalar]:
    """Equality key: texts without case, true and 1 kept apart, 1 and 1.0 together."""
    if isinstance(value, Phase):
        value = value.value
    if isinstance(value, str):
        return ("text", value.casefold())
    return ("bool", value) if isinstance(value, bool) else ("number", value)
