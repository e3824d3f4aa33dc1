"""Without langchain-core the import says what to install."""

from __future__ import annotations

import subprocess
import sys

import nla_monitor_langchain

SCRIPT = """
import sys
sys.modules["langchain_core"] = None
try:
    import nla_monitor_langchain
except ImportError as error:
    print(type(error).__name__, error)
"""


def test_the_missing_extra_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("MissingExtraError nla_monitor_langchain needs the package 'langchain-core'")
    assert "pip install 'nla-monitor[langchain]'" in done.stdout


def test_public_names_are_sorted_and_exist() -> None:
    assert sorted(nla_monitor_langchain.__all__) == nla_monitor_langchain.__all__
    assert all(hasattr(nla_monitor_langchain, name) for name in nla_monitor_langchain.__all__)
