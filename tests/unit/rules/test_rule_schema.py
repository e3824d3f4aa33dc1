"""The published JSON Schema: what editors check is what the loader accepts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from test_headers import ATR, CASES, OURS, SIGMA
from test_rule_files import GOOD
from typer.testing import CliRunner

from nla_monitor.cli.app import app
from nla_monitor.errors import RuleError
from nla_monitor.rules import load_text, pack_names
from nla_monitor.rules.document import parse_document, read_document
from nla_monitor.rules.jsonschema import SCHEMA_FILE, rule_schema, rule_schema_text
from nla_monitor.rules.loader import find_files

PACK_FILES = [file for name in pack_names() for file in find_files(name)]
VALIDATOR = jsonschema.Draft202012Validator(rule_schema())

SPECIAL = """\
title: Special
id: special
level: high
detection:
  a: {probe: {file: p.safetensors, gte: 1}, quotes: ignore, keywords: x y}
  b:
    - {semantic: {like: a sentence, model: m}}
    - {judge: {question: 'Is it really so?', endpoint: 'http://x', model: m, api_key_env: KEY}}
  c: {fidelity.fve|gte|or_missing: 0.2, phase: [train, eval], meta.reward|lt: 0, step|exists: true, role: null}
  condition: a && b
exceptions: [c, {selection: {keywords: [z]}, reason: known}, {when: step < 3}]
window: {count: 2, within: 20 steps, for: 5m, keep_firing_for: {steps: 2, seconds: 3.5}}
evidence: {swap_margin: {alternatives: one}}
response: log
tests: {positive: [x, {text: y, given: {b: true}}], negative: [z], window: [{readings: [x], fires: true}]}
"""


def problems(text: str) -> list[str]:
    return [error.json_path for error in VALIDATOR.iter_errors(parse_document(text).data)]


def test_the_schema_is_one_and_is_the_shipped_file() -> None:
    """What the models say, what is shipped and what the command prints are the same.

    After a change of the models: ``nla-monitor rules schema > nla_monitor/rules/nla-rule.schema.json``.
    """
    jsonschema.Draft202012Validator.check_schema(rule_schema())
    assert SCHEMA_FILE.read_text(encoding="utf-8") == rule_schema_text()
    printed = CliRunner().invoke(app, ["rules", "schema"])
    assert printed.stdout == rule_schema_text()
    where = CliRunner().invoke(app, ["rules", "schema", "--path"])
    assert json.loads(Path(where.stdout.strip()).read_text(encoding="utf-8")) == rule_schema()


@pytest.mark.parametrize("file", PACK_FILES, ids=[file.stem for file in PACK_FILES])
def test_every_built_in_rule_is_valid(file: Path) -> None:
    assert not [error.message for error in VALIDATOR.iter_errors(read_document(file).data)]


@pytest.mark.parametrize("text", [GOOD, SIGMA + OURS, ATR + OURS, ATR + CASES + OURS[: OURS.index("tests:")], SPECIAL])
def test_every_form_that_the_loader_takes_is_valid(text: str) -> None:
    assert problems(text) == []


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("title:", "titel:", "$"),
        ("level: high", "level: hihg", "$.level"),
        ("level: high", "level: high\nseverity: low", "$"),
        ("keywords: x y", "keyword: x y", "$.detection.a"),
        ("quotes: ignore", "quotes: never", "$.detection.a"),
        ("gte: 1}", "gtee: 1}", "$.detection.a"),
        ("fidelity.fve|gte", "fidelity.fvee|gte", "$.detection.c"),
        ("|or_missing", "|or_mising", "$.detection.c"),
        ("  condition: a && b\n", "", "$.detection"),
        ("within: 20 steps", "within: {step: 20}", "$.window.within"),
        ("count: 2", "count: 0", "$.window.count"),
        ("response: log", "response: [log, mail]", "$.response"),
        ("fires: true", "fires: 1", "$.tests.window[0].fires"),
        ("api_key_env: KEY", "api_key_env: sk-1", "$.detection.b"),
    ],
)
def test_mistakes_are_marked_where_they_stand(old: str, new: str, path: str) -> None:
    assert old in SPECIAL
    assert path in problems(SPECIAL.replace(old, new, 1))


def test_the_loader_refuses_what_the_schema_refuses() -> None:
    """Every key of a full rule, misspelt: both refuse it."""
    data = yaml.safe_load(GOOD)
    for path in list(_keys(data)):
        broken = copy.deepcopy(data)
        parent: Any = broken
        for part in path[:-1]:
            parent = parent[part]
        parent[f"{path[-1]}x_"] = parent.pop(path[-1])
        text = json.dumps(broken)
        if path[:1] == ("detection",) and len(path) == 2:
            continue  # another selection's name
        assert problems(text), path
        with pytest.raises(RuleError):
            load_text(text)


def _keys(data: Any, path: tuple[Any, ...] = ()) -> Any:
    if isinstance(data, dict):
        for key, value in data.items():
            yield (*path, key)
            yield from _keys(value, (*path, key))
