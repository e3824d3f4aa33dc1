"""How a run stands against the calibrations that it was held against: what the report says of guarantees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Engine

from nla_monitor.baseline import from_record
from nla_monitor.evidence.eprocess import e_bh
from nla_monitor.evidence.statement import Standing, run_sentence, sentence
from nla_monitor.evidence.tally import RunTests, Tally, shown
from nla_monitor.store.calibrations import calibrations, run_tallies


@dataclass(frozen=True, slots=True)
class RunGuarantee:
    """One rule's guarantee in one run."""

    rule_id: str
    rule_version: str
    set_name: str
    status: str
    """``certified``, ``uncertified`` or ``void``."""
    says: str
    run: str
    """The test over the whole run, in words."""
    sequences: int
    hits: int
    e_value: float
    alarmed: bool
    survives: bool
    """Whether it stands among all calibrated rules of the run, by e-BH at the strictest alpha of them."""


def run_guarantees(engine: Engine, run_id: str) -> tuple[RunGuarantee, ...]:
    """The guarantees of a run, by rule; a rule that was calibrated anew meanwhile has the newest one only.

    Raises:
        StoreUnavailableError: the database cannot be read.
    """
    tallies = run_tallies(engine, run_id)
    newest: dict[str, Standing] = {}
    for record in calibrations(engine, ids=list(tallies)):  # newest first
        if record.rule_id not in newest:
            calibration, tally = from_record(record), Tally(**tallies[record.calibration_id])
            newest[record.rule_id] = Standing(calibration, RunTests.of(calibration), tally)
    values = {rule_id: one.tests.log_e(one.tally) for rule_id, one in newest.items()}
    level = min((one.calibration.promise.alpha for one in newest.values()), default=0.01)
    kept = e_bh(values, level)
    return tuple(_one(rule_id, newest[rule_id], values, survives=rule_id in kept) for rule_id in sorted(newest))


def _one(rule_id: str, standing: Standing, values: Mapping[str, float], *, survives: bool) -> RunGuarantee:
    subject, tally = standing.calibration.subject, standing.tally
    return RunGuarantee(
        rule_id=rule_id,
        rule_version=subject.rule_version,
        set_name=subject.set_name,
        status=standing.status,
        says=sentence(standing, None),
        run=run_sentence(standing),
        sequences=tally.sequences,
        hits=tally.hits,
        e_value=shown(values[rule_id]),
        alarmed=tally.alarmed,
        survives=survives,
    )
