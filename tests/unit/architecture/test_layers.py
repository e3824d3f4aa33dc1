"""The map of DESIGN §4 held against the code: who may import whom, and no cycles."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "nla_monitor"

LEAVES = {
    "records",
    "errors",
    "config",
    "outlet_config",
    "semconv",
    "guard",
    "ranks",
    "breathing",
    "leaving",
    "mixing",
    "untraced",
}
STAGES = {"capture", "spool", "nla", "rules", "evidence", "alerts", "store", "telemetry", "organism"}
ROOTS = {"monitor", "worker"}
# Leaf-like exceptions, each with its reason.
ALLOWED = {
    ("config", "errors"): "a config error is one of ours",
    ("config", "outlet_config"): "sections of the config, in a module of their own",
    ("config", "records"): "severities and phases are config values",
    ("spool.sql", "store"): "one database is spool and store, so that 'sampled' and 'alerted' are transactions",
    ("organism.reading", "nla"): "the card's figures are measured with the product's own AV and AR",
}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = path
    return found


def imports_of(name: str, path: Path) -> set[str]:
    """Our own modules imported by a module (type-checking imports and lazy ones included), relative to the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}; imports here are absolute"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names] if base.startswith("nla_monitor") else [base]
        else:
            continue
        for imported in names:
            parts = imported.split(".")
            if parts[0] == "nla_monitor" and len(parts) > 1:
                found.add(".".join(parts[1:]))
            if parts[0].startswith("nla_monitor_"):
                found.add(parts[0])
    return found


MODULES = modules()


def room(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


def reason(importer: str, imported: str) -> str | None:
    return ALLOWED.get((importer, room(imported))) or ALLOWED.get((room(importer), room(imported)))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_one_way(name: str) -> None:
    """Leaves import nothing of ours, stages leaves and themselves; only roots and what lies above import stages."""
    mine = room(name)
    wrong = set()
    for imported in imports_of(name, MODULES[name]):
        theirs = room(imported)
        if mine in {theirs, ""} or reason(name, imported):
            continue
        if mine in LEAVES or (mine in STAGES and theirs not in LEAVES):
            wrong.add(imported)
        if theirs == "cli" or (theirs in ROOTS and (mine in STAGES or mine in LEAVES)):
            wrong.add(imported)
    assert not wrong, f"nla_monitor.{name} must not import {sorted(wrong)}"


def resolve(imported: str) -> str | None:
    """The module that an imported name lives in."""
    while imported:
        if imported in MODULES:
            return imported
        imported = imported.rpartition(".")[0]
    return None


def test_no_import_cycle() -> None:
    """No module reaches itself through imports (the package's lazy public names aside)."""
    graph = {
        name: {target for imported in imports_of(name, path) if (target := resolve(imported)) and target != name}
        for name, path in MODULES.items()
        if name
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name in done:
            return
        for target in sorted(graph.get(name, ())):
            # `from package import submodule` inside the package itself is no cycle
            if not name.startswith(f"{target}."):
                visit(target, (*trail, name))
        done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_no_print_outside_the_cli() -> None:
    """Only the command line prints; libraries log."""
    for name, path in MODULES.items():
        if room(name) == "cli":
            continue
        calls = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        ]
        assert not calls, f"{path}: print in lines {calls}"


def test_modules_stay_under_500_lines() -> None:
    """A module of more than 500 lines is more than one thing."""
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values()}
    assert not {path: count for path, count in lines.items() if count > 500}
