"""The committed dashboards are what the generator makes, and every SQL expression answers on both databases."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from nla_monitor.records import TriageState
from nla_monitor.store.engine import open_engine, read, write
from nla_monitor.store.models import CalibrationRow, TallyRow, table
from nla_monitor.store.repository import Repository
from tests.cli_support import RULE, STARTED, fill_store, sample

GRAFANA = Path(__file__).parents[3] / "integrations" / "grafana"
BOARDS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(GRAFANA.glob("dashboards/*.json"))}


def test_generating_them_again_gives_the_same_files(tmp_path: Path) -> None:
    pytest.importorskip("grafana_foundation_sdk")
    subprocess.run([sys.executable, str(GRAFANA / "generate.py"), str(tmp_path)], check=True, capture_output=True)
    made = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert made == {name: (GRAFANA / "dashboards" / name).read_text(encoding="utf-8") for name in BOARDS}


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
            assert panel["targets"]


def test_the_provisioned_folder_is_where_the_stack_puts_them() -> None:
    provider = (GRAFANA / "provisioning/dashboards/nla-monitor.yaml").read_text(encoding="utf-8")
    compose = (GRAFANA.parent / "compose/compose.yaml").read_text(encoding="utf-8")
    assert "path: /var/lib/grafana/dashboards/nla-monitor" in provider
    assert "../grafana/dashboards:/var/lib/grafana/dashboards/nla-monitor" in compose


def sql_of(engine: str) -> dict[str, str]:
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
    return {title: filled(text) for title, text in found.items()}


def filled(text: str) -> str:
    values = {
        "${run}": sample(0, 0).run_id,
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
    assert (tool["tool"], tool["readings"], tool["unverbalized"], tool["verbalized"]) == ("run_tests", 2, 1, 0)
    (precision,) = by_title["Precision"]
    assert (precision["alerts"], precision["labelled"], precision["share_true"]) == (4, 1, 1.0)
    (certificate,) = by_title["Certificates"]
    assert (certificate["runs"], certificate["void"], certificate["alarms"]) == (1, 1, 0)
