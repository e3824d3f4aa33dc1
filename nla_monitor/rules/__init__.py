"""Rules: Sigma-shaped YAML over explanations, fidelity and metadata; pure evaluation; windows; embedded tests."""

from __future__ import annotations

from nla_monitor.rules.embedded import RuleTestResult
from nla_monitor.rules.engine import RuleSet, load_rules
from nla_monitor.rules.lint import Finding, lint
from nla_monitor.rules.loader import load_file, load_text, pack_names
from nla_monitor.rules.rule import Rule

__all__ = ["Finding", "Rule", "RuleSet", "RuleTestResult", "lint", "load_file", "load_rules", "load_text", "pack_names"]
