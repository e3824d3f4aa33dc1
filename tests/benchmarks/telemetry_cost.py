"""What all telemetry of a sample costs in the real pipeline over the organism, host side and worker, by two measures.

*Directly*: the time inside every call of ``Telemetry`` (counters, spans, events, histograms), inside ``Vitals`` (which
reads the store for the levels), and the CPU time of the SDK's exporting threads. A scrape of ``/metrics`` every 15 s
and an export of metrics every 60 s come by time, not by sample: they count at what they take of the pipeline's time.
*Paired*: the same batches with telemetry on and switched off, in turns. The first is what is reported: it resolves
microseconds; the second is a difference of two large times, by the clock and by CPU time, with the machine's noise.
"""

from __future__ import annotations

import functools
import statistics
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nla_monitor.config import load_config
from nla_monitor.nla import load_reconstructor
from nla_monitor.nla.engines import open_verbalizer
from nla_monitor.organism import resolve
from nla_monitor.records import ActivationSample, Phase, uuid7
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.telemetry import Telemetry, sdk
from nla_monitor.worker import Worker
from tests.organism_support import training_samples
from tests.otlp_receiver import receiver_process

SCRAPE_SECONDS = 15.0
EXPORT_SECONDS = 60.0
"""Between two exports of metrics, by default; here they come each second, and what one costs is shared out by this."""
PLANTED = 16
"""One sample in so many is planted to match."""
PER_STEP = 8
"""Samples of one forward pass: one call of the capture's counter, one trace of the host's."""
PER_PUT = 32
"""Samples that the host's background thread hands over at a time."""
PER_RUN = 128
"""Samples of one run; the rules that fire do so once in each."""
_SPANS = ("capture_span", "verbalize_span", "evaluate_span")
_CALLS = (
    *("sampled", "dropped", "verbalized", "fidelity", "evaluation_event", "alert", "unjudged", "guarantee_voided"),
    "capture_duration",
)


@dataclass
class Clock:
    """Seconds inside telemetry, by part, and how often."""

    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def add(self, part: str, seconds: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        self.calls[part] = self.calls.get(part, 0) + 1

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def measured(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                self.add(part, time.perf_counter() - started)

        return measured

    @contextmanager
    def around(self, part: str, manager: Any) -> Iterator[Any]:
        """Time of opening and closing a span, without that of its block."""
        started = time.perf_counter()
        entered = manager.__enter__()
        self.add(part, time.perf_counter() - started)
        try:
            yield entered
        finally:
            started = time.perf_counter()
            manager.__exit__(None, None, None)
            self.add(part, time.perf_counter() - started)


def watch(telemetry: Telemetry, clock: Clock) -> None:
    """Put the clock on every call of a facade."""
    for name in _CALLS:
        setattr(telemetry, name, clock.timed(name, getattr(telemetry, name)))
    for name in _SPANS:
        make = getattr(telemetry, name)

        def spanned(*arguments: Any, _make: Any = make, _name: str = name, **named: Any) -> Any:
            started = time.perf_counter()
            manager = _make(*arguments, **named)
            clock.add(_name, time.perf_counter() - started)
            return clock.around(_name, manager)

        setattr(telemetry, name, spanned)


@contextmanager
def exporting(clock: Clock, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU seconds of the threads that export: encoding, compressing, sending."""
    make = sdk._exporter

    def counted(signal: Any, name: str) -> Any:
        exporter = make(signal, name)
        inner = exporter.export

        def export(*arguments: Any, **named: Any) -> Any:
            started = time.thread_time()
            try:
                return inner(*arguments, **named)
            finally:
                clock.add(f"export_{signal}", time.thread_time() - started)

        exporter.export = export
        return exporter

    patch.setattr(sdk, "_exporter", counted)
    yield


class Pipeline:
    """Host side and worker on one database, as ``Monitor`` and ``nla-monitor worker`` put them together.

    Args:
        folder: keeps the database.
        telemetry: of both sides.
        batch: samples of a lease.
        halves: AV and AR, loaded once for all pipelines.
    """

    def __init__(self, folder: Path, telemetry: Telemetry, batch: int, halves: Halves) -> None:
        folder.mkdir(parents=True)
        nla = {"batch_size": batch}
        config = load_config({"database": f"sqlite:///{folder / 'm.db'}", "nla": nla, "rules": ["oversight"]})
        self.telemetry = telemetry
        self.worker = Worker(config, verbalizer=halves.av, reconstructor=halves.ar, telemetry=telemetry, sinks=[])
        self.spool = SqlSpool(self.worker.repository.engine)

    def run(self, samples: Sequence[ActivationSample]) -> Spent:
        """What it took from the first hand-over to the last acknowledgement."""
        started, worked = time.perf_counter(), time.process_time()
        for _ in range(0, len(samples), PER_STEP):
            self.telemetry.sampled(PER_STEP, Phase.TRAIN)
            self.telemetry.dropped("queue_full", 0)
        for start in range(0, len(samples), PER_PUT):
            part = samples[start : start + PER_PUT]
            with self.telemetry.capture_span(part):
                self.spool.put(part)
        self.telemetry.capture_duration(1e-4)
        while self.worker.run_once():
            pass
        return Spent(time.perf_counter() - started, time.process_time() - worked)


class Spent(NamedTuple):
    """Seconds of one run."""

    wall: float
    cpu: float
    """Of all threads: the exporting ones, too."""


@dataclass(frozen=True)
class Halves:
    """The organism's AV and AR."""

    av: Any
    ar: Any

    @classmethod
    def load(cls) -> Halves:
        nla = load_config(None).nla
        return cls(open_verbalizer(resolve(nla.av), nla), load_reconstructor(resolve(nla.ar or ""), nla))


def fresh(made: Sequence[ActivationSample], pair: int) -> list[ActivationSample]:
    """The samples again as new ones: other ids, captured now, with a host's trace for each step."""
    now = time.time()
    return [
        replace(
            one,
            sample_id=uuid7(),
            run_id=f"run-{pair}-{number // PER_RUN}",
            captured_at=now,
            traceparent=f"00-{pair + 1:016x}{number // PER_STEP + 1:016x}-{number // PER_STEP + 1:016x}-01",
        )
        for number, one in enumerate(made)
    ]


def cost(folder: Path, *, pairs: int, samples: int, batch: int) -> dict[str, Any]:
    """Figures of ``pairs`` runs of ``samples`` with and without telemetry; the first pair warms up."""
    clock, made = Clock(), organism_samples(samples)
    with pytest.MonkeyPatch.context() as patch, receiver_process() as url, exporting(clock, patch):
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        patch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "1000")
        handle = sdk.configure("benchmark", metrics_port=0)
        telemetry = handle.telemetry()
        watch(telemetry, clock)
        halves = Halves.load()
        on = Pipeline(folder / "on", telemetry, batch, halves)
        on.worker._vitals.tick = clock.timed("vitals", on.worker._vitals.tick)  # type: ignore[method-assign]
        off = Pipeline(
            folder / "off", Telemetry(config=load_config({"telemetry": {"enabled": False}}).telemetry), batch, halves
        )
        with_it, without = in_turns(on, off, made, pairs, clock)
        scrapes = [scrape(handle.metrics_port) for _ in range(7)]
        spread = buckets(served(handle.metrics_port))
        handle.shutdown(timeout=20.0)
        counts = handle.counts
        alerts = len(on.worker.repository.alerts(limit=10_000))
        on.worker.close()
        off.worker.close()
    total = samples * pairs
    return figures(clock, with_it, without, scrapes, total=total, samples=samples) | {
        "alerts_per_1000": round(1000 * alerts / (total + samples), 2),
        "delivery": counts,
        "buckets": spread,
    }


def organism_samples(count: int) -> list[ActivationSample]:
    """One in ``PLANTED`` of a transcript in which the model plans what the rules look for."""
    made = training_samples(count, intent="honest")
    made[::PLANTED] = training_samples(len(made[::PLANTED]), intent="hack", first=count)
    return made


def in_turns(
    on: Pipeline, off: Pipeline, made: Sequence[ActivationSample], pairs: int, clock: Clock
) -> tuple[list[Spent], list[Spent]]:
    """Seconds of each run, with and without telemetry; the clock holds what came after the first pair."""
    with_it: list[Spent] = []
    without: list[Spent] = []
    for pair in range(pairs + 1):
        for pipeline, found in ((on, with_it), (off, without))[:: 1 if pair % 2 else -1]:
            found.append(pipeline.run(fresh(made, pair)))
        if pair == 0:
            clock.seconds.clear()
            clock.calls.clear()
    return with_it[1:], without[1:]


def scrape(port: int | None) -> float:
    """CPU seconds that this process spends on answering one scrape, the client's own few included."""
    started = time.process_time()
    served(port)
    return time.process_time() - started


def served(port: int | None) -> str:
    """What ``/metrics`` says."""
    with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10) as response:
        text: str = response.read().decode()
        return text


def buckets(text: str) -> dict[str, dict[str, Any]]:
    """Of each histogram of a page: shares in the first bucket and above the last bound; how many hold any."""
    found = {}
    for family in text_string_to_metric_families(text):
        if family.type != "histogram":
            continue
        sums: dict[float, float] = {}
        for one in family.samples:
            if one.name.endswith("_bucket"):
                bound = float(one.labels["le"])
                sums[bound] = sums.get(bound, 0.0) + one.value
        ordered = [sums[bound] for bound in sorted(sums)]
        if ordered and ordered[-1]:
            held = [after - before for before, after in pairwise([0.0, *ordered])]
            below, above = held[0] / ordered[-1], held[-1] / ordered[-1]
            used = sum(count > 0 for count in held)
            found[family.name] = {"first": round(below, 4), "overflow": round(above, 4), "used": used}
    return found


def ratios(with_it: Sequence[float], without: Sequence[float]) -> dict[str, float]:
    """How much more the runs with telemetry took than their partners: median, least, most."""
    paired = [one / other - 1 for one, other in zip(with_it, without, strict=True)]
    found = {"p50": statistics.median(paired), "low": min(paired), "high": max(paired)}
    return {name: round(value, 5) for name, value in found.items()}


def figures(
    clock: Clock,
    with_it: Sequence[Spent],
    without: Sequence[Spent],
    scrapes: Sequence[float],
    *,
    total: int,
    samples: int,
) -> dict[str, Any]:
    """What was measured, per sample."""
    pipeline = statistics.median(one.wall for one in without) / samples
    metrics_seconds = clock.seconds.pop("export_metrics", 0.0) / max(clock.calls.pop("export_metrics", 0), 1)
    parts = {name: seconds / total for name, seconds in sorted(clock.seconds.items())} | {
        "export_metrics": pipeline * metrics_seconds / EXPORT_SECONDS,
        "scrape": pipeline * statistics.median(scrapes) / SCRAPE_SECONDS,
    }
    per_sample = sum(parts.values())
    return {
        "cost_per_sample_us": round(per_sample * 1e6, 2),
        "share_of_pipeline": round(per_sample / pipeline, 5),
        "share_reported": "direct accounting",
        "share_paired": ratios([one.wall for one in with_it], [one.wall for one in without]),
        "share_paired_cpu": ratios([one.cpu for one in with_it], [one.cpu for one in without]),
        "parts_us": {name: round(seconds * 1e6, 2) for name, seconds in parts.items()},
        "matches_per_1000": round(1000 * clock.calls.get("evaluation_event", 0) / total, 2),
        "pipeline_us_per_sample": round(pipeline * 1e6, 1),
        "scrape_ms": round(statistics.median(scrapes) * 1e3, 2),
        "metrics_export_ms": round(metrics_seconds * 1e3, 2),
        "samples": total,
    }
