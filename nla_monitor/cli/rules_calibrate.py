"""``nla-monitor rules calibrate``: how often rules match on benign runs, and what that allows to promise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nla_monitor.cli.common import DEFAULT_DATABASE, DatabaseOption, JsonOption, console, find_run, opened, print_json
from nla_monitor.errors import ConfigError

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from nla_monitor.baseline import Baseline
    from nla_monitor.config import NLAConfig
    from nla_monitor.controls import Controls
    from nla_monitor.evidence.calibration import Calibration
    from nla_monitor.rules import RuleSet
    from nla_monitor.store.repository import Repository


def register(app: typer.Typer) -> None:
    """Adds the command to ``nla-monitor rules``."""
    app.command("calibrate")(calibrate)


def calibrate(
    rules: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RULES]...", help="Packs, rule files or folders; all built-in packs by default."),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option("--baseline", metavar="RUN", help="A run of benign traffic (id, its start or end, or name)."),
    ] = None,
    database: DatabaseOption = DEFAULT_DATABASE,
    set_name: Annotated[
        str | None, typer.Option("--set", metavar="NAME", help="Name of the set; by default the one each rule names.")
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(min=1e-6, max=0.5, help="False-alarm rate to promise; by default each rule's own, or 0.01."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also take runs with true positives, or not read to the end.")
    ] = False,
    av: Annotated[
        str | None, typer.Option(help="The AV that read the baseline; by default as the run names it.")
    ] = None,
    ar: Annotated[
        str | None, typer.Option(help="The AR that read the baseline; by default as the run names it.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure rules on benign runs, and keep what follows: thresholds, certified bounds, the reference for drift.

    A rule with a calibration section gets a threshold for its alpha. One without is measured as it stands. Running the
    command again on the same data changes nothing; workers take a new set up with their next batch.
    """
    from nla_monitor.baseline import make_sets, store_sets, survey
    from nla_monitor.rules import load_rules, pack_names

    if not baseline:
        raise ConfigError("name at least one benign run with --baseline (id or name, as nla-monitor report shows it)")
    found = load_rules(rules or pack_names())
    with opened(database, read_only=False) as repository:
        runs = [run for text in baseline if (run := find_run(repository, text)) is not None]
        benign = survey(repository, runs, force=force)
        _connect(repository.engine, found)
        with _progress(benign.readings) as told:
            made = make_sets(
                repository.engine,
                found,
                benign,
                set_name=set_name,
                alpha=alpha,
                checker=lambda: _controls(repository, found, benign, av=av, ar=ar),
                progress=told,
            )
        store_sets(repository.engine, made)
    if as_json:
        print_json([row(calibration) for calibration in made])
    else:
        _print(made, benign)


def row(calibration: Calibration) -> dict[str, Any]:
    """One calibration for ``--json``."""
    from nla_monitor.evidence.statement import base_rate

    subject, promise = calibration.subject, calibration.promise
    return {
        "calibration_id": calibration.calibration_id,
        "rule": subject.rule_id,
        "version": subject.rule_version,
        "set": subject.set_name,
        "runs": subject.runs,
        "av_hash": subject.av_hash,
        "ar_hash": subject.ar_hash,
        "alpha": promise.alpha,
        "confidence": promise.confidence,
        "score": promise.score if promise.gated else None,
        "sequences": calibration.sequences,
        "matching": calibration.matching,
        "unscored": calibration.unscored,
        "refuted": calibration.refuted,
        "threshold": calibration.threshold,
        "exceedances": calibration.exceedances,
        "fpr_upper": calibration.fpr_upper(),
        "certified": calibration.certified,
        "more_needed": calibration.more_needed,
        "mute": calibration.mute,
        "base_rate": base_rate(calibration),
        "says": verdict(calibration),
    }


def verdict(calibration: Calibration) -> str:
    """What the set allows to promise, in words."""
    from nla_monitor.evidence.promise import percent
    from nla_monitor.evidence.statement import missing

    if calibration.mute:
        return "can never fire: its matches on benign traffic score as high as any; choose another calibration.score"
    bound = f"at most {percent(calibration.fpr_upper())} of benign sequences"
    if calibration.certified:
        return f"certified: {bound} ({100 * calibration.promise.confidence:.4g} % confidence)"
    return f"uncertified: {missing(calibration)}; so far {bound}"


def _connect(engine: Engine, rules: RuleSet) -> None:
    from nla_monitor.rules.deferred import connect
    from nla_monitor.store.judgements import SqlJudgements

    connect(rules.rules, SqlJudgements(engine))


def _controls(
    repository: Repository, rules: RuleSet, baseline: Baseline, *, av: str | None, ar: str | None
) -> Controls:
    """What checks matches that were never checked: the NLA that read the baseline, as far as the rules need it."""
    from nla_monitor.candidates import DEAR, plan_of
    from nla_monitor.controls import Controls
    from nla_monitor.nla import load_reconstructor
    from nla_monitor.nla.engines import open_verbalizer
    from nla_monitor.organism import resolve
    from nla_monitor.store.surroundings import Surroundings

    config = _nla(repository, baseline, av=av, ar=ar)
    verbalizer = reconstructor = None
    if any(plan_of(rule).wanted & DEAR for rule in rules.rules):
        verbalizer = open_verbalizer(resolve(config.av), config)
        _require("AV", config.av, verbalizer.content_hash, baseline.av_hash, "--av")
    if baseline.ar_hash is not None:
        if config.ar is None:
            raise ConfigError("the baseline holds matches that no control has checked; name its AR with --ar")
        reconstructor = load_reconstructor(resolve(config.ar), config)
        _require("AR", config.ar, reconstructor.content_hash, baseline.ar_hash, "--ar")
    around = Surroundings(repository.engine, baseline.av_hash)
    return Controls(rules, verbalizer, reconstructor, neighbourhood=around)


def _nla(repository: Repository, baseline: Baseline, *, av: str | None, ar: str | None) -> NLAConfig:
    """How the baseline says that it was read, with the options over it."""
    from nla_monitor.config import NLAConfig

    run = repository.run(baseline.runs[0])
    kept = run.info.config.get("nla") if run is not None else None
    known = (
        {key: value for key, value in kept.items() if key in NLAConfig.model_fields} if isinstance(kept, dict) else {}
    )
    options = {key: value for key, value in (("av", av), ("ar", ar)) if value is not None}
    return NLAConfig.model_validate({**known, **options})


def _require(what: str, name: str, found: str, wanted: str, option: str) -> None:
    if found != wanted:
        raise ConfigError(
            f"{what} {name} ({found[:12]}) is not the one that read the baseline ({wanted[:12]}), and its scores would "
            f"not compare; name that one with {option}"
        )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's standard error; nothing in a pipe."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("readings", total=total)
        yield lambda done: bar.update(task, completed=done)


def _print(made: Sequence[Calibration], baseline: Baseline) -> None:
    from rich.table import Table

    out = console()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("rule", overflow="fold")
    for name in ("match", "refuted", "threshold", "above it"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("what may be promised", ratio=1, overflow="fold")
    for calibration in made:
        threshold = f"{calibration.threshold:.3g}" if calibration.threshold > float("-inf") else "none"
        table.add_row(
            calibration.subject.rule_id,
            str(calibration.matching),
            str(calibration.refuted),
            threshold,
            str(calibration.exceedances),
            verdict(calibration),
        )
    sequences = made[0].sequences if made else 0
    sets = ", ".join(sorted({calibration.subject.set_name for calibration in made}))
    runs = f"{len(baseline.runs)} run" + ("s" if len(baseline.runs) != 1 else "")
    out.print(f"{sequences} benign sequences ({baseline.readings} readings, {runs}), set {sets}\n")
    out.print(table)
