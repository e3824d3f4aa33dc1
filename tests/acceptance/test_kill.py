"""Any process may be killed at any instant: nothing that was acknowledged is lost or read twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nla_monitor import Monitor, NLAMonitorCallback
from nla_monitor.organism import keyed_rng, load_target, make_transcript
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
from tests.integration.training import train
from tests.interrupts import listen_to_ctrl_c

ROOT = Path(__file__).parents[2]
CAPTURE = {"triggers": ["\n"], "tokens_per_sequence": 2, "sequences_per_step": 4}


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    worker = {"lease_seconds": 1.0, "max_attempts": 20, "poll_seconds": 0.05}
    return {"database": str(folder / "m.db"), "capture": CAPTURE, "worker": worker, "nla": {"batch_size": 4}, **changes}


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Any, seconds: float = 120.0, pause: float = 0.05) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(pause)


def assert_read_once(repository: Repository, written: int) -> None:
    counts = repository.reading_counts()
    assert (counts.samples, counts.readings) == (written, written)
    assert (counts.waiting, counts.leased, counts.failed) == (0, 0, 0)


class Host:
    """A raw loop that goes on while its worker dies."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self.model, self.tokenizer = load_target("planted")
        text = make_transcript(keyed_rng("kill", 0), intent="hack", belief="real").prompt
        self.ids = torch.tensor([self.tokenizer(text)["input_ids"]] * 4)
        self.step = 0
        monitor.attach(self.model, self.tokenizer)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step += 1
            self.monitor.step(self.step)
            self.model(self.ids, labels=self.ids).loss.backward()
            self.model.zero_grad()


def test_a_worker_killed_again_and_again_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """Three times, each time in the middle of its reading; the last time while the host waits for the end."""
    random.seed(0)
    monitor = Monitor(settings(tmp_path))
    host = Host(monitor)
    readings = 0
    for _ in range(2):
        host.run(6)
        before = readings
        wait_until(lambda before=before: monitor.repository.reading_counts().readings > before)
        time.sleep(random.uniform(0.0, 0.1))
        assert monitor._reader.process is not None
        pid = monitor._reader.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        readings = monitor.repository.reading_counts().readings
    host.run(12)
    monitor.flush()
    wait_until(lambda: monitor.repository.reading_counts().readings > readings)

    def kill_at_the_end() -> None:
        wait_until(lambda: monitor._reader.process is not None and monitor._reader.process._finishing)
        pid = monitor._reader.process.pid if monitor._reader.process is not None else None
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_at_the_end)
    killer.start()
    assert monitor.close(240), "the worker did not read the rest"
    killer.join()
    stats = monitor.stats
    assert stats.worker_restarts >= 2
    assert not stats.dropped
    assert not stats.faults
    assert stats.written == stats.sampled > 100
    assert_read_once(monitor.repository, stats.written)
    assert len({one.fingerprint for one in monitor.alerts()}) == len(monitor.alerts())


@pytest.fixture
def program(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Repository]]:
    """A training run in a process of its own, and the database that it writes."""
    (tmp_path / "m.json").write_text(json.dumps({**settings(tmp_path), "steps": 400}))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.acceptance.training_program", str(tmp_path / "m.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NLA_MONITOR_STRICT": "0"},
        preexec_fn=listen_to_ctrl_c,
    )
    try:
        yield process, Repository(open_engine(f"sqlite:///{tmp_path / 'm.db'}"))
    finally:
        process.kill()
        process.communicate()


def trained(process: subprocess.Popen[str], steps: int) -> int:
    """Wait for so many steps; the worker's process id."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith('{"step"') and json.loads(line)["step"] >= steps:
            return int(json.loads(line)["worker"])
    raise AssertionError(process.communicate()[1])


def test_a_host_killed_in_training_leaves_its_samples_to_the_worker(
    program: tuple[subprocess.Popen[str], Repository],
) -> None:
    """SIGKILL: the worker outlives the host, reads what was written, and goes by itself."""
    process, repository = program
    worker = trained(process, 4)
    wait_until(lambda: repository.reading_counts().samples >= 16)
    process.kill()
    process.communicate()
    written = repository.reading_counts().samples
    wait_until(lambda: not alive(worker), 240)
    assert_read_once(repository, written)
    assert written >= 16


def test_ctrl_c_stops_training_as_usual_and_hands_over(program: tuple[subprocess.Popen[str], Repository]) -> None:
    """KeyboardInterrupt as without us, the samples written, the run ended, the worker gone, no traceback of ours."""
    process, repository = program
    worker = trained(process, 4)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    # 1 where a library compiled code at exit (SQLAlchemy does): CPython then forgets that it was a signal.
    assert process.returncode in (-signal.SIGINT, 1), errors
    assert "\nKeyboardInterrupt\n" in errors
    assert errors.count("Traceback (most recent call last)") == 1
    assert errors.strip().splitlines()[-1].startswith(("KeyboardInterrupt", "nla_monitor", "worker"))
    assert "Exception ignored" not in errors
    wait_until(lambda: not alive(worker), 240)
    counts = repository.reading_counts()
    assert_read_once(repository, counts.samples)
    assert counts.samples >= 16
    (run,) = repository.runs()
    assert run.ended_at is not None


def test_training_again_after_an_interrupt_is_watched_again(tmp_path: Path) -> None:
    """As in a notebook: the interrupted run is ended, the next one is a run of its own."""
    from transformers import TrainerCallback

    class Interrupts(TrainerCallback):
        armed = True

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.armed and state.global_step == 3:
                self.armed = False
                raise KeyboardInterrupt

    watch = NLAMonitorCallback({**settings(tmp_path), "worker": {"mode": "thread"}})
    kept: list[Any] = []

    class Keeps(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            kept.extend([kwargs["model"], kwargs["processing_class"]])

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [watch, Keeps(), Interrupts()])
    first = watch.monitor
    assert not first.closed
    from transformers import TrainerControl, TrainerState, TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path / "x"), report_to="none", use_cpu=True)
    watch.on_train_begin(arguments, TrainerState(), TrainerControl(), model=kept[0], processing_class=kept[1])
    second = watch.monitor
    assert first.closed
    assert second is not first
    assert second.run_id != first.run_id
    kept[0](input_ids=torch.arange(1, 30)[None], labels=torch.arange(1, 30)[None])
    assert second.flush()
    assert second.stats.written > 0
    watch.on_train_end(arguments, TrainerState(), TrainerControl(), model=kept[0])
    assert second.closed
    assert_read_once(first.repository, first.stats.written + second.stats.written)


def test_children_that_the_host_forks_neither_end_the_run_nor_hold_it_up(tmp_path: Path) -> None:
    """A child that exits runs our exit handler, one that lives holds the host's end of every pipe (data loaders do)."""
    monitor = Monitor(settings(tmp_path))
    host = Host(monitor)
    host.run(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: what torch's data loaders do
        gone, stays = os.fork(), -1
        if gone == 0:
            try:
                monitor.step(99)
                assert monitor.close()
            finally:
                os._exit(0)
        os.waitpid(gone, 0)
        assert not monitor.closed
        run = monitor.repository.run(monitor.run_id)
        assert run is not None
        assert run.ended_at is None
        stays = os.fork()
        if stays == 0:
            time.sleep(300)
            os._exit(0)
    try:
        host.run(2)
        started = time.monotonic()
        assert monitor.close(240)
        assert time.monotonic() - started < 120
    finally:
        os.kill(stays, signal.SIGKILL)
        os.waitpid(stays, 0)
    assert monitor.stats.worker_restarts == 0
    assert_read_once(monitor.repository, monitor.stats.written)


def test_a_host_without_temporary_files_home_or_folder_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths mean where the monitor was made; the worker's log may be lost, its work not."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("HOME")
    monitor = Monitor({**settings(tmp_path), "database": "../m.db"})
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    (tmp_path / "here").rmdir()

    def nowhere(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.mkstemp", nowhere)
    host = Host(monitor)
    host.run(3)
    assert monitor.close(240)
    monkeypatch.chdir(tmp_path)
    assert monitor.stats.written > 0
    assert_read_once(Repository(open_engine(f"sqlite:///{tmp_path / 'm.db'}")), monitor.stats.written)
