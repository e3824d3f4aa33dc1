"""The report of one run: what was sampled, what was lost, how faithful the words were, what matched, what alerted.

``build_report`` asks the store, ``render`` writes it as text, Markdown, one self-contained HTML file, or JSON.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from sqlalchemy import func, select

from nla_monitor.errors import ConfigError
from nla_monitor.evidence.promise import ENDED, brief
from nla_monitor.evidence.wording import lines
from nla_monitor.records import Alert, Phase
from nla_monitor.standing import RunGuarantee, run_guarantees
from nla_monitor.store.engine import read
from nla_monitor.store.models import MatchRow, ReadingRow, RuleRow
from nla_monitor.store.queries import Counts, RunSummary
from nla_monitor.store.repository import Repository

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["Format", "Report", "build_report", "render"]

MAX_POINTS: Final = 60
"""Steps are put together into at most so many points."""
MAX_ALERTS: Final = 500
QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95)
_BARS: Final = "▁▂▃▄▅▆▇█"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_MARKDOWN: Final = re.compile(r"([\\`*_{}\[\]<>#|~])")
CAUTION: Final = (
    "An alert is a hypothesis until a person labels it. Fidelity says how much of the activation the words hold, not "
    "whether they are true; FVE is comparable only under the same denominator. Neighbouring tokens depend on each "
    "other, so matched / read is no count of independent observations."
)
NO_GUARANTEE: Final = (
    "None: no rule was calibrated for this run, so that its false-alarm rate is not known "
    "(nla-monitor rules calibrate --baseline RUN)."
)


class Format(StrEnum):
    """How a report may be written."""

    TEXT = "text"
    MARKDOWN = "markdown"
    HTML = "html"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class FidelitySummary:
    """Fidelity of the readings that share one denominator."""

    denominator: str | None
    """None: no denominator is known, so there is no FVE."""
    readings: int
    cosine: Mapping[str, float]
    """Quantiles by name (``p05`` to ``p95``) and the mean."""
    fve: Mapping[str, float] | None


@dataclass(frozen=True, slots=True)
class RatePoint:
    """Readings of some neighbouring steps."""

    first_step: int
    last_step: int
    matched: int
    read: int

    @property
    def rate(self) -> float:
        """Share of the readings that matched, 0 to 1."""
        return self.matched / self.read


@dataclass(frozen=True, slots=True)
class RuleRate:
    """How often a rule matched in one kind of forward pass."""

    rule_id: str
    title: str
    phase: Phase
    matched: int
    read: int
    points: tuple[RatePoint, ...]
    """Over the steps of training; empty where there are no steps."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that the report says."""

    generated_at: float
    run: RunSummary
    counts: Counts
    drops: Mapping[str, int]
    refuted: int
    """Matches that a control refuted; they count in no rate and no alert."""
    unread_fidelity: int
    """Readings without fidelity: no AR was configured."""
    fidelity: tuple[FidelitySummary, ...]
    rates: tuple[RuleRate, ...]
    alerts: tuple[Alert, ...]
    """Newest first, at most ``MAX_ALERTS``."""
    guarantees: tuple[RunGuarantee, ...]
    """Of the rules that were calibrated while the run was read."""


def build_report(repository: Repository, run_id: str | None = None) -> Report:
    """The report of a run; of the newest one by default.

    Raises:
        ConfigError: there is no such run, or none at all.
        StoreUnavailableError: the database cannot be read.
    """
    run = _run(repository, run_id)
    key = run.info.run_id
    bare, fidelity = _fidelity(repository, key)
    return Report(
        generated_at=time.time(),
        run=run,
        counts=repository.reading_counts(key),
        drops=repository.drops(key),
        refuted=_refuted(repository, key),
        unread_fidelity=bare,
        fidelity=fidelity,
        rates=tuple(_rates(repository, key)),
        alerts=tuple(repository.alerts(key, limit=MAX_ALERTS)),
        guarantees=run_guarantees(repository.engine, key),
    )


def _run(repository: Repository, run_id: str | None) -> RunSummary:
    if run_id is None:
        newest = next(iter(repository.runs(limit=1)), None)
        if newest is None:
            raise ConfigError("the database holds no run yet")
        return newest
    run = repository.run(run_id)
    if run is None:
        raise ConfigError(f"the database holds no run {run_id!r}")
    return run


# -- figures ------------------------------------------------------------------------------------------------------


def _refuted(repository: Repository, run_id: str) -> int:
    query = select(func.count()).where(MatchRow.run_id == run_id, MatchRow.supported.is_(False))
    with read(repository.engine) as connection:
        return int(connection.execute(query).scalar_one())


def _fidelity(repository: Repository, run_id: str) -> tuple[int, tuple[FidelitySummary, ...]]:
    query = select(ReadingRow.denominator_name, ReadingRow.cosine, ReadingRow.fve).where(ReadingRow.run_id == run_id)
    with read(repository.engine) as connection:
        rows = connection.execute(query.order_by(ReadingRow.denominator_name)).all()
    scored = [row for row in rows if row.cosine is not None]
    summaries = []
    for name, group in groupby(scored, key=lambda row: row.denominator_name):
        members = list(group)
        fves = [row.fve for row in members if row.fve is not None]
        summaries.append(
            FidelitySummary(
                name, len(members), _spread([row.cosine for row in members]), _spread(fves) if fves else None
            )
        )
    return len(rows) - len(scored), tuple(summaries)


def _spread(values: Sequence[float]) -> dict[str, float]:
    array = np.asarray(values, dtype=np.float64)
    names = [f"p{round(quantile * 100):02d}" for quantile in QUANTILES]
    found = dict(zip(names, np.quantile(array, QUANTILES).tolist(), strict=True))
    return {**found, "mean": float(array.mean())}


def _rates(repository: Repository, run_id: str) -> Iterator[RuleRate]:
    """Rules that matched first, most often first; then those that never did. One entry per phase that was read."""
    with read(repository.engine) as connection:
        titles = {row.rule_id: row.title for row in connection.execute(select(RuleRow.rule_id, RuleRow.title))}
        matched = connection.execute(select(MatchRow.rule_id).where(MatchRow.run_id == run_id).distinct()).scalars()
        rules = sorted({*titles, *matched})
    found = [_rate(repository, run_id, (rule, titles.get(rule, rule)), phase) for rule in rules for phase in Phase]
    yield from sorted((rate for rate in found if rate.read), key=lambda rate: (-rate.matched, rate.rule_id, rate.phase))


def _rate(repository: Repository, run_id: str, rule: tuple[str, str], phase: Phase) -> RuleRate:
    rows = repository.match_rate(run_id, rule[0], phase=phase)
    steps = [RatePoint(step, step, matched, total) for step, matched, total in rows if step is not None and total]
    return RuleRate(
        rule_id=rule[0],
        title=rule[1],
        phase=phase,
        matched=sum(matched for _, matched, _ in rows),
        read=sum(total for _, _, total in rows),
        points=tuple(_binned(steps)) if len(steps) > 1 else (),
    )


def _binned(points: Sequence[RatePoint]) -> Iterator[RatePoint]:
    """At most ``MAX_POINTS`` points: steps of one span of equal length go together."""
    if len(points) <= MAX_POINTS:
        yield from points
        return
    first, last = points[0].first_step, points[-1].last_step
    width = (last - first) // MAX_POINTS + 1
    for _, group in groupby(points, key=lambda point: (point.first_step - first) // width):
        members = list(group)
        yield RatePoint(
            members[0].first_step,
            members[-1].last_step,
            sum(point.matched for point in members),
            sum(point.read for point in members),
        )


# -- writing ------------------------------------------------------------------------------------------------------


def render(report: Report, how: Format) -> str:
    """The report as text that ends in a newline."""
    if how is Format.JSON:
        return json.dumps(dataclasses.asdict(report), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    if how is Format.HTML:
        return _html(report)
    if how is Format.MARKDOWN:
        return "\n".join(_markdown(report)) + "\n"
    return "\n".join(_text(report)) + "\n"


def _html(report: Report) -> str:
    filters: dict[str, Callable[..., Any]] = {
        "certainties": _certainties,
        "facts": _facts,
        "where": _where,
        "whole_run": _whole_run,
    }
    return page("report.html.j2", filters).render(
        report=report,
        caution=CAUTION,
        no_guarantee=NO_GUARANTEE,
        plots=[plot(rate, report.alerts) for rate in report.rates if rate.points],
    )


def page(name: str, filters: Mapping[str, Callable[..., Any]]) -> Template:
    """A template of ``nla_monitor/templates``; everything that is put into it is escaped."""
    # Imported here: the other forms and the CLI's start do not need it.
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415

    # Everything from the database was written by models and users: it is escaped, whatever the template forgets.
    environment = Environment(
        loader=PackageLoader("nla_monitor", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=lambda value: _CONTROL.sub(" ", value) if isinstance(value, str) else value,
    )
    environment.filters |= {"clean": clean, "moment": moment, "percent": percent, **filters}
    return environment.get_template(name)


def clean(text: str) -> str:
    """Text on one line without control or direction characters, which could act on a terminal or a reader."""
    return " ".join(_CONTROL.sub(" ", text).split())


def moment(seconds: float | None) -> str:
    """Unix seconds as a date and time in UTC; a dash for None."""
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def percent(share: float) -> str:
    """A share of 1 in percent."""
    return f"{share:.1%}"


def _facts(report: Report) -> list[tuple[str, str]]:
    """The head of the report."""
    info, counts = report.run.info, report.counts
    lost = ", ".join(f"{count} {reason}" for reason, count in report.drops.items())
    waiting = f"{counts.waiting + counts.leased} still to be read" if counts.waiting + counts.leased else "all read"
    return [
        ("run", f"{clean(info.name)} ({info.run_id})"),
        ("model", f"{clean(info.model)}, output of block {info.layer}"),
        ("started", moment(info.started_at)),
        ("ended", moment(report.run.ended_at)),
        ("samples", f"{counts.samples} stored, {counts.readings} read, {waiting}, {counts.failed} given up"),
        ("dropped", f"{sum(report.drops.values())} ({lost})" if lost else "0"),
        ("matches", f"{counts.matches}, {report.refuted} of them refuted by a control"),
        ("alerts", str(counts.alerts)),
    ]


def _fidelity_rows(report: Report) -> Iterator[tuple[str, str, Mapping[str, float]]]:
    """(measure, which readings, spread)."""
    for summary in report.fidelity:
        name = clean(summary.denominator) if summary.denominator is not None else "no denominator known"
        if summary.fve is not None:
            yield "FVE", f"{summary.readings} readings, denominator: {name}", summary.fve
        yield "cosine", f"{summary.readings} readings", summary.cosine


def sparkline(points: Sequence[RatePoint]) -> str:
    """Rates as bars, on a scale from 0 to 100 %."""
    return "".join(_BARS[min(int(point.rate * len(_BARS)), len(_BARS) - 1)] for point in points)


def _text(report: Report) -> Iterator[str]:
    yield from (f"{name:<9} {value}" for name, value in _facts(report))
    yield "\nFidelity"
    for measure, which, spread in _fidelity_rows(report):
        told = "  ".join(f"{name} {value:.2f}" for name, value in spread.items())
        yield f"  {measure:<7} {told}  ({which})"
    if report.unread_fidelity:
        yield f"  {report.unread_fidelity} readings have none (no AR)"
    yield "\nMatch rates by step (bars: 0 to 100 %)"
    for rate in report.rates:
        if not rate.matched:
            continue
        yield f"  {rate.rule_id:<24} {rate.phase.value:<6} {_share(rate.matched, rate.read)}"
        if rate.points:
            steps = f"steps {rate.points[0].first_step} to {rate.points[-1].last_step}"
            yield f"    {sparkline(rate.points)}  {steps}, last {percent(rate.points[-1].rate)}"
    never = sorted({rate.rule_id for rate in report.rates} - {rate.rule_id for rate in report.rates if rate.matched})
    if never:
        yield f"  never matched: {', '.join(never)}"
    yield "\nGuarantees"
    for guarantee in report.guarantees:
        yield f"  {guarantee.rule_id:<24} {clean(guarantee.says)}\n    whole run: {_whole_run(guarantee)}"
    if not report.guarantees:
        yield f"  {NO_GUARANTEE}"
    yield "\nAlerts"
    yield from (_alert_line(alert) for alert in report.alerts) if report.alerts else ("  none",)
    yield f"\n{CAUTION}"


def _whole_run(guarantee: RunGuarantee) -> str:
    stands = "stands" if guarantee.survives else "does not stand"
    told = f"{guarantee.run}; {stands} among all calibrated rules (e-BH)"
    return f"{told}; {ENDED}" if guarantee.status == "void" else told


def _share(matched: int, total: int) -> str:
    return f"{matched} of {total} readings ({percent(matched / total)})" if total else "no readings"


def _alert_line(alert: Alert) -> str:
    return (
        f"  [{alert.severity.value}] {clean(alert.rule_title)}: {alert.state.value}, {alert.triage.value}, "
        f"{_where(alert)}, {_certainty(alert)}\n    “{clean(alert.quote)}”  {alert.alert_id}"
    )


def _where(alert: Alert) -> str:
    """In an agent's work, or at which steps of training; and at which token."""
    if alert.agent is not None or alert.first_step is None:
        return f"agent, position {alert.position}"
    last = alert.last_step if alert.last_step is not None else alert.first_step
    steps = f"{alert.first_step}" if last == alert.first_step else f"{alert.first_step} to {last}"
    return f"step {steps}, position {alert.position}"


def _certainty(alert: Alert) -> str:
    fve = (
        f"FVE {alert.fve:.2f} (denominator: {clean(alert.denominator_name or 'unnamed')})"
        if alert.fve is not None
        else "no FVE"
    )
    return f"{fve}, {clean(brief(alert.calibration))}"


def _certainties(alert: Alert) -> list[str]:
    """Fidelity, calibration and the controls, each as a few words."""
    cosine = [f"cosine {alert.cosine:.2f}"] if alert.cosine is not None else []
    controls = [f"{clean(line.name)}: {clean(str(line))}" for line in lines(alert.evidence)]
    return [_certainty(alert), *cosine, *controls]


def _markdown(report: Report) -> Iterator[str]:
    yield f"# nla_monitor report: {escaped(report.run.info.name)}\n"
    yield "| | |\n|---|---|"
    yield from (f"| {name} | {escaped(value)} |" for name, value in _facts(report))
    yield "\n## Fidelity\n"
    header = [f"p{round(quantile * 100):02d}" for quantile in QUANTILES] + ["mean"]
    yield f"| measure | readings | {' | '.join(header)} |\n|---|---|{'---:|' * len(header)}"
    for measure, which, spread in _fidelity_rows(report):
        yield f"| {measure} | {escaped(which)} | {' | '.join(f'{value:.2f}' for value in spread.values())} |"
    if report.unread_fidelity:
        yield f"\n{report.unread_fidelity} readings have no fidelity (no AR)."
    yield "\n## Match rates by step\n"
    yield "| rule | phase | matched / read | last | over the steps (bars: 0 to 100 %) |\n|---|---|---|---:|---|"
    for rate in report.rates:
        last = percent(rate.points[-1].rate) if rate.points else "-"
        cells = (
            escaped(rate.rule_id),
            rate.phase.value,
            _share(rate.matched, rate.read),
            last,
            sparkline(rate.points),
        )
        yield f"| {' | '.join(cells)} |"
    yield "\n## Guarantees\n"
    for guarantee in report.guarantees:
        yield f"- `{guarantee.rule_id}`: {escaped(guarantee.says)}\n  Whole run: {escaped(_whole_run(guarantee))}"
    if not report.guarantees:
        yield NO_GUARANTEE
    yield "\n## Alerts\n"
    if not report.alerts:
        yield "None."
    for alert in report.alerts:
        yield (
            f"- **{alert.severity.value}** {escaped(alert.rule_title)}: {alert.state.value}, {alert.triage.value}, "
            f"{_where(alert)}, {escaped(_certainty(alert))}\n  > {escaped(alert.quote)}\n\n"
            f"  `{alert.alert_id}`"
        )
    yield f"\n*{CAUTION}*"


def escaped(text: str) -> str:
    """Text of a model or user that Markdown takes literally."""
    return _MARKDOWN.sub(r"\\\1", clean(text))


# -- plot ---------------------------------------------------------------------------------------------------------

WIDTH: Final = 640
HEIGHT: Final = 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 24


@dataclass(frozen=True, slots=True)
class Plot:
    """One curve in SVG units, for the template."""

    rate: RuleRate
    dots: tuple[tuple[float, float, RatePoint], ...]
    grid: tuple[tuple[float, str], ...]
    """(y, label)."""
    ticks: tuple[tuple[float, str], ...]
    """(x, step)."""
    alerts: tuple[tuple[float, str], ...]
    """(x, what) of the alerts of this rule."""
    width: int = WIDTH
    height: int = HEIGHT

    @property
    def line(self) -> str:
        """``points`` of the polyline."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in self.dots)


def plot(rate: RuleRate, alerts: Sequence[Alert]) -> Plot:
    """The rate of one rule over the steps; the scale goes to the next of 5, 10, 25, 50, 100 %."""
    first, last = rate.points[0].first_step, rate.points[-1].last_step
    top = next(limit for limit in (0.05, 0.1, 0.25, 0.5, 1.0) if max(point.rate for point in rate.points) <= limit)

    def across(step: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * ((step - first) / (last - first) if last > first else 0.5)

    def up(share: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share / top

    fired = [alert for alert in alerts if alert.rule_id == rate.rule_id and _in_phase(alert, rate.phase)]
    return Plot(
        rate=rate,
        dots=tuple((across((point.first_step + point.last_step) / 2), up(point.rate), point) for point in rate.points),
        grid=tuple((up(share), f"{share:.3g}".rstrip("0") if top < 0.1 else f"{share:.0%}") for share in _grid(top)),
        ticks=tuple((across(step), str(step)) for step in sorted({first, (first + last) // 2, last})),
        alerts=tuple(
            (across(min(max(alert.first_step or 0, first), last)), f"{alert.severity.value} alert") for alert in fired
        ),
    )


def _in_phase(alert: Alert, phase: Phase) -> bool:
    """Whether a curve of this phase is where the alert belongs (rules may group by phase, or not)."""
    if alert.first_step is None or (alert.agent is not None) != (phase is Phase.AGENT):
        return False
    return alert.group.get("phase", phase) == phase


def _grid(top: float) -> tuple[float, float, float]:
    return 0.0, top / 2, top
