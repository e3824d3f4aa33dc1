"""Finds and reads rule files: packs by name, files, folders."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path as FilePath
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from nla_monitor.errors import RuleError
from nla_monitor.rules.document import BadDocument, Document, parse_document, read_document
from nla_monitor.rules.headers import adopt
from nla_monitor.rules.problems import BadRule, Path, Problem, dotted, line_of, nearest
from nla_monitor.rules.rule import Rule, compile_rule
from nla_monitor.rules.schema import SECTIONS, RuleSpec, keys_of

MAX_PROBLEMS: Final = 50
"""Problems of one file that are explained."""
SUFFIXES: Final = (".yaml", ".yml")
_HINTS: Final = {
    "timeframe": "use window.within",
    "test": "did you mean 'tests'?",
    "condition": "it belongs under detection",
    "level": "give severity or level, not both",
}


def packs_folder() -> FilePath:
    """Where the built-in packs lie."""
    return FilePath(str(resources.files("nla_monitor.rules"))) / "packs"


def pack_names() -> list[str]:
    """Names of the built-in packs."""
    return sorted(folder.name for folder in packs_folder().iterdir() if folder.is_dir() and list(folder.glob("*.yaml")))


def find_files(name: str) -> list[FilePath]:
    """Rule files behind a pack name, a file or a folder, sorted by name.

    Raises:
        RuleError: there is nothing of that name, or a folder without rules.
    """
    pack = packs_folder() / name
    if name in pack_names():
        return sorted(pack.glob("*.yaml"))
    path = FilePath(name)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
        if not found:
            raise RuleError("holds no rule files (*.yaml, *.yml)", file=str(path))
        return found
    if path.is_file():
        return [path]
    raise RuleError(f"no rule pack, file or folder is called {name!r}; built-in packs, {nearest(name, pack_names())}")


def load_file(file: FilePath) -> Rule:
    """One rule.

    Raises:
        RuleError: with file, line and key of the first problem; further ones are added as notes.
    """
    return _unwrap(*check_file(file))


def load_text(text: str, name: str = "<text>") -> Rule:
    """One rule from YAML in memory.

    Raises:
        RuleError: see ``load_file``.
    """
    return _unwrap(*check_text(text, name))


def check_file(file: FilePath) -> tuple[Rule | None, list[Problem]]:
    """The rule of a file, or all that is wrong with it."""
    try:
        document = read_document(file)
    except BadDocument as error:
        return None, [_problem(error, str(file))]
    return _check(document, str(file))


def check_text(text: str, name: str) -> tuple[Rule | None, list[Problem]]:
    """``check_file`` for text in memory."""
    try:
        document = parse_document(text)
    except BadDocument as error:
        return None, [_problem(error, name)]
    return _check(document, name)


def _problem(error: BadDocument, file: str) -> Problem:
    return Problem(file, error.line, dotted(error.path) or None, error.message)


def _unwrap(rule: Rule | None, problems: Sequence[Problem]) -> Rule:
    if rule is not None:
        return rule
    first, *others = problems
    error = first.error()
    for other in others:
        error.add_note(str(other.error()))
    raise error


def _check(document: Document, file: str) -> tuple[Rule | None, list[Problem]]:
    try:
        adopt(document)
        spec = RuleSpec.model_validate(document.data)
    except ValidationError as error:
        # Unknown keys first: a misspelt key is often why another one is missing.
        items = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        return None, [_explain(item, document, file) for item in items[:MAX_PROBLEMS]]
    except BadRule as error:
        return None, [_located(error, document, file)]
    try:
        return compile_rule(spec, file, document.lines), []
    except BadRule as error:
        return None, [_located(error, document, file)]


def _located(error: BadRule, document: Document, file: str) -> Problem:
    return Problem(file, line_of(document.lines, error.path), dotted(error.path) or None, error.message)


def _explain(item: Any, document: Document, file: str) -> Problem:
    path: Path = tuple(item["loc"])
    message = _message(item, path)
    return Problem(file, line_of(document.lines, path), dotted(path) or None, message)


def _message(item: Any, path: Path) -> str:
    names = tuple(part for part in path if isinstance(part, str))
    if item["type"] == "extra_forbidden":
        section: type[BaseModel] = SECTIONS.get(names[:-1], RuleSpec)
        hint = _HINTS.get(names[-1]) if len(names) == 1 else None
        return f"unknown key {names[-1]!r}; {hint or nearest(names[-1], keys_of(section))}"
    if item["type"] == "missing":
        return f"{names[-1]!r} is missing{_WHY.get(names[-1], '')}"
    if item["type"] in {"span", "exception", "severity", "response"}:
        return str(item["msg"])
    return f"{item['msg']}, found {_short(item['input'])}"


_WHY: Final = {
    "tests": ": a rule needs positive and negative examples",
    "positive": ": a rule needs at least one example that it must match",
    "negative": ": a rule needs at least one example that it must not match",
    "id": ": a slug such as 'reward-hacking' or a UUID",
}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
