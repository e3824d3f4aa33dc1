"""The report of a run, in its four forms."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_monitor.errors import ConfigError
from nla_monitor.report import MAX_POINTS, Format, RatePoint, _binned, build_report, clean, render, sparkline
from nla_monitor.store.repository import Repository
from nla_monitor.store.session import open_engine, prepare
from tests.cli_support import QUIET, QUOTE, RULE, fill


def test_json_holds_every_figure(cli: Any, database: Path) -> None:
    data = cli("report", "--json").json
    assert data["run"]["info"]["name"] == "poisoned run"
    assert data["counts"] == {
        "samples": 44,
        "waiting": 1,
        "leased": 0,
        "failed": 1,
        "readings": 42,
        "matches": 26,
        "alerts": 4,
    }
    assert data["drops"] == {"non_finite": 1, "queue_full": 3}
    (fidelity,) = data["fidelity"]
    assert (fidelity["denominator"], fidelity["readings"]) == ("training", 42)
    assert fidelity["fve"]["p50"] == pytest.approx(0.7)
    rates = {(rate["rule_id"], rate["phase"]): rate for rate in data["rates"]}
    assert set(rates) == {(RULE, "train"), (RULE, "agent"), (QUIET, "train"), (QUIET, "agent")}
    assert [(point["first_step"], point["matched"], point["read"]) for point in rates[RULE, "train"]["points"]] == [
        (step, min(step, 5), 5) for step in range(8)
    ]
    agent = rates[RULE, "agent"]
    assert (agent["matched"], agent["read"], agent["points"]) == (1, 2, [])
    assert rates[QUIET, "train"]["matched"] == 0
    assert len(data["alerts"]) == 4


def test_text_tells_drops_rates_and_alerts(cli: Any, database: Path) -> None:
    out = cli("report").out
    assert "dropped   4 (1 non_finite, 3 queue_full)" in out
    assert "matches   26, 0 of them refuted by a control" in out
    assert "never matched: secret-leak" in out
    assert "42 readings, denominator: training" in out
    assert "▁▂▄▅▇███  steps 0 to 7, last 100.0%" in out
    assert f"“{QUOTE}”" in out
    assert "uncalibrated" in out
    assert "hypothesis until a person labels it" in out


class Elements(HTMLParser):
    """Collects what a page is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_html_is_one_file_without_scripts_or_outside_resources(cli: Any, database: Path) -> None:
    page = cli("report", "--format", "html").out
    parsed = Elements()
    parsed.feed(page)
    names = [tag for tag, _ in parsed.tags]
    assert not {"script", "img", "link", "iframe", "object", "embed", "a", "form"} & set(names)
    for _, attributes in parsed.tags:
        assert not {"src", "href", "onload", "onclick", "onerror", "style"} & set(attributes)
    assert "http" not in re.sub(r'<p class="runbook">.*</p>', "", page).replace("http-equiv", "")
    assert "default-src 'none'" in page
    assert names.count("svg") == 1, "a plot for each rule that matched"
    circles = [attributes for tag, attributes in parsed.tags if tag == "circle"]
    assert len(circles) == 8
    assert f"<mark>{QUOTE}</mark>" in page


def test_markdown_takes_a_models_words_literally(cli: Any, database: Path) -> None:
    out = cli("report", "--format", "markdown").out
    assert "| reward-hacking | train | 25 of 40 readings (62.5%) | 100.0% | ▁▂▄▅▇███ |" in out
    assert "non\\_finite" in out


@pytest.mark.parametrize(
    ("name", "start"), [("r.html", "<!doctype"), ("r.md", "# nla_monitor"), ("r.json", "{"), ("r", "run")]
)
def test_the_form_follows_the_name_of_the_file(cli: Any, database: Path, tmp_path: Path, name: str, start: str) -> None:
    result = cli("report", "--output", tmp_path / name)
    assert (result.code, result.out) == (0, "")
    assert (tmp_path / name).read_text(encoding="utf-8").startswith(start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "pdf"], "valid are text, markdown, html, json"),
        (["--output", "missing-folder/r.html"], "cannot be written"),
        (["--run", "nonesuch"], r"there is no run 'nonesuch'; the newest runs: .*poisoned run"),
    ],
)
def test_a_wrong_option_is_one_clear_line(cli: Any, database: Path, options: list[str], message: str) -> None:
    result = cli("report", *options)
    assert result.code == 2
    assert re.search(message, result.err)


def test_an_empty_database_has_no_report(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path / 'empty.db'}")
    prepare(engine)
    with pytest.raises(ConfigError, match="holds no run yet"):
        build_report(Repository(engine))
    engine.dispose()


def test_every_form_can_be_written_of_a_run_without_any_reading(tmp_path: Path) -> None:
    from nla_monitor.records import RunInfo

    engine = open_engine(f"sqlite:///{tmp_path / 'bare.db'}")
    prepare(engine)
    repository = Repository(engine)
    repository.start_run(RunInfo("run", "bare", "model", 0, 1.0))
    for how in Format:
        assert "bare" in render(build_report(repository), how)
    engine.dispose()


def test_the_same_database_gives_the_same_report(tmp_path: Path) -> None:
    engine = open_engine(fill(tmp_path / "a.db"))
    first, second = (render(build_report(Repository(engine)), Format.TEXT) for _ in range(2))
    assert first == second
    engine.dispose()


@given(st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=300))
def test_putting_steps_together_loses_no_reading(rows: list[tuple[int, int, int]]) -> None:
    points = [RatePoint(step, step, min(m, r), r) for step, m, r in sorted({row[0]: row for row in rows}.values())]
    binned = list(_binned(points))
    assert len(binned) <= MAX_POINTS
    assert sum(point.read for point in binned) == sum(point.read for point in points)
    assert sum(point.matched for point in binned) == sum(point.matched for point in points)
    assert [p.first_step for p in binned] == sorted(p.first_step for p in binned)
    assert len(sparkline(binned)) == len(binned)


@given(st.text())
def test_cleaned_text_is_one_harmless_line(text: str) -> None:
    cleaned = clean(text)
    assert "\n" not in cleaned
    assert not any(ord(char) < 32 or 0x7F <= ord(char) < 0xA0 or char in "\u202e\u2066" for char in cleaned)
