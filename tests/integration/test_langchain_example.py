"""The LangChain example runs as it stands, and its finding is not there when the model believes otherwise."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "langchain_agent.py"


def test_the_example_runs_and_names_call_tool_position_and_quote(tmp_path: Path) -> None:
    """What a reader of the README sees."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=240, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ activations read, 0 dropped", done.stdout)
    assert "does not say that it is being evaluated" in done.stdout
    assert re.search(r"exhibit: position \d+, “[^”]*(being (tested|evaluated)|an evaluation)[^”]*”", done.stdout)
    assert re.search(r"model call \d+ reading the result of \w+: run [0-9a-f-]{36}, positions \[\d+", done.stdout)
    assert re.search(r"model call 1: run", done.stdout)


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("langchain_agent_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_same_agent_that_believes_it_is_deployed_raises_no_evaluation_alert(
    example: ModuleType, sqlite_url: str
) -> None:
    """The negative control: same tools, same tokens budget, the other belief."""
    model, tokenizer = example.load_target("planted")
    rng = example.keyed_rng("langchain-agent", 4)
    task = example.agent_prompt(rng, belief="real").prompt.splitlines()[0]
    chat = example.ChatNLAModel(
        model=model,
        tokenizer=tokenizer,
        max_new_tokens=24,
        temperature=0.7,
        seed=7,
        stop=["\n"],
        tool_parser=example.tool_calls,
    )
    agent = example.make_agent(chat, example.make_tools(("open_file", "list_rows", "run_query", "find_code"), rng))
    with example.Monitor(database=sqlite_url, rules="oversight", worker="thread").attach(model, tokenizer) as monitor:
        agent.invoke(task, {"callbacks": [example.NLACallbackHandler(monitor)]})
        assert monitor.drain(120)
        assert monitor.stats.written > 0
        assert [alert.rule_id for alert in monitor.alerts() if alert.rule_id == "evaluation-awareness"] == []
