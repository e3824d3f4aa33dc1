"""``nla-monitor doctor``: is this sidecar, model, device and database usable, and if not, why not?"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from nla_monitor.cli.common import (
    DATABASE_VARIABLE,
    JsonOption,
    console,
    print_json,
    safe,
    sqlite_file,
)
from nla_monitor.config import MonitorConfig, NLAConfig, load_config
from nla_monitor.errors import CheckpointError, ConfigError, NLAMonitorError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nla_monitor.alerts.span_sink import SpanSink
    from nla_monitor.nla.sidecar import Sidecar

Verdict = Literal["ok", "note", "problem"]

_PACKAGES: Final = ("torch", "transformers", "pydantic", "sqlalchemy", "alembic", "opentelemetry-sdk", "typer")
_EXTRAS: Final = {
    "trainer": ("accelerate", "transformers' Trainer"),
    "langchain": ("langchain_core", "LangChain agents"),
    "prometheus": ("prometheus_client", "/metrics"),
    "otlp": ("opentelemetry.exporter.otlp.proto.http", "sending telemetry by OTLP"),
    "otlp-grpc": ("opentelemetry.exporter.otlp.proto.grpc", "the same over gRPC"),
    "postgres": ("psycopg", "PostgreSQL"),
    "semantic": ("sentence_transformers", "rules with semantic selections"),
    "judge": ("httpx", "rules with an LLM judge"),
    "engines": ("httpx", "an AV that vLLM or SGLang serves"),
    "adapters": ("peft", "AV and AR as LoRA adapters"),
    "quantized": ("bitsandbytes", "4-bit weights, on a GPU"),
    "parquet": ("pyarrow", "Parquet files"),
    "notify": ("apprise", "alerts by Slack, PagerDuty, e-mail, Discord and others"),
}
_STYLES: Final = {"ok": "green", "note": "yellow", "problem": "bold red"}


@dataclass(frozen=True, slots=True)
class Result:
    """One thing that was looked at."""

    about: str
    verdict: Verdict
    detail: str
    """What was found; for a problem, what helps."""


def doctor(
    config: Annotated[Path | None, typer.Option("--config", "-c", metavar="FILE", help="The monitor's YAML.")] = None,
    av: Annotated[str | None, typer.Option(help="AV checkpoint: folder, hub id or organism:planted/av.")] = None,
    ar: Annotated[str | None, typer.Option(help="AR checkpoint; 'none' for none.")] = None,
    model: Annotated[str | None, typer.Option(help="The model to monitor: does the NLA fit it?")] = None,
    dialect: Annotated[
        str | None, typer.Option(help="How the AV takes vectors: auto, replace, add, depth, oracle.")
    ] = None,
    activations: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Real activations [n, d_model], .npy or .safetensors, for the self-test."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="torch device: cpu, cuda, cuda:1.")] = None,
    database: Annotated[
        str | None, typer.Option(envvar=DATABASE_VARIABLE, metavar="URL", help="Database to look at.")
    ] = None,
    self_test: Annotated[
        bool, typer.Option("--self-test/--no-self-test", help="Load AV and AR and let them read random vectors.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Check what a run needs, one by one; exit 1 when something is not usable. Changes nothing."""
    from nla_monitor.cli.worker_command import settings_of

    results = list(_installation())
    try:
        settings = _with_dialect(settings_of(config, database=database, av=av, ar=ar, device=device), dialect)
    except ConfigError as error:
        results.append(Result("config", "problem", str(error)))
    else:
        results += _examine(settings, model, activations, self_test=self_test)
    _report(results, as_json=as_json)
    if any(result.verdict == "problem" for result in results):
        raise typer.Exit(1)


def _with_dialect(settings: MonitorConfig, dialect: str | None) -> MonitorConfig:
    if dialect is None:
        return settings
    data = settings.model_dump()
    return load_config(data | {"nla": data["nla"] | {"dialect": dialect}})


def _examine(
    settings: MonitorConfig, model: str | None, activations: Path | None, *, self_test: bool
) -> Iterator[Result]:
    device = _device(settings.nla.device)
    yield device
    yield _guarded("database", lambda: _database(settings.database))
    yield _guarded("rules", lambda: _rules(settings.rules))
    yield from _outlets(settings)
    sidecars = [_sidecar("av", settings.nla.av, settings.nla)]
    if settings.nla.ar is not None:
        sidecars.append(_sidecar("ar", settings.nla.ar, settings.nla))
    yield from (result for result, _ in sidecars)
    usable = all(sidecar is not None for _, sidecar in sidecars)
    found = [sidecar for _, sidecar in sidecars if sidecar is not None]
    if len(found) == 2:
        yield _pair(*found)
    if model is not None and sidecars[0][1] is not None:
        yield _guarded("model", lambda: _model(model, sidecars[0][1]))
    if self_test and usable and device.verdict != "problem":
        yield from _self_test(settings, activations)


def _guarded(about: str, look: Callable[[], Result]) -> Result:
    """A check whose errors of ours are its result."""
    try:
        return look()
    except NLAMonitorError as error:
        return Result(about, "problem", str(error))


# -- installation -------------------------------------------------------------------------------------------------


def _installation() -> Iterator[Result]:
    from nla_monitor import __version__

    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    yield Result("versions", "ok", f"nla-monitor {__version__}, Python {platform.python_version()}, {versions}")
    for extra, (module, purpose) in _EXTRAS.items():
        if _importable(module):
            yield Result(f"extra {extra}", "ok", f"present ({purpose})")
        else:
            yield Result(f"extra {extra}", "note", f"absent; for {purpose}: pip install 'nla-monitor[{extra}]'")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(absent)"


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is absent
        return False


def _device(name: str) -> Result:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        return Result("device", "problem", f"{name!r} is no torch device ({text}); use cpu, cuda or cuda:N")
    if device.type == "cuda":
        return _cuda(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        return Result("device", "problem", "mps is not available on this machine; use cpu")
    return Result(
        "device", "ok", f"{device.type}, {os.cpu_count()} processors, {torch.get_num_threads()} torch threads"
    )


def _cuda(device: object) -> Result:
    import torch

    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        return Result("device", "problem", f"{device} was asked for, but torch sees no GPU (it is {built}); use cpu")
    count, index = torch.cuda.device_count(), getattr(device, "index", None) or 0
    if index >= count:
        return Result(
            "device", "problem", f"{device} was asked for, but there are only {count} GPUs (0 to {count - 1})"
        )
    free, total = torch.cuda.mem_get_info(index)
    name = torch.cuda.get_device_name(index)
    return Result("device", "ok", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")


# -- database and rules -------------------------------------------------------------------------------------------


def _database(url: str) -> Result:
    from nla_monitor.store import session
    from nla_monitor.store.repository import Repository

    file = sqlite_file(url)
    if file is not None and not file.exists():
        folder = file.resolve().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            return Result("database", "problem", f"{file} cannot be made: {folder} is no writable folder")
        return Result("database", "note", f"{file} does not exist yet; the first run makes it")
    engine = session.open_engine(url, read_only=True)
    try:
        status = session.check(engine)
        if not status.ok:
            return Result("database", "problem", status.message)
        counts = Repository(engine).reading_counts()
    finally:
        engine.dispose()
    told = f"{status.message}; {counts.samples} samples, {counts.waiting} waiting, {counts.alerts} alerts"
    if file is not None and not (os.access(file, os.W_OK) and os.access(file.resolve().parent, os.W_OK)):
        return Result("database", "problem", f"{told}; but {file} or its folder is not writable for this user")
    failed = f"; {counts.failed} samples were given up, see: nla-monitor samples" if counts.failed else ""
    return Result("database", "note" if failed else "ok", told + failed)


def _rules(names: tuple[str, ...]) -> Result:
    from nla_monitor.rules import load_rules

    rules = load_rules(names)
    rules.verify()
    return Result("rules", "ok", f"{len(rules)} rules from {', '.join(names)}, their own tests pass")


def _outlets(settings: MonitorConfig) -> Iterator[Result]:
    """Where alerts go: whether each can be made, and whether the trace UIs answer. Nothing is sent."""
    from nla_monitor.alerts.span_sink import SpanSink
    from nla_monitor.outlets import sinks_of

    try:
        sinks = sinks_of(settings)
    except NLAMonitorError as error:
        yield Result("alerts", "problem", str(error))
        return
    yield Result("alerts", "ok", f"go to {', '.join(sink.name for sink in sinks)}")
    for sink in sinks:
        if isinstance(sink, SpanSink):
            yield _guarded(f"alerts.{sink.name}", partial(_answers, sink))


def _answers(sink: SpanSink) -> Result:
    return Result(f"alerts.{sink.name}", "ok", f"{sink.check()} answers and takes the keys")


# -- checkpoints --------------------------------------------------------------------------------------------------


def _sidecar(role: Literal["av", "ar"], name: str, config: NLAConfig) -> tuple[Result, Sidecar | None]:
    from nla_monitor.nla.sidecar import load_sidecar
    from nla_monitor.organism import resolve

    try:
        sidecar = load_sidecar(resolve(name), role, revision=config.revision, config=config)
    except (CheckpointError, ConfigError) as error:
        return Result(role, "problem", str(error)), None
    layer = f"block {sidecar.layer}" if sidecar.layer is not None else "no layer named"
    dialect = f", dialect {sidecar.dialect}" if sidecar.dialect is not None else ""
    return Result(role, "ok", f"{name}: d_model {sidecar.d_model}, {layer}{dialect}"), sidecar


def _pair(av: Sidecar, ar: Sidecar) -> Result:
    if av.d_model != ar.d_model:
        return Result("pair", "problem", f"d_model differs: AV {av.d_model}, AR {ar.d_model}; they are no pair")
    if av.layer is not None and ar.layer is not None and av.layer != ar.layer:
        return Result("pair", "problem", f"layer differs: AV block {av.layer}, AR block {ar.layer}; they are no pair")
    return Result("pair", "ok", "AV and AR agree on width and layer")


def _model(name: str, sidecar: Sidecar | None) -> Result:
    from nla_monitor.nla.sidecar import config_width, read_model_config
    from nla_monitor.organism import resolve

    if sidecar is None:
        return Result("model", "problem", "the AV's sidecar is not usable")
    folder = resolve(name)
    if not folder.is_dir():
        return Result("model", "problem", f"{folder} is no folder; give a local checkpoint (config.json is enough)")
    config = read_model_config(folder)
    width = config_width(config)
    if width != sidecar.d_model:
        return Result(
            "model",
            "problem",
            f"its residual stream has d_model {width}, the AV reads {sidecar.d_model}: another model's",
        )
    depth = next((int(config[key]) for key in ("num_hidden_layers", "n_layer") if key in config), None)
    if depth is not None and sidecar.layer is not None and sidecar.layer >= depth:
        return Result(
            "model",
            "problem",
            f"it has {depth} blocks (0 to {depth - 1}), the AV reads the output of block {sidecar.layer}",
        )
    kind = config.get("model_type", "unknown type")
    return Result("model", "ok", f"{kind}, d_model {width}, {depth} blocks: the AV fits its shape")


def _activations(file: Path) -> npt.NDArray[np.float32]:
    """Activations ``[n, d_model]`` from ``.npy``, or from the only tensor of ``.safetensors``.

    Raises:
        ConfigError: the file cannot be read, or holds no such array.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(file) if file.suffix == ".safetensors" else {"": np.load(file, allow_pickle=False)}
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise ConfigError(f"activations {file} cannot be read: {error}. Save them as .npy or .safetensors.") from error
    shapes = [array.shape for array in arrays.values()]
    if len(shapes) != 1 or len(shapes[0]) != 2:
        raise ConfigError(f"activations {file} must hold one array [n, d_model], found shapes {shapes}")
    return np.asarray(next(iter(arrays.values())), dtype=np.float32)


def _self_test(settings: MonitorConfig, activations: Path | None) -> Iterator[Result]:
    import torch
    import transformers

    from nla_monitor.nla import load_reconstructor, load_verbalizer, run_selftest
    from nla_monitor.organism import resolve

    if settings.nla.engine != "transformers":
        yield _guarded("engine", lambda: _engine(settings.nla))
        return
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers does not annotate it
    try:
        known = None if activations is None else _activations(activations)
        verbalizer = load_verbalizer(resolve(settings.nla.av), settings.nla)
        ar = settings.nla.ar
        reconstructor = load_reconstructor(resolve(ar), settings.nla) if ar is not None else None
        report = run_selftest(verbalizer, reconstructor, activations=known)
    except NLAMonitorError as error:
        yield Result("self-test", "problem", str(error))
        return
    except torch.OutOfMemoryError:
        yield Result(
            "self-test", "problem", f"{settings.nla.device} has not enough memory for AV and AR; see nla.device"
        )
        return
    for check in report.checks:
        bad: Verdict = "note" if check.advisory else "problem"
        yield Result(f"self-test {check.name}", "ok" if check.ok else bad, check.detail)
    yield Result("self-test", "ok" if report.ok else "problem", report.verdict)


def _engine(nla: NLAConfig) -> Result:
    """Whether the server or plug-in that runs the AV can be used."""
    from nla_monitor.nla.base import Checkable
    from nla_monitor.nla.engines import open_verbalizer, release
    from nla_monitor.organism import resolve

    verbalizer = open_verbalizer(resolve(nla.av), nla)
    if not isinstance(verbalizer, Checkable):
        return Result("engine", "ok", f"{nla.engine}: d_model {verbalizer.d_model}, block {verbalizer.layer}")
    try:
        found = verbalizer.check()
    finally:
        release(verbalizer)
    return Result("engine", "ok", f"{nla.engine} at {nla.url or 'no url'}: {found}")


# -- output -------------------------------------------------------------------------------------------------------


def _report(results: list[Result], *, as_json: bool) -> None:
    problems = sum(result.verdict == "problem" for result in results)
    if as_json:
        print_json({"ok": problems == 0, "checks": results})
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=24)
    table.add_column(overflow="fold", ratio=1)
    for result in results:
        style = _STYLES[result.verdict]
        table.add_row(Text(result.verdict, style=style), result.about, Text(safe(result.detail, one_line=True)))
    console().print(table)
    sys.stdout.write("Everything is usable.\n" if not problems else f"{problems} problems.\n")
