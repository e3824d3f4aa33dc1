"""``rules import`` and ``rules schema`` as a user has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIGMA = """\
title: Hidden window
level: medium
logsource: {product: windows}
detection:
  words: [a hidden window, quiet mode]
  condition: words
"""


def test_an_imported_rule_can_be_linted_tested_and_is_never_overwritten(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "sigma.yml").write_text(SIGMA)
    done = cli("rules", "import", "sigma.yml", "-o", "ours.yaml")
    assert (done.code, done.out) == (0, "")
    assert "the rule had no id" in done.err
    assert cli("rules", "lint", "ours.yaml").code == 0
    assert cli("rules", "test", "ours.yaml").code == 0
    again = cli("rules", "import", "sigma.yml", "-o", "ours.yaml")
    assert again.code == 2
    assert "--force" in again.err
    assert cli("rules", "import", "sigma.yml", "-o", "ours.yaml", "--force").code == 0


def test_without_a_file_the_rule_goes_to_standard_output(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "sigma.yml").write_bytes(b"\xef\xbb\xbf" + SIGMA.replace("\n", "\r\n").encode())
    printed = cli("rules", "import", "sigma.yml")
    found = cli("rules", "import", "sigma.yml", "--json").json
    assert found["rule"] == printed.out
    assert found["standard"] == "sigma"
    assert found["remarks"]


def test_what_is_no_rule_is_said_with_its_file(cli: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "list.yml").write_text("- a\n")
    (tmp_path / "raw.yml").write_bytes(b"\xff\xfe\x00")
    for name in ("list.yml", "raw.yml"):
        done = cli("rules", "import", name)
        assert done.code == 2
        assert name in done.err
    assert cli("rules", "import", "nowhere.yml").code == 2


def test_the_schema_is_json(cli: Callable[..., Any]) -> None:
    assert json.loads(cli("rules", "schema").out)["title"] == "nla-monitor rule"
