"""Records to rows and back. A row rebuilt is the record that was stored, its vector equal to the bit."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import numpy as np

from nla_monitor.errors import ActivationError
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
    RunInfo,
    Severity,
    Support,
    TriageState,
    Vector,
)

Row: TypeAlias = Mapping[Any, Any]
"""A database row by column name."""

DTYPE: Final = "float32"
"""Of stored vectors; little-endian on every machine."""

_UNSTORABLE: Final = re.compile("[\x00\ud800-\udfff]")
"""NUL (PostgreSQL refuses it) and lone surrogates (no UTF-8 has them); decoded tokens may hold both."""

_AGENT: Final = {
    "agent_run_id": "agent_run_id",
    "parent_run_id": "agent_parent_run_id",
    "root_run_id": "agent_root_run_id",
    "tool": "agent_tool",
    "node": "agent_node",
    "conversation_id": "agent_conversation_id",
    "generated": "agent_generated",
    "token_index": "agent_token_index",
}
"""Field of ``AgentContext`` to column."""

_AGENT_MORE: Final = ("tool_call_id", "message_role", "span_start", "span_end")
"""Fields of ``AgentContext`` that no query looks for: kept with the attributes, under one name."""
_AGENT_KEY: Final = "nla_monitor.agent"

_SAME: Final = (
    "sample_id",
    "run_id",
    "layer",
    "phase",
    "sequence_id",
    "position",
    "token_id",
    "trigger",
    "captured_at",
    "step",
    "rank",
    "token_text",
    "context",
    "role",
    "inclusion_probability",
    "traceparent",
    "model",
    "adapter",
)
"""Fields of ``ActivationSample`` stored in a column of the same name."""


def clean(value: Any) -> Any:
    """``value`` with characters that no database stores replaced by U+FFFD, in texts at any depth."""
    if isinstance(value, str):
        return _UNSTORABLE.sub("\ufffd", value) if _UNSTORABLE.search(value) else value
    if isinstance(value, Mapping):
        return {clean(str(key)): clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return value


def group_key(group: Mapping[str, Any]) -> str:
    """Canonical text of a window's group: equal for equal groups, whatever their order."""
    return json.dumps(clean(group), sort_keys=True, separators=(",", ":"), default=str)


def sample_row(sample: ActivationSample) -> dict[str, Any]:
    """Row of ``nla_samples``."""
    vector = np.ascontiguousarray(sample.vector, dtype="<f4").tobytes()
    row = {name: clean(getattr(sample, name)) for name in _SAME}
    row["phase"] = str(sample.phase)
    row["norm"] = float(sample.norm)
    row["attributes"] = clean(_with_agent(sample))
    row["priority"] = _finite(sample.priority)
    row["screens"] = {name: float(value) for name, value in sample.screens.items() if math.isfinite(value)}
    row["vector"] = vector
    row["dtype"] = DTYPE
    row["d_model"] = sample.d_model
    row["checksum"] = zlib.crc32(vector)
    agent = sample.agent
    row.update({column: clean(getattr(agent, name)) if agent else None for name, column in _AGENT.items()})
    return row


def sample_of(row: Row) -> ActivationSample:
    """The sample of a row.

    Raises:
        ActivationError: the stored bytes do not fit their width or checksum.
    """
    fields = {name: row[name] for name in _SAME}
    fields["phase"] = Phase(row["phase"])
    norm = row["norm"]
    return ActivationSample(
        **fields,
        vector=stored_vector(row["sample_id"], row["vector"], row["dtype"], row["d_model"], row["checksum"]),
        norm=math.nan if norm is None else norm,
        agent=agent_of(row),
        attributes=attributes_of(row["attributes"]),
        priority=row["priority"] or 0.0,
        screens=row["screens"] or {},
    )


def stored_vector(sample_id: str, stored: bytes, dtype: str, d_model: int, checksum: int) -> Vector:
    """The vector of a sample's columns.

    Raises:
        ActivationError: the stored bytes do not fit their width or checksum.
    """
    data = bytes(stored)
    if dtype != DTYPE or len(data) != 4 * d_model:
        raise ActivationError(
            f"stored vector of sample {sample_id}: {len(data)} bytes of {dtype} do not make "
            f"{d_model} x {DTYPE}; the database was changed by something else"
        )
    if zlib.crc32(data) != checksum:
        raise ActivationError(
            f"stored vector of sample {sample_id}: CRC-32 is {zlib.crc32(data)}, not {checksum}; "
            "the disk or the database damaged it"
        )
    # A copy in the machine's byte order, which the caller may write to.
    return np.frombuffer(data, dtype="<f4").astype(np.float32)


def agent_of(row: Row) -> AgentContext | None:
    """The agent context of a sample's row."""
    if row["agent_run_id"] is None:
        return None
    return AgentContext(**{name: row[column] for name, column in _AGENT.items()}, **more_of(row["attributes"]))


def _with_agent(sample: ActivationSample) -> Mapping[str, Any]:
    more = {name: value for name in _AGENT_MORE if (value := getattr(sample.agent, name, None)) is not None}
    return {**sample.attributes, _AGENT_KEY: more} if more else sample.attributes


def attributes_of(stored: Mapping[str, Any]) -> Mapping[str, Any]:
    """The attributes that the host gave, without what is kept beside them."""
    if _AGENT_KEY not in stored:
        return stored
    return {name: value for name, value in stored.items() if name != _AGENT_KEY}


def more_of(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``AgentContext`` that are kept with the attributes."""
    more = stored.get(_AGENT_KEY)
    return {name: more[name] for name in _AGENT_MORE if name in more} if isinstance(more, Mapping) else {}


def reading_row(reading: Reading) -> dict[str, Any]:
    """Row of ``nla_readings``, without ``created_at``."""
    sample, explanation, fidelity = reading.sample, reading.explanation, reading.fidelity
    return {
        "sample_id": sample.sample_id,
        "av_hash": explanation.av_hash,
        "run_id": sample.run_id,
        "step": sample.step,
        "captured_at": sample.captured_at,
        "explanation": clean(explanation.text),
        "truncated": explanation.truncated,
        "tokens": explanation.tokens,
        "ar_hash": fidelity.ar_hash if fidelity else None,
        "cosine": _finite(fidelity.cosine) if fidelity else None,
        "mse_nrm": _finite(fidelity.mse_nrm) if fidelity else None,
        "fve": _finite(fidelity.fve) if fidelity else None,
        "denominator": _finite(fidelity.denominator) if fidelity else None,
        "denominator_name": fidelity.denominator_name if fidelity else None,
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def explanation_of(row: Row) -> Explanation:
    """The explanation of a reading's row."""
    return Explanation(row["sample_id"], row["explanation"], row["truncated"], row["tokens"], row["av_hash"])


def fidelity_of(row: Row) -> Fidelity | None:
    """The fidelity of a reading's row; None when it was read without an AR."""
    if row["ar_hash"] is None:
        return None
    return Fidelity(
        sample_id=row["sample_id"],
        cosine=math.nan if row["cosine"] is None else row["cosine"],
        mse_nrm=math.nan if row["mse_nrm"] is None else row["mse_nrm"],
        fve=row["fve"],
        denominator=row["denominator"],
        denominator_name=row["denominator_name"],
        ar_hash=row["ar_hash"],
    )


def match_row(match: Match, support: Support | None = None) -> dict[str, Any]:
    """Row of ``nla_matches``, without ``created_at``."""
    return {
        "match_id": match.match_id,
        "sample_id": match.sample_id,
        "run_id": match.run_id,
        "rule_id": match.rule_id,
        "rule_version": match.rule_version,
        "severity": str(match.severity),
        "group_key": group_key(match.group),
        "group_values": clean(match.group),
        "hits": [
            {"selection": h.selection, "quote": clean(h.quote), "start": h.start, "end": h.end} for h in match.hits
        ],
        "step": match.step,
        "position": match.position,
        "sequence_id": match.sequence_id,
        "captured_at": match.captured_at,
        "swap_margin": support.swap_margin if support else None,
        "supported": support.supported if support else None,
        "controls": _controls(support) if support else None,
        "score": _finite(support.score) if support else None,
    }


def _controls(support: Support) -> dict[str, Any]:
    results = {name: _finite(value) for name, value in support.controls.items()}
    return {"results": results, "failed": list(support.failed), "not_run": dict(support.not_run)}


def support_of(row: Row) -> Support | None:
    """What the controls said of the match of a row; None when none was run."""
    if row["supported"] is None:
        return None
    kept = row["controls"] or {}
    results = {name: value for name, value in (kept.get("results") or {}).items() if value is not None}
    if row["swap_margin"] is not None:
        results.setdefault("swap_margin", row["swap_margin"])
    failed, not_run = tuple(kept.get("failed") or ()), dict(kept.get("not_run") or {})
    return Support(row["match_id"], row["supported"], results, failed, not_run, row["score"])


def match_of(row: Row) -> Match:
    """The match of a row."""
    return Match(
        match_id=row["match_id"],
        sample_id=row["sample_id"],
        run_id=row["run_id"],
        rule_id=row["rule_id"],
        rule_version=row["rule_version"],
        severity=Severity(row["severity"]),
        group=row["group_values"],
        hits=tuple(Hit(**hit) for hit in row["hits"]),
        step=row["step"],
        position=row["position"],
        sequence_id=row["sequence_id"],
        captured_at=row["captured_at"],
    )


def alert_row(alert: Alert) -> dict[str, Any]:
    """Row of ``nla_alerts``; also, as JSON, the payload of the outbox."""
    row = {item.name: clean(getattr(alert, item.name)) for item in dataclasses.fields(alert)}
    row["group_values"] = row.pop("group")
    row["agent"] = clean(dataclasses.asdict(alert.agent)) if alert.agent else None
    for name in ("severity", "state", "triage"):
        row[name] = str(row[name])
    for name in ("cosine", "fve"):
        row[name] = _finite(row[name])
    return row


def alert_of(row: Row) -> Alert:
    """The alert of a row or of an outbox payload."""
    fields = dict(row)
    fields["group"] = fields.pop("group_values")
    fields["agent"] = AgentContext(**row["agent"]) if row["agent"] else None
    fields["severity"] = Severity(row["severity"])
    fields["state"] = AlertState(row["state"])
    fields["triage"] = TriageState(row["triage"])
    return Alert(**fields)


def run_row(info: RunInfo) -> dict[str, Any]:
    """Row of ``nla_runs``, without ``ended_at``."""
    row = {item.name: clean(getattr(info, item.name)) for item in dataclasses.fields(info)}
    row["config"] = clean(info.config)
    return row


def run_of(row: Row) -> RunInfo:
    """The run of a row."""
    return RunInfo(**{item.name: row[item.name] for item in dataclasses.fields(RunInfo)})
