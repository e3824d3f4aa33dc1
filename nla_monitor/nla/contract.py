"""What an AV or AR checkpoint promises: the fields of its sidecar, and what an AV or AR needs of them.

Reads the released format (``kind: nla_model``, schema 1 and 2) and the spellings seen in training folders: role
``actor`` / ``critic``, templates ``actor`` / ``critic``, five places for the layer index. ``sidecar`` reads the files.
No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    field_validator,
)

from nla_monitor.errors import SidecarError
from nla_monitor.nla.checkpoint import SIDECAR_NAME

MARKER_PLACEHOLDER = "{injection_char}"
TEXT_PLACEHOLDER = "{explanation}"
DEPTH_PLACEHOLDERS = ("{pct}", "{depth_pct}", "{depth}")
READOUT_PLACEHOLDERS = ("{inj}", MARKER_PLACEHOLDER)
"""In an AR template: the marker whose own position is read, where there is no value head."""
DEPTH_GRID = (4, 10, 17, 25, 32, 40, 47, 55, 63, 71, 80, 90, 96)
"""Percentages that the published depth-conditioned pairs were trained on; the nearest one goes into the prompt."""
ADD_BLOCK = 1
SQRT_D = "sqrt_d_model"
RAW_SCALES = frozenset({"raw", "none"})
ROLES = {"av": "av", "actor": "av", "ar": "ar", "critic": "ar"}


class Role(StrEnum):
    """Which half of the NLA a checkpoint is."""

    AV = "av"
    AR = "ar"


class Dialect(StrEnum):
    """How an AV takes a vector."""

    REPLACE = "replace"
    """The marker's embedding row becomes ``v * injection_scale / |v|``."""
    ADD = "add"
    """``h' = h + |h| * v / |v|`` at the output of block index 1, at the marker; ``injection_scale`` plays no part."""
    DEPTH = "depth"
    """As ``replace``; the prompt says how deep in the network the vector was taken."""
    ORACLE = "oracle"
    """As ``add``, at placeholders of a prompt that asks a question."""

    @property
    def by_row(self) -> bool:
        """Whether the vector is a row of the prompt's embeddings (what a server with prompt embeddings can take)."""
        return self in (Dialect.REPLACE, Dialect.DEPTH)


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class Extraction(_Part):
    """Section ``extraction``: how vectors were taken and at which norm they are injected."""

    injection_scale: StrictFloat | StrictInt | StrictStr | None = None
    """L2 norm at which the AV was trained: a number, ``sqrt_d_model``, or ``raw`` / ``none`` (not rescaled)."""
    mse_scale: StrictFloat | StrictInt | StrictStr | None = None
    """Norm to which the AR's loss scaled both sides. Scores are cosines, so it cancels; kept for the record."""
    layer_index: StrictInt | None = Field(None, validation_alias=AliasChoices("layer_index", "extraction_layer_index"))


class Tokens(_Part):
    """Section ``tokens``: ids that the live tokenizer must reproduce."""

    injection_char: StrictStr | None = None
    injection_token_id: StrictInt | None = None
    injection_left_neighbor_id: StrictInt | None = None
    injection_right_neighbor_id: StrictInt | None = None
    critic_suffix_ids: tuple[StrictInt, ...] | None = None


class Templates(_Part):
    """Section ``prompt_templates``."""

    av: StrictStr | None = Field(None, validation_alias=AliasChoices("av", "actor"))
    ar: StrictStr | None = Field(None, validation_alias=AliasChoices("ar", "critic"))


class Depth(_Part):
    """Section ``critic`` (older) or ``ar``: K again, in two more spellings."""

    extraction_layer_index: StrictInt | None = None
    num_hidden_layers: StrictInt | None = None


class Denominator(NamedTuple):
    """What an FVE is divided by: mean of ``||v/|v| - mean(v/|v|)||^2`` over a named reference set."""

    name: str
    value: float


class VerbalizerContract(NamedTuple):
    """What an AV needs from its sidecar, complete and typed."""

    marker: str
    marker_id: int | None
    """None: whatever the marker tokenizes to (oracles, which have no sidecar)."""
    left_id: int | None
    right_id: int | None
    template: str
    injection_scale: float | None
    """None: vectors are injected as they are (``raw``)."""
    dialect: Dialect = Dialect.REPLACE
    markers: int = 1
    """How many markers take the vector; neighbours are checked where there is one."""
    block: int = ADD_BLOCK
    """``add`` and ``oracle``: index of the block after which the vector is added."""
    coefficient: float = 1.0
    """``add`` and ``oracle``: how many norms of the stream are added."""
    tagged: bool = True
    """Whether the text stands between explanation tags; an oracle's answer does not."""


class ReconstructorContract(NamedTuple):
    """What an AR needs from its sidecar."""

    template: str
    suffix_ids: tuple[int, ...] | None


class OracleSettings(NamedTuple):
    """What an activation oracle's ``ao_config.json`` and the config say beyond a sidecar."""

    question: str
    placeholders: int
    block: int
    coefficient: float


class Sidecar(BaseModel):
    """One ``nla_meta.yaml``. Unknown fields are kept, never an error: training code adds its own."""

    model_config = ConfigDict(extra="allow", frozen=True)

    role: Role
    d_model: StrictInt = Field(gt=0)
    kind: StrictStr = "nla_model"
    schema_version: StrictInt = 1
    stage: StrictStr | None = None
    base_checkpoint: StrictStr | None = None
    extraction_layer_index: StrictInt | None = Field(None, ge=0)
    extraction: Extraction = Field(default_factory=Extraction)
    tokens: Tokens = Field(default_factory=Tokens)
    prompt_templates: Templates = Field(default_factory=Templates)
    depth: Depth = Field(default_factory=Depth, validation_alias=AliasChoices("critic", "ar"))
    training: Mapping[str, Any] = Field(default_factory=dict)
    dialect: Dialect | None = None
    """As the file says, which released ones do not; ``load_sidecar`` finds it out."""
    source: Path = Field(Path(SIDECAR_NAME), exclude=True)
    """The file itself, for messages."""
    target_blocks: int | None = Field(None, exclude=True)
    """Blocks of the target model, where the checkpoint's config tells (an AV is a copy of it)."""
    oracle: OracleSettings | None = Field(None, exclude=True)

    @field_validator("role", mode="before")
    @classmethod
    def _role_spellings(cls, value: object) -> object:
        return ROLES.get(value.lower(), value) if isinstance(value, str) else value

    @field_validator("extraction", "tokens", "prompt_templates", "depth", "training", mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        return {} if value is None else value

    @property
    def layer(self) -> int | None:
        """K, from whichever spelling is there (the explicit ones first); None when the file does not say."""
        return next((layer for _, layer in self._layers()), None)

    def _layers(self) -> list[tuple[str, int]]:
        explicit = {
            "extraction_layer_index": self.extraction_layer_index,
            "critic.extraction_layer_index": self.depth.extraction_layer_index,
            "extraction.layer_index": self.extraction.layer_index,
        }
        found = [(name, layer) for name, layer in explicit.items() if layer is not None]
        if not found and self.depth.num_hidden_layers is not None:
            found = [("critic.num_hidden_layers", self.depth.num_hidden_layers)]
        return found

    def mismatch(self, field: str, expected: str, found: object, remedy: str) -> SidecarError:
        """An error that says what was expected, what was found and what to do."""
        return SidecarError(f"{self.source}: {field}: expected {expected}, found {found!r}. {remedy}")

    def verbalizer_contract(self) -> VerbalizerContract:
        """The AV's part of the file.

        Raises:
            SidecarError: a field is missing or has a value that cannot be used.
        """
        dialect = self.dialect or Dialect.REPLACE
        if self.oracle is not None:
            return self._oracle_contract(self.oracle)
        tokens = self.tokens
        template = self._with_depth(
            "prompt_templates.av", self._required("prompt_templates.av", self.prompt_templates.av)
        )
        marker = self._required("tokens.injection_char", tokens.injection_char)
        if template.count(MARKER_PLACEHOLDER) + template.count(marker) != 1:
            wanted = f"the placeholder {MARKER_PLACEHOLDER} exactly once"
            raise self.mismatch(
                "prompt_templates.av", wanted, template, "Restore the template that the AV was trained with."
            )
        return VerbalizerContract(
            marker=marker,
            marker_id=self._required("tokens.injection_token_id", tokens.injection_token_id),
            left_id=self._required("tokens.injection_left_neighbor_id", tokens.injection_left_neighbor_id),
            right_id=self._required("tokens.injection_right_neighbor_id", tokens.injection_right_neighbor_id),
            template=template,
            injection_scale=self._injection_scale() if dialect.by_row else None,
            dialect=dialect,
        )

    def _oracle_contract(self, oracle: OracleSettings) -> VerbalizerContract:
        marker = self._required("special_token", self.tokens.injection_char)
        layer = self._required("the layer (act_layers, or nla.layer in the config)", self.layer)
        prefix = self._required("prefix_template", self.prompt_templates.av)
        filled = prefix.replace("{layer}", str(layer)).replace("{placeholders}", marker * oracle.placeholders)
        return VerbalizerContract(
            marker=marker,
            marker_id=self.tokens.injection_token_id,
            left_id=None,
            right_id=None,
            template=filled + oracle.question,
            injection_scale=None,
            dialect=Dialect.ORACLE,
            markers=oracle.placeholders,
            block=oracle.block,
            coefficient=oracle.coefficient,
            tagged=False,
        )

    def reconstructor_contract(self) -> ReconstructorContract:
        """The AR's part of the file.

        Raises:
            SidecarError: the template is missing or has no place for the explanation.
        """
        template = self._with_depth(
            "prompt_templates.ar", self._required("prompt_templates.ar", self.prompt_templates.ar)
        )
        if template.count(TEXT_PLACEHOLDER) != 1:
            wanted = f"the placeholder {TEXT_PLACEHOLDER} exactly once"
            raise self.mismatch(
                "prompt_templates.ar", wanted, template, "Restore the template that the AR was trained with."
            )
        for placeholder in READOUT_PLACEHOLDERS:
            if placeholder in template:
                marker = self._required("tokens.injection_char", self.tokens.injection_char)
                template = template.replace(placeholder, marker)
        return ReconstructorContract(template, self.tokens.critic_suffix_ids)

    @property
    def settings(self) -> str:
        """What decides the output beyond the files, for provenance; empty for the released dialect."""
        parts = [] if self.dialect in (None, Dialect.REPLACE) else [f"dialect={self.dialect}"]
        if self.depth_conditioned or self.oracle is not None:
            parts.append(f"layer={self.layer}")
        if self.oracle is not None:
            parts += [f"question={self.oracle.question}", f"placeholders={self.oracle.placeholders}"]
        return "\n".join(parts)

    @property
    def depth_conditioned(self) -> bool:
        """Whether a template asks for the depth of the layer."""
        return any(
            placeholder in (template or "")
            for template in (self.prompt_templates.av, self.prompt_templates.ar)
            for placeholder in DEPTH_PLACEHOLDERS
        )

    def _with_depth(self, field: str, template: str) -> str:
        """The template with the depth in it: the trained percentage nearest to ``100 * K / blocks of the target``."""
        if not any(placeholder in template for placeholder in DEPTH_PLACEHOLDERS):
            return template
        if self.layer is None or self.target_blocks is None:
            raise SidecarError(
                f"{self.source}: {field} asks for the depth of the layer, and the file names no layer: this NLA reads "
                "any. Set nla.layer to the block that is captured."
            )
        depth, grid = 100 * self.layer / self.target_blocks, self.training.get("depth_pcts") or DEPTH_GRID
        nearest = min(grid, key=lambda pct: abs(pct - depth))
        for placeholder in DEPTH_PLACEHOLDERS:
            template = template.replace(placeholder, str(nearest))
        return template

    def fve_denominator(self) -> Denominator | None:
        """The denominator recorded under ``training``, if there is one.

        Written as ``fve_denominator: <number>`` with ``fve_denominator_name: <reference set>``, or as one map
        ``fve_denominator: {name, value}``.

        Raises:
            SidecarError: it is there but is no positive number.
        """
        entry = self.training.get("fve_denominator")
        if entry is None:
            return None
        parts = (
            entry if isinstance(entry, Mapping) else {"value": entry, "name": self.training.get("fve_denominator_name")}
        )
        name, value = parts.get("name") or "training", parts.get("value")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            remedy = "Correct it, or remove it: FVE is then left out."
            raise self.mismatch("training.fve_denominator", "a positive number", entry, remedy)
        return Denominator(str(name), float(value))

    def _required(self, field: str, value: Any) -> Any:
        if value is None or value == "":
            raise SidecarError(
                f"{self.source}: {field} is missing, and an {self.role.value.upper()} cannot be used without it. Take "
                "the sidecar that was written when this checkpoint was trained; the value cannot be guessed."
            )
        return value

    def _injection_scale(self) -> float | None:
        field, value = "extraction.injection_scale", self.extraction.injection_scale
        if value is None:
            raise SidecarError(
                f"{self.source}: {field} is missing. It is the norm at which the AV was trained to see vectors; any "
                "other gives fluent nonsense, so no default is taken. Write the trained value there: a number, "
                f"'{SQRT_D}' if training used sqrt(d_model), or 'raw' if vectors were not rescaled."
            )
        if isinstance(value, str) and value.strip().lower() in RAW_SCALES:
            return None
        if value == SQRT_D:
            return math.sqrt(self.d_model)
        try:
            scale = float(value)
        except ValueError:
            scale = math.nan
        if not 0 < scale < math.inf:
            raise self.mismatch(
                field, f"a positive number, '{SQRT_D}' or 'raw'", value, "Write the norm used in training."
            )
        return scale
