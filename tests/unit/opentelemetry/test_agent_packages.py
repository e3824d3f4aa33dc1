"""The agent integrations as packages: what they promise, and what they say without the framework."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

SCRIPT = """
import sys
sys.modules[{framework!r}] = None
try:
    import {package}
except ImportError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    "package",
    ["nla_monitor_inspect", "nla_monitor_openai_agents", "nla_monitor_opentelemetry", "nla_monitor_smolagents"],
)
def test_public_names_are_sorted_and_exist(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == module.__all__
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize(
    ("package", "framework", "extra"),
    [
        ("nla_monitor_inspect", "inspect_ai", "inspect"),
        ("nla_monitor_openai_agents", "agents", "openai-agents"),
        ("nla_monitor_smolagents", "smolagents", "smolagents"),
    ],
)
def test_the_missing_extra_is_named(package: str, framework: str, extra: str) -> None:
    script = SCRIPT.format(package=package, framework=framework)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith(f"MissingExtraError {package} needs the package")
    assert f"pip install 'nla-monitor[{extra}]'" in done.stdout


def test_spans_need_no_framework() -> None:
    """Nothing but what is required anyway is imported; no torch either."""
    code = (
        "import sys, nla_monitor_opentelemetry; "
        "heavy = {'torch', 'transformers', 'langchain_core', 'openinference', 'agents'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
