"""Configuration: small frozen value objects, one per stage, from YAML, a mapping or keyword arguments.

An unknown key is an error that names the nearest valid one. Paths are taken relative to the config file.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from nla_monitor.errors import ConfigError
from nla_monitor.records import Phase, Severity

WorkerMode = Literal["process", "thread", "external"]
Positions = Literal["prompt", "completion", "all"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NLAConfig(_Section):
    """Which AV and AR read the activations."""

    av: str = Field("organism:planted/av", description="AV checkpoint folder, hub id, or organism:<variant>/av")
    ar: str | None = Field("organism:planted/ar", description="AR checkpoint; null: explanations without fidelity")
    revision: str | None = Field(None, description="Pinned hub revision")
    device: str = Field("cpu", description="torch device of the worker: cpu, cuda, cuda:1")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: int = Field(64, ge=1, le=4096)
    max_new_tokens: int = Field(200, ge=1, le=4096)
    threads: int | None = Field(None, ge=1, description="torch CPU threads of the worker; default 1 on CPU")


class CaptureConfig(_Section):
    """What is sampled, and how much."""

    layer: int | None = Field(None, ge=0, description="K, output of decoder block K; default: the AV sidecar's")
    every_n_steps: int = Field(1, ge=1)
    sequences_per_step: int = Field(8, ge=1, description="at most so many sequences of a forward pass")
    tokens_per_sequence: int = Field(2, ge=0, description="random positions per sequence")
    triggers: tuple[str, ...] = Field(
        (), description="token strings (or ids) after which a sample is always taken: turn ends, control tokens"
    )
    triggers_per_sequence: int = Field(2, ge=0)
    generated_tokens: int = Field(8, ge=0, description="agent generations: samples of written tokens, at most")
    positions: Positions = Field("all", description="prompt: where labels are -100; completion: where they are not")
    skip_first: int = Field(0, ge=0, description="positions at the start of a sequence that are never sampled")
    skip_special_tokens: bool = True
    phases: tuple[Phase, ...] = (Phase.TRAIN, Phase.EVAL, Phase.AGENT)
    seed: int = 0
    store_text: bool = Field(
        default=True, description="keep the text before the token in the database (never in telemetry)"
    )
    context_tokens: int = Field(128, ge=0, description="how many tokens of text to keep with a sample")


class QueueConfig(_Section):
    """The bounded hand-over between the host's thread and the database."""

    max_samples: int = Field(8192, ge=1, description="samples in memory; the oldest are dropped and counted beyond it")
    write_batch: int = Field(256, ge=1)
    write_interval_seconds: float = Field(0.2, gt=0)


class WorkerConfig(_Section):
    """Who verbalizes."""

    mode: WorkerMode = "process"
    lease_seconds: float = Field(120.0, gt=0)
    poll_seconds: float = Field(0.2, gt=0)
    max_attempts: int = Field(3, ge=1)
    metrics_port: int | None = Field(None, ge=0, le=65535)


class AlertConfig(_Section):
    """What alerts may do."""

    stop_on: Severity | None = Field(None, description="stop training at an alert of this severity or above")
    log: bool = Field(default=True, description="log alerts in the host process")
    webhook: str | None = Field(None, description="URL that gets each alert as JSON (Alertmanager webhook, version 4)")


class TelemetryConfig(_Section):
    """OpenTelemetry behaviour."""

    enabled: bool = True
    parent: Literal["link", "child"] = Field("link", description="how late spans relate to their source")


class MonitorConfig(_Section):
    """Everything, as one frozen object."""

    database: str = Field("sqlite:///nla-monitor.db", description="SQLAlchemy URL, or a path of an SQLite file")
    run_name: str | None = None
    nla: NLAConfig = Field(default_factory=NLAConfig)
    capture: CaptureConfig = Field(default_factory=CaptureConfig)
    rules: tuple[str, ...] = Field(("oversight",), description="names of packs, rule files or folders of them")
    queue: QueueConfig = Field(default_factory=QueueConfig)
    worker: WorkerConfig = Field(default_factory=WorkerConfig)
    alerts: AlertConfig = Field(default_factory=AlertConfig)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)

    @field_validator("rules", mode="before")
    @classmethod
    def _one_rule_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("database")
    @classmethod
    def _path_becomes_url(cls, value: str) -> str:
        return value if "://" in value else f"sqlite:///{value}"


def load_config(source: str | Path | Mapping[str, Any] | MonitorConfig | None = None) -> MonitorConfig:
    """A config from a YAML file, a mapping, or an existing config.

    Raises:
        ConfigError: the file is missing or no YAML, a key is unknown (the nearest valid one is named), a value is out
            of range.
    """
    if isinstance(source, MonitorConfig):
        return source
    if source is None:
        return MonitorConfig()
    if isinstance(source, Mapping):
        return _validate(dict(source), "config")
    path = Path(source)
    return _absolute_paths(_validate(_read_yaml(path), str(path)), path.resolve().parent)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path} is not valid YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path} must hold a mapping, found {type(data).__name__}")
    return data


def _validate(data: dict[str, Any], where: str) -> MonitorConfig:
    try:
        return MonitorConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {_explain(item)}" for item in error.errors())) from error


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] != "extra_forbidden":
        return f"{key} = {item['input']!r}: {item['msg']}"
    section: type[BaseModel] = MonitorConfig
    for part in item["loc"][:-1]:
        annotation = section.model_fields[str(part)].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            section = annotation
    nearest = difflib.get_close_matches(str(item["loc"][-1]), section.model_fields, n=1, cutoff=0.4)
    valid = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys: {', '.join(section.model_fields)}"
    return f"unknown key {key!r}; {valid}"


def _absolute_paths(config: MonitorConfig, base: Path) -> MonitorConfig:
    """Relative rule files, checkpoints and the SQLite file are meant relative to the config file."""

    def resolve(value: str) -> str:
        candidate = base / value
        return str(candidate) if not Path(value).is_absolute() and candidate.exists() else value

    nla = config.nla.model_copy(
        update={"av": resolve(config.nla.av), "ar": resolve(config.nla.ar) if config.nla.ar else None}
    )
    rules = tuple(resolve(rule) for rule in config.rules)
    return absolute_database(config, base).model_copy(update={"nla": nla, "rules": rules})


def absolute_database(config: MonitorConfig, base: Path | None) -> MonitorConfig:
    """The config with the path of its SQLite file, if it has one, taken relative to ``base`` (None: left as it is)."""
    prefix, database = "sqlite:///", config.database
    file = database.removeprefix(prefix)
    if base is None or not database.startswith(prefix) or file.startswith((":memory:", "file:", "?")) or not file:
        return config
    return config.model_copy(update={"database": f"{prefix}{base / file}"})
