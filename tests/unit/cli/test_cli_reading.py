"""Commands that read the store: what a person sees, and what a program gets."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from nla_monitor.cli.common import age, cut, jsonable, safe, since
from nla_monitor.errors import ConfigError
from tests.cli_support import HOSTILE, QUOTE, RULE

FIRST, SECOND, THIRD, FOURTH = (f"0199cccc-0000-7000-8000-{number:012d}" for number in (1, 2, 3, 4))


def test_alerts_are_listed_newest_first_with_quote_fidelity_and_the_word_uncalibrated(cli: Any, database: Path) -> None:
    result = cli("alerts", "list")
    assert result.code == 0
    assert list(re.findall(r"0000000000\d\d$", result.out, re.MULTILINE)) == [
        "000000000004",
        "000000000003",
        "000000000002",
        "000000000001",
    ]
    assert f"“{QUOTE}”" in result.out
    assert "FVE 0.70 (training); uncalibrated" in result.out
    assert "no FVE; uncalibrated" in result.out
    assert "no fidelity; uncalibrated" in result.out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], [FOURTH, THIRD, SECOND, FIRST]),
        (["--state", "resolved"], [SECOND]),
        (["--severity", "high"], [THIRD, FIRST]),
        (["--rule", RULE, "--limit", "1"], [FOURTH]),
        (["--rule", "another"], []),
        (["--triage", "benign"], []),
        (["--since", "2026-09-21T14:15:03+00:00"], [FOURTH, THIRD]),
        (["--run", "poisoned run"], [FOURTH, THIRD, SECOND, FIRST]),
        (["--run", "0199bbbb", "--state", "firing", "--severity", "critical"], [THIRD]),
    ],
)
def test_alerts_can_be_chosen(cli: Any, database: Path, options: list[str], expected: list[str]) -> None:
    result = cli("alerts", "list", "--json", *options)
    assert result.code == 0
    assert result.err == ""
    assert [alert["alert_id"] for alert in result.json] == expected


def test_a_longer_list_says_that_there_is_more(cli: Any, database: Path) -> None:
    assert "more than 2; see --limit" in cli("alerts", "list", "--limit", 2).out
    assert "see --limit" not in cli("alerts", "list", "--limit", 4).out


def test_the_page_of_an_alert_says_what_how_sure_where_and_what_to_do(cli: Any, database: Path) -> None:
    out = cli("alerts", "show", FIRST).out
    headings = ["What the activation reads", "How sure", "Where", "More matching readings (5)", "What to do"]
    assert [out.index(heading) for heading in headings] == sorted(out.index(heading) for heading in headings)
    assert "HIGH  Intends to special-case tests" in out
    assert f"»{QUOTE}«" in out, "the quote is marked also without colours"
    assert "FVE 0.70 (denominator: training), cosine 0.90" in out
    assert "uncalibrated: the false-alarm rate of this rule is not known" in out
    assert "readings 6, sequences 6 (the rule asks for 3)" in out
    assert re.search(
        r"swap margin\s+good: \+0\.120 \(the rule asks for at least \+0\.020; median of 6 matches \+0\.100\): the text",
        out,
    )
    assert "good: 12% (median of 6 matches 12%) of the quote's words stand in the text up to the token" in out
    assert "not measured" in out
    assert "neighbours (no neighbouring reading within 8 tokens)" in out
    assert "An alert is a hypothesis until a person labels it" in out
    assert "poisoned run, model organism" in out
    assert "49, token ' service' (id 439), after block 2" in out
    assert "Now write the fix for the deployed[ service]" in out, "the token is marked in its context"
    assert "1. Runbook:\n     https://example.org/runbooks/reward-hacking" in out
    assert "nla-monitor alerts label 000000000001 true_positive" in out


def test_the_page_of_an_agents_alert_says_which_call_and_tool(cli: Any, database: Path) -> None:
    out = cli("alerts", "show", FOURTH).out
    assert "agent-call-1 in agent-1" in out
    assert re.search(r"tool\s+run_tests", out)
    assert "none (no training step)" in out
    assert "not stored (capture.store_text is off" in out


def test_commands_on_the_page_can_be_copied_whatever_the_width(cli: Any, database: Path) -> None:
    out = cli("alerts", "show", FIRST, "--database", database, env={"COLUMNS": "40"}).out
    (command,) = [line.strip() for line in out.splitlines() if "nla-monitor alerts label" in line]
    assert command.endswith(f"--database {database}")
    assert cli(*command.split()[1:]).code == 0


@pytest.mark.parametrize("text", [FIRST, "000000000001", "0199cccc-0000-7000-8000-000000000001"])
def test_an_alert_is_found_by_its_id_or_either_end_of_it(cli: Any, database: Path, text: str) -> None:
    assert cli("alerts", "show", text, "--json").json["alert"]["alert_id"] == FIRST


@pytest.mark.parametrize(
    ("text", "message"), [("0199cccc", "give more of the id"), ("nonesuch", "alerts list"), ("", "there is no alert")]
)
def test_an_alert_that_is_not_meant_clearly_is_an_error(cli: Any, database: Path, text: str, message: str) -> None:
    result = cli("alerts", "show", text)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert len(result.err.splitlines()) == 1


def test_show_json_holds_the_readings_without_vectors(cli: Any, database: Path) -> None:
    data = cli("alerts", "show", FIRST, "--json").json
    assert data["run"]["name"] == "poisoned run"
    assert len(data["readings"]) == 6
    assert data["readings"][0]["fidelity"]["denominator_name"] == "training"
    assert "vector" not in data["readings"][0]


def test_a_label_is_kept_with_who_and_why_and_can_be_changed(cli: Any, database: Path) -> None:
    first = cli("alerts", "label", "000000000001", "false_positive", "--who", "ada", "--note", "echo of the prompt")
    assert first.code == 0
    assert "now labelled false_positive" in first.out
    assert cli("alerts", "label", FIRST, "benign", "--who", "bob", "--json").json["triage"] == "benign"
    page = cli("alerts", "show", FIRST).out
    assert re.search(r"false_positive by ada: echo of the prompt\n.*benign by bob", page)
    assert [alert["alert_id"] for alert in cli("alerts", "list", "--triage", "benign", "--json").json] == [FIRST]


def test_an_unknown_label_is_wrong_usage_and_names_the_valid_ones(cli: Any, database: Path) -> None:
    result = cli("alerts", "label", FIRST, "maybe")
    assert result.code == 2
    assert "true_positive" in result.err


def test_samples_show_state_and_reading(cli: Any, database: Path) -> None:
    out = cli("samples").out
    assert "(waiting)" in out
    assert "(failed: zero norm)" in out
    assert "agent run_tests" in out
    assert "The model intends to special-case" in out
    assert "deployed service" not in out, "contexts are shown only on request"
    whole = cli("samples", "--explanations", "--limit", 3).out
    assert "Now write the fix for the deployed service" in whole
    assert "FVE 0.70 (denominator: training)" in whole


def test_samples_json_holds_texts_only_on_request(cli: Any, database: Path) -> None:
    bare = cli("samples", "--json", "--step", 3, "--rule", RULE).json
    assert len(bare) == 3
    assert {sample["step"] for sample in bare} == {3}
    assert "context" not in bare[0]
    assert "text" not in bare[0]["explanation"]
    whole = cli("samples", "--json", "--contains", "cooking", "--phase", "agent", "--explanations").json
    assert [sample["agent"]["tool"] for sample in whole] == ["run_tests"]
    assert "cooking" in whole[0]["explanation"]["text"]


@pytest.mark.parametrize(
    "command",
    [
        ["alerts", "list"],
        ["alerts", "show", FIRST],
        ["samples", "--limit", "100"],
        ["samples", "--limit", "100", "--explanations"],
        ["report"],
        ["report", "--format", "markdown"],
        ["report", "--format", "html"],
    ],
)
def test_a_models_words_cannot_act_on_the_terminal_or_the_page(cli: Any, database: Path, command: list[str]) -> None:
    out = cli(*command).out
    assert "\x1b" in HOSTILE
    assert "\x1b" not in out
    assert "\u202e" not in out
    if "html" in command:
        assert "<script>alert" not in out
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in out


def test_output_to_a_pipe_has_no_colour_codes_and_no_trailing_blanks(cli: Any, database: Path) -> None:
    for command in (["alerts", "list"], ["alerts", "show", FIRST], ["samples"], ["doctor", "--no-self-test"]):
        out = cli(*command).out
        assert not [line for line in out.splitlines() if line != line.rstrip()]


def test_sixty_columns_are_enough(cli: Any, database: Path) -> None:
    for command in (["alerts", "list"], ["samples"]):
        out = cli(*command, env={"COLUMNS": "60"}).out
        assert max(len(line) for line in out.splitlines()) <= 60
    assert "000000000004" in cli("alerts", "list", env={"COLUMNS": "60"}).out


# -- the database -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        ["alerts", "list"],
        ["alerts", "show", "x"],
        ["alerts", "label", "x", "benign"],
        ["samples"],
        ["report"],
        ["db", "check"],
        ["db", "prune", "--older-than", "1d"],
        ["db", "downgrade", "base", "--yes"],
    ],
)
def test_a_missing_database_is_told_and_not_made(cli: Any, tmp_path: Path, command: list[str]) -> None:
    result = cli(*command)
    assert result.code == 3
    assert result.out == ""
    assert "there is no database 'nla-monitor.db'" in result.err
    assert "NLA_MONITOR_DATABASE" in result.err
    assert list(tmp_path.iterdir()) == []


def test_the_database_may_come_from_the_environment(cli: Any, database: Path, tmp_path: Path) -> None:
    moved = database.rename(tmp_path / "elsewhere.db")
    assert cli("alerts", "list", "--json").code == 3
    assert len(cli("alerts", "list", "--json", env={"NLA_MONITOR_DATABASE": f"sqlite:///{moved}"}).json) == 4
    assert len(cli("alerts", "list", "--json", "--database", moved).json) == 4


def test_a_file_that_is_no_database_is_told(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "nla-monitor.db").write_text("no database at all, just text that is long enough to be read\n" * 50)
    result = cli("alerts", "list")
    assert result.code == 3
    assert "not an SQLite database" in result.err


def test_db_upgrade_creates_check_agrees_and_downgrade_asks(cli: Any, tmp_path: Path) -> None:
    assert cli("db", "upgrade").code == 0
    assert (tmp_path / "nla-monitor.db").exists()
    status = cli("db", "check", "--json").json
    assert status["ok"] is True
    assert status["current"] == status["head"]
    refused = cli("db", "downgrade", "base", stdin="n\n")
    assert refused.code != 0
    assert cli("db", "check").code == 0
    assert cli("db", "downgrade", "base", "--yes").code == 0
    checked = cli("db", "check")
    assert checked.code == 1
    assert "db upgrade" in checked.out
    reading = cli("alerts", "list")
    assert reading.code == 3
    assert "db upgrade" in reading.err


def test_prune_forgets_old_samples_but_not_what_an_alert_rests_on(cli: Any, database: Path) -> None:
    plan = cli("db", "prune", "--older-than", "1d", "--dry-run", "--json").json
    assert plan["dry_run"] is True
    assert len(cli("samples", "--limit", 1000, "--json").json) == 44
    done = cli("db", "prune", "--older-than", "1d")
    assert f"{plan['pruned']['samples']} samples" in done.out
    left = cli("samples", "--limit", 1000, "--json").json
    assert len(left) == 44 - plan["pruned"]["samples"]
    assert len(cli("alerts", "show", FIRST, "--json").json["readings"]) == 6
    assert {sample["state"] for sample in left} == {"read", "waiting", "failed"}


# -- small things -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("7d", 604800), ("1.5h", 5400)]
)
def test_since_understands_spans(text: str, seconds: float) -> None:
    found = since(text)
    assert found is not None
    assert abs(time.time() - seconds - found) < 5


def test_since_refuses_what_it_does_not_understand() -> None:
    with pytest.raises(ConfigError, match="yesterday"):
        since("yesterday")


def test_json_has_no_word_for_nan() -> None:
    assert json.dumps(jsonable({"a": [float("nan"), float("inf"), 1.5]}), allow_nan=False) == '{"a": [null, null, 1.5]}'


def test_unsafe_characters_are_shown_as_escapes() -> None:
    assert safe("a\x1b[2Jb\u202ec\x07d\te\nf") == "a\\x1b[2Jb\\u202ec\\x07d\te\nf"
    assert safe("a\r\nb", one_line=True) == "a\\r b"
    assert cut("x" * 50, 10) == "x" * 9 + "…"
    assert age(time.time() - 7300) == "2h ago"
