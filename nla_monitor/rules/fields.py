"""The names that rules may use for what is known of a reading, and how to get their values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final, Literal

from nla_monitor.records import AgentContext, Fidelity, Phase, Reading, Scalar
from nla_monitor.rules.problems import nearest

Kind = Literal["number", "text", "bool", "any"]
META: Final = "meta."
SCREEN: Final = "screen."


@dataclass(frozen=True, slots=True)
class Field:
    """One name: its kind, its valid values where they are few, and how to read it."""

    name: str
    kind: Kind
    get: Callable[[Reading], Scalar]
    choices: tuple[str, ...] = ()


def _sample(name: str) -> Callable[[Reading], Scalar]:
    return attrgetter(f"sample.{name}")


def _explanation(name: str) -> Callable[[Reading], Scalar]:
    return attrgetter(f"explanation.{name}")


def _fidelity(name: str) -> Callable[[Reading], Scalar]:
    def get(reading: Reading) -> Scalar:
        fidelity: Fidelity | None = reading.fidelity
        return None if fidelity is None else getattr(fidelity, name)

    return get


def _agent(name: str) -> Callable[[Reading], Scalar]:
    def get(reading: Reading) -> Scalar:
        agent: AgentContext | None = reading.sample.agent
        return None if agent is None else getattr(agent, name)

    return get


def _meta(name: str) -> Callable[[Reading], Scalar]:
    return lambda reading: reading.sample.attributes.get(name)


def _screen(name: str) -> Callable[[Reading], Scalar]:
    return lambda reading: reading.sample.screens.get(name)


_ALL: Final = (
    *(Field(f"fidelity.{name}", "number", _fidelity(name)) for name in ("cosine", "mse_nrm", "fve", "denominator")),
    Field("fidelity.denominator_name", "text", _fidelity("denominator_name")),
    *(
        Field(name, "number", _sample(name))
        for name in ("norm", "step", "position", "layer", "rank", "token_id", "captured_at")
    ),
    Field("inclusion_probability", "number", _sample("inclusion_probability")),
    Field("phase", "text", _sample("phase"), tuple(Phase)),
    *(
        Field(name, "text", _sample(name))
        for name in ("role", "trigger", "run_id", "sequence_id", "token_text", "context", "model", "adapter")
    ),
    Field("explanation.truncated", "bool", _explanation("truncated")),
    Field("explanation.tokens", "number", _explanation("tokens")),
    Field("explanation.av_hash", "text", _explanation("av_hash")),
    *(
        Field(f"agent.{name}", "text", _agent(name))
        for name in ("agent_run_id", "parent_run_id", "root_run_id", "tool", "node", "conversation_id", "tool_call_id")
    ),
    Field("agent.message_role", "text", _agent("message_role"), ("system", "user", "assistant", "tool")),
    Field("agent.generated", "bool", _agent("generated")),
    *(Field(f"agent.{name}", "number", _agent(name)) for name in ("token_index", "span_start", "span_end")),
)
FIELDS: Final[Mapping[str, Field]] = {field.name: field for field in _ALL}
"""Known names; ``meta.<key>`` is open: what the host passed to ``Monitor.step(**attributes)``. So is ``screen.<name>``:
what ``capture.screens`` measured of the raw vector."""

GROUP_KEYS: Final = (
    *("run_id", "rule", "phase", "step", "sequence_id", "role", "trigger", "layer", "model", "adapter"),
    *(name for name, field in FIELDS.items() if name.startswith("agent.") and field.kind != "number"),
)
"""What a window may be grouped by, beside ``meta.<key>``."""

OPEN: Final = ("meta", "screen")
"""Mappings whose keys are not known beforehand."""
PREFIXES: Final = ("fidelity", "explanation", "agent", *OPEN)
APART: Final = "__"
"""Stands for the dot in names of members that CEL is given one by one."""
_MEMBERS: Final[Mapping[str, Mapping[str, Field]]] = {
    prefix: {field.name.removeprefix(f"{prefix}."): field for field in _ALL if field.name.startswith(f"{prefix}.")}
    for prefix in PREFIXES
}
TOP_LEVEL: Final = tuple(sorted({name.partition(".")[0] for name in FIELDS} | set(OPEN)))
"""Names that a CEL condition may use beside the selections."""


def find_field(name: str) -> Field | None:
    """The field of that name, ``meta.<key>`` and ``screen.<name>`` included."""
    if name.startswith(META) and len(name) > len(META):
        return Field(name, "any", _meta(name.removeprefix(META)))
    if name.startswith(SCREEN) and len(name) > len(SCREEN):
        return Field(name, "number", _screen(name.removeprefix(SCREEN)))
    return FIELDS.get(name)


def unknown_field(name: str, also: Iterable[str] = ()) -> str:
    """What to say of a name that is no field."""
    return f"unknown field {name!r}; {nearest(name, [*FIELDS, 'meta.<key>', 'screen.<name>', *also])}"


def variables(reading: Reading) -> dict[str, Any]:
    """A reading as CEL sees it: known names always present (null where unknown), ``meta`` as it came."""
    return {name: variable(name, reading) for name in TOP_LEVEL}


class Variables(dict[str, Any]):
    """``variables`` of a reading, each made when it is asked for; ``fidelity__fve`` is member ``fve`` of ``fidelity``.

    Raises ``KeyError`` for a key of ``meta`` or ``screen`` that is not there, and for what is no name.
    """

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self._reading = reading

    def __missing__(self, name: str) -> Any:
        prefix, apart, member = name.partition(APART)
        if not apart:
            value = variable(name, self._reading)
        elif prefix in OPEN:
            value = variable(prefix, self._reading)[member]
        else:
            value = _MEMBERS[prefix][member].get(self._reading)
        self[name] = value
        return value


def variable(name: str, reading: Reading) -> Any:
    """One of a reading's CEL variables, by its top-level name."""
    if name == "meta":
        return dict(reading.sample.attributes)
    if name == "screen":
        return dict(reading.sample.screens)
    if name in PREFIXES:
        return {member: field.get(reading) for member, field in _MEMBERS[name].items()}
    value = FIELDS[name].get(reading)
    return value.value if isinstance(value, Phase) else value


def group_value(key: str, reading: Reading, rule_id: str) -> Scalar:
    """The value of a ``group_by`` key."""
    if key == "rule":
        return rule_id
    field = find_field(key)
    value = field.get(reading) if field else None
    return value.value if isinstance(value, Phase) else value
