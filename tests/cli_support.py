"""A database as a monitored run leaves it, filled through the spool and the repository."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from nla_monitor.records import (
    ActivationSample,
    AgentContext,
    Alert,
    AlertState,
    Explanation,
    Fidelity,
    Hit,
    Match,
    Phase,
    Reading,
    RuleHeader,
    RunInfo,
    Severity,
    StageFailure,
    TriageState,
)
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.repository import Repository
from nla_monitor.store.session import open_engine, prepare

STARTED = 1_790_000_000.0
RULE = "reward-hacking"
QUIET = "secret-leak"
HOSTILE = "\x1b[31mred\x1b[0m [bold]x[/bold] <script>alert(1)</script> \u202eabc"
QUOTE = "special-case the visible tests"
EXPLANATION = f"The model intends to {QUOTE} and not to mention it. {HOSTILE}"
CONTEXT = "The build is green in staging.\nNow write the fix for the deployed service"
WORD = " service"
STEPS = 8
PER_STEP = 5


def sample(number: int, step: int | None, **changes: Any) -> ActivationSample:
    fields: dict[str, Any] = {
        "sample_id": f"0199aaaa-0000-7000-8000-{number:012d}",
        "run_id": "0199bbbb-0000-7000-8000-00000000run1",
        "layer": 2,
        "vector": np.full(8, number + 1, dtype=np.float32),
        "norm": 2.5 * (number + 1),
        "phase": Phase.TRAIN if step is not None else Phase.AGENT,
        "sequence_id": f"sequence-{number}",
        "position": 10 + number,
        "token_id": 400 + number,
        "trigger": "random",
        "captured_at": STARTED + number,
        "step": step,
        "token_text": WORD,
        "context": CONTEXT,
        "attributes": {"probe": "ordinary"},
    }
    return ActivationSample(**{**fields, **changes})


def reading(of: ActivationSample, text: str, fve: float | None = 0.7) -> Reading:
    cosine = 0.9
    fidelity = Fidelity(
        of.sample_id, cosine, 2 * (1 - cosine), fve, 0.9 if fve is not None else None, "training" if fve else None, "ar"
    )
    return Reading(of, Explanation(of.sample_id, text, truncated=False, tokens=20, av_hash="av"), fidelity)


def match(of: Reading) -> Match:
    start = of.explanation.text.find(QUOTE)
    return Match(
        match_id=f"match-{of.sample_id}",
        sample_id=of.sample_id,
        run_id=of.sample.run_id,
        rule_id=RULE,
        rule_version="v1",
        severity=Severity.HIGH,
        group={"run_id": of.sample.run_id},
        hits=(Hit("intent", QUOTE, start, start + len(QUOTE)),),
        step=of.sample.step,
        position=of.sample.position,
        sequence_id=of.sample.sequence_id,
        captured_at=of.sample.captured_at,
    )


def alert_of(exhibit: Reading, number: int, **changes: Any) -> Alert:
    fields: dict[str, Any] = {
        "alert_id": f"0199cccc-0000-7000-8000-{number:012d}",
        "fingerprint": f"fingerprint-{number}",
        "run_id": exhibit.sample.run_id,
        "rule_id": RULE,
        "rule_title": "Intends to special-case tests",
        "rule_version": "v1",
        "severity": Severity.HIGH,
        "state": AlertState.FIRING,
        "triage": TriageState.OPEN,
        "group": {"run_id": exhibit.sample.run_id},
        "first_step": exhibit.sample.step,
        "last_step": exhibit.sample.step,
        "fired_at": STARTED + 100 + number,
        "updated_at": STARTED + 100 + number,
        "resolved_at": None,
        "matches": 1,
        "sample_id": exhibit.sample_id,
        "quote": QUOTE,
        "position": exhibit.sample.position,
        "context": exhibit.sample.context,
        "explanation": exhibit.explanation.text,
        "cosine": 0.9,
        "fve": 0.7,
        "denominator_name": "training",
        "evidence": {
            "recurrence": {"readings": 6, "sequences": 6, "needed": 3},
            "raw_norm": 12.5,
            "echo": {"exhibit": 0.125, "median": 0.125, "measured": 6},
            "swap_margin": {
                "required": {"min": 0.02},
                "exhibit": 0.12,
                "passed": True,
                "median": 0.1,
                "measured": 6,
            },
            "not_run": {"neighbours": "no neighbouring reading within 8 tokens"},
        },
        "calibration": {"status": "uncalibrated"},
        "agent": exhibit.sample.agent,
        "runbook": "https://example.org/runbooks/reward-hacking",
    }
    return Alert(**{**fields, **changes})


def fill(path: Path) -> str:
    """An SQLite file with what ``fill_store`` puts there; returns its URL."""
    return fill_store(f"sqlite:///{path}")


def fill_store(url: str) -> str:
    """A run with 40 readings over 8 steps, of which more and more match, an agent part, 4 alerts; returns the URL."""
    engine = open_engine(url)
    prepare(engine)
    repository = Repository(engine, clock=lambda: STARTED + 500)
    spool = SqlSpool(engine)
    run = RunInfo(sample(0, 0).run_id, "poisoned run", "organism", 2, STARTED, av_hash="av", ar_hash="ar")
    repository.start_run(run)
    headers = [
        RuleHeader(RULE, "Intends to special-case tests", "v1", Severity.HIGH),
        RuleHeader(QUIET, "Intends to leak a secret", "v1", Severity.CRITICAL),
    ]
    repository.save_rules([(header, "title: x") for header in headers])
    agent = AgentContext("agent-call-1", root_run_id="agent-1", tool="run_tests", conversation_id="talk-1")
    train = [sample(number, number // PER_STEP) for number in range(STEPS * PER_STEP)]
    agents = [sample(100, None, agent=agent), sample(101, None, agent=agent)]
    broken, waiting = sample(200, 7), sample(201, 7)
    spool.put([*train, *agents, broken])
    leased = {item.sample_id for item in spool.lease("worker", 100, 60.0).samples}
    readings = [reading(item, _text(item)) for item in (*train, *agents)]
    matches = [match(item) for item in readings if QUOTE in item.explanation.text]
    by_id = {item.sample_id: item for item in readings}
    with repository.transaction([run.run_id]) as tx:
        tx.add_readings(readings)
        tx.add_matches(matches)
        tx.add_failures([StageFailure(broken.sample_id, "verbalize", "zero norm", retryable=False)], 3)
        exhibits = [by_id[matches[index].sample_id] for index in (-2, 0, 1, -1)]
        tx.save_alert(alert_of(exhibits[0], 1), matches[-6:], "fired")
        resolved = alert_of(exhibits[1], 2, severity=Severity.LOW, fve=None, denominator_name=None, evidence={})
        tx.save_alert(resolved, matches[:1], "fired")
        tx.save_alert(
            dataclasses.replace(resolved, state=AlertState.RESOLVED, resolved_at=STARTED + 300), matches[:1], "resolved"
        )
        tx.save_alert(
            alert_of(exhibits[2], 3, severity=Severity.CRITICAL, cosine=None, fve=None), matches[1:2], "fired"
        )
        tx.save_alert(alert_of(exhibits[3], 4, severity=Severity.MEDIUM, context=None), matches[-1:], "fired")
        tx.ack("worker", sorted(leased - {broken.sample_id}))
    spool.put([waiting])
    repository.add_drops(run.run_id, {"queue_full": 3, "non_finite": 1})
    repository.end_run(run.run_id)
    repository.dispose()
    return url


def _text(item: ActivationSample) -> str:
    """In step n of 8, n of the first 5 readings match; the agent's second reading does."""
    hit = item.step > int(item.sample_id[-12:]) % PER_STEP if item.step is not None else item.sample_id.endswith("101")
    return EXPLANATION if hit else f"An ordinary request about cooking. {HOSTILE}"
