"""The rules are what Prometheus takes, and each alert leads to a page whose commands run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from nla_monitor.cli.app import app
from tests.cli_support import RULE, fill, sample
from tests.conftest import missing_service

INTEGRATIONS = Path(__file__).parents[3] / "integrations"
PROMETHEUS = INTEGRATIONS / "prometheus"
RUNBOOKS = PROMETHEUS / "runbooks"
SECTIONS = ["What it means", "How sure", "What to check", "How to silence", "How to label"]
GROUPS = yaml.safe_load((PROMETHEUS / "nla-monitor.rules.yaml").read_text(encoding="utf-8"))["groups"]
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in GROUPS for rule in group["rules"] if "alert" in rule
}


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        missing_service(f"{command[0]} is not installed (apt-get install prometheus prometheus-alertmanager)")
    done = subprocess.run(command, cwd=INTEGRATIONS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.services
@pytest.mark.parametrize(
    "command",
    [
        ("promtool", "check", "rules", "prometheus/nla-monitor.rules.yaml"),
        ("promtool", "test", "rules", "prometheus/nla-monitor.rules.test.yaml"),
        ("promtool", "check", "config", "prometheus/prometheus.example.yaml"),
        ("amtool", "check-config", "alertmanager/alertmanager.example.yaml"),
    ],
    ids=" ".join,
)
def test_the_servers_own_tools_accept_the_files(command: tuple[str, ...]) -> None:
    assert "FAILED" not in tool(*command)


@pytest.mark.services
@pytest.mark.parametrize(
    ("labels", "receivers"),
    [
        ({"alertname": "NlaMonitorRuleFired", "severity": "critical"}, "oncall,record"),
        ({"alertname": "NlaMonitorRuleFired", "severity": "medium"}, "record"),
        ({"alertname": "NlaMonitorWorkerDown", "severity": "critical"}, "oncall,record"),
        ({"alertname": "NlaMonitorDeliveryDelayed", "severity": "critical"}, "oncall,record"),
        ({"alertname": "NlaMonitorLag", "severity": "warning"}, "record"),
    ],
)
def test_the_example_routes_what_must_wake_somebody(labels: dict[str, str], receivers: str) -> None:
    pairs = [f"{name}={value}" for name, value in labels.items()]
    routes = ("amtool", "config", "routes", "test", "--config.file", "alertmanager/alertmanager.example.yaml")
    assert tool(*routes, *pairs).strip() == receivers


def test_every_alert_is_named_tested_and_leads_to_its_page() -> None:
    tested = (PROMETHEUS / "nla-monitor.rules.test.yaml").read_text(encoding="utf-8")
    for name, rule in ALERTS.items():
        assert re.fullmatch(r"NlaMonitor([A-Z][a-z]+)+", name)
        assert f"alertname: {name}\n        exp_alerts:\n          - exp_labels" in tested, (
            f"{name} never fires in a test"
        )
        assert {"summary", "description", "runbook_url"} <= set(rule["annotations"])
        assert rule["annotations"]["runbook_url"] == f"runbooks/{name}.md"
        told = CliRunner().invoke(app, shlex.split(rule["annotations"]["runbook"])[1:])
        assert told.stdout.startswith(f"# {name}: "), "the command in the message prints the page"
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == set(ALERTS)


def test_alertmanagers_routes_name_only_alerts_that_exist() -> None:
    text = (INTEGRATIONS / "alertmanager" / "alertmanager.example.yaml").read_text(encoding="utf-8")
    patterns = re.findall(r'alertname=~?"([^"]+)"', text)
    assert patterns
    for pattern in patterns:
        assert [name for name in ALERTS if re.fullmatch(pattern, name)], pattern


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


@pytest.mark.parametrize("name", sorted(ALERTS))
def test_a_runbook_answers_its_five_questions_with_commands_that_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (RUNBOOKS / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}: ")
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == SECTIONS
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (RUNBOOKS / link).is_file(), link
    known = {
        "ALERT": "0199cccc-0000-7000-8000-000000000001",
        "RUN": sample(0, 0).run_id,
        "RULE": RULE,
        "AV": "organism:planted/av",
        "AR": "organism:planted/ar",
        "USER": "me",
    }
    monkeypatch.setenv("NLA_MONITOR_DATABASE", fill(tmp_path / "nla-monitor.db"))
    monkeypatch.chdir(tmp_path)
    ran = 0
    for line in commands(page):
        words = [re.sub(r"\$(\w+)", lambda found: known[found[1]], word) for word in shlex.split(line)]
        if words[0] == "amtool":
            assert words[1:4] == ["silence", "add", f"alertname={name}"]
            continue
        assert words[0] == "nla-monitor"
        if "worker" in words or "--self-test" in words:
            words.append("--help")  # loads an AV: that worker and doctor run is shown elsewhere
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code in {0, 1} if "doctor" in words else result.exit_code == 0, f"{line}: {result.output}"
        ran += 1
    assert ran
