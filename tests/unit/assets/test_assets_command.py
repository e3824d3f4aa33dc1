"""``nla-monitor assets write``: everything arrives, again changes nothing, and nobody's edits are lost."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from nla_monitor import assets
from nla_monitor.cli.app import app, run

RULES = "prometheus/nla-monitor.rules.yaml"


def write(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["assets", "write", str(folder), *options])


def outcomes(result: Result) -> dict[str, str]:
    assert result.exit_code == 0, result.output
    return {one["path"]: one["outcome"] for one in json.loads(result.stdout)["files"]}


def test_it_writes_all_sections_and_a_second_time_nothing(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "assets"
    first = outcomes(write(target, "--json"))
    assert set(first.values()) == {"written"}
    assert {path.split("/")[0] for path in first} == {section.split("/")[0] for section in assets.SECTIONS}
    assert {
        RULES,
        "prometheus/nla-monitor.rules.test.yaml",
        "prometheus/runbooks/NlaMonitorRuleFired.md",
        "alertmanager/alertmanager.example.yaml",
        "grafana/dashboards/fleet.json",
        "grafana/provisioning/dashboards/nla-monitor.yaml",
        "compose/compose.yaml",
        "compose/stack.sh",
    } <= set(first)
    assert not [path for path in first if path.endswith((".py", "views.yaml"))]
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*") if path.is_file()}
    second = outcomes(write(target, "--json"))
    assert set(second.values()) == {"unchanged"}
    assert {path: at for path, at in before.items() if path.name != assets.MANIFEST} == {
        path: path.stat().st_mtime_ns for path in before if path.name != assets.MANIFEST
    }
    assert (target / "compose/stack.sh").stat().st_mode & stat.S_IXUSR


def test_a_changed_file_is_kept_and_nothing_else_is_written_either(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path)
    (tmp_path / RULES).write_text("groups: []\n", encoding="utf-8")
    (tmp_path / "compose/compose.yaml").unlink()
    assert run(["assets", "write", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert RULES in said
    assert "--force" in said
    assert (tmp_path / RULES).read_text(encoding="utf-8") == "groups: []\n"
    assert not (tmp_path / "compose/compose.yaml").exists()
    forced = outcomes(write(tmp_path, "--force", "--json"))
    assert (forced[RULES], forced["compose/compose.yaml"]) == ("updated", "written")


def test_a_file_of_an_older_version_that_nobody_touched_is_updated(tmp_path: Path) -> None:
    write(tmp_path)
    old = b"# of an older version\n"
    (tmp_path / RULES).write_bytes(old)
    manifest = tmp_path / assets.MANIFEST
    hashes = json.loads(manifest.read_text(encoding="utf-8")) | {RULES: assets._hash(old)}
    manifest.write_text(json.dumps(hashes), encoding="utf-8")
    assert outcomes(write(tmp_path, "--json"))[RULES] == "updated"


def test_links_to_runbooks_can_lead_to_where_they_are_served(tmp_path: Path) -> None:
    write(tmp_path, "--runbooks-url", "https://ops.example.org/runbooks/")
    groups = yaml.safe_load((tmp_path / RULES).read_text(encoding="utf-8"))["groups"]
    links = [rule["annotations"]["runbook_url"] for group in groups for rule in group["rules"] if "alert" in rule]
    assert "https://ops.example.org/runbooks/NlaMonitorLag.md" in links
    assert all(link.startswith("https://ops.example.org/runbooks/Nla") for link in links)


def test_without_an_address_the_links_are_said_to_be_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["assets", "write", str(tmp_path)])
    assert "--runbooks-url" in capsys.readouterr().err
    run(["assets", "write", str(tmp_path), "--runbooks-url", "https://ops.example.org"])
    assert capsys.readouterr().err == ""


def test_a_page_can_be_read_where_no_link_leads(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("NlaMonitorLag", "lag"):
        assert run(["assets", "runbook", name]) == 0
        assert capsys.readouterr().out.startswith("# NlaMonitorLag: ")
    assert run(["assets", "runbook", "../../../etc/passwd"]) == 2
    assert "NlaMonitorWorkerDown" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert run(["assets", "write", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_people_see_what_was_written(tmp_path: Path) -> None:
    said = write(tmp_path).stdout
    assert f"written    {tmp_path / RULES}" in said
    assert said.rstrip().endswith("0 updated, 0 unchanged")
    assert write(tmp_path).stdout.startswith("0 written, 0 updated, ")


def test_the_wheel_carries_what_an_editable_install_finds() -> None:
    """Each section's folder is named in the build configuration, under the place that ``folder`` looks in."""
    root = Path(__file__).parents[3]
    included = [
        line.split('"')[1::2] for line in (root / "pyproject.toml").read_text(encoding="utf-8").splitlines()
        if "nla_monitor/_assets/" in line
    ]  # fmt: skip
    assert {target for _, target in included} == {f"nla_monitor/_assets/{path.removeprefix('integrations/')}"
                                                  for path, _ in included}  # fmt: skip
    for path, _ in assets._contents(None):
        assert any(f"integrations/{path}".startswith(f"{source}/") for source, _ in included), path
