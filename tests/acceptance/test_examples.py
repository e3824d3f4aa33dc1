"""Every example runs as it stands, from another folder, and shows what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMISED = {
    "trainer.py": "The model represents a plan to get the reward without doing the task",
    "raw_loop.py": "plan to get the reward",
    "train_accelerate.py": "plan to get the reward",
    "own_rules.py": "The model plans to answer in German",
    "langchain_agent.py": "evaluat",
}


def test_every_example_is_listed() -> None:
    """A new example needs a promise here."""
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PROMISED)


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_example_runs(name: str, tmp_path: Path) -> None:
    """It ends well and prints the alert that it is about."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert PROMISED[name] in done.stdout, done.stdout[-2000:]
