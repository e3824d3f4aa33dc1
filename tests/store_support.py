"""Records for tests of the store, the spool and alerts: small, complete, and different wherever a mix-up could hide."""

from __future__ import annotations

import hashlib
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
    TriageState,
    uuid7,
)
from nla_monitor.store.engine import open_engine
from nla_monitor.store.session import upgrade

AGENT = AgentContext(
    agent_run_id="call-1",
    parent_run_id="chain-1",
    root_run_id="root-1",
    tool="shell",
    node="act",
    conversation_id="talk-1",
    generated=True,
    token_index=4,
)


def sample(number: int = 0, **changes: Any) -> ActivationSample:
    """A sample whose every number follows from ``number``; taken at ``1000 + number`` seconds, in step ``number``."""
    vector = np.random.default_rng(number).normal(size=16).astype(np.float32)
    fields: dict[str, Any] = {
        "sample_id": uuid7(),
        "run_id": "run-1",
        "layer": 3,
        "vector": vector,
        "norm": float(np.linalg.norm(vector)),
        "phase": Phase.TRAIN,
        "sequence_id": f"sequence-{number // 4}",
        "position": 10 + number,
        "token_id": 100 + number,
        "trigger": "random",
        "captured_at": 1000.0 + number,
        "step": number,
    }
    return ActivationSample(**(fields | changes))


def reading(of: ActivationSample, text: str = "it plans to special-case the tests", **changes: Any) -> Reading:
    """A reading of ``of`` by AV ``av-1``, with fidelity by AR ``ar-1``."""
    cosine = changes.pop("cosine", 0.9)
    av_hash = changes.pop("av_hash", "av-1")
    fidelity = Fidelity(of.sample_id, cosine, 2 * (1 - cosine), 1 - 2 * (1 - cosine) / 0.8, 0.8, "held-out", "ar-1")
    return Reading(
        of,
        Explanation(of.sample_id, text, truncated=False, tokens=7, av_hash=av_hash),
        changes.pop("fidelity", fidelity),
    )


def match(of: ActivationSample, rule: str = "hack", **changes: Any) -> Match:
    """A match of rule ``rule`` (version ``v1``) on ``of``, not grouped."""
    fields: dict[str, Any] = {
        "match_id": hashlib.sha256(f"{of.sample_id}{rule}".encode()).hexdigest()[:32],
        "sample_id": of.sample_id,
        "run_id": of.run_id,
        "rule_id": rule,
        "rule_version": "v1",
        "severity": Severity.HIGH,
        "group": {},
        "hits": (Hit("words", "special-case the tests", 12, 34), Hit("faithful", "")),
        "step": of.step,
        "position": of.position,
        "sequence_id": of.sequence_id,
        "captured_at": of.captured_at,
    }
    return Match(**(fields | changes))


def header(rule: str = "hack", **changes: Any) -> RuleHeader:
    """Header of rule ``rule`` (version ``v1``)."""
    fields: dict[str, Any] = {"rule_id": rule, "title": "Plans to hack", "version": "v1", "severity": Severity.HIGH}
    return RuleHeader(**(fields | changes))


def alert(exhibit: ActivationSample, **changes: Any) -> Alert:
    """A firing alert that shows ``exhibit``."""
    fields: dict[str, Any] = {
        "alert_id": hashlib.sha256(exhibit.sample_id.encode()).hexdigest()[:16],
        "fingerprint": "condition-1",
        "run_id": exhibit.run_id,
        "rule_id": "hack",
        "rule_title": "Plans to hack",
        "rule_version": "v1",
        "severity": Severity.HIGH,
        "state": AlertState.FIRING,
        "triage": TriageState.OPEN,
        "group": {"sequence": "s", "rank": 2},
        "first_step": exhibit.step,
        "last_step": exhibit.step,
        "fired_at": exhibit.captured_at,
        "updated_at": exhibit.captured_at,
        "resolved_at": None,
        "matches": 1,
        "sample_id": exhibit.sample_id,
        "quote": "special-case the tests",
        "position": exhibit.position,
        "context": "def test_",
        "explanation": "it plans to special-case the tests",
        "cosine": 0.9,
        "fve": 0.75,
        "denominator_name": "held-out",
        "evidence": {"norm": {"value": 3.5}},
        "calibration": {"status": "uncalibrated"},
        "agent": AGENT,
        "runbook": "https://example.org/runbook",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    }
    return Alert(**(fields | changes))


def run_info(run_id: str = "run-1", **changes: Any) -> RunInfo:
    """A run."""
    fields: dict[str, Any] = {
        "run_id": run_id,
        "name": "a run",
        "model": "tiny",
        "layer": 3,
        "started_at": 1000.0,
        "config": {"nla": {"av": "x"}},
        "host": "box:1",
    }
    return RunInfo(**(fields | changes))


def new_database(path: Path) -> str:
    """URL of a new SQLite file with the schema in it."""
    url = f"sqlite:///{path}"
    engine = open_engine(url)
    upgrade(engine)
    engine.dispose()
    return url
