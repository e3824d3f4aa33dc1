"""``nla-monitor rules replay | diff | precision``: rules over what is stored already."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from nla_monitor.cli.common import (
    DEFAULT_DATABASE,
    SEVERITY_STYLES,
    DatabaseOption,
    JsonOption,
    console,
    cut,
    find_run,
    opened,
    print_json,
    safe,
    short,
)
from nla_monitor.errors import ConfigError, RuleError

if TYPE_CHECKING:
    from nla_monitor.config import NLAConfig
    from nla_monitor.nla.base import Reconstructor
    from nla_monitor.precision import Precision
    from nla_monitor.rechecks import Rechecks
    from nla_monitor.records import Alert
    from nla_monitor.replay import Replay
    from nla_monitor.rule_diff import Example, RuleDiff
    from nla_monitor.rules import RuleSet
    from nla_monitor.store.repository import Repository

_STORED: Final = re.compile(r"(?P<id>[^@/\\]+)@(?P<version>[0-9a-f]{4,})")
_ALL_RUNS: Final = 100_000

RulesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RULES]...", help="Packs, rule files, folders, or ID@VERSION of a rule that ran."),
]
SideArgument = Annotated[str, typer.Argument(help="Pack, rule file, folder, or ID@VERSION of a rule that ran.")]
RunsOption = Annotated[
    list[str] | None,
    typer.Option("--run", metavar="ID", help="Over this run (id, its start or end, or name); by default over all."),
]
ReadByOption = Annotated[
    str | None, typer.Option("--read-by", metavar="HASH", help="Readings by this AV (start of its hash) instead.")
]
AROption = Annotated[
    str | None, typer.Option(help="AR for matches that were never checked; by default as the run names it; 'none'.")
]


def register(app: typer.Typer) -> None:
    """Adds the commands to ``nla-monitor rules``."""
    app.command("replay")(replay)
    app.command("diff")(diff)
    app.command("precision")(precision)


def replay(
    rules: RulesArgument = None,
    run: RunsOption = None,
    database: DatabaseOption = DEFAULT_DATABASE,
    read_by: ReadByOption = None,
    reverbalize: Annotated[
        bool, typer.Option("--reverbalize", help="First read the stored vectors by the NLA of --av and --ar.")
    ] = False,
    av: Annotated[str | None, typer.Option(help="With --reverbalize: the AV checkpoint.")] = None,
    ar: AROption = None,
    device: Annotated[str | None, typer.Option(help="torch device for models: cpu, cuda, cuda:1.")] = None,
    calibration: Annotated[
        bool, typer.Option(help="Put the calibrations that are stored now on the matches, as the worker would.")
    ] = True,
    processes: Annotated[
        int, typer.Option(min=1, max=8, help="More than 1: screen regular expressions in processes of their own.")
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Show which matches and alerts rules give over stored readings; live alerts are left as they are.

    With --reverbalize an interrupted reading goes on where it was; what is read is kept for later replays (--read-by).
    """
    if av is not None and not reverbalize:
        raise ConfigError("--av is for --reverbalize; to use readings that are stored, name them with --read-by")
    with opened(database, read_only=False) as repository:
        runs = _runs(repository, run)
        found = _rules(repository, rules)
        again = None
        if reverbalize:
            read_by, again = _reverbalize(repository, runs, av=av, ar=ar, device=device)
        by = _verbalizer(repository, runs, read_by)
        checks = _rechecks(repository, found, runs, ar=ar, device=device)
        result = _replayed(repository, found, runs, by=by, checks=checks, calibration=calibration, processes=processes)
    if as_json:
        print_json(_document(result, checks.why) | ({"reverbalized": again} if again is not None else {}))
    else:
        _print_replay(result, checks.why)


def diff(
    old: SideArgument,
    new: SideArgument,
    run: RunsOption = None,
    database: DatabaseOption = DEFAULT_DATABASE,
    read_by: ReadByOption = None,
    ar: AROption = None,
    exit_code: Annotated[bool, typer.Option("--exit-code", help="Exit 1 when a match or alert came or went.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what NEW gains and loses against OLD over stored readings: matches, with their words, and alerts."""
    from nla_monitor.rule_diff import compare

    with opened(database, read_only=False) as repository:
        runs = _runs(repository, run)
        by = _verbalizer(repository, runs, read_by)
        sides, reasons = [], []
        for name in (old, new):
            found = _rules(repository, [name])
            checks = _rechecks(repository, found, runs, ar=ar)
            sides.append(_replayed(repository, found, runs, by=by, checks=checks, calibration=True))
            reasons.append(checks.why)
    changes = compare(*sides)
    changed = any(change.changed for change in changes)
    why = next((reason for reason in reasons if reason), None)
    if as_json:
        rows = [_diff_row(change) for change in changes]
        print_json({"runs": runs, "readings": sides[0].readings, "changed": changed, "not_checked": why, "rules": rows})
    else:
        _print_diff(changes, sides, why)
    if exit_code and changed:
        raise typer.Exit(1)


def precision(
    rules: RulesArgument = None, database: DatabaseOption = DEFAULT_DATABASE, as_json: JsonOption = False
) -> None:
    """Show how often rules were right, by what people said of their alerts (nla-monitor alerts label)."""
    from nla_monitor.precision import precisions

    with opened(database) as repository:
        wanted = None if rules is None else set(_rules(repository, rules).headers)
        found = precisions(repository.engine, rule_ids=wanted)
    if as_json:
        print_json([_precision_row(one) for one in found])
    else:
        _print_precision(found)


# -- what is asked for ---------------------------------------------------------------------------------------------


def _runs(repository: Repository, names: list[str] | None) -> list[str]:
    from nla_monitor.store.stream import stored_runs

    if names:
        return list(dict.fromkeys(run for name in names if (run := find_run(repository, name)) is not None))
    found = stored_runs(repository.engine)
    if not found:
        raise ConfigError("the database holds no readings to replay; run a worker first")
    return found


def _rules(repository: Repository, names: list[str] | None) -> RuleSet:
    """The rules named, stored versions among them."""
    from nla_monitor.rules import RuleSet, load_rules, load_text, pack_names
    from nla_monitor.rules.deferred import connect
    from nla_monitor.store.judgements import SqlJudgements
    from nla_monitor.store.rules import rule_sources

    stored = {name: hit for name in names or () if (hit := _STORED.fullmatch(name)) is not None}
    found = []
    for name, hit in stored.items():
        sources = rule_sources(repository.engine, hit["id"], hit["version"])
        if len(sources) != 1:
            known = ", ".join(
                f"{hit['id']}@{version}" for version in sources or rule_sources(repository.engine, hit["id"])
            )
            what = "several stored versions start so" if sources else "no such rule ran on this database"
            raise RuleError(f"{name}: {what}; stored: {known or 'none of that id'}")
        found.append(load_text(next(iter(sources.values())), name))
    others = [name for name in names or pack_names() if name not in stored]
    rules = RuleSet([*found, *(load_rules(others).rules if others else ())])
    connect(rules.rules, SqlJudgements(repository.engine))
    return rules


def _verbalizer(repository: Repository, runs: Sequence[str], start: str | None) -> str | None:
    """The AV whose hash starts so; None: the readings that were made live."""
    from nla_monitor.store.stream import verbalizers

    if start is None:
        return None
    known = sorted({av_hash for run in runs for av_hash in verbalizers(repository.engine, run)})
    found = [av_hash for av_hash in known if av_hash.startswith(start)]
    if len(found) != 1:
        told = ", ".join(av_hash[:12] for av_hash in known)
        raise ConfigError(f"--read-by {start!r}: {len(found)} AVs are meant; these read the runs: {told}")
    return found[0]


def _settings(repository: Repository, runs: Sequence[str], **options: str | None) -> NLAConfig:
    """How the first run was read, with the options over it."""
    from nla_monitor.config import NLAConfig

    info = repository.run(runs[0])
    kept = info.info.config.get("nla") if info is not None else None
    known = {key: kept[key] for key in NLAConfig.model_fields if key in kept} if isinstance(kept, dict) else {}
    return NLAConfig.model_validate(known | {key: value for key, value in options.items() if value is not None})


def _rechecks(
    repository: Repository, rules: RuleSet, runs: Sequence[str], *, ar: str | None, device: str | None = None
) -> Rechecks:
    from nla_monitor.rechecks import Rechecks
    from nla_monitor.store.surroundings import Surroundings

    def load() -> Reconstructor | None:
        from nla_monitor.nla import load_reconstructor
        from nla_monitor.organism import resolve

        settings = _settings(repository, runs, ar=ar, device=device)
        if settings.ar is None or settings.ar.lower() == "none":
            return None
        return load_reconstructor(resolve(settings.ar), settings)

    named = ar is not None
    return Rechecks(rules, load, neighbourhood=Surroundings(repository.engine), strict=named)


def _replayed(
    repository: Repository,
    rules: RuleSet,
    runs: Sequence[str],
    *,
    by: str | None,
    checks: Rechecks,
    calibration: bool,
    processes: int = 1,
) -> Replay:
    from nla_monitor.replay import replay as play
    from nla_monitor.store.stream import count_readings

    engine = repository.engine
    guarantees = _guarantees(repository, rules, runs, by) if calibration else None
    with _progress("replaying", count_readings(engine, run_ids=runs, av_hash=by)) as advance:
        return play(
            rules,
            engine,
            runs,
            av_hash=by,
            controls=checks,
            guarantees=guarantees,
            progress=advance,
            processes=processes,
        )


def _guarantees(repository: Repository, rules: RuleSet, runs: Sequence[str], by: str | None) -> Any:
    """The calibrations stored for these rules and for the NLA that made the readings."""
    from nla_monitor.baseline import LiveGuarantees
    from nla_monitor.store.stream import read_by

    nla = read_by(repository.engine, runs, by)
    if nla is None:
        return None

    def info(run_id: str) -> Any:
        found = repository.run(run_id)
        return found.info if found is not None else None

    return LiveGuarantees(repository.engine, rules, *nla, run=info).current()


def _reverbalize(
    repository: Repository, runs: Sequence[str], *, av: str | None, ar: str | None, device: str | None
) -> tuple[str, dict[str, object]]:
    """Reads the vectors again; the AV's hash, and what was done."""
    from nla_monitor.nla import load_reconstructor
    from nla_monitor.nla.domains import denominators_for
    from nla_monitor.nla.engines import open_verbalizer
    from nla_monitor.organism import resolve
    from nla_monitor.reverbalize import reverbalize
    from nla_monitor.worker import check_pair

    if av is None:
        raise ConfigError(
            "--reverbalize needs the AV that is to read the vectors: --av PATH, and its AR: --ar PATH|none"
        )
    settings = _settings(repository, runs, av=av, ar=ar, device=device)
    verbalizer = open_verbalizer(resolve(settings.av), settings)
    reconstructor = None
    if ar is not None and ar.lower() != "none":
        reconstructor = load_reconstructor(resolve(ar), settings)
        check_pair(verbalizer, reconstructor)
    own = denominators_for(settings.denominator, verbalizer.d_model, verbalizer.layer)
    with _progress("reading vectors", None) as advance:
        done = 0

        def told(now: int, total: int) -> None:
            nonlocal done
            advance(now - done, total)
            done = now

        result = reverbalize(
            repository.engine,
            verbalizer,
            reconstructor,
            runs,
            batch=settings.batch_size,
            denominators=own,
            progress=told,
        )
    report = {"av_hash": verbalizer.content_hash, "read": result.read, "unreadable": result.unreadable}
    return verbalizer.content_hash, report


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar with its rate on a terminal's standard error; nothing in a pipe."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total, rate="")

        def advance(count: int, of: int | None = None) -> None:
            bar.update(task, advance=count, total=of if of is not None else total)
            speed = bar.tasks[0].speed
            bar.update(task, rate=f"{speed:,.0f}/s" if speed else "")

        yield advance


# -- for programs --------------------------------------------------------------------------------------------------


def _document(result: Replay, why: str | None) -> dict[str, Any]:
    return {
        "runs": result.runs,
        "av_hash": result.av_hash,
        "readings": result.readings,
        "sequences": result.sequences,
        "matches": len(result.matches),
        "alerts": result.alerts,
        "rules": result.rules,
        "not_checked": why,
        "seconds": round(result.seconds, 3),
    }


def _diff_row(change: RuleDiff) -> dict[str, Any]:
    from nla_monitor.cli.common import jsonable

    return {**jsonable(change), "changed": change.changed}


def _precision_row(one: Precision) -> dict[str, Any]:
    low, high = one.bounds()
    return {
        "rule_id": one.rule_id,
        "version": one.version,
        "precision": one.value,
        "low": low,
        "high": high,
        "labelled": one.labelled,
        "true_positive": one.true_positive,
        "false_positive": one.false_positive,
        "benign": one.benign,
        "unlabelled": one.unlabelled,
    }


# -- for people ----------------------------------------------------------------------------------------------------


def _print_replay(result: Replay, why: str | None) -> None:
    from rich.table import Table
    from rich.text import Text

    out = console()
    out.print(_over(result))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("rule", ratio=1, overflow="fold")
    for name in ("alerts", "matches", "refuted", "unchecked", "sequences"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = [rule for rule in result.rules if rule.matches]
    for rule in shown:
        label = Text.assemble((rule.rule_id, SEVERITY_STYLES[rule.severity]), (f"@{rule.version}", "dim"))
        counts = (rule.alerts, rule.matches, rule.refuted, rule.unchecked, rule.sequences)
        table.add_row(label, *map(str, counts))
    if shown:
        out.print(table)
    silent = len(result.rules) - len(shown)
    out.print(f"{silent} of {len(result.rules)} rules match nothing." if shown else "No rule matches anything.")
    _say_unchecked(sum(rule.unchecked for rule in result.rules), why)
    for alert in result.alerts:
        out.print(_alert_line(alert))


def _over(result: Replay) -> str:
    by = f", read by AV {result.av_hash[:12]}" if result.av_hash is not None else ""
    runs = f"{len(result.runs)} run{'s' if len(result.runs) != 1 else ''}"
    alerts = f"{len(result.alerts)} alert{'s' if len(result.alerts) != 1 else ''}"
    return f"{result.readings:,} readings of {runs}{by}: {alerts} ({result.seconds:.1f} s)"


def _say_unchecked(count: int, why: str | None) -> None:
    if count:
        sys.stdout.write(
            f"{count} matches count although a control that their rule requires could not be measured: "
            f"{safe(why or 'no AR', one_line=True)}\n"
        )


def _alert_line(alert: Alert) -> str:
    steps = f"steps {alert.first_step} to {alert.last_step}" if alert.first_step is not None else "no step"
    return f"  {alert.state.value} {alert.rule_id}, run {short(alert.run_id)}, {steps}: {cut(alert.quote, 80)!r}"


def _print_diff(changes: Sequence[RuleDiff], sides: Sequence[Replay], why: str | None) -> None:
    out = console()
    out.print(f"{sides[0].readings:,} readings")
    for change in (change for change in changes if change.changed or change.old_version != change.new_version):
        versions = f"{change.old_version or 'new'} -> {change.new_version or 'gone'}"
        out.print(f"\n{change.rule_id} ({versions})", style="bold")
        out.print(f"  matches: {change.gained} gained, {change.lost} lost, {change.kept} kept")
        for sign, example in _signed(change):
            step = f"step {example.step}, " if example.step is not None else ""
            words = example.quote or example.explanation
            out.print(f"    {sign} {step}position {example.position}: {cut(words, 90)!r}")
        out.print(
            f"  alerts: {len(change.alerts_gained)} gained, {len(change.alerts_lost)} lost, {change.alerts_kept} kept"
        )
        for sign, alerts in (("+", change.alerts_gained), ("-", change.alerts_lost)):
            for alert in alerts:
                out.print(f"    {sign}{_alert_line(alert)[1:]}")
    differing = sum(change.changed for change in changes)
    out.print(f"\nrules that differ here: {differing} of {len(changes)}")
    _say_unchecked(max(sum(rule.unchecked for rule in side.rules) for side in sides), why)


def _signed(change: RuleDiff) -> Iterator[tuple[str, Example]]:
    for sign, examples in (("+", change.gained_examples), ("-", change.lost_examples)):
        for example in examples:
            yield sign, example


def _print_precision(found: Sequence[Precision]) -> None:
    from rich.table import Table

    if not found:
        sys.stdout.write("No rule has fired yet.\n")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("rule", ratio=1, overflow="fold")
    table.add_column("precision (95 % interval)", no_wrap=True)
    for name in ("true", "false", "benign", "unlabelled"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found:
        low, high = one.bounds()
        told = "not known: no labels" if one.value is None else f"{one.value:.0%} ({low:.0%} to {high:.0%})"
        counts = (one.true_positive, one.false_positive, one.benign, one.unlabelled)
        table.add_row(f"{one.rule_id}@{one.version}", told, *map(str, counts))
    console().print(table)
