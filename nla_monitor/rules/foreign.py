"""Turns a Sigma or ATR rule into one of ours: header unchanged, detection taken over where it means the same.

What means the same over an explanation: words and patterns, wherever the other rule looks for them. What does not
(equality with a field, numbers, metrics, sequences of events) is left out and marked with a comment ``# import:``. So
the result is a start: somebody must say what the model would *represent* when it does the thing.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import cel
import yaml

from nla_monitor.errors import RuleError
from nla_monitor.rules.condition import NAME
from nla_monitor.rules.document import BadDocument, Document, parse_document
from nla_monitor.rules.embedded import run_rule_tests
from nla_monitor.rules.headers import standard_of, tests_of
from nla_monitor.rules.loader import load_text
from nla_monitor.rules.patterns import compile_re2
from nla_monitor.rules.problems import BadRule, dotted, line_of
from nla_monitor.rules.schema import RuleSpec, keys_of

MARK: Final = "# import:"
_REPLACED: Final = ("logsource", "detection", "tests", "test_cases")
_GUARDS_OFF: Final = {"negation": "ignore", "quotes": "ignore", "mentions": "ignore"}
_PLAIN: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9 ]*[A-Za-z0-9])?")
_TOKEN: Final = re.compile(
    r"\s*(?:(?P<of>(?:all|any|\d+)\s+of\s+(?:them\b|[\w*]+))|(?P<word>[\w*-]+)|(?P<sign>[()!]|&&|\|\|))", re.IGNORECASE
)
_SIGNS: Final = {"and": "&&", "or": "||", "not": "!"}
_MOST_NAMES: Final = 8
_HARMLESS: Final = "The text is about the weather in the hills."
_WINDOW: Final = {"count": 3, "distinct": "position", "within": {"steps": 10, "seconds": 600}}


@dataclass(frozen=True, slots=True)
class Imported:
    """A rule of ours made of another's."""

    text: str
    """Its YAML."""
    standard: str
    """``sigma`` or ``atr``."""
    remarks: tuple[str, ...]
    """What was left out or has to be looked at; in the text, too."""


@dataclass(slots=True)
class _Taken:
    """What was taken over of a detection."""

    selections: dict[str, Any] = field(default_factory=dict)
    exprs: dict[str, str] = field(default_factory=dict)
    """CEL for each name of the other rule; those that could not be taken over are absent."""
    names: set[str] = field(default_factory=set)
    """All names of the other rule."""
    remarks: list[str] = field(default_factory=list)

    def add(self, name: str, block: Mapping[str, Any]) -> str:
        """A new selection; returns its name."""
        base = name if NAME.fullmatch(name) else f"s_{re.sub(r'[^A-Za-z0-9_]', '_', name)}"
        chosen, number = base, 1
        while chosen in self.selections:
            number += 1
            chosen = f"{base}_{number}"
        self.selections[chosen] = {**block, **_GUARDS_OFF}
        return chosen


def import_rule(text: str, name: str = "<text>") -> Imported:
    """A rule of ours from the text of a Sigma or ATR rule.

    Args:
        text: its YAML.
        name: of the file, for errors.

    Raises:
        RuleError: no YAML, or neither a Sigma nor an ATR detection rule.
    """
    try:
        document = parse_document(text)
        standard = _standard(document.data)
        cases = _cases(document)
    except BadRule as error:
        line = error.line if isinstance(error, BadDocument) else line_of(document.lines, error.path)
        raise RuleError(error.message, file=name, line=line, key=dotted(error.path) or None) from error
    detection = document.data.get("detection")
    taken = _atr(detection) if standard == "atr" else _sigma(detection)
    condition = _condition(taken, detection)
    if not taken.selections:
        condition = taken.add("claim", {"keywords": [_words(document.data)]})
        taken.remarks.append("nothing of the detection could be taken over; say here what the model would represent")
    rest = _rest(document.data, standard, taken, condition)
    header = _header(text, document)
    tests = _tests(header, rest, taken, cases)
    return Imported(_assembled(header, {**rest, "tests": tests}, taken.remarks), standard, tuple(taken.remarks))


def _standard(data: Mapping[str, Any]) -> str:
    standard = standard_of(data)
    if standard is not None:
        return standard
    if "correlation" in data:
        raise BadRule((), "is a Sigma correlation: it counts matches of other rules; use 'window' in a rule of ours")
    source = data.get("logsource")
    if isinstance(source, Mapping) and "product" not in source and "category" not in source:
        return "sigma"
    if isinstance(source, Mapping):
        raise BadRule((), "is a rule of ours already (logsource.product is nla)")
    raise BadRule((), "is neither a Sigma rule (logsource, detection) nor an ATR rule (agent_source, conditions)")


def _cases(document: Document) -> dict[str, list[dict[str, Any]]] | None:
    given = document.data.get("test_cases")
    if given is None:
        return None
    found = tests_of(given)
    for case in (*found["positive"], *found["negative"]):
        del case["path"]
    return found


def _words(data: Mapping[str, Any]) -> str:
    return " ".join(re.findall(r"[A-Za-z0-9]+", str(data.get("title", "")))[:8]) or "what is looked for"


# -- detection ----------------------------------------------------------------------------------------------------


def _sigma(detection: Any) -> _Taken:
    taken = _Taken()
    for name, value in detection.items() if isinstance(detection, Mapping) else ():
        if name in {"condition", "timeframe"}:
            continue
        taken.names.add(name)
        blocks = value if isinstance(value, list) and value and isinstance(value[0], Mapping) else [value]
        exprs = [_sigma_block(name, block, taken) for block in blocks]
        kept = [expr for expr in exprs if expr is not None]
        if kept and len(kept) == len(exprs):
            taken.exprs[name] = _any_of(kept)
    return taken


def _sigma_block(name: str, block: Any, taken: _Taken) -> str | None:
    if not isinstance(block, Mapping):
        words = block if isinstance(block, list) else [block]
        return _add(name, _literals(words, every=False), taken, f"{name}: holds no words")
    names: list[str] = []
    for key, value in block.items():
        found, *modifiers = str(key).split("|")
        words = value if isinstance(value, list) else [value]
        block_of_ours = _sigma_words(modifiers, words)
        why = f"{name}: {key!r} compares a field that explanations do not have"
        added = _add(name, block_of_ours, taken, why)
        if added is None:
            for other in names:
                del taken.selections[other]
            return None
        taken.remarks.append(f"{name}: looked for in {found!r}; here anywhere in the explanation")
        names.append(added)
    return f"({' && '.join(names)})" if len(names) > 1 else names[0] if names else None


def _sigma_words(modifiers: Sequence[str], words: Sequence[Any]) -> dict[str, Any] | None:
    plain = [modifier for modifier in modifiers if modifier not in {"all", "i", "cased"}]
    every = "all" in modifiers
    if plain == ["re"]:
        return _patterns([str(word) for word in words], every=every)
    wild = all(isinstance(word, str) and len(word) > 2 and word[0] == word[-1] == "*" for word in words)
    if plain == ["contains"] or (not plain and wild):
        return _literals(words, every=every)
    return None


def _atr(detection: Any) -> _Taken:
    taken = _Taken()
    conditions = detection.get("conditions") if isinstance(detection, Mapping) else None
    if isinstance(conditions, list):
        conditions = {f"condition_{index + 1}": item for index, item in enumerate(conditions)}
    for name, item in conditions.items() if isinstance(conditions, Mapping) else ():
        taken.names.add(name)
        if not isinstance(item, Mapping):
            taken.remarks.append(f"{name}: {item!r} is no condition; left out")
            continue
        operator = item.get("operator", item.get("match_type"))
        values = item.get("patterns", item.get("value", []))
        words = [str(word) for word in (values if isinstance(values, list) else [values])]
        block = None
        if operator in {"regex", "matches"}:
            block = _patterns(words, every=False)
        elif operator == "contains":
            block = _literals(words, every=False)
        added = _add(name, block, taken, f"{name}: {operator!r} has no counterpart here, or RE2 cannot run its pattern")
        if added is not None:
            taken.exprs[name] = added
            taken.remarks.append(f"{name}: looked for in {item.get('field')!r}; here anywhere in the explanation")
    return taken


def _add(name: str, block: Mapping[str, Any] | None, taken: _Taken, why: str) -> str | None:
    if block is None:
        taken.remarks.append(f"{why}; left out")
        return None
    return taken.add(name, block)


def _literals(words: Sequence[Any], *, every: bool) -> dict[str, Any] | None:
    """Texts that are looked for anywhere: keywords where they are plain words, patterns otherwise."""
    texts = [str(word).strip("*") for word in words if word is not None]
    if not texts or not all(any(char.isalnum() for char in text) for text in texts):
        return None
    suffix = "|all" if every else ""
    if all(_PLAIN.fullmatch(text) for text in texts):
        return {f"keywords{suffix}": [f"*{text}*" for text in texts]}
    return {f"regex{suffix}": [_literal(text) for text in texts]}


def _literal(text: str) -> str:
    wild = {"*": ".*", "?": "."}
    return "".join(
        wild.get(char) or (f"\\{char}" if char.isascii() and not char.isalnum() and char not in " _" else char)
        for char in text
    )


def _patterns(patterns: Sequence[str], *, every: bool) -> dict[str, Any] | None:
    try:
        for pattern in patterns:
            compile_re2(pattern, ())
    except BadRule:
        return None
    return {"regex|all" if every else "regex": list(patterns)} if patterns else None


def _condition(taken: _Taken, detection: Any) -> str:
    """The other rule's condition in CEL; what was left out counts as not met, or as met where nothing could match."""
    source = detection.get("condition", "any") if isinstance(detection, Mapping) else "any"
    sources = [str(item) for item in (source if isinstance(source, list) else [source])]
    left_out, names = taken.names - set(taken.exprs), list(taken.selections)
    for stand_in in ("false", "true"):
        exprs = {**taken.exprs, **dict.fromkeys(left_out, stand_in)}
        parts = [part for item in sources if (part := _translated(item, exprs)) is not None]
        if len(parts) == len(sources) and _solution(whole := _any_of(parts), names, names):
            if left_out:
                taken.remarks.append(f"condition: what was left out stands there as {stand_in!r}")
            return whole
    if taken.selections:
        taken.remarks.append(f"condition {str(source)[:200]!r} could not be taken over; here any selection does")
    return " || ".join(taken.selections)


def _solution(condition: str, chosen: Sequence[str], names: Sequence[str]) -> tuple[str, ...] | None:
    """The fewest of the chosen selections that, met alone, meet the condition; None where none do, or none need to."""
    chosen = chosen[:_MOST_NAMES]
    worlds = [
        tuple(itertools.compress(chosen, answers))
        for answers in sorted(itertools.product((True, False), repeat=len(chosen)), key=sum)
    ]
    try:
        program = cel.compile(condition)
        met = [met for met in worlds if program.execute({name: name in met for name in names}) is True]
    except (ValueError, RuntimeError, TypeError):
        return None
    return met[0] if met and met[0] else None


def _translated(source: str, exprs: Mapping[str, str]) -> str | None:
    """CEL for a condition of Sigma or ATR; None where a name is not there or the form is not known."""
    if not exprs:
        return None
    whole = source.strip().lower()
    if whole in {"any", "or", "all", "and"}:
        return _any_of(list(exprs.values())) if whole in {"any", "or"} else _all_of(list(exprs.values()))
    parts, position = [], 0
    while source[position:].strip():
        token = _TOKEN.match(source, position)
        part = _part(token, exprs) if token is not None else None
        if token is None or part is None:
            return None
        parts.append(part)
        position = token.end()
    return " ".join(parts).replace("! ", "!")


def _part(token: re.Match[str], exprs: Mapping[str, str]) -> str | None:
    if token["sign"]:
        return token["sign"]
    if token["word"]:
        return _SIGNS.get(token["word"].lower()) or exprs.get(token["word"])
    how, wanted = re.split(r"\s+of\s+", token["of"], flags=re.IGNORECASE)
    pattern = ".*" if wanted == "them" else wanted.replace("*", ".*")
    chosen = [expr for name, expr in exprs.items() if re.fullmatch(pattern, name)]
    if not chosen:
        return None
    if how.lower() == "all":
        return _all_of(chosen)
    if how.lower() in {"any", "1"}:
        return _any_of(chosen)
    return f"({' + '.join(f'({expr} ? 1 : 0)' for expr in chosen)} >= {how})"


def _any_of(exprs: Sequence[str]) -> str:
    return exprs[0] if len(exprs) == 1 else f"({' || '.join(exprs)})"


def _all_of(exprs: Sequence[str]) -> str:
    return exprs[0] if len(exprs) == 1 else f"({' && '.join(exprs)})"


# -- the file -----------------------------------------------------------------------------------------------------


def _rest(data: Mapping[str, Any], standard: str, taken: _Taken, condition: str) -> dict[str, Any]:
    """What the header lacks, and all that decides."""
    found: dict[str, Any] = {}
    if "id" not in data:
        found["id"] = (
            re.sub(r"[^a-z0-9]+", "-", str(data.get("title", "imported")).lower()).strip("-")[:100] or "imported"
        )
        taken.remarks.append("the rule had no id; it was made of the title")
    if "severity" not in data and "level" not in data:
        found["severity"] = "medium"
        taken.remarks.append("the rule had no level; medium is a guess")
    other = {key: data[key] for key in data if key not in {*keys_of(RuleSpec), "level", *_REPLACED}}
    about = {"standard": standard, "logsource": data.get("logsource"), "other": other or None}
    found["imported"] = {key: value for key, value in about.items() if value is not None}
    detection = data.get("detection")
    known = detection.get("false_positives") if isinstance(detection, Mapping) else None
    if known and "falsepositives" not in data:
        found["falsepositives"] = known  # ATR has them in its detection
    found["logsource"] = {"product": "nla", "category": "activation_explanation"}
    found["detection"] = {**taken.selections, "condition": condition}
    if "window" not in data:
        found["window"] = dict(_WINDOW)
    taken.remarks.append("negation, quotes and mentions are ignored, as the other engine does; respect them if you can")
    return found


def _header(text: str, document: Document) -> str:
    """The header as it was written, comments and all; dumped anew where keys share a line."""
    known = {*keys_of(RuleSpec), "level"} - set(_REPLACED)
    starts = sorted((document.lines[(key,)], key) for key in document.data)
    if len({line for line, _ in starts}) < len(starts):
        return _dumped({key: value for key, value in document.data.items() if key in known})
    lines = text.removeprefix("\ufeff").splitlines()
    ends = [line - 1 for line, _ in starts[1:]] + [len(lines)]
    kept = lines[: starts[0][0] - 1]
    for (line, key), end in zip(starts, ends, strict=True):
        if key in known:
            kept += lines[line - 1 : end]
    kept = [line for line in kept if line.strip() not in {"---", "..."}]
    return "\n".join(kept).rstrip() + "\n"


def _tests(header: str, rest: Mapping[str, Any], taken: _Taken, cases: Any) -> dict[str, list[Any]]:
    """The other rule's cases that hold here, or one of each kind made of its words."""
    # First what can be shown by an example: what meets a pattern cannot always be made up.
    names = sorted(taken.selections, key=lambda name: not _shown(taken.selections[name]))
    shown = sum(_shown(taken.selections[name]) for name in names)
    condition = rest["detection"]["condition"]
    enough = _solution(condition, names[:shown], names) or _solution(condition, names, names) or tuple(names)
    words = [item for name in enough for item in _samples(taken.selections[name])]
    made = {"positive": [{"text": ". ".join(words)}], "negative": [{"text": _HARMLESS}]}
    full = {kind: (cases or made)[kind] or made[kind] for kind in made}
    try:
        rule = load_text(_assembled(header, {**rest, "tests": full}, ()))
    except RuleError as error:
        taken.remarks.append(f"the rule is not whole yet: {error}")
        return full
    passed: dict[str, list[Any]] = {kind: [] for kind in made}
    for result in run_rule_tests(rule):
        if result.passed:
            passed[result.kind].append(full[result.kind][result.index])
    failed = sum(map(len, full.values())) - sum(map(len, passed.values()))
    if failed and cases:
        taken.remarks.append(f"{failed} test cases do not hold with what was taken over; they were left out")
    if not cases or not all(passed.values()):
        taken.remarks.append("tests: write examples of explanations that must match and that must not")
    return {kind: passed[kind] or made[kind] for kind in made}


def _shown(block: Mapping[str, Any]) -> bool:
    """Whether the examples made of a selection's words and patterns meet it."""
    patterns: list[str] = next((words for key, words in block.items() if key.startswith("regex")), [])
    return all(compile_re2(pattern, ()).search(_example(pattern)) is not None for pattern in patterns)


def _example(word: str) -> str:
    return re.sub(r"\\(.)", r"\1", word.replace(".*", " ")).strip("*")


def _samples(block: Mapping[str, Any]) -> Iterator[str]:
    for key, words in block.items():
        if key.startswith(("keywords", "regex")):
            chosen = words if key.endswith("|all") else words[:1]
            yield " ".join(map(_example, chosen))


def _assembled(header: str, rest: Mapping[str, Any], remarks: Sequence[str]) -> str:
    said = "".join(f"{MARK} {' '.join(remark.split())}\n" for remark in dict.fromkeys(remarks))
    return f"{header}{said}{_dumped(rest)}"


def _dumped(data: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, width=110)
