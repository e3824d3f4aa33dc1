"""The guide of the rule language says what is so: its rule is a good one, and it leaves out no key."""

from __future__ import annotations

import re
from pathlib import Path

from nla_monitor.rules import lint, load_rules
from nla_monitor.rules.evidence_schema import CONTROLS
from nla_monitor.rules.matchers import MODIFIERS

GUIDE = Path(__file__).resolve().parents[3] / "nla_monitor" / "rules" / "README.md"


def test_the_example_is_a_rule_without_faults_that_passes_its_tests(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    file = tmp_path / "example.yaml"
    file.write_text(example, encoding="utf-8")
    assert not [finding for finding in lint([str(file)]) if finding.severity == "error"]
    rules = load_rules([str(file)])
    rules.verify()
    assert len(rules) == 1


def test_every_control_and_modifier_is_told() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    assert not [name for name in CONTROLS if f"`{name}`" not in text]
    assert not [name for name in MODIFIERS if not re.search(rf"\b{name}\b", text)]
