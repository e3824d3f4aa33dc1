"""The sidecar ``nla_meta.yaml``: what an AV or AR checkpoint promises, checked before anything is loaded.

Reads the released format (``kind: nla_model``, schema 1 and 2) and the spellings seen in training folders: role
``actor`` / ``critic``, templates ``actor`` / ``critic``, five places for the layer index. No torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
)

from nla_monitor.errors import CheckpointError, SidecarError
from nla_monitor.nla.checkpoint import CONFIG_NAME, METADATA_FILES, SIDECAR_NAME, resolve_checkpoint

NEWEST_SCHEMA = 2
MARKER_PLACEHOLDER = "{injection_char}"
TEXT_PLACEHOLDER = "{explanation}"
SQRT_D = "sqrt_d_model"
RAW_SCALES = frozenset({"raw", "none"})
_ROLES = {"av": "av", "actor": "av", "ar": "ar", "critic": "ar"}


class Role(StrEnum):
    """Which half of the NLA a checkpoint is."""

    AV = "av"
    AR = "ar"


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
    marker_id: int
    left_id: int
    right_id: int
    template: str
    injection_scale: float | None
    """None: vectors are injected as they are (``raw``)."""


class ReconstructorContract(NamedTuple):
    """What an AR needs from its sidecar."""

    template: str
    suffix_ids: tuple[int, ...] | None


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
    source: Path = Field(Path(SIDECAR_NAME), exclude=True)
    """The file itself, for messages."""

    @field_validator("role", mode="before")
    @classmethod
    def _role_spellings(cls, value: object) -> object:
        return _ROLES.get(value.lower(), value) if isinstance(value, str) else value

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
        tokens = self.tokens
        template = self._required("prompt_templates.av", self.prompt_templates.av)
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
            injection_scale=self._injection_scale(),
        )

    def reconstructor_contract(self) -> ReconstructorContract:
        """The AR's part of the file.

        Raises:
            SidecarError: the template is missing or has no place for the explanation.
        """
        template = self._required("prompt_templates.ar", self.prompt_templates.ar)
        if template.count(TEXT_PLACEHOLDER) != 1:
            wanted = f"the placeholder {TEXT_PLACEHOLDER} exactly once"
            raise self.mismatch(
                "prompt_templates.ar", wanted, template, "Restore the template that the AR was trained with."
            )
        return ReconstructorContract(template, self.tokens.critic_suffix_ids)

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


def load_sidecar(path: str | Path, role: Role | str, *, revision: str | None = None) -> Sidecar:
    """The checked sidecar of a checkpoint: a folder, a ``nla_meta.yaml`` file, or a hub id.

    Raises:
        SidecarError: missing, malformed, of the other role, or contradicting the checkpoint's ``config.json``.
        CheckpointError: there is no such folder or hub repository, or it has no ``config.json``.
    """
    wanted = Role(_ROLES.get(str(role), str(role)))
    local = Path(path)
    folder = local.parent if local.is_file() else resolve_checkpoint(path, revision=revision, patterns=METADATA_FILES)
    file = local if local.is_file() else folder / SIDECAR_NAME
    sidecar = parse_sidecar(_read_yaml(file), file)
    _check_identity(sidecar, wanted)
    _check_layers(sidecar)
    _check_width(sidecar, folder)
    if wanted is Role.AV:
        sidecar.verbalizer_contract()
    else:
        sidecar.reconstructor_contract()
        sidecar.fve_denominator()
    return sidecar


def parse_sidecar(data: Mapping[str, Any], source: Path = Path(SIDECAR_NAME)) -> Sidecar:
    """A sidecar from parsed YAML; field types only, contents are checked by ``load_sidecar``.

    Raises:
        SidecarError: a field is missing or of the wrong type; each is named with what was expected and found.
    """
    if data.get("kind") == "nla_dataset":
        raise SidecarError(
            f"{source} describes a dataset (kind nla_dataset), not a model. Point to the AV or AR checkpoint."
        )
    try:
        return Sidecar.model_validate({**data, "source": source})
    except ValidationError as error:
        problems = "; ".join(_explain(item) for item in error.errors())
        raise SidecarError(
            f"{source}: {problems}. Correct the file, or take the one that the checkpoint was released with."
        ) from error


def _explain(item: Any) -> str:
    field = ".".join(str(part) for part in item["loc"])
    if item["type"] == "missing":
        return f"{field} is missing"
    if field == "role":
        return f"role: expected one of {', '.join(_ROLES)}, found {item['input']!r}"
    return f"{field}: {item['msg'].lower()}, found {item['input']!r}"


def _read_yaml(file: Path) -> Mapping[str, Any]:
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SidecarError(
            f"{file.parent} has no {SIDECAR_NAME}. An AV or AR is released with one beside its weights; copy it there "
            "(a plain language model is not an NLA checkpoint)."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SidecarError(f"{file} cannot be read: {error}. Check its permissions and encoding (UTF-8).") from error
    except yaml.YAMLError as error:
        raise SidecarError(f"{file} is not valid YAML: {error}. Correct the file.") from error
    if not isinstance(data, Mapping):
        raise SidecarError(f"{file} must hold a mapping, found {type(data).__name__}. Correct the file.")
    return data


def _check_identity(sidecar: Sidecar, wanted: Role) -> None:
    if sidecar.kind != "nla_model":
        raise sidecar.mismatch("kind", "'nla_model'", sidecar.kind, "Point to an AV or AR checkpoint.")
    if sidecar.schema_version > NEWEST_SCHEMA:
        expected = f"at most {NEWEST_SCHEMA}"
        raise sidecar.mismatch("schema_version", expected, sidecar.schema_version, "Upgrade nla-monitor to read it.")
    if sidecar.role is not wanted:
        remedy = (
            f"This is an {sidecar.role.value.upper()}: exchange nla.av and nla.ar in the config, or correct the path."
        )
        raise sidecar.mismatch("role", repr(wanted.value), sidecar.role.value, remedy)


def _check_layers(sidecar: Sidecar) -> None:
    layers = sidecar._layers()  # noqa: SLF001 - same module, the property hides the spellings
    if len({layer for _, layer in layers}) > 1:
        told = ", ".join(f"{name} = {layer}" for name, layer in layers)
        raise SidecarError(f"{sidecar.source}: the layer index is given twice and differs: {told}. Keep the right one.")


def _check_width(sidecar: Sidecar, folder: Path) -> None:
    found = config_width(read_model_config(folder))
    if found is not None and found != sidecar.d_model:
        remedy = f"The sidecar belongs to another checkpoint, or {CONFIG_NAME} does: take both from the same release."
        raise sidecar.mismatch("d_model", f"{found} (hidden size in {CONFIG_NAME})", sidecar.d_model, remedy)


def read_model_config(folder: Path) -> Mapping[str, Any]:
    """``config.json`` of a checkpoint folder, the text part of a multimodal one.

    Raises:
        CheckpointError: missing, or not a JSON object.
    """
    file = folder / CONFIG_NAME
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        adapter = (folder / "adapter_config.json").exists()
        remedy = "It is a LoRA adapter: merge it into its base model first" if adapter else "Point to a model folder"
        raise CheckpointError(f"{folder} has no {CONFIG_NAME}. {remedy}.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Copy it again from the release.") from error
    if not isinstance(data, dict):
        raise CheckpointError(
            f"{file} must hold an object, found {type(data).__name__}. Copy it again from the release."
        )
    inner = data.get("text_config")
    return inner if isinstance(inner, dict) else data


def config_width(config: Mapping[str, Any]) -> int | None:
    """Width of the residual stream named by a ``config.json``; None when it names none."""
    return next(
        (int(config[key]) for key in ("hidden_size", "n_embd", "d_model") if isinstance(config.get(key), int)), None
    )
