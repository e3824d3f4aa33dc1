"""``nla-monitor rules``: check rules, run the tests they carry, list them."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from nla_monitor.cli import rules_calibrate, rules_language, rules_replay
from nla_monitor.cli.common import SEVERITY_STYLES, JsonOption, console, print_json, safe
from nla_monitor.records import Severity

if TYPE_CHECKING:
    from nla_monitor.rules import Rule

app = typer.Typer(help="Check, test and list rules.", no_args_is_help=True)
rules_calibrate.register(app)
rules_language.register(app)
rules_replay.register(app)

NamesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RULES]...", help="Packs, rule files or folders; all built-in packs by default."),
]


def _names(names: list[str] | None) -> list[str]:
    from nla_monitor.rules import pack_names

    return names or pack_names()


@app.command()
def lint(
    rules: NamesArgument = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as problems.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what is wrong with rules, and what is unwise; exit 1 on errors."""
    from nla_monitor.rules import lint as check

    findings = check(_names(rules))
    counts = Counter(finding.severity for finding in findings)
    if as_json:
        print_json(findings)
    else:
        for finding in findings:
            where = ":".join(str(part) for part in (finding.file, finding.line) if part is not None)
            key = f" ({finding.key})" if finding.key else ""
            text = safe(finding.message, one_line=True)
            sys.stdout.write(f"{where}: {finding.severity} [{finding.code}] {text}{key}\n")
        sys.stdout.write(f"{counts['error']} errors, {counts['warning']} warnings\n")
    if counts["error"] or (strict and counts["warning"]):
        raise typer.Exit(1)


@app.command("test")
def run_tests(
    rules: NamesArgument = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also show the tests that passed.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the tests that rules carry; exit 1 when one fails."""
    from nla_monitor.rules import load_rules

    results = load_rules(_names(rules)).run_tests()
    failed = [result for result in results if not result.passed]
    if as_json:
        print_json(results)
    else:
        for result in results if verbose else failed:
            where = ":".join(str(part) for part in (result.file, result.line) if part is not None)
            said = f"FAILED {result.message}" if not result.passed else "ok"
            text = safe(result.text, one_line=True)[:100]
            sys.stdout.write(f"{where}: {result.rule_id} {result.key} {said}: {text!r}\n")
        sys.stdout.write(f"{len(results) - len(failed)} of {len(results)} tests passed\n")
    if failed:
        raise typer.Exit(1)


@app.command("list")
def list_rules(rules: NamesArgument = None, as_json: JsonOption = False) -> None:
    """Show rules: id, severity, what they look for, when they alert."""
    from nla_monitor.rules import load_rules

    found = load_rules(_names(rules)).rules
    if as_json:
        print_json(
            [
                {
                    "id": rule.id,
                    "title": rule.spec.title,
                    "severity": rule.spec.severity,
                    "status": rule.spec.status,
                    "version": rule.header.version,
                    "window": rule.spec.window.model_dump(mode="json", by_alias=True),
                    "description": rule.spec.description,
                    "runbook": rule.spec.runbook,
                    "tests": len(rule.spec.tests.positive)
                    + len(rule.spec.tests.negative)
                    + len(rule.spec.tests.window),
                    "file": rule.file,
                }
                for rule in found
            ]
        )
        return
    _print_rules(found)


def _print_rules(found: tuple[Rule, ...]) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("severity", no_wrap=True)
    table.add_column("rule", ratio=1, overflow="fold")
    table.add_column("alerts on", ratio=1, overflow="fold")
    for rule in found:
        severity = Severity(rule.spec.severity)
        name = Text.assemble((rule.id, "bold"), f"\n{safe(rule.spec.title, one_line=True)}")
        table.add_row(Text(severity.value, style=SEVERITY_STYLES[severity]), name, _window(rule))
    out.print(table)


def _window(rule: Rule) -> str:
    window = rule.spec.window
    what = {"sample_id": "readings", "position": "positions", "sequence_id": "sequences", "step": "steps"}
    text = f"{window.count} {what[window.distinct]}"
    if window.within is not None:
        spans = [
            f"{window.within.steps} steps" if window.within.steps is not None else None,
            f"{window.within.seconds:g} s" if window.within.seconds is not None else None,
        ]
        text += f" within {' or '.join(span for span in spans if span)}"
    return text + f", by {', '.join(window.group_by)}"
