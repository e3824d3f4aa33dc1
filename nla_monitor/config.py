"""Configuration: small frozen value objects, one per stage, from YAML, a mapping or keyword arguments.

An unknown key is an error that names the nearest valid one. Paths are taken relative to the config file.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from nla_monitor.errors import ConfigError
from nla_monitor.outlet_config import LangfuseConfig, PhoenixConfig, Section, TrackerConfig, checked_url
from nla_monitor.records import Phase, Severity

Dialect = Literal["auto", "replace", "add", "depth", "oracle"]
HTTP_ENGINES = ("vllm", "sglang")
"""Engines that are servers of their own."""
WorkerMode = Literal["process", "thread", "external"]
Positions = Literal["prompt", "completion", "all"]
SourceKind = Literal["replay", "vllm_files", "vllm_replica"]
RoleTrigger = Literal["turn_end", "assistant", "tool_call", "tool_result", "final_answer"]


class NLAConfig(Section):
    """Which AV and AR read the activations."""

    av: str = Field("organism:planted/av", description="AV checkpoint folder, hub id, or organism:<variant>/av")
    ar: str | None = Field("organism:planted/ar", description="AR checkpoint; null: explanations without fidelity")
    revision: str | None = Field(None, description="Pinned hub revision")
    device: str = Field("cpu", description="torch device of the worker: cpu, cuda, cuda:1")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    dialect: Dialect = Field(
        "auto",
        description="how the AV takes a vector. replace: the marker's embedding row; add: norm-matched after block 1; "
        "depth: replace, with the layer's depth in the prompt; oracle: norm-matched at placeholders, answers question",
    )
    layer: int | None = Field(None, ge=0, description="K, for an AV that reads any layer; default: the sidecar's")
    question: str | None = Field(None, min_length=1, description="oracle: what is asked about each activation")
    placeholders: int = Field(1, ge=1, le=64, description="oracle: how many placeholders take the activation")
    base: str | None = Field(None, description="Base model of LoRA adapters; default: the one that the adapter names")
    merge_adapter: bool = Field(default=True, description="add LoRA weights to the base once; not with 4-bit weights")
    quantization: Literal["none", "4bit"] = Field("none", description="4bit: NF4 through bitsandbytes, on a GPU")
    batch_size: int = Field(64, ge=1, le=4096)
    max_new_tokens: int = Field(200, ge=1, le=4096)
    threads: int | None = Field(None, ge=1, description="torch CPU threads of the worker; default 1 on CPU")
    denominator: str = Field(
        "training",
        description="what FVEs are divided by: training (the checkpoint's own), or a file of nla-monitor denominator",
    )
    engine: str = Field(
        "transformers",
        pattern=r"^[A-Za-z0-9][\w.-]*$",
        description="what runs the AV: transformers (in process), vllm or sglang (servers), or the name of a plug-in",
    )
    url: str | None = Field(None, description="vllm, sglang: base URL of the server, such as http://localhost:8000")
    served_model: str | None = Field(None, description="vllm: name of the AV there; default: the only one it serves")
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_]\w*$", description="environment variable that holds the server's API key"
    )
    concurrency: int = Field(64, ge=1, le=1024, description="requests to the server under way at a time")
    timeout_seconds: float = Field(120.0, gt=0, le=3600, description="silence after which a request counts as failed")
    retries: int = Field(4, ge=0, le=20, description="further attempts of a request that failed in a way that may pass")
    options: Mapping[str, str | int | float | bool | None] = Field(
        default_factory=dict, description="for a plug-in, whatever it understands; stored with the run, so no secrets"
    )

    @field_validator("url")
    @classmethod
    def _plain_url(cls, value: str | None) -> str | None:
        return None if value is None else checked_url(value)

    @model_validator(mode="after")
    def _servers_have_a_url(self) -> NLAConfig:
        if self.engine in HTTP_ENGINES and self.url is None:
            raise ValueError(f"engine {self.engine!r} needs a url, such as http://localhost:8000")
        if self.engine == "transformers" and self.url is not None:
            raise ValueError("a url is given, but engine is 'transformers', which asks no server; set engine: vllm")
        return self


class BurstConfig(Section):
    """A closer look after an alert."""

    steps: int = Field(
        20,
        ge=1,
        description="optimizer steps (training forwards where no step is told) that it lasts; for an agent, model "
        "calls of the run that a match was found in",
    )
    factor: int = Field(4, ge=2, le=64, description="times the sequences, the random positions and the triggers")


class ScreenConfig(Section):
    """A number that is measured of every sampled vector where it is, before anything is copied."""

    name: str = Field(pattern="^[a-z][a-z0-9_]*$", description="as in rules: screen.<name>")
    kind: Literal["probe", "novelty", "norm"] = Field(
        description="probe: a linear probe (the file of a rule's probe); novelty: how far the direction is from those "
        "of this run so far; norm: the L2 norm"
    )
    file: str | None = Field(None, description="probe: its safetensors file, relative to the config file")
    dims: int = Field(32, ge=2, le=512, description="novelty: dimensions of the random projection")

    @model_validator(mode="after")
    def _a_probe_has_a_file(self) -> ScreenConfig:
        if (self.kind == "probe") != (self.file is not None):
            needs = "needs a file" if self.kind == "probe" else "takes no file"
            raise ValueError(f"a screen of kind {self.kind!r} {needs}")
        return self


class CaptureConfig(Section):
    """What is sampled, and how much. All limits are of one process: of one rank in distributed training."""

    layer: int | None = Field(None, ge=0, description="K, output of decoder block K; default: the AV sidecar's")
    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="several layers, in place of layer: those that the AV does not read must be in screen_only"
    )
    screen_only: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (), description="layers whose vectors are screened and stored at the same positions, and never verbalized"
    )
    screens: tuple[ScreenConfig, ...] = Field(
        (), description="measured of each raw vector; the unusual is verbalized first"
    )
    every_n_steps: int = Field(1, ge=1, description="training forwards of every N-th optimizer step only")
    sequences_per_step: int = Field(
        8, ge=1, description="at most so many sequences of an optimizer step, or of a forward pass outside training"
    )
    tokens_per_sequence: int = Field(2, ge=0, description="random positions per sequence")
    triggers: tuple[str, ...] = Field(
        (),
        description="token strings, token ids, or texts of up to 16 tokens, after whose last token a sample is always "
        "taken: turn ends, control tokens",
    )
    role_triggers: tuple[RoleTrigger, ...] = Field(
        (),
        description="triggers found in the tokenizer's chat template: turn_end, assistant (the sequence that opens the "
        "model's turn), tool_call (what opens a call of a tool), tool_result (what opens a tool's turn), final_answer "
        "(what ends the model's thinking)",
    )
    triggers_per_sequence: int = Field(2, ge=0)
    text_triggers: tuple[str, ...] = Field(
        (), description="RE2 patterns: a candidate position is sampled if a match in the text before it ends there"
    )
    text_candidates: int = Field(
        16, ge=1, le=512, description="positions per sequence that text_triggers are tried on, drawn at random"
    )
    generated_tokens: int = Field(8, ge=0, description="agent generations: samples of written tokens, at most")
    positions: Positions = Field("all", description="prompt: where labels are -100; completion: where they are not")
    skip_first: int = Field(
        10,
        ge=0,
        description="positions at the start of a sequence that are not drawn at random, where it has others; triggers "
        "are taken wherever they stand",
    )
    skip_special_tokens: bool = True
    norm_sink_factor: float | None = Field(
        5.0,
        gt=1.0,
        description="random samples whose norm is above so many running medians are attention sinks: left out and "
        "counted; null keeps them",
    )
    samples_per_second: float | None = Field(
        None, gt=0, description="samples taken on average, at most; beyond it a keyed share of them is taken"
    )
    backpressure: bool = Field(
        default=False,
        description="take a smaller keyed share while the queue in memory is more than half full, so that it need not "
        "drop its oldest",
    )
    samples_per_agent_run: int | None = Field(
        None,
        ge=1,
        description="samples of one agent's run (all model calls with one root), at most; from half of it on an ever "
        "smaller keyed share is taken",
    )
    max_backlog: int | None = Field(
        None, ge=1, description="samples waiting to be read at which next to none is taken; thinned from half of it on"
    )
    reservoir: int | None = Field(
        None, ge=1, description="random training samples kept of each epoch: a uniform keyed sample"
    )
    burst: BurstConfig | None = Field(None, description="sample more for some steps after an alert of this run")
    phases: tuple[Phase, ...] = (Phase.TRAIN, Phase.EVAL, Phase.AGENT)
    seed: int = 0
    store_text: bool = Field(
        default=True, description="keep the text before the token in the database (never in telemetry)"
    )
    store_transcript: bool = Field(
        default=False,
        description="keep what agents read and answer, for nla-monitor report --conversation (never in telemetry)",
    )
    context_tokens: int = Field(128, ge=0, description="how many tokens of text to keep with a sample")

    @model_validator(mode="after")
    def _layers_and_screens_are_named_once(self) -> CaptureConfig:
        if self.layer is not None and self.layers:
            raise ValueError("layer and layers are both given; use one of them")
        names = [screen.name for screen in self.screens]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"screens share the name {', '.join(map(repr, twice))}; give each its own")
        return self


class SourceConfig(Section):
    """Whence the activations of model calls that are answered elsewhere, for ``Monitor.attach_source()``."""

    kind: SourceKind = Field(
        description="replay: prompt and answer are run again through a local copy; vllm_files: a vLLM server with "
        "hidden-state extraction writes them into folder; vllm_replica: such a server is sent prompt and answer again"
    )
    model: str | None = Field(
        None, description="replay: folder of the local copy; vllm: of the tokenizer that the served model has"
    )
    proxy: bool | None = Field(
        None, description="whether the model that is read is not the one that answers; replay and replica must say it"
    )
    device: str = Field("cpu", description="replay: torch device of the local copy")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="replay: auto is the checkpoint's"
    )
    max_tokens: int | None = Field(
        None, ge=1, description="tokens of prompt and answer of the longest call that is read"
    )
    check_every: int = Field(
        8, ge=0, description="replay: of so many calls one is asked whether the local copy would answer so; 0: none"
    )
    folder: str | None = Field(None, description="vllm: shared_storage_path of the server, as this process sees it")
    layer_ids: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (),
        description="vllm: eagle_aux_hidden_state_layer_ids of the server, in its order; default: K + 1 of each layer",
    )
    keep_files: bool = Field(default=False, description="vllm: leave files that were read; otherwise they are deleted")
    url: str | None = Field(None, description="vllm_replica: base URL of the server, such as http://localhost:8000")
    served_model: str | None = Field(None, description="vllm_replica: its name there; default: the only one it serves")
    api_key_env: str | None = Field(
        None, pattern=r"^[A-Za-z_]\w*$", description="environment variable that holds the server's API key"
    )
    timeout_seconds: float = Field(
        30.0, gt=0, le=3600, description="vllm: silence of the server, or lateness of a file, that counts as a failure"
    )

    @field_validator("url")
    @classmethod
    def _plain_url(cls, value: str | None) -> str | None:
        return None if value is None else checked_url(value)

    @model_validator(mode="after")
    def _each_kind_has_its_keys(self) -> SourceConfig:
        needed = {
            "replay": ("model", "proxy"),
            "vllm_files": ("folder",),
            "vllm_replica": ("folder", "url", "proxy"),
        }
        missing = [key for key in needed[self.kind] if getattr(self, key) is None]
        if missing:
            raise ValueError(f"a source of kind {self.kind!r} needs {' and '.join(missing)}")
        return self


class QueueConfig(Section):
    """The bounded hand-over between the host's thread and the database."""

    max_samples: int = Field(8192, ge=1, description="samples in memory; the oldest are dropped and counted beyond it")
    write_batch: int = Field(256, ge=1)
    write_interval_seconds: float = Field(
        1.0,
        gt=0,
        description="what waits is written so often; more often costs the host more, less often keeps more in memory, "
        "where a host that is killed loses it",
    )
    priority_seconds: float = Field(
        3600.0,
        ge=0,
        description="what screens find most unusual is verbalized as if it had come so many seconds earlier; whatever "
        "has waited longer goes before it",
    )


class WorkerConfig(Section):
    """Who verbalizes."""

    mode: WorkerMode = "process"
    lease_seconds: float = Field(120.0, gt=0)
    poll_seconds: float = Field(0.2, gt=0)
    max_attempts: int = Field(3, ge=1)
    metrics_port: int | None = Field(None, ge=0, le=65535)


SECRET_OUTLETS: Final[set[str]] = {"webhook", "alertmanager", "notify"}
"""Keys of ``alerts`` that may hold tokens: never stored with a run, and never said."""
_TRACE_UIS: Final = {"phoenix", "langfuse"}
"""Keys of ``alerts`` that hold no token where they are valid, and perhaps where they are not."""


class AlertConfig(Section):
    """What alerts may do."""

    stop_on: Severity | None = Field(None, description="stop training at an alert of this severity or above")
    log: bool = Field(default=True, description="log alerts in the host process")
    webhook: str | None = Field(None, description="URL that gets each alert as JSON (Alertmanager webhook, version 4)")
    alertmanager: tuple[str, ...] = Field(
        (),
        description="base URLs of Alertmanagers, all replicas of a cluster: alerts are posted there, and posted again "
        "while they fire",
    )
    notify: tuple[str, ...] = Field(
        (), description="Apprise URLs (slack://, pagerduty://, mailtos://, discord:// and the like) that get alerts"
    )
    phoenix: PhoenixConfig | None = Field(None, description="Phoenix, whose spans are annotated with findings")
    langfuse: LangfuseConfig | None = Field(None, description="Langfuse, whose observations get findings as scores")
    trackers: TrackerConfig = Field(default_factory=TrackerConfig)
    stale_seconds: float = Field(
        14_400.0,
        ge=60.0,
        description="alerts of a run that has not ended resolve as stale when nothing of it was read for so long "
        "(its host was killed, perhaps)",
    )

    @field_validator("alertmanager", "notify", mode="before")
    @classmethod
    def _one_address_is_a_list(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class TelemetryConfig(Section):
    """OpenTelemetry behaviour."""

    enabled: bool = True
    parent: Literal["link", "child"] = Field("link", description="how late spans relate to their source")


class MonitorConfig(Section):
    """Everything, as one frozen object."""

    database: str = Field("sqlite:///nla-monitor.db", description="SQLAlchemy URL, or a path of an SQLite file")
    run_name: str | None = None
    nla: NLAConfig = Field(default_factory=NLAConfig)
    capture: CaptureConfig = Field(default_factory=CaptureConfig)
    source: SourceConfig | None = Field(None, description="of calls that are answered elsewhere")
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


_NLA_KEYS = ("av", "ar", "device", "revision", "batch_size", "engine", "url", "dialect", "question", "base")


def overridden(config: MonitorConfig, overrides: Mapping[str, Any]) -> MonitorConfig:
    """A config with the keyword arguments of ``Monitor`` laid over it.

    Raises:
        ConfigError: as ``load_config``.
    """
    if not overrides:
        return config
    data = config.model_dump()
    for key, value in overrides.items():
        if key in _NLA_KEYS:
            data["nla"][key] = str(value) if isinstance(value, Path) else value
        elif key == "layer":
            data["capture"]["layer"] = value
        elif key == "worker" and isinstance(value, str):
            data["worker"]["mode"] = value
        elif key == "stop_on":
            data["alerts"]["stop_on"] = value
        elif isinstance(value, Mapping) and isinstance(data.get(key), dict):
            data[key] |= dict(value)
        else:
            data[key] = value
    return load_config(data)


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
    if item["type"] == "secret":
        return f"{key}: {item['msg']}"
    if key.endswith("_env") and item["type"] != "extra_forbidden":  # perhaps the secret itself, which is not repeated
        return f"{key}: must be the name of an environment variable, not what it holds"
    # Of a section: what stands there may hold secrets, and is not repeated.
    if item["type"] == "model_type":
        return f"{key}: must be a mapping of keys to values"
    if item["type"] == "missing":
        return f"{key}: is required"
    if item["type"] != "extra_forbidden":
        # A list or mapping in the wrong place may hold a URL with its password.
        unsaid = _is_secret(item["loc"]) or not isinstance(item["input"], str | int | float | None)
        return f"{key}: {item['msg']}" if unsaid else f"{key} = {item['input']!r}: {item['msg']}"
    section: type[BaseModel] = MonitorConfig
    for part in item["loc"][:-1]:
        if isinstance(part, int):  # of a list of sections
            continue
        annotation = section.model_fields[part].annotation
        for kind in (annotation, *get_args(annotation)):  # a section, or one that may be null
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                section = kind
    nearest = difflib.get_close_matches(str(item["loc"][-1]), section.model_fields, n=1, cutoff=0.4)
    valid = f"did you mean {nearest[0]!r}?" if nearest else f"valid keys: {', '.join(section.model_fields)}"
    return f"unknown key {key!r}; {valid}"


def _is_secret(place: Sequence[int | str]) -> bool:
    """Whether what stands there may hold a token: addresses of alerts, and whatever holds them."""
    return place[:1] == ("alerts",) and (len(place) < 2 or place[1] in SECRET_OUTLETS | _TRACE_UIS)


def _absolute_paths(config: MonitorConfig, base: Path) -> MonitorConfig:
    """Relative rule files, checkpoints and the SQLite file are meant relative to the config file."""

    def resolve(value: str) -> str:
        candidate = base / value
        return str(candidate) if not Path(value).is_absolute() and candidate.exists() else value

    places = {"av": resolve(config.nla.av)} | {
        name: resolve(value) for name in ("ar", "base") if (value := getattr(config.nla, name))
    }
    if config.nla.denominator != "training":  # a folder of that name is not meant
        places["denominator"] = resolve(config.nla.denominator)
    nla = config.nla.model_copy(update=places)
    rules = tuple(resolve(rule) for rule in config.rules)
    screens = tuple(
        screen if screen.file is None else screen.model_copy(update={"file": resolve(screen.file)})
        for screen in config.capture.screens
    )
    capture = config.capture.model_copy(update={"screens": screens})
    source = config.source
    if source is not None:
        folders = {name: resolve(value) for name in ("model", "folder") if (value := getattr(source, name))}
        source = source.model_copy(update=folders)
    changed = {"nla": nla, "rules": rules, "capture": capture, "source": source}
    return absolute_database(config, base).model_copy(update=changed)


def absolute_database(config: MonitorConfig, base: Path | None) -> MonitorConfig:
    """The config with the path of its SQLite file, if it has one, taken relative to ``base`` (None: left as it is)."""
    prefix, database = "sqlite:///", config.database
    file = database.removeprefix(prefix)
    if base is None or not database.startswith(prefix) or file.startswith((":memory:", "file:", "?")) or not file:
        return config
    return config.model_copy(update={"database": f"{prefix}{base / file}"})
