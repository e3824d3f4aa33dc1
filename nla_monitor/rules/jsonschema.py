"""The JSON Schema of a rule file, made from the models, for editors.

Shipped as ``nla_monitor/rules/nla-rule.schema.json``; ``nla-monitor rules schema`` prints it. In an editor with a YAML
language server, the first line of a rule file may be
``# yaml-language-server: $schema=<path of that file>``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from pydantic.json_schema import GenerateJsonSchema

from nla_monitor.rules.fields import FIELDS
from nla_monitor.rules.matchers import GUARD_KEYS, MODIFIERS, TEXT_KEYS
from nla_monitor.rules.schema import RuleSpec
from nla_monitor.rules.specials import MODELS

SCHEMA_FILE: Final = Path(__file__).with_name("nla-rule.schema.json")
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

_TEXTS: Final = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"type": "string"}}]}
_VALUE: Final = {"type": ["string", "number", "boolean", "null"]}
_ABOUT: Final = {
    "keywords": "whole-word phrases, any of them; '*' at a word's edge is any rest of the word",
    "keywords|all": "all of them",
    "regex": "RE2 patterns without case, any of them; a group named 'quote' is the stretch that counts",
    "regex|all": "all of them",
    "negation": "ignore: negated words count, too",
    "quotes": "ignore: quoted words count, too",
    "mentions": "ignore: words that are talked about, or what others do, count, too",
}
_NAME: Final = "^[A-Za-z_][A-Za-z0-9_]*$"


def rule_schema() -> dict[str, Any]:
    """The schema of a rule file (JSON Schema 2020-12)."""
    schema = RuleSpec.model_json_schema(by_alias=True, schema_generator=_Generator, mode="validation")
    definitions = schema["$defs"]
    for name, model in MODELS.items():
        section = model.model_json_schema(by_alias=True, schema_generator=_Generator, mode="validation")
        definitions |= section.pop("$defs", {})
        definitions[name] = section
    definitions["selection"] = _selection()
    definitions["block"] = _block()
    definitions["ExceptionSpec"]["properties"]["selection"] = {"$ref": "#/$defs/selection"}
    schema["properties"]["detection"] = _detection()
    _accept_level(schema)
    _accept_test_cases(schema)
    return {
        "$schema": DIALECT,
        "$id": "https://nla-monitor.invalid/nla-rule.schema.json",
        **schema,
        "title": "nla-monitor rule",
    }


def rule_schema_text() -> str:
    """The schema as it is shipped."""
    return json.dumps(rule_schema(), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


class _Generator(GenerateJsonSchema):
    """Pydantic's, without the titles that it makes of names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """No: the key says it."""
        del schema
        return False


def _accept_level(schema: dict[str, Any]) -> None:
    """``level`` is Sigma's word for ``severity``; one of the two must stand there."""
    schema["properties"]["level"] = {**schema["properties"]["severity"], "description": "Sigma's word for severity"}
    schema["required"].remove("severity")
    schema["oneOf"] = [{"required": ["severity"]}, {"required": ["level"]}]


def _accept_test_cases(schema: dict[str, Any]) -> None:
    """ATR's ``test_cases`` may stand for ``tests``."""
    schema["required"].remove("tests")
    schema["anyOf"] = [{"required": ["tests"]}, {"required": ["test_cases"]}]


def _detection() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "named selections, and a CEL condition over their names and the fields of a reading",
        "required": ["condition"],
        "minProperties": 2,
        "properties": {"condition": {"type": "string", "minLength": 1, "description": "CEL: claim && !other"}},
        "additionalProperties": {"$ref": "#/$defs/selection"},
        "propertyNames": {"pattern": _NAME},
    }


def _selection() -> dict[str, Any]:
    return {
        "description": "keywords, a mapping whose keys must all hold, or a list of mappings of which one must hold",
        "anyOf": [
            {"type": "string"},
            {"type": "array", "minItems": 1, "items": {"type": "string"}},
            {"$ref": "#/$defs/block"},
            {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/block"}},
        ],
    }


def _block() -> dict[str, Any]:
    fields = "|".join([*(re.escape(name) for name in FIELDS), r"meta\..+", r"screen\..+"])
    modifiers = "|".join(MODIFIERS)
    texts = {key: {**_TEXTS, "description": _ABOUT[key]} for key in TEXT_KEYS}
    guards = {key: {"enum": ["respect", "ignore"], "description": _ABOUT[key]} for key in GUARD_KEYS}
    return {
        "type": "object",
        "minProperties": 1,
        "properties": {**texts, **guards, **{name: {"$ref": f"#/$defs/{name}"} for name in MODELS}},
        "patternProperties": {
            rf"^({fields})(\|({modifiers}))*$": {"anyOf": [_VALUE, {"type": "array", "minItems": 1, "items": _VALUE}]}
        },
        "additionalProperties": False,
    }
