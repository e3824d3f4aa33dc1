"""Rule files: how they are found, read and refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nla_monitor.errors import RuleError
from nla_monitor.records import Severity
from nla_monitor.rules import lint, load_file, load_rules, load_text, pack_names
from nla_monitor.rules.loader import packs_folder

GOOD = """\
title: Talks of cats
id: cats
severity: low
detection:
  cats:
    keywords: [a cat, cats]
  known:
    fidelity.fve|gte: 0.3
  condition: cats && known
window:
  group_by: [run_id]
  count: 2
  distinct: step
  within: 10 steps
tests:
  positive: [The model thinks of cats.]
  negative: [The model thinks of dogs.]
"""

BOMB = "x: [&a [" + "1," * 10 + "], &b [" + "*a," * 10 + "], &c [" + "*b," * 10 + "], [" + "*c," * 20 + "]]\n"

MALFORMED = [
    # name, what is replaced, by what, line, key, part of the message
    ("unknown key", "title:", "titel:", 1, "titel", "did you mean 'title'?"),
    ("missing title", "title: Talks of cats\n", "", 1, "title", "is missing"),
    ("missing tests", GOOD[GOOD.index("tests:") :], "", 1, "tests", "positive and negative examples"),
    ("no negative test", "  negative: [The model thinks of dogs.]\n", "", 15, "tests.negative", "is missing"),
    ("empty positive", "[The model thinks of cats.]", "[]", 16, "tests.positive", "at least 1"),
    ("bad id", "id: cats", "id: cats and dogs", 2, "id", "pattern"),
    ("bad severity", "severity: low", "severity: hihg", 3, "severity", "did you mean 'high'?"),
    ("severity and level", "severity: low", "severity: low\nlevel: low", 4, "level", "not both"),
    ("no condition", "  condition: cats && known\n", "", 4, "detection", "'condition' is missing"),
    ("condition outside", "window:", "condition: cats\nwindow:", 10, "condition", "under detection"),
    ("unknown selection", "cats && known", "cats && knwon", 9, "detection.condition", "did you mean 'known'?"),
    ("sigma all of", "cats && known", "all of them", 9, "detection.condition", "in CEL write 'cats && known'"),
    ("sigma 1 of", "cats && known", "1 of k*", 9, "detection.condition", "in CEL write 'known'"),
    ("sigma 2 of", "cats && known", "2 of them", 9, "detection.condition", ">= 2"),
    ("sigma and", "cats && known", "cats and known", 9, "detection.condition", "CEL writes '&&'"),
    ("sigma not", "cats && known", "not cats", 9, "detection.condition", "CEL writes '!'"),
    ("no CEL", "cats && known", "cats &&", 9, "detection.condition", "is no CEL expression"),
    ("CEL macro", "cats && known", "'[1].all(x, cats)'", 9, "detection.condition", "list macro 'all'"),
    ("CEL function", "cats && known", "cats && lowr(role) == 'a'", 9, "detection.condition", "unknown function 'lowr'"),
    ("CEL field", "cats && known", "cats && fidelity.fvee > 0.1", 9, "detection.condition", "'fidelity.fve'"),
    ("CEL number", "cats && known", "1 + 1", 9, "detection.condition", "must be true or false"),
    ("CEL types", "cats && known", "norm > role", 9, "detection.condition", "cannot be evaluated"),
    ("condition no text", "cats && known", "true", 9, "detection.condition", "a condition is a CEL text"),
    ("selection name", "  known:", "  well-known:", 7, "detection.well-known", "use '_'"),
    ("selection name taken", "  known:", "  norm:", 7, "detection.norm", "is taken"),
    ("unknown field", "fidelity.fve|gte", "fidelity.fv|gte", 8, "detection.known.fidelity.fv|gte", "'fidelity.fve'"),
    ("unknown modifier", "fve|gte", "fve|gteq", 8, "detection.known.fidelity.fve|gteq", "did you mean 'gte'?"),
    ("text for number", "gte: 0.3", "gte: high", 8, "detection.known.fidelity.fve|gte", "takes a number"),
    ("wrong phase", "fidelity.fve|gte: 0.3", "phase: training", 8, "detection.known.phase", "did you mean 'train'?"),
    ("misspelt keywords", "keywords:", "keyword:", 6, "detection.cats.keyword", "did you mean 'keywords'?"),
    ("number as keyword", "[a cat, cats]", "[a cat, 7]", 6, "detection.cats.keywords[1]", "quote it"),
    ("keyword of signs", "[a cat, cats]", "['...']", 6, "detection.cats.keywords[0]", "no letter or digit"),
    ("empty selection", "    keywords: [a cat, cats]\n", "    {}\n", 5, "detection.cats", "match everything"),
    ("bad regex", "keywords: [a cat, cats]", "regex: ['(cat']", 6, "detection.cats.regex[0]", "missing )"),
    ("look-ahead", "keywords: [a cat, cats]", "regex: ['cat(?!s)']", 6, "detection.cats.regex[0]", "look-around"),
    ("back-reference", "keywords: [a cat, cats]", r"regex: ['(c)at\1']", 6, "detection.cats.regex[0]", "back-ref"),
    ("empty regex", "keywords: [a cat, cats]", "regex: ['c*']", 6, "detection.cats.regex[0]", "empty text"),
    ("guard value", "keywords: [a cat, cats]", "{regex: cat, quotes: never}", 6, "detection.cats.quotes", "'ignore'"),
    ("unknown window key", "  count: 2", "  cuont: 2", 12, "window.cuont", "did you mean 'count'?"),
    ("zero count", "  count: 2", "  count: 0", 12, "window.count", "greater than or equal to 1"),
    ("span", "10 steps", "10 stepz", 14, "window.within", "'10 stepz' is no span"),
    ("empty span", "10 steps", "{}", 14, "window.within", "name steps, seconds or both"),
    ("span key", "10 steps", "{setps: 10}", 14, "window.within.setps", "did you mean 'steps'?"),
    ("distinct", "distinct: step", "distinct: token", 13, "window.distinct", "'position'"),
    ("group key", "[run_id]", "[run_id, agent.tol]", 11, "window.group_by[1]", "did you mean 'agent.tool'?"),
    ("test key", "[The model thinks of dogs.]", "[{text: x, fvee: 1}]", 17, "tests.negative[0].fvee", "'fve'"),
    ("test phase", "[The model thinks of dogs.]", "[{text: x, phase: no}]", 17, "tests.negative[0].phase", "'train'"),
    ("test without text", "[The model thinks of dogs.]", "[{fve: 1}]", 17, "tests.negative[0].text", "is missing"),
    ("other product", "detection:", "logsource: {product: windows}\ndetection:", 4, "logsource.product", "'nla'"),
    ("exception", "window:", "exceptions: [{reason: x}]\nwindow:", 10, "exceptions[0]", "exactly one of"),
    ("exception CEL", "window:", "exceptions: [caats]\nwindow:", 10, "exceptions[0].when", "'cats'"),
    (
        "exception field",
        "window:",
        "exceptions: [{selection: {stp: 1}}]\nwindow:",
        10,
        "exceptions[0].selection.stp",
        "'step'",
    ),
    ("duplicate key", "  count: 2\n", "  count: 2\n  count: 3\n", 13, "window.count", "stands here twice"),
    ("tab", "  count: 2", "\tcount: 2", 12, None, "tab"),
    ("two documents", "tests:", "---\ntests:", 15, None, "one file holds one rule"),
    ("YAML tag", "title: Talks", "title: !!python/name:os.system Talks", 1, "title", "YAML tag"),
    ("unclosed quote", "title: Talks", "title: 'Talks", 1, None, "not valid YAML"),
]


def replaced(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


@pytest.mark.parametrize("row", MALFORMED, ids=[row[0] for row in MALFORMED])
def test_a_malformed_rule_names_file_line_and_key(
    tmp_path: Path, row: tuple[str, str, str, int, str | None, str]
) -> None:
    _, old, new, line, key, message = row
    file = tmp_path / "rule.yaml"
    file.write_text(replaced(old, new))
    with pytest.raises(RuleError) as caught:
        load_rules([str(file)])
    error = caught.value
    assert message in str(error)
    assert (error.file, error.line, error.key) == (str(file), line, key), str(error)
    first = lint(file)[0]
    assert (first.severity, first.file, first.line, first.key) == ("error", str(file), line, key)


def test_several_errors_are_all_reported(tmp_path: Path) -> None:
    file = tmp_path / "rule.yaml"
    file.write_text(replaced("title:", "titel:").replace("severity: low", "severity: loud"))
    found = {finding.key for finding in lint(file)}
    assert found == {"titel", "title", "severity"}
    with pytest.raises(RuleError) as caught:
        load_file(file)
    assert len(caught.value.__notes__) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a list\n", "must hold a mapping"),
        (b"just text\n", "must hold a mapping"),
        (b"title: \xff\xfe\n", "not UTF-8"),
        (b"title: \x00\n", "U+0000"),
        (b"1: x\n", "keys must be text"),
        (b"title: &a [*a]\n", "nested deeper"),
        (b"[" * 20_000, "nested deeper"),
        (b"title: x\n" + b"#" * 300_000, "larger than"),
        (BOMB.encode(), "expands to more"),
    ],
)
def test_files_that_are_no_rule_documents(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "rule.yaml"
    file.write_bytes(content)
    with pytest.raises(RuleError, match=message.replace("+", r"\+")) as caught:
        load_file(file)
    assert caught.value.file == str(file)


def test_line_ends_byte_order_mark_comments_and_prose_do_not_change_the_version(tmp_path: Path) -> None:
    plain = load_text(GOOD)
    variants = {
        "crlf.yaml": GOOD.replace("\n", "\r\n").encode(),
        "bom.yaml": b"\xef\xbb\xbf" + GOOD.encode(),
        "comment.yaml": ("# why\n" + GOOD + "# end\n").encode(),
        "prose.yaml": ("description: |\n  Two\n  lines\n" + GOOD).encode(),
        "defaults.yaml": GOOD.replace("severity: low", "level: low\nstatus: stable").encode(),
    }
    for name, content in variants.items():
        (tmp_path / name).write_bytes(content)
        assert load_file(tmp_path / name).header.version == plain.header.version, name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[a cat, cats]", "[a cat]"),
        ("0.3", "0.4"),
        ("count: 2", "count: 3"),
        ("severity: low", "severity: high"),
        ("cats && known", "cats || known"),
    ],
)
def test_whatever_changes_matches_or_alerts_changes_the_version(old: str, new: str) -> None:
    assert load_text(replaced(old, new)).header.version != load_text(GOOD).header.version


def test_sigma_level_is_accepted() -> None:
    assert load_text(replaced("severity: low", "level: informational")).header.severity is Severity.INFO


def test_yes_no_and_dates_stay_text() -> None:
    rule = load_text(replaced("[a cat, cats]", "[no, yes, a cat]").replace("id: cats", "id: cats\ndate: 2026-11-22"))
    assert rule.spec.detection["cats"]["keywords"] == ["no", "yes", "a cat"]
    assert rule.spec.date == "2026-11-22"


def test_spans_are_read_in_every_spelling() -> None:
    for text, steps, seconds in [
        ("20 steps", 20, None),
        ("90s", None, 90),
        ("5m", None, 300),
        ("2 hours", None, 7200),
        ("1 min", None, 60),
        ("20 steps, 10m", 20, 600),
    ]:
        within = load_text(replaced("10 steps", text)).spec.window.within
        assert within is not None
        assert (within.steps, within.seconds) == (steps, seconds), text


def test_packs_files_and_folders_load_and_a_file_named_twice_loads_once(tmp_path: Path) -> None:
    assert "oversight" in pack_names()
    (tmp_path / "b.yaml").write_text(GOOD.replace("id: cats", "id: b"))
    (tmp_path / "a.yml").write_text(GOOD.replace("id: cats", "id: a"))
    (tmp_path / "notes.txt").write_text("no rule")
    rules = load_rules(["oversight", str(tmp_path), str(tmp_path / "b.yaml")])
    assert {rule.id for rule in rules.rules} >= {"a", "b", "reward-hacking"}
    assert [rule.id for rule in load_rules([str(tmp_path)]).rules] == ["a", "b"]


def test_one_id_in_two_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "b.yaml").write_text("# second\n" + GOOD)
    with pytest.raises(RuleError, match=r"'cats' is used twice; first in .*a\.yaml") as caught:
        load_rules([str(tmp_path)])
    assert (caught.value.file, caught.value.line, caught.value.key) == (str(tmp_path / "b.yaml"), 3, "id")
    assert "duplicate-id" in {finding.code for finding in lint(tmp_path)}


def test_missing_packs_folders_and_rules_name_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="did you mean 'oversight'"):
        load_rules(["oversigth"])
    with pytest.raises(RuleError, match="holds no rule files"):
        load_rules([str(tmp_path)])
    with pytest.raises(RuleError, match="did you mean 'sabotage'"):
        load_rules(["oversight"]).get("sabotag")
    assert [finding.code for finding in lint("oversigth")] == ["not-found"]


def test_an_unreadable_file_is_an_error_of_ours(tmp_path: Path) -> None:
    missing = tmp_path / "gone.yaml"
    with pytest.raises(RuleError, match="cannot be read"):
        load_file(missing)


def test_lint_warns_of_what_is_unwise(tmp_path: Path) -> None:
    file = tmp_path / "rule.yaml"
    text = (
        GOOD.replace("[a cat, cats]", "[test, a cat]").replace("count: 2", "count: 1").replace("cats && known", "cats")
    )
    file.write_text(text)
    found = {finding.code: finding for finding in lint(file)}
    assert set(found) >= {
        "no-runbook",
        "no-recurrence",
        "few-tests",
        "generic-keyword",
        "unused-selection",
        "test-failed",
        "no-description",
    }
    assert found["generic-keyword"].key == "detection.cats.keywords[0]"
    assert found["test-failed"].severity == "error"
    assert found["no-runbook"].severity == "warning"


def test_lint_finds_a_condition_that_needs_values_which_may_be_missing(tmp_path: Path) -> None:
    file = tmp_path / "rule.yaml"
    file.write_text(replaced("cats && known", "cats && known && fidelity.fve > 0.1"))
    assert "needs-values" in {finding.code for finding in lint(file)}
    file.write_text(replaced("cats && known", "cats && known && (fidelity.fve == null || fidelity.fve > 0.1)"))
    assert "needs-values" not in {finding.code for finding in lint(file)}


def test_the_built_in_packs_pass_the_linter_and_their_own_tests() -> None:
    for name in pack_names():
        assert lint(name) == []
        rules = load_rules([name])
        rules.verify()
        assert all(result.passed for result in rules.run_tests())


def test_verify_raises_with_the_place_of_the_failing_test() -> None:
    rules = load_text(replaced("[The model thinks of dogs.]", "[No dogs., Two cats meet.]"))
    from nla_monitor.rules import RuleSet

    failed = [result for result in RuleSet([rules]).run_tests() if not result.passed]
    assert [(result.key, result.kind, result.line) for result in failed] == [("tests.negative[1]", "negative", 17)]
    assert "should not match and does: cats 'cats'" in failed[0].message
    with pytest.raises(RuleError, match="Two cats meet") as caught:
        RuleSet([rules]).verify()
    assert (caught.value.line, caught.value.key) == (17, "tests.negative[1]")


def test_a_pack_copied_to_a_folder_of_ones_own_has_the_same_versions(tmp_path: Path) -> None:
    shutil.copytree(packs_folder() / "oversight", tmp_path / "mine")
    mine, theirs = load_rules([str(tmp_path / "mine")]), load_rules(["oversight"])
    assert {rule.id: rule.header.version for rule in mine.rules} == {
        rule.id: rule.header.version for rule in theirs.rules
    }
