"""The README does what it says: its Python runs, its commands work, its config is valid, its two commands are CI's."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nla_monitor import Monitor
from nla_monitor.config import load_config
from nla_monitor.organism import load_target

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOOLS = Path(sys.executable).parent


AGENT_GUIDE = (ROOT / "integrations" / "README.md").read_text(encoding="utf-8")
SOURCES_GUIDE = (ROOT / "nla_monitor" / "sources" / "README.md").read_text(encoding="utf-8")
STACK_GUIDE = (ROOT / "integrations" / "STACK.md").read_text(encoding="utf-8")
CAPTURE_GUIDE = (ROOT / "nla_monitor" / "capture" / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's Python blocks were run one after another, as a user would."""
    return run_blocks(tmp_path_factory.mktemp("readme"), README)


def run_blocks(folder: Path, text: str) -> Path:
    for index, code in enumerate(blocks("python", text)):
        script = folder / f"block_{index}.py"
        script.write_text(f"import torch\ntorch.set_num_threads(1)\n{code}", encoding="utf-8")
        done = subprocess.run(
            [sys.executable, str(script)], cwd=folder, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 0, f"{code}\n{done.stderr[-3000:]}"
    return folder


def test_python_blocks_run(workplace: Path) -> None:
    """All Python of the README runs as it stands, and leaves the databases that it names."""
    assert (workplace / "agent.db").is_file()
    assert (workplace / "loop.db").is_file()


def commands() -> list[str]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("nla-monitor ")]


@pytest.mark.parametrize("command", commands())
def test_commands_work(workplace: Path, command: str) -> None:
    """Each command of the README answers on the database that its Python blocks made."""
    database = f"sqlite:///{workplace / 'agent.db'}"
    environment = {**os.environ, "NLA_MONITOR_DATABASE": database, "NO_COLOR": "1"}
    rules = workplace / "my-rules"
    if not rules.exists():
        shutil.copytree(ROOT / "nla_monitor" / "rules" / "packs" / "oversight", rules)
    tool = str(TOOLS / "nla-monitor")
    listed = subprocess.run(
        [tool, "alerts", "list", "--json"], env=environment, capture_output=True, text=True, check=True
    )
    alert = json.loads(listed.stdout)[0]["alert_id"]
    words = [tool if word == "nla-monitor" else alert if word == "ID" else word for word in shlex.split(command)]
    done = subprocess.run(words, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_config_block_is_valid(workplace: Path) -> None:
    """The YAML of the README is a config."""
    (block,) = blocks("yaml")
    file = workplace / "nla-monitor.yaml"
    file.write_text(block, encoding="utf-8")
    config = load_config(file)
    assert config.alerts.stop_on == "critical"
    assert config.capture.triggers == ("\n",)


@pytest.mark.parametrize("block", blocks("yaml", CAPTURE_GUIDE))
def test_configs_of_the_capture_guide_are_valid(block: str, tmp_path: Path) -> None:
    """They load, and a monitor with them attaches."""
    model, tokenizer = load_target("planted")
    with Monitor(yaml.safe_load(block), database=str(tmp_path / "m.db"), worker="external") as monitor:
        assert monitor.attach(model, tokenizer).capture is not None


def test_the_agent_guide_runs(tmp_path: Path) -> None:
    """Its Python runs as it stands, and its commands answer on the database that the first block leaves."""
    run_blocks(tmp_path, AGENT_GUIDE)
    environment = {**os.environ, "NLA_MONITOR_DATABASE": f"sqlite:///{tmp_path / 'graph.db'}", "NO_COLOR": "1"}
    for command in "".join(blocks("sh", AGENT_GUIDE)).splitlines():
        words = [str(TOOLS / "nla-monitor"), *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "a person (ada) said block" in done.stdout or "written to conversations.html" in done.stderr


def test_the_stack_guide_runs(tmp_path: Path) -> None:
    """Its Python makes all four spans, its commands write and print, its configs are valid."""
    spans = set(re.findall(r"^\| `(nla_monitor\.\w+)` \|", STACK_GUIDE, flags=re.MULTILINE))
    (code,) = blocks("python", STACK_GUIDE)
    run_blocks(
        tmp_path,
        f"```python\n{code}assert set({sorted(spans)}) == {{span.name for span in spans.get_finished_spans()}}\n```\n",
    )
    for command in "".join(blocks("sh", STACK_GUIDE)).splitlines():
        words = [str(TOOLS / "nla-monitor"), *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "monitoring" / "prometheus").is_dir()
    for number, block in enumerate(blocks("yaml", STACK_GUIDE)):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block, encoding="utf-8")
        assert load_config(file).alerts.alertmanager or load_config(file).alerts.phoenix


@pytest.mark.parametrize("line", "".join(blocks("yaml", SOURCES_GUIDE)).splitlines())
def test_configs_of_the_sources_guide_are_valid(line: str, tmp_path: Path) -> None:
    """The one that is shown and those that are commented out."""
    file = tmp_path / "nla-monitor.yaml"
    file.write_text(line.removeprefix("# "), encoding="utf-8")
    assert load_config(file).source is not None


def test_links_lead_somewhere() -> None:
    """Relative links of README, ARCHITECTURE and guides name files that exist; so do the paths in the map."""
    guides = [*(ROOT / "integrations").glob("*.md"), *(ROOT / "nla_monitor").glob("*/README.md")]
    for guide in guides:
        for target in re.findall(r"\]\(([^)#:]+)\)", guide.read_text(encoding="utf-8")):
            assert (guide.parent / target).exists(), (guide, target)
    architecture = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", README + architecture):
        assert (ROOT / target).exists(), target
    table = architecture[architecture.index("## The map") : architecture.index("## Decisions")]
    for path in re.findall(r"`((?:nla_monitor|integrations|migrations|\.ci)/[^`{]*)`", table):
        assert (ROOT / path).exists(), path


def test_the_two_commands_are_what_ci_runs() -> None:
    """CI installs and tests with the README's own commands."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    install, test = blocks("sh")[0].strip(), blocks("sh")[1].strip()
    assert "pip install -c constraints.txt -e '.[dev]'" in install
    assert "-c constraints.txt -e '.[dev]'" in ci
    assert install.endswith("nla-monitor demo")
    assert test in ci
