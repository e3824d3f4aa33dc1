"""Files for the tools around the monitor: Prometheus rules, Alertmanager, Grafana, compose, runbooks; ready to copy.

They live in ``integrations/`` of the repository and in ``nla_monitor/_assets`` of an installed package.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from nla_monitor.errors import ConfigError

Outcome = Literal["written", "updated", "unchanged"]

SECTIONS: Final = ("prometheus", "alertmanager", "grafana/dashboards", "grafana/provisioning", "compose")
"""Folders of files for users; beside them in the repository lies what makes them."""
MANIFEST: Final = ".nla-monitor-assets.json"
"""In the target folder: hashes of what was written there, by which a file that a person has changed is known."""
_RELATIVE: Final = b"runbook_url: runbooks/"


@dataclass(frozen=True, slots=True)
class Written:
    """What became of one file."""

    path: str
    """Relative to the target folder, with slashes."""
    outcome: Outcome


def folder() -> Path:
    """Where the assets lie: inside the installed package, or in the repository of an editable install.

    Raises:
        ConfigError: they are in neither place (a broken installation).
    """
    package = Path(__file__).resolve().parent
    for found in (package / "_assets", package.parent / "integrations"):
        if (found / "prometheus" / "nla-monitor.rules.yaml").is_file():
            return found
    raise ConfigError(f"the assets are missing beside {package}; install nla-monitor again")


def write(target: Path, *, force: bool = False, runbooks: str | None = None) -> list[Written]:
    """Copy the assets into a folder; a second time changes nothing.

    Args:
        target: the folder; made if it is missing.
        force: also overwrite files that somebody has changed since they were written.
        runbooks: base URL under which the runbooks are served, for the links in alerts; relative paths by default.

    Returns:
        One entry per file, by path.

    Raises:
        ConfigError: a file was changed (then nothing is written), or the folder can't be written.
    """
    contents = dict(_contents(runbooks))
    try:
        before = _manifest(target)
        present = {path: (target / path).read_bytes() for path in contents if (target / path).exists()}
        changed = [path for path, data in present.items() if data != contents[path] and before.get(path) != _hash(data)]
        if changed and not force:
            raise ConfigError(
                f"{target} has files that were changed since they were written: {', '.join(changed)}; nothing was "
                "written. Give --force to overwrite them, or another folder"
            )
        return _write(target, contents, present)
    except OSError as error:
        raise ConfigError(f"the assets cannot be written to {target}: {error}") from error


def runbook(alert: str) -> str:
    """The page about an alert of the Prometheus rules, as Markdown.

    Args:
        alert: its name, such as ``NlaMonitorLag``; the prefix may be left out.

    Raises:
        ConfigError: there is no alert of that name.
    """
    pages = {file.stem.lower(): file for file in (folder() / "prometheus" / "runbooks").glob("*.md")}
    wanted = alert.lower()
    file = pages.get(wanted) or pages.get(f"nlamonitor{wanted}")
    if file is None:
        known = ", ".join(sorted(page.stem for page in pages.values()))
        raise ConfigError(f"no alert is called {alert[:100]!r}; there are {known}")
    return file.read_text(encoding="utf-8")


def _write(target: Path, contents: Mapping[str, bytes], present: Mapping[str, bytes]) -> list[Written]:
    done = []
    for path, data in sorted(contents.items()):
        if present.get(path) == data:
            done.append(Written(path, "unchanged"))
            continue
        file = target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        if path.endswith(".sh"):
            file.chmod(0o755)
        done.append(Written(path, "updated" if path in present else "written"))
    manifest = json.dumps({path: _hash(data) for path, data in sorted(contents.items())}, indent=1) + "\n"
    (target / MANIFEST).write_text(manifest, encoding="utf-8")
    return done


def _contents(runbooks: str | None) -> Iterator[tuple[str, bytes]]:
    root = folder()
    for section in SECTIONS:
        for file in sorted((root / section).rglob("*")):
            if file.is_file():
                yield file.relative_to(root).as_posix(), _linked(file.read_bytes(), runbooks)


def _linked(data: bytes, runbooks: str | None) -> bytes:
    """The file with its links to runbooks under the base URL."""
    if runbooks is None:
        return data
    return data.replace(_RELATIVE, f"runbook_url: {runbooks.rstrip('/')}/".encode())


def _manifest(target: Path) -> dict[str, str]:
    file = target / MANIFEST
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # somebody's own file of that name, or half of one: then every difference is a change
        return {}
    return found if isinstance(found, dict) else {}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
