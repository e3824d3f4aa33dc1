"""The committed dashboards are what the generator makes, and every SQL expression answers on both databases."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import insert, update

from nla_monitor.records import RunInfo, TriageState
from nla_monitor.store.engine import open_engine, read, write
from nla_monitor.store.models import CalibrationRow, MatchRow, TallyRow, table
from nla_monitor.store.repository import Repository
from tests.cli_support import RULE, STARTED, fill_store, sample

GRAFANA = Path(__file__).parents[3] / "integrations" / "grafana"
BOARDS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(GRAFANA.glob("dashboards/*.json"))}


def test_generating_them_again_gives_the_same_files(tmp_path: Path) -> None:
    pytest.importorskip("grafana_foundation_sdk")
    subprocess.run([sys.executable, str(GRAFANA / "generate.py"), str(tmp_path)], check=True, capture_output=True)
    made = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert made == {name: (GRAFANA / "dashboards" / name).read_text(encoding="utf-8") for name in BOARDS}


@pytest.mark.parametrize("name", sorted(BOARDS))
def test_it_is_of_grafanas_schema_and_holds_nothing_that_the_schema_does_not_know(name: str) -> None:
    """Read into Grafana's types and written again it is the same: an unknown or misplaced key would be lost."""
    pytest.importorskip("grafana_foundation_sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    known = json.loads(json.dumps(Dashboard.from_json(BOARDS[name]), cls=JSONEncoder))
    for panel in known["panels"]:
        if panel["options"] is None:
            del panel["options"]
        if not panel["fieldConfig"]["defaults"].get("custom", True):
            del panel["fieldConfig"]["defaults"]["custom"]
    assert known == BOARDS[name]


def test_each_has_a_stable_uid_a_data_source_of_ones_choice_and_no_panel_upon_another() -> None:
    uids = [board["uid"] for board in BOARDS.values()]
    assert len(set(uids)) == len(uids) == 10
    for name, board in BOARDS.items():
        assert len(board["uid"]) <= 40
        assert board["templating"]["list"][0]["type"] == "datasource", name
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
            assert not cells & taken, f"{name}: {panel['title']}"
            taken |= cells
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["description"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["targets"]
            assert all(target["legendFormat"] for target in panel["targets"] if "expr" in target)


def test_the_colours_turn_where_the_alerting_rules_do() -> None:
    """Whoever is woken and looks sees the number that woke them beyond the line."""
    rules = (GRAFANA.parent / "prometheus/nla-monitor.rules.yaml").read_text(encoding="utf-8")
    for board, title, level, rule in (
        ("fleet", "Lag", 900, "nla_monitor:queue_age_seconds:max > 900"),
        ("fleet", "Workers up", 1, 'up{job="nla-monitor"} == 0'),
        ("training-run", "Fidelity", 0.4, "nla_monitor:fve:mean6h < 0.4"),
        ("training-run", "Staleness", 0.1, "nla_monitor:fve:mean6h offset 30m - 0.1"),
    ):
        (panel,) = [one for one in BOARDS[f"{board}.json"]["panels"] if one["title"] == title]
        steps = [step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]]
        assert level in steps, title
        assert rule in rules, title


def test_one_can_choose_between_workers_of_their_own_and_those_of_runs() -> None:
    scraped = yaml.safe_load((GRAFANA.parent / "prometheus/prometheus.example.yaml").read_text(encoding="utf-8"))
    jobs = {one["job_name"] for one in scraped["scrape_configs"]}
    for board in BOARDS.values():
        for one in board["templating"]["list"]:
            if one["name"] == "job":
                assert one["type"] == "custom"
                assert set(one["query"].split(",")) == jobs


def test_the_provisioned_folder_is_where_the_stack_puts_them() -> None:
    provider = (GRAFANA / "provisioning/dashboards/nla-monitor.yaml").read_text(encoding="utf-8")
    compose = (GRAFANA.parent / "compose/compose.yaml").read_text(encoding="utf-8")
    assert "path: /var/lib/grafana/dashboards/nla-monitor" in provider
    assert "../grafana/dashboards:/var/lib/grafana/dashboards/nla-monitor" in compose


def sql_of(engine: str, run: str = sample(0, 0).run_id) -> dict[str, str]:
    """Every SQL expression of an engine's dashboards, with Grafana's variables filled in."""
    key = "rawSql" if engine == "postgres" else "rawQueryText"
    found = {}
    for name, board in BOARDS.items():
        if not name.endswith(f".{engine}.json"):
            continue
        found |= {f"{name}: {panel['title']}": panel["targets"][0][key] for panel in board["panels"]}
        found |= {
            f"{name}: ${one['name']}": one["query"] for one in board["templating"]["list"] if one["name"] == "run"
        }
    return {title: filled(text, run) for title, text in found.items()}


def filled(text: str, run: str) -> str:
    values = {
        "${run:sqlstring}": "'" + run.replace("'", "''") + "'",  # as Grafana writes it
        "$__from": f"{(STARTED - 10) * 1000:.0f}",
        "$__to": f"{(STARTED + 10_000) * 1000:.0f}",
    }
    for name, value in values.items():
        text = text.replace(name, value)
    assert "$" not in text, text
    return text


def certify(url: str) -> None:
    """A label on an alert, and a calibration that one run stands on."""
    engine = open_engine(url)
    repository = Repository(engine)
    repository.label(repository.alerts()[0].alert_id, TriageState.TRUE_POSITIVE, "me", "seen")
    with write(engine) as connection:
        calibration: dict[str, Any] = dict.fromkeys(("rule_version", "set_name", "av_hash"), "x")
        calibration |= {"calibration_id": "c", "rule_id": RULE, "baseline_runs": [], "ar_hash": None, "sequences": 300}
        connection.execute(
            insert(table(CalibrationRow)).values(**calibration, sampling={}, figures={}, created_at=STARTED)
        )
        counts = dict.fromkeys(("sequences", "matching", "hits", "refuted", "measured", "low"), 1)
        connection.execute(
            insert(table(TallyRow)).values(run_id=sample(0, 0).run_id, calibration_id="c", void_at=STARTED, **counts)
        )
    engine.dispose()


def test_every_expression_answers_on_the_real_database(store_url: str) -> None:
    fill_store(store_url)
    certify(store_url)
    engine = open_engine(store_url)
    asked = sql_of("sqlite" if store_url.startswith("sqlite") else "postgres")
    assert len(asked) == 15
    with read(engine) as connection:
        rows = {title: [dict(row) for row in connection.exec_driver_sql(text.replace("%", "%%")).mappings()]
                for title, text in asked.items()}  # fmt: skip
    engine.dispose()
    assert not [title for title, found in rows.items() if not found]
    by_title = {title.split(": ")[1]: found for title, found in rows.items()}
    for row in by_title["Share of readings that match, by step"]:
        low, share, high = float(row["low"]), float(row["share"]), float(row["high"])  # numeric in PostgreSQL
        assert -1e-9 < low < share + 1e-9 < high + 2e-9 < 1 + 3e-9
    (tool,) = by_title["By tool"]
    assert (tool["tool"], tool["readings"]) == ("run_tests", 2)
    assert (tool["unverbalized"], tool["verbalized"], tool["unknown"]) == (0, 0, 1), "no control ran"
    (precision,) = by_title["Precision"]
    assert (precision["alerts"], precision["labelled"], precision["share_true"]) == (4, 1, 1.0)
    (certificate,) = by_title["Certificates"]
    assert (certificate["runs"], certificate["void"], certificate["alarms"]) == (1, 1, 0)


@pytest.mark.parametrize(("echo", "counted"), [(0.1, (1, 0, 0)), (0.5, (0, 1, 0)), (None, (0, 0, 1))])
def test_what_the_text_says_too_is_verbalized_and_what_nobody_knows_is_neither(
    store_url: str, echo: float | None, counted: tuple[int, int, int]
) -> None:
    fill_store(store_url)
    engine = open_engine(store_url)
    with write(engine) as connection:
        connection.execute(update(table(MatchRow)).values(controls={"results": {"echo": echo, "norm": 1.0}}))
    texts = sql_of(PLUGIN[engine.name])
    with read(engine) as connection:
        for panel in ("By tool", "By agent", "Over time"):
            (text,) = [text for title, text in texts.items() if title.endswith(f": {panel}")]
            (row,) = connection.exec_driver_sql(text.replace("%", "%%")).mappings()
            assert tuple(row[name] for name in ("unverbalized", "verbalized", "unknown")) == counted, panel
    engine.dispose()


PLUGIN = {"sqlite": "sqlite", "postgresql": "postgres"}


@pytest.mark.parametrize("run", ["o'brien", '"; DROP TABLE nla_runs; --', "two\nlines", "🙈", "x" * 10_000, "a\\'b"])
def test_a_run_of_any_name_is_asked_about_and_nothing_else(store_url: str, run: str) -> None:
    fill_store(store_url)
    engine = open_engine(store_url)
    repository = Repository(engine)
    repository.start_run(RunInfo(run, "n", "m", 2, STARTED))
    repository.add_drops(run, {"queue_full": 7})
    with read(engine) as connection:
        rows = {
            title: list(connection.exec_driver_sql(text.replace("%", "%%")).mappings())
            for title, text in sql_of(PLUGIN[engine.name], run).items()
        }
    (drops,) = [found for title, found in rows.items() if title.endswith(": Drops")]
    assert [(row["reason"], row["count"]) for row in drops] == [("queue_full", 7)]
    assert run in [row["run_id"] for title, found in rows.items() if title.endswith("$run") for row in found]
    engine.dispose()
