"""Ten thousand faults of ours in one training run: it finishes with the same losses, and every fault is counted."""

from __future__ import annotations

import functools
import logging
import os
import random
import signal
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import exc
from transformers import Qwen2Config, Qwen2ForCausalLM

from nla_monitor import Monitor
from nla_monitor.capture import assembly, capture, held, planning, sampling, staging, tap
from nla_monitor.spool import sql
from nla_monitor.supervisor import MAX_RESTARTS
from tests.benchmarks.capture_arms import write_sidecar

FAULTS = 10_000
WIDTH, BLOCKS, VOCAB, BATCH, LENGTH = 16, 2, 32, 2, 8
TOKENS, QUEUE = 2, 32
CALM_STEPS = 5
JUMP_SECONDS = 1e6

HOST = ("capture.plan", "capture.tap", "capture.stage")
CHOICE = "choice"
"""In the host's thread where a forward is chosen from at once, in ours where its rows are held."""
# Where it breaks, where the guard must count it, and how often in a hundred calls.
PLACES: tuple[tuple[Any, str, str, int], ...] = (
    (tap._BeginHook, "bind", "capture.plan", 40),
    (capture.Capture, "begin", "capture.plan", 40),
    (sampling, "choose", CHOICE, 10),
    (tap.Slots, "plan", "capture.plan", 10),
    (held.Inputs, "copied", "capture.plan", 10),
    (capture.Capture, "tap", "capture.tap", 20),
    (tap.Slots, "gather", "capture.tap", 10),
    (held.HeldRows, "gather", "capture.tap", 10),
    (capture.Capture, "end", "capture.stage", 40),
    (planning, "to_host", "capture.stage", 10),
    (staging.Stager, "put_nowait", "capture.stage", 10),
    (assembly.Assembler, "build", "capture.build", 20),
    (sql, "sample_row", "capture.sink", 5),
)


class InjectedError(RuntimeError):
    """What our own functions raise here."""


def disk_error() -> exc.DBAPIError:
    """What the driver raises when the disk fails."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = "SQLITE_IOERR_WRITE"  # type: ignore[misc]  # SQLite itself sets it
    return exc.OperationalError("INSERT", {}, error)


class Saboteur:
    """Breaks functions of ours at random (seeded), and remembers how often, by the place that must count it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self._random = random.Random(4)
        self._lock = threading.Lock()
        self.armed = False
        self.injected: Counter[str] = Counter()
        self.staged = 0
        """Samples that reached the queue."""

    def sometimes(self, chance: float) -> bool:
        """Whether a fault happens now."""
        with self._lock:
            return self.armed and self._random.random() < chance

    def break_(
        self, owner: Any, name: str, where: str, chance: float, error: Callable[[], Exception] = InjectedError
    ) -> None:
        """Let ``owner.name`` raise with this chance."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def broken(*args: Any, **kwargs: Any) -> Any:
            if self.sometimes(chance):
                host = threading.current_thread() is threading.main_thread()
                place = ("capture.plan" if host else "capture.build") if where == CHOICE else where
                with self._lock:
                    self.injected[place] += 1
                raise error()
            return inner(*args, **kwargs)

        self._monkeypatch.setattr(owner, name, broken)

    def count_staged(self) -> None:
        """Count what really enters the queue."""
        inner = staging.Stager.put_nowait

        def counting(stager: staging.Stager, job: Any) -> None:
            self.staged += job.count()
            inner(stager, job)

        self._monkeypatch.setattr(staging.Stager, "put_nowait", counting)

    def hang_disk(self, samples: int, chance: float) -> None:
        """Let a write hang until so many samples more have reached the queue."""
        inner = sql._insert_samples

        def slow(*args: Any) -> Any:
            if self.sometimes(chance):
                enough = self.staged + samples
                while self.armed and self.staged < enough:
                    time.sleep(0.001)
            return inner(*args)

        self._monkeypatch.setattr(sql, "_insert_samples", slow)

    @property
    def total(self) -> int:
        """Faults so far."""
        with self._lock:
            return self.injected.total()


class JumpingClock:
    """The time module for our capture, with clocks that jump to and fro by days."""

    def __init__(self, saboteur: Saboteur) -> None:
        self._saboteur = saboteur
        self._random = random.Random(5)
        self.jumps = 0
        self.sleep, self.thread_time = time.sleep, time.thread_time

    def _jump(self) -> float:
        if not self._saboteur.sometimes(0.2):
            return 0.0
        self.jumps += 1
        return self._random.uniform(-JUMP_SECONDS, JUMP_SECONDS)

    def time(self) -> float:
        """Unix seconds, or some other time."""
        return time.time() + self._jump()

    def monotonic(self) -> float:
        """Anything but monotonic."""
        return time.monotonic() + self._jump()


def make_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=None,
        eos_token_id=None,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).train()


def steps_of(model: Qwen2ForCausalLM) -> Iterator[torch.Tensor]:
    """Train for ever; a loss a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    batches = torch.randint(0, VOCAB, (16, BATCH, LENGTH), generator=generator)
    number = 0
    while True:
        ids = batches[number % len(batches)]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        number += 1
        yield loss.detach()


def kill_workers(monitor: Monitor, wanted: int, killed: list[int], enough: threading.Event) -> None:
    """Kill each worker process as soon as it has started."""
    while len(killed) < wanted and not enough.wait(0.02):
        pid = monitor._reader.process.pid if monitor._reader.process is not None else None
        if pid is not None and pid not in killed:
            killed.append(pid)
            os.kill(pid, signal.SIGKILL)


def settings(folder: Path) -> dict[str, Any]:
    return {
        "database": str(folder / "faults.db"),
        "nla": {"av": str(write_sidecar(folder / "av", WIDTH, 1)), "ar": None},
        "capture": {
            "tokens_per_sequence": TOKENS,
            "sequences_per_step": BATCH,
            "skip_first": 0,
            "norm_sink_factor": None,
        },
        "queue": {"max_samples": QUEUE, "write_batch": 8, "write_interval_seconds": 0.001},
    }


@pytest.mark.slow
def test_ten_thousand_faults_change_no_bit_and_all_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("NLA_MONITOR_STRICT")
    caplog.set_level(logging.ERROR, "nla_monitor")
    saboteur = Saboteur(monkeypatch)
    saboteur.count_staged()
    saboteur.hang_disk(2 * QUEUE, 0.05)
    saboteur.break_(sql, "_insert_samples", "retries", 0.15, disk_error)
    saboteur.break_(sql.SqlSpool, "put", "capture.sink", 0.1, lambda: OSError("no such device"))
    for owner, name, where, percent in PLACES:
        saboteur.break_(owner, name, where, percent / 100)
    clock = JumpingClock(saboteur)
    for name, module in list(sys.modules.items()):
        if name.startswith("nla_monitor.capture.") and getattr(module, "time", None) is time:
            monkeypatch.setattr(module, "time", clock)

    model = make_model()
    training = steps_of(model)
    monitor = Monitor(settings(tmp_path)).attach(model)
    assert monitor.capture is not None
    killed: list[int] = []
    enough = threading.Event()
    killer = threading.Thread(target=kill_workers, args=(monitor, MAX_RESTARTS + 1, killed, enough))
    killer.start()
    losses = []
    saboteur.armed = True
    while saboteur.total < FAULTS or len(killed) <= MAX_RESTARTS:
        monitor.step(len(losses))
        losses.append(next(training))
    saboteur.armed = False
    enough.set()
    killer.join()
    assert monitor.flush(30)
    written = monitor.stats.written
    for number in range(CALM_STEPS):
        monitor.step(len(losses) + number)
        losses.append(next(training))
    assert monitor.flush(30)
    stats = monitor.stats
    assert monitor.spool.depth().waiting == stats.written

    # The run: the same losses and weights as without a monitor.
    plain = make_model()
    assert all(torch.equal(one, other) for one, other in zip(losses, steps_of(plain), strict=False))
    weights = plain.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    # The count: where each fault belongs, and no more.
    retries = saboteur.injected.pop("retries")
    assert {name: count for name, count in stats.faults.items() if name in saboteur.injected} == saboteur.injected
    assert set(stats.faults) == set(saboteur.injected) >= {*HOST, "capture.build", "capture.sink"}
    assert retries == monitor.capture.stats.retries > 0
    assert clock.jumps > FAULTS / 100
    assert saboteur.staged == stats.written + sum(stats.dropped.values())
    assert {"queue_full", "fault"} <= set(stats.dropped) <= {"queue_full", "store_unavailable", "fault"}
    assert len(killed) == stats.worker_restarts + 1
    assert sum("died too often" in record.message for record in caplog.records) == 1

    # Afterwards everything is read again.
    assert written > 0
    assert stats.written - written == CALM_STEPS * BATCH * TOKENS
    monitor.close(5)
