"""``nla-monitor worker``: read what monitored runs left in the database."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nla_monitor.cli.common import DATABASE_VARIABLE, JsonOption, database_url, print_json
from nla_monitor.config import MonitorConfig, load_config

if TYPE_CHECKING:
    from nla_monitor.worker import Worker


def worker(
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="The monitor's YAML; options override it.")
    ] = None,
    database: Annotated[
        str | None, typer.Option(envvar=DATABASE_VARIABLE, metavar="URL", help="Database to work on.")
    ] = None,
    av: Annotated[str | None, typer.Option(help="AV checkpoint: folder, hub id or organism:planted/av.")] = None,
    ar: Annotated[str | None, typer.Option(help="AR checkpoint; 'none' reads without fidelity.")] = None,
    device: Annotated[str | None, typer.Option(help="torch device: cpu, cuda, cuda:1.")] = None,
    rules: Annotated[
        list[str] | None, typer.Option(metavar="RULES", help="Pack, rule file or folder; may be repeated.")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Read what waits now, then end.")] = False,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve Prometheus metrics at /metrics; 0 takes a free port.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Verbalize, score, match and alert. SIGTERM or Ctrl-C: the batch in hand is finished first.

    Any number of workers may share a database. Metrics are served on localhost; OTEL_EXPORTER_PROMETHEUS_HOST=0.0.0.0
    lets another machine scrape them. Traces and events go where the OTEL_* variables say; what of them was exported and
    what was lost is said at the end.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    settings = settings_of(config, database=database, av=av, ar=ar, device=device, rules=rules, port=metrics_port)
    started, done = time.monotonic(), 0
    from nla_monitor.telemetry import sdk

    with sdk.configure("nla-monitor-worker", settings.worker.metrics_port) as handle:
        _calm(settings)
        from nla_monitor.worker import Worker

        if handle.metrics_port is not None:
            sys.stderr.write(f"metrics: http://localhost:{handle.metrics_port}/metrics\n")
        with _stopping() as stop:
            reader = Worker(settings, telemetry=handle.telemetry(settings.telemetry))
            sys.stderr.write(f"worker ready: {', '.join(settings.rules)}\n")
            sys.stderr.flush()
            try:
                done = _work(reader, stop, once=once)
                if once and (left := reader.untold()):
                    sys.stderr.write(f"{left} message(s) about alerts wait; the next worker here sends them\n")
            finally:
                reader.close()
    if as_json:
        seconds = round(time.monotonic() - started, 2)
        print_json({"read": done if once else None, "seconds": seconds, "telemetry": handle.counts})
    elif once:
        sys.stdout.write(f"{done} samples read\n")


def settings_of(
    config: Path | None,
    *,
    database: str | None = None,
    av: str | None = None,
    ar: str | None = None,
    device: str | None = None,
    rules: list[str] | None = None,
    port: int | None = None,
) -> MonitorConfig:
    """The config file (or the defaults) with the command line's options over it.

    Raises:
        ConfigError: the file or an option is wrong.
    """
    base = load_config(config)
    nla: dict[str, Any] = {"av": av, "device": device}
    data = base.model_dump()
    data["nla"] |= {key: value for key, value in nla.items() if value is not None}
    if ar is not None:
        data["nla"]["ar"] = None if ar.lower() == "none" else ar
    if database is not None:
        data["database"] = database_url(database)
    if rules:
        data["rules"] = rules
    if port is not None:
        data["worker"]["metrics_port"] = port
    return load_config(data)


def _calm(settings: MonitorConfig) -> None:
    """Progress bars of model loading do not belong into a service's log; threads as the config says."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers does not annotate it
    if settings.nla.threads is not None or settings.nla.device.startswith("cpu"):
        torch.set_num_threads(settings.nla.threads or 1)


def _work(reader: Worker, stop: threading.Event, *, once: bool) -> int:
    """Run until stopped; with ``once``, until nothing waits. Returns how many samples ``once`` read."""
    if not once:
        reader.run(stop)
        return 0
    done = 0
    while not stop.is_set():
        batch = reader.run_once()
        if batch == 0:
            break
        done += batch
    return done


@contextmanager
def _stopping() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; a second signal ends the process at once (the lease will run out)."""
    stop = threading.Event()

    def ask(number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        sys.stderr.write(f"{signal.Signals(number).name}: finishing the batch in hand; again to end at once\n")

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
