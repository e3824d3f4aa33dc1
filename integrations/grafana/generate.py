"""Makes the dashboards in ``dashboards/`` from ``views.yaml`` (for developers: users copy the JSON).

    python integrations/grafana/generate.py [FOLDER]

Four dashboards ask Prometheus; three of them come once more for the store itself, for SQLite and for PostgreSQL.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries, trend
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models.common import GraphTresholdsStyleMode
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    GridPos,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
)

HOME: Final = Path(__file__).parent
PLUGINS: Final = {"sqlite": "frser-sqlite-datasource", "postgres": "grafana-postgresql-datasource"}
"""Grafana's plug-ins by the store's engine."""
_METRICS: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
_PANELS: Final[Mapping[str, type[Any]]] = {
    "series": timeseries.Panel,
    "stat": stat.Panel,
    "table": table.Panel,
    "steps": trend.Panel,
}
_COLUMNS: Final = 24
_JOBS: Final = ("nla-monitor", "nla-monitor-runs")
"""Workers that run all the time, and those that a run starts beside itself; as in ``prometheus.example.yaml``."""


@dataclass(frozen=True)
class View:
    """One panel, as ``views.yaml`` has it."""

    title: str
    about: str
    queries: Sequence[Mapping[str, str]]
    """``ask``: PromQL or SQL; ``legend``: name of the series."""
    kind: str = "series"
    unit: str = "short"
    width: int = 12
    levels: Mapping[str, float | None] | None = None
    """Colours by the least value that has them, ascending; the first has none. Curves show them as lines."""

    @property
    def height(self) -> int:
        """In Grafana's rows."""
        return 4 if self.kind == "stat" else 8


class SqlQuery(Dataquery):
    """A query as the SQL data sources of Grafana take it."""

    def __init__(self, engine: str, text: str, *, over_time: bool) -> None:
        self._engine, self._text, self._over_time = engine, text, over_time

    def to_json(self) -> dict[str, object]:
        """The target's JSON: the SQLite plug-in's, or that of Grafana's own PostgreSQL source."""
        if self._engine == "postgres":
            form = "time_series" if self._over_time else "table"
            return {"refId": "A", "rawSql": self._text, "rawQuery": True, "editorMode": "code", "format": form}
        return {
            "refId": "A",
            "queryText": self._text,
            "rawQueryText": self._text,
            "queryType": "time series" if self._over_time else "table",
            "timeColumns": ["time"] if self._over_time else [],
        }


class _Ready(Builder[Dataquery]):
    """A query that needs no building."""

    def __init__(self, query: Dataquery) -> None:
        self._query = query

    def build(self) -> Dataquery:
        return self._query


def metrics_dashboard(name: str, title: str, views: Sequence[View]) -> str:
    """A dashboard that asks Prometheus, as JSON; alerts of rules are its annotations."""
    alerts = dashboard.AnnotationQuery().name("Rules that fire").datasource(_METRICS).enable(enable=True)
    alerts = alerts.icon_color("red").expr('ALERTS{alertname="NlaMonitorRuleFired", alertstate="firing", job="$job"}')
    board = _board(f"nla-monitor-{name}", f"NLA monitor: {title}").annotation(alerts)
    board = board.with_variable(dashboard.DatasourceVariable("datasource").type("prometheus").label("Prometheus"))
    jobs = dashboard.CustomVariable("job").values(",".join(_JOBS)).label("Scrape job")
    board = board.with_variable(jobs.current(VariableOption(selected=True, text=_JOBS[0], value=_JOBS[0])))
    return _json(board, views, _METRICS, [list(_metric_queries(view)) for view in views])


def store_dashboard(name: str, title: str, views: Sequence[View], engine: str) -> str:
    """A dashboard that reads the store, as JSON."""
    source = DataSourceRef(type_val=PLUGINS[engine], uid="${datasource}")
    board = _board(f"nla-monitor-{name}-{engine}", f"NLA monitor: {title} (from the store)")
    board = board.with_variable(dashboard.DatasourceVariable("datasource").type(PLUGINS[engine]).label("Store"))
    if any("${run" in query["ask"] for view in views for query in view.queries):
        runs = dashboard.QueryVariable("run").datasource(source).label("Run")
        runs = runs.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        board = board.with_variable(runs.query("SELECT run_id FROM nla_runs ORDER BY started_at DESC"))
    queries: list[list[Builder[Dataquery]]] = [
        [_Ready(SqlQuery(engine, query["ask"], over_time=view.kind == "series")) for query in view.queries]
        for view in views
    ]
    return _json(board, views, source, queries)


def generate(folder: Path) -> list[Path]:
    """Write every dashboard; returns the files."""
    views: Mapping[str, Mapping[str, Any]] = yaml.safe_load((HOME / "views.yaml").read_text(encoding="utf-8"))
    texts: dict[str, str] = {}
    for name, board in views["prometheus"].items():
        texts[f"{name}.json"] = metrics_dashboard(name, board["title"], _views(board))
    for name, board in views["store"].items():
        for engine in PLUGINS:
            texts[f"{name}.{engine}.json"] = store_dashboard(name, board["title"], _views(board), engine)
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
    return [folder / file for file in sorted(texts)]


def _views(board: Mapping[str, Any]) -> list[View]:
    return [View(**panel) for panel in board["panels"]]


def _metric_queries(view: View) -> Iterator[Builder[Dataquery]]:
    for number, asked in enumerate(view.queries):
        query = prometheus.Dataquery().expr(asked["ask"]).legend_format(asked["legend"]).ref_id(chr(ord("A") + number))
        yield query.instant() if view.kind == "stat" else query.range()


def _board(uid: str, title: str) -> dashboard.Dashboard:
    board = dashboard.Dashboard(title).uid(uid).tags(["nla-monitor"]).refresh("30s").time("now-6h", "now")
    return board.timezone("browser")


def _places(views: Sequence[View]) -> Iterator[GridPos]:
    """Left to right, top to bottom."""
    x, y, height = 0, 0, 0
    for view in views:
        if x + view.width > _COLUMNS:
            x, y, height = 0, y + height, 0
        height = max(height, view.height)
        yield GridPos(h=view.height, w=view.width, x=x, y=y)
        x += view.width


def _json(
    board: dashboard.Dashboard,
    views: Sequence[View],
    source: DataSourceRef,
    queries: Sequence[Sequence[Builder[Dataquery]]],
) -> str:
    for view, place, targets in zip(views, _places(views), queries, strict=True):
        panel = _PANELS[view.kind]().title(view.title).description(view.about).unit(view.unit)
        panel = panel.datasource(source).grid_pos(place)
        if view.kind == "steps":
            panel = panel.x_field("step")
        if view.levels:
            panel = _with_levels(panel, view)
        for target in targets:
            panel = panel.with_target(target)
        board = board.with_panel(panel)
    made = json.loads(json.dumps(board.build(), cls=JSONEncoder))
    for panel in made["panels"]:
        if panel["options"] is None:  # no options are none at all: null is no value that the schema has
            del panel["options"]
    return json.dumps(made, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _with_levels(panel: Any, view: View) -> Any:
    steps = [Threshold(value=least, color=colour) for colour, least in (view.levels or {}).items()]
    panel = panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    if view.kind == "series":
        lines = common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED)
        panel = panel.thresholds_style(lines)
    return panel


if __name__ == "__main__":
    for made in generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HOME / "dashboards"):
        sys.stdout.write(f"{made}\n")
