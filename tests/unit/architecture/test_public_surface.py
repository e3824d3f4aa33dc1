"""What users import: complete, sorted, and cheap."""

from __future__ import annotations

import subprocess
import sys

import nla_monitor


def test_all_is_sorted_and_resolves() -> None:
    """Every public name exists and nothing else is promised."""
    assert sorted(nla_monitor.__all__) == list(nla_monitor.__all__)
    assert set(nla_monitor.__all__) == set(nla_monitor._HOME)
    for name in nla_monitor.__all__:
        assert getattr(nla_monitor, name).__name__ == name


def test_unknown_name_is_an_attribute_error() -> None:
    """A misspelt name fails like in any module."""
    assert not hasattr(nla_monitor, "NLAMonitorCalback")


def test_import_loads_no_torch() -> None:
    """`import nla_monitor` (and the CLI's entry point) costs no torch and no transformers."""
    code = (
        "import sys, nla_monitor, nla_monitor.cli; "
        "heavy = {'torch', 'transformers', 'sqlalchemy', 'opentelemetry.sdk'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_integrations_declare_their_surface() -> None:
    """Each integration package has a sorted __all__ that resolves."""
    import nla_monitor_langchain
    import nla_monitor_transformers

    for package in (nla_monitor_langchain, nla_monitor_transformers):
        assert sorted(package.__all__) == list(package.__all__)
        for name in package.__all__:
            assert hasattr(package, name)
