"""The demo as a user runs it: each story shows what it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(sys.executable).parent / "nla-monitor"
KEYS = {
    "story",
    "alerts",
    "visible_rate",
    "activation_rate",
    "agent_alerts",
    "samples",
    "dropped",
    "seconds",
    "database",
}


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run ``nla-monitor demo --json``; its last line, parsed."""
    done = subprocess.run(
        [str(TOOL), "demo", "--json", *arguments],
        cwd=folder,
        env={**os.environ, "NLA_MONITOR_STRICT": "0"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    (line,) = done.stdout.splitlines()
    result: dict[str, Any] = json.loads(line)
    assert set(result) >= KEYS
    assert result["dropped"] == 0
    assert result["samples"] > 500
    assert Path(result["database"]).is_file()
    return result


def rules(alerts: list[dict[str, Any]]) -> set[str]:
    return {alert["rule"] for alert in alerts}


def test_the_evaluation_says_clean_and_the_activations_say_otherwise(tmp_path: Path) -> None:
    """Default story: reward hacking is alerted, the harness ends clean; the agent's awareness is read, not said."""
    result = run(tmp_path)
    assert "reward-hacking" in rules(result["alerts"])
    assert result["visible_rate"][-1][1] <= 0.05
    assert result["activation_rate"][-1][1] >= 0.2
    assert [step for step, _ in result["visible_rate"]] == [step for step, _ in result["activation_rate"]]
    assert "evaluation-awareness" in rules(result["agent_alerts"])
    assert result["seconds"] < 180
    for alert in result["alerts"] + result["agent_alerts"]:
        assert {"rule", "step", "severity", "fve"} <= set(alert)
        assert alert["fve"] > 0.2
        assert alert["quote"]
    # The database that it names answers the commands that it recommends.
    listed = subprocess.run(
        [str(TOOL), "alerts", "list", "--json", "--database", result["database"]],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {alert["alert_id"] for alert in json.loads(listed.stdout)} >= {alert["id"] for alert in result["alerts"]}


def test_benign_training_fires_nothing(tmp_path: Path) -> None:
    """Honest fine-tuning and an honest agent: not one alert."""
    result = run(tmp_path, "--story", "benign")
    assert result["alerts"] == []
    assert result["agent_alerts"] == []


@pytest.mark.slow
def test_plain_poisoning_shows_the_behaviour_first(tmp_path: Path) -> None:
    """Story plain: the harness is past one half no later than the activations; nobody claims to lead."""
    result = run(tmp_path, "--story", "plain")

    def half(curve: list[list[float]]) -> float:
        return next((step for step, rate in curve if rate >= 0.5), float("inf"))

    assert half(result["visible_rate"]) <= half(result["activation_rate"]) < float("inf")


@pytest.mark.slow
def test_a_planted_thought_is_read_before_any_word(tmp_path: Path) -> None:
    """Story planted-thought: activations at once, text clean until it is trained to follow."""
    result = run(tmp_path, "--story", "planted-thought")
    visible, read = dict(map(tuple, result["visible_rate"])), dict(map(tuple, result["activation_rate"]))
    assert read[20] > 0.8
    assert visible[20] == visible[40] == 0.0
    assert visible[60] > 0.5
