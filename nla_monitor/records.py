"""Frozen records: what travels from the host process to an alert.

Records grow by composition, keyed by the client-made ``sample_id``: ``ActivationSample`` → ``Explanation`` →
``Fidelity`` → ``Reading`` → ``Match`` → ``Alert``. No stage edits an earlier record. A stage that fails leaves a
``StageFailure``: result or failure, never neither.

This module is a leaf: it imports nothing of ours and no torch.
"""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Vector: TypeAlias = npt.NDArray[np.float32]
"""One residual-stream vector, ``[d_model]``, float32, raw (not normalised)."""

Scalar: TypeAlias = str | int | float | bool | None
"""What metadata may hold: flat, JSON-safe."""


SOURCE, PROXY, RETOKENIZED, IMPLAUSIBLE = "source", "proxy", "retokenized", "implausible"
"""Attributes of samples that were not taken in the model's own forward pass. ``source``: how they were had (``replay``,
``vllm``). True, where it is so: ``proxy``, the model that was read is not the one that answered; ``retokenized``, the
answer's tokens were made from its text; ``implausible``, the model that was read would hardly have answered so."""

ENDED = "ended"
"""Key in an alert's evidence: why it resolved without its rule saying so."""


def uuid7() -> str:
    """A time-ordered UUID (version 7, RFC 9562 §5.7) as text: 48 bits of Unix milliseconds, then random bits."""
    value = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(secrets.token_bytes(10), "big")
    value = value & ~(0xF << 76) | (0x7 << 76)
    value = value & ~(0x3 << 62) | (0x2 << 62)
    text = f"{value:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


class Phase(StrEnum):
    """Which kind of forward pass a sample comes from."""

    TRAIN = "train"
    """Forward under gradients inside a training step."""
    EVAL = "eval"
    """Forward without gradients: evaluation or a probe of fixed prompts."""
    AGENT = "agent"
    """A generation on behalf of an agent or chain."""


class Severity(StrEnum):
    """How loudly an alert asks for attention; ordered by ``rank``."""

    INFO = "info"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """Position in the order info < low < medium < high < critical."""
        return list(Severity).index(self)


class AlertState(StrEnum):
    """What the machine says of an alert."""

    FIRING = "firing"
    RESOLVED = "resolved"


class TriageState(StrEnum):
    """What people say of an alert. An alert is a hypothesis until a person labels it."""

    OPEN = "open"
    ACKNOWLEDGED = "acknowledged"
    TRUE_POSITIVE = "true_positive"
    FALSE_POSITIVE = "false_positive"
    BENIGN = "benign"


@dataclass(frozen=True, slots=True)
class AgentContext:
    """Where in an agent's work a sample was taken."""

    agent_run_id: str
    """``run_id`` of the model call (LangChain's, or the span id elsewhere)."""
    parent_run_id: str | None = None
    root_run_id: str | None = None
    """Outermost run: one agent invocation."""
    tool: str | None = None
    """Name of the tool whose result the token is part of; elsewhere in a model call, of the newest that it reads."""
    node: str | None = None
    """LangGraph node."""
    conversation_id: str | None = None
    generated: bool = False
    """True for a token that the model wrote itself, False for one of its prompt."""
    token_index: int | None = None
    """0-based index among the generated tokens; None in the prompt."""
    tool_call_id: str | None = None
    """The framework's id of the tool call that ``tool`` answered; for a token of an earlier turn that asks for a tool,
    of that call. None where the framework tells none."""
    message_role: str | None = None
    """Whose message the token stands in: ``system``, ``user``, ``assistant`` or ``tool``; None where messages are not
    known, or cannot be found in the prompt."""
    span_start: int | None = None
    """Token position at which that message begins, the template's own words before it included."""
    span_end: int | None = None
    """Token position behind its last token; None while the model is writing it."""


@dataclass(frozen=True, slots=True)
class MessageSpan:
    """Where one message of a chat prompt lies in the prompt's tokens."""

    start: int
    """Token position of its first token, the template's own words before it included."""
    end: int | None
    """Token position behind its last token; None: the model is about to write it."""
    role: str
    """``system``, ``user``, ``assistant`` or ``tool``."""
    tool: str | None = None
    """Name of the tool whose result it is."""
    tool_call_id: str | None = None
    """Id of the call that it answers or, an assistant's message with a single call, asks for."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a model answered to a prompt: its text, its tokens or both.

    A tap in the model's process needs none of it; a source that runs prompt and answer again does.

    Raises:
        ValueError: neither is there.
    """

    text: str | None = None
    """As the caller got it: special tokens and stop texts are gone."""
    token_ids: tuple[int, ...] | None = None
    """Every token that was written, ``[token]``, an end of sequence included: exact, where ``text`` is not."""
    prompt_ids: tuple[int, ...] | None = None
    """What the model was fed, ``[token]``, where that was not said when the call began."""

    def __post_init__(self) -> None:
        if self.text is None and self.token_ids is None:
            raise ValueError("a completion needs its text or its token ids; leave it out where neither is known")


@dataclass(frozen=True, slots=True, eq=False)
class ActivationSample:
    """One activation and where it came from."""

    sample_id: str
    """UUIDv7 made where the sample was taken; the key of everything that follows."""
    run_id: str
    layer: int
    """K: the output of decoder block K, that is ``hidden_states[K + 1]``."""
    vector: Vector
    norm: float
    """Raw L2 norm; the AV erases it, so it is kept as a signal of its own."""
    phase: Phase
    sequence_id: str
    """Hash of the sequence's token ids; the same on every rank and after a resume."""
    position: int
    """0-based token position in the sequence, padding not counted."""
    token_id: int
    trigger: str
    """Why this position: ``random``, or the name of a trigger."""
    captured_at: float
    """Unix seconds."""
    step: int | None = None
    """Optimizer step of the training run."""
    rank: int = 0
    token_text: str | None = None
    context: str | None = None
    """Text up to and including the sampled token (content: stays in the database)."""
    role: str | None = None
    inclusion_probability: float | None = None
    """Chance that this position was chosen by the random part of the sampler; None for triggers."""
    traceparent: str | None = None
    """W3C trace context of the source span."""
    agent: AgentContext | None = None
    attributes: Mapping[str, Scalar] = field(default_factory=dict)
    """Free metadata from ``Monitor.step(**attributes)``; rules may use it as ``meta.<key>``."""
    model: str | None = None
    """Name that the model was attached by (policy, reference); None where only one is watched."""
    adapter: str | None = None
    """Active adapter of the forward, several joined with ``+``; None: without adapter, or with all switched off."""
    priority: float = 0.0
    """How unusual its screens found it, 0 to 1 (see ``capture.screens``): what is read first; 0 without screens."""
    screens: Mapping[str, float] = field(default_factory=dict)
    """What each screen of the raw vector measured, by the screen's name; rules may use it as ``screen.<name>``."""

    @property
    def d_model(self) -> int:
        """Width of the vector."""
        return int(self.vector.shape[0])


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the AV wrote about one activation."""

    sample_id: str
    text: str
    truncated: bool
    """True when the closing tag never came: the text was cut by ``max_new_tokens``."""
    tokens: int
    """Number of generated tokens."""
    av_hash: str
    """Content hash of the AV checkpoint (provenance)."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How much of the vector the words hold. Never a measure of truth.

    ``mse_nrm = 2 * (1 - cosine)``; ``fve = 1 - mse_nrm / denominator``, where the denominator is the mean of
    ``||v/|v| - mean||^2`` over a named reference set (a per-sample FVE is a normalised score, not a variance share).
    """

    sample_id: str
    cosine: float
    mse_nrm: float
    fve: float | None
    """None when no denominator is known for this checkpoint."""
    denominator: float | None
    denominator_name: str | None
    ar_hash: str


@dataclass(frozen=True, slots=True)
class Reading:
    """Sample + explanation + fidelity: what rules look at. ``fidelity`` is None when no AR is configured."""

    sample: ActivationSample
    explanation: Explanation
    fidelity: Fidelity | None

    @property
    def sample_id(self) -> str:
        """Key of the sample."""
        return self.sample.sample_id


@dataclass(frozen=True, slots=True)
class Hit:
    """One selection of a rule, met by a reading."""

    selection: str
    quote: str
    """Verbatim words of the explanation (empty for numeric selections)."""
    start: int = -1
    end: int = -1


@dataclass(frozen=True, slots=True)
class Match:
    """A rule's condition met by one reading."""

    match_id: str
    """Deterministic: hash of sample, rule id and rule version, so that a replay reproduces it."""
    sample_id: str
    run_id: str
    rule_id: str
    rule_version: str
    """Content hash of the rule."""
    severity: Severity
    group: Mapping[str, Scalar]
    """Values of the window's ``group_by`` keys."""
    hits: tuple[Hit, ...]
    step: int | None
    position: int
    sequence_id: str
    captured_at: float
    unjudged: Mapping[str, str] = field(default_factory=dict)
    """Selections that could not be looked at (no judge within reach, a probe for another layer), with the reason.
    They counted as not met. Kept with the match's ``Support``, not with the match."""

    @property
    def quote(self) -> str:
        """The first verbatim quote, or an empty string."""
        return next((hit.quote for hit in self.hits if hit.quote), "")


@dataclass(frozen=True, slots=True)
class Support:
    """What the controls said of one match. A refuted match is kept, and counts in no window."""

    match_id: str
    supported: bool
    """False: a control that the rule requires said no."""
    controls: Mapping[str, float] = field(default_factory=dict)
    """Results by name of the control (``swap_margin``, ``claim_probability``, ``echo``, ``agreement``, ``neighbours``,
    ``ablation``, ``null_percentile``, ``norm``, ``prediction_echo``); what could not be measured is absent."""
    failed: tuple[str, ...] = ()
    """Required controls whose result is out of bounds."""
    not_run: Mapping[str, str] = field(default_factory=dict)
    """Controls that were wanted and could not be measured, with the reason."""
    score: float | None = None
    """The statistic that calibration ranks: see ``calibration.score`` of the rule."""

    @property
    def swap_margin(self) -> float | None:
        """AR cosine of the explanation as stated minus the best with an alternative in the claim's place.

        Supported claims stand well above 0, confabulated ones at or below it (measured: ``organism/CARD.md``).
        """
        return self.controls.get("swap_margin")


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge (LLM) or classifier said of a text; remembered, so that a replay says the same."""

    kind: str
    """``judge`` or ``semantic``."""
    verdict: str
    """``yes``, ``no`` or ``unclear``."""
    quote: str
    """Verbatim words of the text that it rests on; empty without any."""
    score: float | None
    """How sure a classifier is; None for a judge, which gives none."""
    model: str


@dataclass(frozen=True, slots=True)
class RuleHeader:
    """What an alert needs to know of its rule."""

    rule_id: str
    title: str
    version: str
    """Content hash of the rule: the same text has the same version everywhere."""
    severity: Severity
    runbook: str | None = None
    keep_firing_steps: int = 0
    """Steps without a match after which a firing alert resolves; 0: as soon as the window no longer holds."""
    keep_firing_seconds: float = 0.0
    responses: tuple[str, ...] | None = None
    """What its alerts may set off (``log``, ``webhook``, ``tag``, ``stop``); None: what the config says."""


@dataclass(frozen=True, slots=True)
class WindowVerdict:
    """Whether a rule's window holds for one group, and what it counted."""

    firing: bool
    matches: tuple[Match, ...]
    """The matches inside the window, oldest first."""
    distinct: int
    """Distinct values of the window's ``distinct`` key among them (the number of matches where it names none). Matches
    with a step and those without are counted apart: it is the number of the kind that decided."""
    needed: int
    """The window's ``count``."""


@dataclass(frozen=True, slots=True)
class Alert:
    """A rule's condition held over its window: a hypothesis for a person, with what speaks for it."""

    alert_id: str
    fingerprint: str
    """Identity of the condition: hash of rule id and group; one alert fires per fingerprint at a time."""
    run_id: str
    rule_id: str
    rule_title: str
    rule_version: str
    severity: Severity
    state: AlertState
    triage: TriageState
    group: Mapping[str, Scalar]
    first_step: int | None
    last_step: int | None
    fired_at: float
    updated_at: float
    resolved_at: float | None
    matches: int
    """Matches in the window when it fired, plus those since."""
    sample_id: str
    """The exhibit: the matching reading with the best fidelity at the time of firing."""
    quote: str
    position: int
    context: str | None
    explanation: str
    cosine: float | None
    fve: float | None
    denominator_name: str | None
    evidence: Mapping[str, object]
    """Results of controls, by name; empty controls are absent, never invented."""
    calibration: Mapping[str, object]
    """``{"status": "uncalibrated"}`` until a calibration set certifies the rule."""
    agent: AgentContext | None = None
    runbook: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class StageFailure:
    """A stage that could not do its work on a sample."""

    sample_id: str
    stage: str
    """``verbalize``, ``reconstruct``, ``evaluate`` or ``store``."""
    error: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class RunInfo:
    """One monitored run: a training run, or the life of an agent process."""

    run_id: str
    name: str
    model: str
    layer: int
    started_at: float
    av_hash: str | None = None
    ar_hash: str | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    host: str = field(default_factory=lambda: f"{platform.node()}:{os.getpid()}")
