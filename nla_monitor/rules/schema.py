"""The form of a rule file: Sigma's header and named selections, a CEL condition, a window, and embedded tests.

Shape only. What a selection, a condition or a pattern means is checked where it is compiled (``matchers``,
``condition``). Unknown keys are errors.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Final, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, StrictBool, StrictInt, model_validator
from pydantic_core import PydanticCustomError

from nla_monitor.records import Phase, Scalar, Severity
from nla_monitor.rules.calibration_schema import CalibrationSpec
from nla_monitor.rules.evidence_schema import CONTROLS, Evidence
from nla_monitor.rules.problems import nearest
from nla_monitor.rules.section import Section, Texts, one_is_a_list

ID_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
MAX_COUNT: Final = 100_000
MAX_STEPS: Final = 1_000_000_000
MAX_SECONDS: Final = 10 * 365 * 86_400.0
LOGIC: Final = ("id", "severity", "detection", "window", "exceptions", "evidence", "calibration")
"""Keys that decide what matches and what fires; the version is the hash of these, so that prose may be corrected."""

_UNITS: Final = {
    "s": 1.0,
    "second": 1.0,
    "sec": 1.0,
    "m": 60.0,
    "min": 60.0,
    "minute": 60.0,
    "h": 3600.0,
    "hour": 3600.0,
    "d": 86_400.0,
    "day": 86_400.0,
}
_PARTS: Final = re.compile(r"\s*(?:,|\band\b|\bor\b)\s*")
_LEVELS: Final = {"informational": "info"}
_LEVEL_NAMES = (*Severity, *_LEVELS)


def _span(value: object) -> object:
    """``"20 steps"``, ``"60s"``, ``"5m"`` or ``"20 steps, 10m"`` as a mapping."""
    if not isinstance(value, str):
        return value
    found: dict[str, Any] = {}
    for part in _PARTS.split(value.strip()):
        hit = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", part)
        unit = hit[2].lower() if hit else ""
        if hit and unit in {"step", "steps"} and "." not in hit[1]:
            found["steps"] = int(hit[1])
        elif hit and (seconds := _UNITS.get(unit) or _UNITS.get(unit.removesuffix("s"))):
            found["seconds"] = float(hit[1]) * seconds
        else:
            raise PydanticCustomError(
                "span",
                "{value} is no span; write '20 steps', '60s', '5m', or a mapping with steps and / or seconds",
                {"value": repr(part)},
            )
    return found


class Span(Section):
    """A length in training steps, in seconds, or both (steps where the run has them, seconds where it has none)."""

    steps: StrictInt | None = Field(None, ge=1, le=MAX_STEPS)
    seconds: float | None = Field(None, gt=0, le=MAX_SECONDS, allow_inf_nan=False)

    @model_validator(mode="after")
    def _not_empty(self) -> Span:
        if self.steps is None and self.seconds is None:
            raise PydanticCustomError("span", "name steps, seconds or both")
        return self


SpanField = Annotated[Span, BeforeValidator(_span, json_schema_input_type=Span | str)]


class LogSource(Section):
    """Sigma's ``logsource``: what kind of record the rule reads."""

    product: Literal["nla"] = "nla"
    category: Literal["activation_explanation"] = "activation_explanation"
    service: str | None = None
    definition: str | None = None


class Window(Section):
    """When matches make an alert: so many distinct ones, close enough together, for long enough."""

    group_by: tuple[str, ...] = ("run_id",)
    count: StrictInt = Field(1, ge=1, le=MAX_COUNT)
    distinct: Literal["sample_id", "position", "sequence_id", "step"] = Field(
        "sample_id", description="position: distinct tokens (sequence and position together)"
    )
    within: SpanField | None = None
    hold: SpanField | None = Field(None, alias="for")
    keep_firing_for: SpanField | None = None


class ExceptionSpec(Section):
    """A known reason not to match: a CEL condition (``when``) or a selection."""

    reason: str | None = None
    when: str | None = None
    selection: Any = None

    @model_validator(mode="after")
    def _one_of(self) -> ExceptionSpec:
        if (self.when is None) == (self.selection is None):
            raise PydanticCustomError("exception", "name exactly one of when (a CEL condition) and selection")
        return self


class AgentCase(Section):
    """Agent context of a test reading."""

    agent_run_id: str = "agent-run"
    parent_run_id: str | None = None
    root_run_id: str | None = None
    tool: str | None = None
    node: str | None = None
    conversation_id: str | None = None
    generated: StrictBool = False
    token_index: StrictInt | None = None
    tool_call_id: str | None = None
    message_role: Literal["system", "user", "assistant", "tool"] | None = None
    span_start: StrictInt | None = None
    span_end: StrictInt | None = None


class TestCase(Section):
    """A reading to test the rule on; everything but the text has a harmless default."""

    __test__ = False  # not a pytest class

    text: str
    fidelity: StrictBool = Field(default=True, description="false: no AR, so no fidelity at all")
    fve: float | None = 0.8
    cosine: float = Field(0.9, ge=-1, le=1)
    denominator: float = Field(1.0, gt=0)
    norm: float = Field(10.0, ge=0)
    layer: StrictInt = Field(0, ge=0)
    step: StrictInt | None = Field(0, ge=0)
    position: StrictInt = Field(0, ge=0)
    sequence_id: str = "sequence"
    seconds: float = Field(0.0, ge=0, description="captured_at")
    phase: Phase = Phase.TRAIN
    role: str | None = None
    trigger: str = "random"
    rank: StrictInt = Field(0, ge=0)
    token_text: str | None = None
    context: str | None = None
    truncated: StrictBool = False
    tokens: StrictInt = Field(40, ge=0)
    agent: AgentCase | None = None
    meta: dict[str, Scalar] = Field(default_factory=dict)
    model: str | None = None
    adapter: str | None = None
    screen: dict[str, float] = Field(default_factory=dict, description="what capture.screens measured, by name")
    given: dict[str, StrictBool] = Field(
        default_factory=dict, description="what probe, semantic and judge selections say in this test, by name"
    )
    note: str | None = None


def _text_is_a_case(value: object) -> object:
    return {"text": value} if isinstance(value, str) else value


CaseField = Annotated[TestCase, BeforeValidator(_text_is_a_case, json_schema_input_type=TestCase | str)]


class Moment(Section):
    """When a window test is judged."""

    step: StrictInt | None = Field(None, ge=0)
    seconds: float | None = Field(None, ge=0)


class WindowCase(Section):
    """A whole-window test: readings, and whether the alert fires."""

    readings: tuple[CaseField, ...] = Field(min_length=1, max_length=1000)
    fires: StrictBool
    at: Moment = Field(default_factory=Moment)
    note: str | None = None


class Tests(Section):
    """Embedded tests; a rule without them is refused."""

    positive: tuple[CaseField, ...] = Field(min_length=1)
    negative: tuple[CaseField, ...] = Field(min_length=1)
    window: tuple[WindowCase, ...] = ()


def _level(value: object) -> object:
    text = value.lower() if isinstance(value, str) else value
    if not isinstance(text, str):
        return value
    text = _LEVELS.get(text, text)
    if text not in set(Severity):
        raise PydanticCustomError(
            "severity", "{value} is no severity; {hint}", {"value": repr(value), "hint": nearest(text, Severity)}
        )
    return text


def _condition_text(value: object) -> object:
    return {"when": value} if isinstance(value, str) else value


Response = Literal["log", "webhook", "tag", "stop"]
"""``log``, ``webhook``: tell these sinks only. ``tag``: mark the agent's run. ``stop``: ask the trainer to stop."""


def _responses(value: object) -> object:
    """Our own list as a tuple; ATR's mapping as it is."""
    if isinstance(value, dict):
        return value
    found = one_is_a_list(value)
    if not isinstance(found, list | tuple):
        raise PydanticCustomError("response", "must be a list of log, webhook, tag, stop, or ATR's mapping")
    for item in found:
        if item not in get_args(Response):
            hint = nearest(str(item), get_args(Response))
            raise PydanticCustomError("response", "{value} is no response; {hint}", {"value": repr(item), "hint": hint})
    return tuple(found)


ResponseField = Annotated[
    tuple[Response, ...] | dict[str, Any],
    BeforeValidator(_responses, json_schema_input_type=Response | list[Response] | dict[str, Any]),
]
TextsOrMapping = Annotated[
    tuple[str, ...] | dict[str, Any],
    BeforeValidator(one_is_a_list, json_schema_input_type=str | list[str] | dict[str, Any]),
]
"""Sigma's list, or ATR's mapping by kind."""
Exceptions = tuple[
    Annotated[ExceptionSpec, BeforeValidator(_condition_text, json_schema_input_type=ExceptionSpec | str)], ...
]


class Header(Section):
    """What a rule says of itself: the headers of Sigma 2.1 and of ATR 1.0, unchanged, decide nothing."""

    status: Literal["draft", "stable", "test", "experimental", "deprecated", "unsupported"] = "experimental"
    description: str | None = None
    runbook: str | None = Field(None, description="what to check when it fires, and how to label it")
    author: str | None = None
    date: str | None = None
    modified: str | None = None
    references: TextsOrMapping = ()
    tags: TextsOrMapping = ()
    falsepositives: Texts = ()
    related: tuple[dict[str, str], ...] = ()
    license: str | None = None
    name: str | None = None
    taxonomy: str | None = None
    fields: Texts = Field((), description="Sigma: fields of interest to the analyst")
    scope: Texts = Field((), description="Sigma: intended scope")
    schema_version: str | float | None = Field(None, description="ATR: version of its schema")
    rule_version: StrictInt | None = Field(None, description="ATR: number of the rule's version; ours is its hash")
    maturity: str | None = Field(None, description="ATR")
    detection_tier: str | None = Field(None, description="ATR")
    confidence: str | float | None = Field(None, description="ATR: of the engine, 0 to 100")
    agent_source: dict[str, Any] | None = Field(None, description="ATR: what the rule was written for")
    compliance: dict[str, Any] | None = Field(None, description="ATR: mappings to frameworks")
    provenance: dict[str, Any] | None = Field(None, description="ATR: producer")
    lifecycle: dict[str, Any] | None = Field(None, description="ATR: review")
    test_cases: dict[str, Any] | None = Field(None, description="ATR: become `tests` where there are none")
    evasion_tests: tuple[dict[str, Any], ...] | None = Field(None, description="ATR: known ways around it")
    imported: dict[str, Any] | None = Field(None, description="what `rules import` replaced: logsource and standard")


class RuleSpec(Header):
    """One rule file, as written."""

    title: str = Field(min_length=1, max_length=256)
    id: str = Field(pattern=ID_PATTERN)
    severity: Annotated[Severity, BeforeValidator(_level, json_schema_input_type=Literal[_LEVEL_NAMES])]
    detection: dict[str, Any]
    tests: Tests
    window: Window = Field(default_factory=Window)
    exceptions: Exceptions = ()
    evidence: Evidence = Field(default_factory=Evidence)
    calibration: CalibrationSpec | None = None
    response: ResponseField | None = Field(
        None, description="what an alert of this rule may set off; by default what the config says for its severity"
    )
    logsource: LogSource = Field(default_factory=LogSource)

    def source(self) -> str:
        """The rule as text that can be loaded again (JSON, which is YAML), to keep with its version."""
        # ASCII with escapes: YAML refuses some characters that are fine in a text, unless they are escaped.
        return json.dumps(self.model_dump(mode="json", by_alias=True, exclude_defaults=True))

    @property
    def responses(self) -> tuple[Response, ...] | None:
        """What an alert may set off; None: what the config says (ATR's mapping is kept, and asks nothing of us)."""
        return None if isinstance(self.response, dict) else self.response


SECTIONS: Final[dict[tuple[str, ...], type[BaseModel]]] = {
    (): RuleSpec,
    ("logsource",): LogSource,
    ("window",): Window,
    ("window", "within"): Span,
    ("window", "for"): Span,
    ("window", "keep_firing_for"): Span,
    ("exceptions",): ExceptionSpec,
    ("evidence",): Evidence,
    **{("evidence", name): model for name, model in CONTROLS.items()},
    ("calibration",): CalibrationSpec,
    ("tests",): Tests,
    ("tests", "positive"): TestCase,
    ("tests", "negative"): TestCase,
    ("tests", "positive", "agent"): AgentCase,
    ("tests", "negative", "agent"): AgentCase,
    ("tests", "window"): WindowCase,
    ("tests", "window", "at"): Moment,
    ("tests", "window", "readings"): TestCase,
    ("tests", "window", "readings", "agent"): AgentCase,
}
"""Which model stands at which path (list indices left out): for the nearest valid key."""


def keys_of(model: type[BaseModel]) -> list[str]:
    """The keys as a rule file spells them."""
    return [field.alias or name for name, field in model.model_fields.items()]
