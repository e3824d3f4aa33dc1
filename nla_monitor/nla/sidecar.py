"""The sidecar ``nla_meta.yaml``: found, read and checked before anything is loaded. No torch here.

The dialect is stated in no released sidecar. It is told by the config (``nla.dialect``), by the file where ours wrote
it, or by what only one dialect has: ``ao_config.json``, a template that asks for the depth, rsLoRA weights without an
injection scale. Where that leaves two, an error says so: the wrong one gives fluent nonsense.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from nla_monitor.config import NLAConfig
from nla_monitor.errors import CheckpointError, SidecarError
from nla_monitor.nla.checkpoint import (
    ADAPTER_NAME,
    CONFIG_NAME,
    METADATA_FILES,
    ORACLE_NAME,
    SIDECAR_NAME,
    Checkpoint,
    open_checkpoint,
    read_json,
    sidecar_file,
)
from nla_monitor.nla.contract import (
    DEPTH_PLACEHOLDERS,
    MARKER_PLACEHOLDER,
    RAW_SCALES,
    ROLES,
    SQRT_D,
    TEXT_PLACEHOLDER,
    Denominator,
    Depth,
    Dialect,
    Extraction,
    OracleSettings,
    ReconstructorContract,
    Role,
    Sidecar,
    Templates,
    Tokens,
    VerbalizerContract,
)

__all__ = [
    "MARKER_PLACEHOLDER",
    "RAW_SCALES",
    "SQRT_D",
    "TEXT_PLACEHOLDER",
    "Denominator",
    "Dialect",
    "ReconstructorContract",
    "Role",
    "Sidecar",
    "VerbalizerContract",
    "config_depth",
    "config_width",
    "load_sidecar",
    "parse_sidecar",
    "read_model_config",
    "sidecar_of",
]

NEWEST_SCHEMA = 2
DATASET_KIND = "nla_dataset"
_ORACLE_QUESTION = "What is the model thinking about?"
_ORACLE_PREFIX = "Layer: {layer}\n{placeholders} \n"
_ORACLE_MARKER = " ?"
_AMBIGUOUS = (
    "Set nla.dialect: replace, if vectors replaced the marker's embedding row in training; add, if they were added "
    "after block 1."
)


def load_sidecar(
    path: str | Path, role: Role | str, *, revision: str | None = None, config: NLAConfig | None = None
) -> Sidecar:
    """The checked sidecar of a checkpoint: a folder, a ``nla_meta.yaml`` file, or a hub id.

    An activation oracle has none: its ``ao_config.json`` is read in its place.

    Args:
        path: where it is.
        role: ``av`` or ``ar`` (``actor`` and ``critic`` are understood).
        revision: pinned hub revision.
        config: dialect, layer, question and base model where they are given there.

    Raises:
        SidecarError: missing, malformed, of the other role, of an unclear dialect, or contradicting ``config.json``.
        CheckpointError: there is no such folder or hub repository, or it has no ``config.json``.
    """
    wanted = Role(ROLES.get(str(role), str(role)))
    config, local = config or NLAConfig(), Path(path)
    place = local.parent if local.is_file() else path
    checkpoint = open_checkpoint(place, wanted.value, revision=revision, base=config.base, patterns=METADATA_FILES)
    return sidecar_of(checkpoint, wanted, config, file=local if local.is_file() else None)


def sidecar_of(checkpoint: Checkpoint, role: Role, config: NLAConfig, *, file: Path | None = None) -> Sidecar:
    """The checked sidecar of an opened checkpoint; ``file`` in place of the one found there. Raises as above."""
    if role is Role.AV and (checkpoint.folder / ORACLE_NAME).exists():
        sidecar = oracle_sidecar(checkpoint, config)
        sidecar.verbalizer_contract()
        return sidecar
    file = file or sidecar_file(checkpoint.folder, role.value)
    data = _read_yaml(file)
    if file.parent != checkpoint.folder:  # one sidecar in the root describes both halves
        data = {**data, "role": role.value}
    sidecar = parse_sidecar(data, file)
    _check_identity(sidecar, role)
    _check_layers(sidecar)
    model_config = read_model_config(checkpoint.root)
    _check_width(sidecar, model_config)
    sidecar = _completed(sidecar, checkpoint, model_config, config)
    if role is Role.AV:
        sidecar.verbalizer_contract()
    else:
        sidecar.reconstructor_contract()
        sidecar.fve_denominator()
    return sidecar


def _completed(sidecar: Sidecar, checkpoint: Checkpoint, model_config: Mapping[str, Any], config: NLAConfig) -> Sidecar:
    """With what the file does not say: dialect, blocks of the target, the layer of an NLA that reads any."""
    known: dict[str, Any] = {"target_blocks": config_depth(model_config)}
    if sidecar.role is Role.AV:
        known["dialect"] = dialect_of(sidecar, checkpoint, config)
    if config.layer is not None and config.layer != sidecar.layer:
        if sidecar.layer is not None and not sidecar.depth_conditioned:
            raise sidecar.mismatch(
                "the layer",
                f"{config.layer} (nla.layer)",
                sidecar.layer,
                "This NLA reads one layer: leave nla.layer out.",
            )
        known |= {"extraction_layer_index": config.layer, "depth": Depth(), "extraction": _without_layer(sidecar)}
    return sidecar.model_copy(update=known)


def _without_layer(sidecar: Sidecar) -> Extraction:
    return sidecar.extraction.model_copy(update={"layer_index": None})


def dialect_of(sidecar: Sidecar, checkpoint: Checkpoint, config: NLAConfig) -> Dialect:
    """How this AV takes vectors: as told, or by what only one dialect has.

    Raises:
        SidecarError: told and found contradict each other, or two dialects are possible.
    """
    told = None if config.dialect == "auto" else Dialect(config.dialect)
    if told is Dialect.ORACLE:
        remedy = "Correct nla.dialect, or take the file from the release."
        raise sidecar.mismatch("nla.dialect", f"{ORACLE_NAME} beside the weights", "none", remedy)
    by_depth = any(placeholder in (sidecar.prompt_templates.av or "") for placeholder in DEPTH_PLACEHOLDERS)
    if told is Dialect.DEPTH and not by_depth:
        wanted = f"one of {', '.join(DEPTH_PLACEHOLDERS)} (nla.dialect: depth)"
        raise sidecar.mismatch("prompt_templates.av", wanted, sidecar.prompt_templates.av, "Correct nla.dialect.")
    if told is not None or sidecar.dialect is not None:
        return told or sidecar.dialect or Dialect.REPLACE
    if by_depth:
        return Dialect.DEPTH
    return _dialect_of_adapter(sidecar, checkpoint) if checkpoint.base is not None else Dialect.REPLACE


def _dialect_of_adapter(sidecar: Sidecar, checkpoint: Checkpoint) -> Dialect:
    """Verbalizers trained by adding are rsLoRA adapters that need no scale; some note one that they do not use."""
    stabilized = bool(read_json(checkpoint.folder / ADAPTER_NAME).get("use_rslora"))
    scaled = sidecar.extraction.injection_scale is not None
    if stabilized == scaled:
        found = f"{'rsLoRA' if stabilized else 'LoRA'} adapter {'with' if scaled else 'without'} an injection_scale"
        raise sidecar.mismatch("the dialect", "one that can be told", found, _AMBIGUOUS)
    return Dialect.ADD if stabilized else Dialect.REPLACE


def oracle_sidecar(checkpoint: Checkpoint, config: NLAConfig) -> Sidecar:
    """What an activation oracle's ``ao_config.json`` promises, as a sidecar.

    Fields read: ``special_token``, ``prefix_template`` (``{layer}``, ``{placeholders}``), ``hook_onto_layer``,
    ``steering_coefficient``, ``act_layers`` (or ``layers``, ``layer``); defaults are those of the published oracles.

    Raises:
        SidecarError: a field is of the wrong type, or another dialect is told.
        CheckpointError: the file or the base model's ``config.json`` cannot be read.
    """
    file = checkpoint.folder / ORACLE_NAME
    data, model_config = read_json(file), read_model_config(checkpoint.root)
    if config.dialect not in ("auto", Dialect.ORACLE):
        raise SidecarError(
            f"{file} makes this an activation oracle, but nla.dialect is {config.dialect!r}. Correct it."
        )
    width = config_width(model_config)
    try:
        oracle = OracleSettings(
            question=config.question or str(data.get("question") or _ORACLE_QUESTION),
            placeholders=config.placeholders,
            block=int(data.get("hook_onto_layer", 1)),
            coefficient=float(data.get("steering_coefficient", 1.0)),
        )
        return Sidecar(
            role=Role.AV,
            d_model=width or 0,
            base_checkpoint=data.get("model_name"),
            extraction_layer_index=config.layer if config.layer is not None else _oracle_layer(data),
            tokens=Tokens(injection_char=data.get("special_token", _ORACLE_MARKER)),
            prompt_templates=Templates(av=data.get("prefix_template", _ORACLE_PREFIX)),
            dialect=Dialect.ORACLE,
            source=file,
            target_blocks=config_depth(model_config),
            oracle=oracle,
        )
    except (ValidationError, ValueError, TypeError) as error:
        raise SidecarError(f"{file}: {error}. Correct the file, or take the one of the release.") from error


def _oracle_layer(data: Mapping[str, Any]) -> int | None:
    """The one layer that an oracle was trained on; None where it reads several."""
    for key in ("act_layers", "layers", "layer"):
        found = data.get(key)
        layers = found if isinstance(found, list) else [found]
        if len(layers) == 1 and isinstance(layers[0], int):
            return layers[0]
    return None


def parse_sidecar(data: Mapping[str, Any], source: Path = Path(SIDECAR_NAME)) -> Sidecar:
    """A sidecar from parsed YAML; field types only, contents are checked by ``load_sidecar``.

    Raises:
        SidecarError: a field is missing or of the wrong type; each is named with what was expected and found.
    """
    if data.get("kind") == DATASET_KIND:
        raise SidecarError(
            f"{source} describes a dataset (kind {DATASET_KIND}), not a model. Point to the AV or AR checkpoint."
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
        return f"role: expected one of {', '.join(ROLES)}, found {item['input']!r}"
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


def _check_width(sidecar: Sidecar, config: Mapping[str, Any]) -> None:
    found = config_width(config)
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
        raise CheckpointError(f"{folder} has no {CONFIG_NAME}. Point to a model folder.") from error
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


def config_depth(config: Mapping[str, Any]) -> int | None:
    """Number of decoder blocks named by a ``config.json``; None when it names none."""
    return next(
        (int(config[key]) for key in ("num_hidden_layers", "n_layer") if isinstance(config.get(key), int)), None
    )
