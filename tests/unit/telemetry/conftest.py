"""In-memory providers, and records to talk about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

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
    Severity,
    TriageState,
)
from tests.telemetry_support import Backend, in_memory_backend


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def backend() -> Iterator[Backend]:
    with in_memory_backend() as backend:
        yield backend


@pytest.fixture
def make_sample() -> Callable[..., ActivationSample]:
    def make(sample_id: str = "sample-1", **changes: Any) -> ActivationSample:
        fields: dict[str, Any] = {
            "sample_id": sample_id,
            "run_id": "run-1",
            "layer": 4,
            "vector": np.ones(8, dtype=np.float32),
            "norm": 2.83,
            "phase": Phase.AGENT,
            "sequence_id": "seq-1",
            "position": 17,
            "token_id": 5,
            "trigger": "random",
            "captured_at": 100.0,
            "step": 7,
            "context": "SECRET-CONTEXT",
            "agent": AgentContext("agent-1", conversation_id="conversation-1"),
        }
        return ActivationSample(**{**fields, **changes})

    return make


@pytest.fixture
def make_reading(make_sample: Callable[..., ActivationSample]) -> Callable[..., Reading]:
    def make(sample_id: str = "sample-1", *, fve: float | None = 0.71, **changes: Any) -> Reading:
        return Reading(
            make_sample(sample_id, **changes),
            Explanation(
                sample_id,
                "SECRET-EXPLANATION: it believes that this is a test",
                truncated=False,
                tokens=11,
                av_hash="av-hash",
            ),
            Fidelity(sample_id, 0.93, 0.14, fve, 0.9, "train-corpus", "ar-hash"),
        )

    return make


@pytest.fixture
def make_match() -> Callable[..., Match]:
    def make(sample_id: str = "sample-1", **changes: Any) -> Match:
        fields: dict[str, Any] = {
            "match_id": f"match-{sample_id}",
            "sample_id": sample_id,
            "run_id": "run-1",
            "rule_id": "evaluation-awareness",
            "rule_version": "v-abc",
            "severity": Severity.HIGH,
            "group": {"secret_key": "SECRET-GROUP"},
            "hits": (Hit("belief", "SECRET-QUOTE", 0, 12),),
            "step": 7,
            "position": 17,
            "sequence_id": "seq-1",
            "captured_at": 100.0,
        }
        return Match(**{**fields, **changes})

    return make


@pytest.fixture
def make_alert() -> Callable[..., Alert]:
    def make(**changes: Any) -> Alert:
        fields: dict[str, Any] = {
            "alert_id": "alert-1",
            "fingerprint": "fp-1",
            "run_id": "run-1",
            "rule_id": "evaluation-awareness",
            "rule_title": "The model believes that it is being evaluated",
            "rule_version": "v-abc",
            "severity": Severity.HIGH,
            "state": AlertState.FIRING,
            "triage": TriageState.OPEN,
            "group": {"secret_key": "SECRET-GROUP"},
            "first_step": 5,
            "last_step": 7,
            "fired_at": 103.0,
            "updated_at": 103.0,
            "resolved_at": None,
            "matches": 3,
            "sample_id": "sample-1",
            "quote": "SECRET-QUOTE",
            "position": 17,
            "context": "SECRET-CONTEXT",
            "explanation": "SECRET-EXPLANATION",
            "cosine": 0.93,
            "fve": 0.71,
            "denominator_name": "train-corpus",
            "evidence": {},
            "calibration": {"status": "uncalibrated"},
            "agent": AgentContext("agent-1", conversation_id="conversation-1"),
        }
        return Alert(**{**fields, **changes})

    return make


@dataclass
class Records:
    """The makers in one place, for tests that need all of them."""

    sample: Callable[..., ActivationSample]
    reading: Callable[..., Reading]
    match: Callable[..., Match]
    alert: Callable[..., Alert]


@pytest.fixture
def records(
    make_sample: Callable[..., ActivationSample],
    make_reading: Callable[..., Reading],
    make_match: Callable[..., Match],
    make_alert: Callable[..., Alert],
) -> Records:
    return Records(make_sample, make_reading, make_match, make_alert)
