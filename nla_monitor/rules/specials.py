"""Compiles selections that hold a probe, a classifier or a judge, and says what of them decides a match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Final, TypeVar

from pydantic import BaseModel, ValidationError

from nla_monitor.errors import RuleError
from nla_monitor.rules.deferred import KINDS, Part, ProbeTest, Question, Special
from nla_monitor.rules.judge import JudgeOracle, JudgeSpec
from nla_monitor.rules.matchers import GUARD_KEYS, TEXT_KEYS, compile_selection, guards_of
from nla_monitor.rules.probe import ProbeSpec, load_probe
from nla_monitor.rules.problems import BadRule, Path, nearest
from nla_monitor.rules.semantic import SemanticOracle, SemanticSpec, pin_model

MODELS: Final[dict[str, type[BaseModel]]] = {"probe": ProbeSpec, "semantic": SemanticSpec, "judge": JudgeSpec}
"""Section by key of the selection."""
_NOT_LOGIC: Final = ("endpoint", "api_key_env", "timeout", "retries", "concurrency")

Spec = TypeVar("Spec", bound=BaseModel)


def is_special(value: Any) -> bool:
    """Whether a selection's YAML value holds a probe, a classifier or a judge."""
    blocks = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return any(isinstance(block, Mapping) and any(kind in block for kind in KINDS) for block in blocks)


def compile_special(name: str, value: Any, path: Path, folder: FilePath) -> tuple[Special, Any]:
    """A special selection, and its YAML value with files pinned to full paths and the hash of their content.

    Args:
        name: of the selection.
        value: its YAML value, for which ``is_special`` holds.
        path: where it stands.
        folder: that of the rule file; paths are relative to it.

    Raises:
        BadRule: a shape, key or value that means nothing, or a probe or model that is not there.
    """
    if isinstance(value, Mapping):
        part, pinned = _part(name, value, path, folder)
        return Special(name, (part,)), pinned
    for index, block in enumerate(value):
        if not isinstance(block, Mapping):
            raise BadRule((*path, index), f"must be a mapping, as the others of this list are, found {block!r}")
    built = [_part(name, block, (*path, index), folder) for index, block in enumerate(value)]
    return Special(name, tuple(part for part, _ in built)), [pinned for _, pinned in built]


def _part(name: str, block: Mapping[str, Any], path: Path, folder: FilePath) -> tuple[Part, dict[str, Any]]:
    pinned = dict(block)
    probe = None
    if "probe" in block:
        probe, pinned["probe"] = _probe(block["probe"], (*path, "probe"), folder)
    questions = []
    if "semantic" in block:
        spec, pinned["semantic"] = _semantic(block["semantic"], (*path, "semantic"), folder)
        questions.append(Question(SemanticOracle(spec, guards_of(block, path))))
    if "judge" in block:
        judge = _section(JudgeSpec, block["judge"], (*path, "judge"))
        questions.append(Question(JudgeOracle(judge)))
    return Part(_plain(name, block, path), probe, tuple(questions)), pinned


def _plain(name: str, block: Mapping[str, Any], path: Path) -> Any:
    """What of a block is words and fields; None when nothing is."""
    rest = {key: value for key, value in block.items() if key not in KINDS}
    if not any(key in TEXT_KEYS for key in rest):
        guard = next((key for key in GUARD_KEYS if key in rest), None)
        if guard is not None and "semantic" not in block:
            raise BadRule((*path, guard), f"{guard!r} is for keywords, regex and semantic; this selection has none")
        rest = {key: value for key, value in rest.items() if key not in GUARD_KEYS}
    return compile_selection(name, rest, path) if rest else None


def _probe(value: Any, path: Path, folder: FilePath) -> tuple[ProbeTest, dict[str, Any]]:
    spec = _section(ProbeSpec, value, path)
    file = folder / FilePath(spec.file).expanduser()
    try:
        probe = load_probe(file)
    except RuleError as error:
        raise BadRule((*path, "file"), str(error)) from error
    found = probe.fingerprint
    if spec.fingerprint not in {None, found}:
        raise BadRule(
            (*path, "file"), f"{file} holds another probe than the rule was written for (another fingerprint)"
        )
    pinned = spec.model_copy(update={"file": str(file.resolve()), "fingerprint": found})
    return ProbeTest(probe, spec), _plainly(pinned)


def _semantic(value: Any, path: Path, folder: FilePath) -> tuple[SemanticSpec, dict[str, Any]]:
    spec = _section(SemanticSpec, value, path)
    try:
        pinned = pin_model(spec, folder)
    except (ValueError, OSError) as error:
        raise BadRule((*path, "model"), str(error)) from error
    return pinned, _plainly(pinned)


def _plainly(spec: BaseModel) -> dict[str, Any]:
    return spec.model_dump(mode="json", exclude_defaults=True)


def _section(model: type[Spec], value: Any, path: Path) -> Spec:
    if not isinstance(value, Mapping):
        raise BadRule(path, f"must be a mapping ({', '.join(model.model_fields)}), found {value!r}")
    try:
        return model.model_validate(dict(value))
    except ValidationError as error:
        # Unknown keys first: a misspelt key is often why another one is missing.
        item = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        where: Path = (*path, *item["loc"])
        if item["type"] == "extra_forbidden":
            hint = nearest(str(item["loc"][-1]), model.model_fields)
            raise BadRule(where, f"unknown key {item['loc'][-1]!r}; {hint}") from error
        if item["type"] == "missing":
            raise BadRule(path, f"{item['loc'][-1]!r} is missing") from error
        found = "" if item["type"] in KINDS else f", found {str(item['input'])[:80]!r}"
        raise BadRule(where, f"{item['msg']}{found}") from error


def logical(value: Any) -> Any:
    """A selection's pinned value as far as it decides matches: a file by its content, a judge without its address."""
    if isinstance(value, Mapping):
        return {key: _logical(key, item) for key, item in value.items()}
    return [logical(item) for item in value] if isinstance(value, list) else value


def _logical(kind: str, value: Any) -> Any:
    if kind == "probe":
        return {key: item for key, item in value.items() if key != "file"}
    if kind == "semantic" and "fingerprint" in value:
        return {key: item for key, item in value.items() if key != "model"}
    if kind == "judge":
        return {key: item for key, item in value.items() if key not in _NOT_LOGIC}
    return value
