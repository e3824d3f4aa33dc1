"""Reads a rule's YAML into plain data, with the line of every key.

YAML 1.2 scalars only: ``true``/``false`` are booleans, ``yes``/``no``/``on``/``off`` and dates are text. Tags, several
documents, duplicate keys and files that expand beyond bounds (alias bombs) are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Final

import yaml

from nla_monitor.rules.problems import BadRule, Path

MAX_BYTES: Final = 256 * 1024
MAX_NODES: Final = 20_000
MAX_DEPTH: Final = 40


class _Loader(yaml.SafeLoader):
    """Safe loader whose implicit types are those of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 -- PyYAML's own class attribute


_INT: Final = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_FLOAT: Final = re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]{1,3})?")
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("int", rf"^{_INT.pattern}$", "-+0123456789"),
    ("float", rf"^{_FLOAT.pattern}$", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), ["" if c == "\0" else c for c in _first]
    )

_PLAIN: Final = {f"tag:yaml.org,2002:{name}" for name in ("bool", "null", "int", "float", "str", "seq", "map")}


@dataclass
class Document:
    """A rule file's data; ``lines`` maps each key path to its 1-based line."""

    data: dict[str, Any]
    lines: dict[Path, int] = field(default_factory=dict)


class BadDocument(BadRule):
    """The file is no rule document; ``line`` is known here."""

    def __init__(self, message: str, line: int | None = None, path: Path = ()) -> None:
        super().__init__(path, message)
        self.line = line


def read_document(file: FilePath) -> Document:
    """Reads one rule file.

    Raises:
        BadDocument: unreadable, not UTF-8, not YAML, empty, no mapping, duplicate keys, tags, or too large.
    """
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise BadDocument(f"cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_BYTES:
        raise BadDocument(f"is larger than {MAX_BYTES // 1024} KiB; a rule file holds one rule")
    try:
        return parse_document(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise BadDocument(f"is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8", line) from error


def parse_document(text: str) -> Document:
    """``read_document`` for text in memory."""
    node = _compose(text)
    if node is None:
        raise BadDocument("is empty; a rule needs at least title, id, severity, detection and tests", 1)
    if not isinstance(node, yaml.MappingNode):
        raise BadDocument(f"must hold a mapping of keys, found a {_kind(node)}", _line(node))
    builder = _Builder()
    data = builder.build(node, ())
    return Document(data, builder.lines)


def _compose(text: str) -> yaml.Node | None:
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_node()
        finally:
            loader.dispose()
    except RecursionError as error:
        raise BadDocument(f"is nested deeper than {MAX_DEPTH} levels", 1) from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise BadDocument(
            f"holds a character that YAML does not allow: U+{ord(text[error.position]):04X}", line
        ) from error
    except yaml.MarkedYAMLError as error:
        raise BadDocument(_explain(error), _mark_line(error)) from error
    except (yaml.YAMLError, ValueError) as error:
        raise BadDocument(f"is not valid YAML: {error}", 1) from error


def _mark_line(error: yaml.MarkedYAMLError) -> int | None:
    # What is never closed is found at the end of the file; people look for where it was opened.
    unclosed = "end of stream" in (error.problem or "")
    mark = (error.context_mark if unclosed else None) or error.problem_mark or error.context_mark
    return mark.line + 1 if mark else None


def _explain(error: yaml.MarkedYAMLError) -> str:
    what = ", ".join(part for part in (error.context, error.problem) if part)
    if "'\\t'" in what:
        return "is indented with a tab; YAML wants spaces"
    if "single document" in what:
        return "holds several documents ('---'); one file holds one rule"
    return f"is not valid YAML: {what}"


def _kind(node: yaml.Node) -> str:
    return (
        "mapping"
        if isinstance(node, yaml.MappingNode)
        else "sequence"
        if isinstance(node, yaml.SequenceNode)
        else "scalar"
    )


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


class _Builder:
    """Turns nodes into data; counts every visit, so that aliases cannot expand without bound."""

    def __init__(self) -> None:
        self.lines: dict[Path, int] = {}
        self._visited = 0
        self._scalars = yaml.constructor.SafeConstructor()

    def build(self, node: yaml.Node, path: Path) -> Any:
        self._visited += 1
        if self._visited > MAX_NODES:
            raise BadDocument(f"expands to more than {MAX_NODES} values (aliases?)", _line(node), path)
        if len(path) > MAX_DEPTH:
            raise BadDocument(f"is nested deeper than {MAX_DEPTH} levels", _line(node))
        if node.tag not in _PLAIN:
            raise BadDocument(f"uses the YAML tag {node.tag!r}; rules hold plain values only", _line(node), path)
        self.lines.setdefault(path, _line(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, path)
            here = (*path, key)
            if key in data:
                raise BadDocument(
                    f"key {key!r} stands here twice (first on line {self.lines[here]})", _line(key_node), here
                )
            self.lines[here] = _line(key_node)
            data[key] = self.build(value_node, here)
        return data

    def _key(self, node: yaml.Node, path: Path) -> str:
        key = self._scalar(node, path) if isinstance(node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            found = repr(node.value) if isinstance(node, yaml.ScalarNode) else f"a {_kind(node)}"
            raise BadDocument(f"keys must be text, found {found}; quote it", _line(node), path)
        return key

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        try:
            value = self._scalars.construct_object(node)
        except (yaml.YAMLError, ValueError, TypeError) as error:
            raise BadDocument(f"{node.value!r} cannot be read: {error}", _line(node), path) from error
        return _paired(value) if isinstance(value, str) and not value.isascii() else value


def _paired(text: str) -> str:
    """JSON writes characters beyond the basic plane as two escapes, which YAML reads as two halves: put together here.

    A half without its other half, which no encoding has a place for, becomes U+FFFD.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
