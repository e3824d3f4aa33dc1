"""``nla-monitor rules schema | import``: the rule language for editors, and rules of other standards."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nla_monitor.cli.common import JsonOption, print_json
from nla_monitor.errors import RuleError


def register(app: typer.Typer) -> None:
    """Adds the commands to ``nla-monitor rules``."""
    app.command("schema")(schema)
    app.command("import")(import_rules)


def schema(
    path: Annotated[
        bool, typer.Option("--path", help="Print where the shipped schema file is, not the schema.")
    ] = False,
) -> None:
    """Print the JSON Schema of rule files, for editors ('# yaml-language-server: $schema=PATH')."""
    from nla_monitor.rules.jsonschema import SCHEMA_FILE, rule_schema_text

    sys.stdout.write(f"{SCHEMA_FILE}\n" if path else rule_schema_text())


def import_rules(
    file: Annotated[Path, typer.Argument(help="A Sigma or ATR rule (YAML).", exists=True, dir_okay=False)],
    out: Annotated[Path | None, typer.Option("--output", "-o", help="Write the rule here; printed otherwise.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a Sigma or ATR rule into one of ours: header unchanged, words and patterns taken over, the rest marked."""
    from nla_monitor.rules.foreign import import_rule

    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RuleError(f"cannot be read as UTF-8: {error}", file=str(file)) from error
    found = import_rule(text, str(file))
    if out is not None:
        _write(out, found.text, force=force)
    if as_json:
        print_json({"standard": found.standard, "remarks": found.remarks, "output": out, "rule": found.text})
        return
    if out is None:
        sys.stdout.write(found.text)
    for remark in found.remarks:
        sys.stderr.write(f"{file}: {' '.join(remark.split())}\n")


def _write(out: Path, text: str, *, force: bool) -> None:
    try:
        with out.open("w" if force else "x", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise RuleError("is there already; --force writes over it", file=str(out)) from error
    except OSError as error:
        raise RuleError(f"cannot be written: {error.strerror or error}", file=str(out)) from error
