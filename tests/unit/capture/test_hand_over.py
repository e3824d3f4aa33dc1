"""The hand-over never waits, never grows without bound, and counts by reason what it loses."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from capture_kit import capturing, make_model, token_batch
from torch import nn

from nla_monitor.capture.staging import Stager
from nla_monitor.config import QueueConfig
from nla_monitor.errors import StoreUnavailableError
from nla_monitor.guard import Guard
from nla_monitor.records import ActivationSample


def _forwards(model: Any, number: int, *, rows: int = 2) -> None:
    with torch.no_grad():
        for seed in range(number):
            model(token_batch(rows, 6, seed=seed))


def test_batches_respect_the_configured_size() -> None:
    sizes: list[int] = []
    queue = QueueConfig(write_batch=3, write_interval_seconds=60)
    model = make_model()
    with capturing(model, sink=lambda batch: sizes.append(len(batch)), queue=queue) as captured:
        _forwards(model, 5)
        assert captured.capture.flush(10)
    assert sum(sizes) == 5 * 2 * 2
    assert max(sizes) <= 3


def test_lone_samples_are_written_after_the_interval() -> None:
    model = make_model()
    written = threading.Event()
    queue = QueueConfig(write_batch=100, write_interval_seconds=0.05)
    with capturing(model, sink=lambda _: written.set(), queue=queue):
        _forwards(model, 1)
        assert written.wait(5)


def test_full_queue_drops_the_oldest_and_counts_them() -> None:
    """The sink hangs; the host goes on at full speed."""
    release = threading.Event()
    entered = threading.Event()
    got: list[ActivationSample] = []

    def sink(batch: Sequence[ActivationSample]) -> None:
        entered.set()
        release.wait(30)
        got.extend(batch)

    model = make_model()
    queue = QueueConfig(max_samples=8, write_batch=4, write_interval_seconds=0.01)
    with capturing(model, sink=sink, queue=queue, tokens_per_sequence=2) as captured:
        _forwards(model, 1)
        assert entered.wait(5)
        started = time.monotonic()
        _forwards(model, 20)
        assert time.monotonic() - started < 5
        assert captured.capture.depth <= 8
        release.set()
        assert captured.capture.flush(10)
        stats = captured.capture.stats
    assert stats.dropped == {"queue_full": 21 * 4 - len(got)}
    assert len(got) == 4 + 8
    assert sum(number for _, number in captured.drops) == stats.dropped["queue_full"]
    newest = {sample.sequence_id for sample in got[-4:]}
    with capturing(model) as again:
        with torch.no_grad():
            model(token_batch(2, 6, seed=19))
        assert {sample.sequence_id for sample in again.samples()} == newest


def test_unavailable_store_is_tried_again_until_it_works() -> None:
    calls: list[int] = []
    got: list[ActivationSample] = []

    def sink(batch: Sequence[ActivationSample]) -> None:
        calls.append(len(batch))
        if len(calls) < 3:
            raise StoreUnavailableError("locked")
        got.extend(batch)

    model = make_model()
    with capturing(model, sink=sink) as captured:
        _forwards(model, 1)
        assert captured.capture.flush(10)
        stats = captured.capture.stats
    assert len(got) == stats.written == 4
    assert stats.dropped == {}
    assert len({sample.sample_id for sample in got}) == 4


def test_store_that_stays_away_is_bounded_and_counted() -> None:
    def sink(_: Sequence[ActivationSample]) -> None:
        raise StoreUnavailableError("read-only")

    model = make_model()
    with capturing(model, sink=sink, queue=QueueConfig(max_samples=8, write_interval_seconds=0.01)) as captured:
        _forwards(model, 3)
        assert not captured.capture.flush(0.3)
        _forwards(model, 10)
        assert not captured.capture.flush(0.3)
        assert captured.capture.depth <= 8
        assert captured.capture.stats.dropped["store_unavailable"] >= 13 * 4 - 8 - 4
        assert not captured.capture.close(0.2)
        dropped = captured.capture.stats.dropped
    assert sum(dropped.values()) == 13 * 4
    assert dropped["closed"] > 0


def test_vectors_that_are_not_finite_are_dropped_and_counted() -> None:
    def spoil(_: nn.Module, __: object, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden.clone()
        hidden[0, 3, 0] = float("nan")
        return hidden

    model = make_model()
    model.model.layers[1].register_forward_hook(spoil)
    with capturing(model, tokens_per_sequence=4) as captured, torch.no_grad():
        model(torch.tensor([[10, 11, 12, 5]]))
        samples = captured.samples()
        assert {sample.position for sample in samples} == {0, 1, 2}
        assert captured.capture.stats.dropped == {"non_finite": 1}


def test_forwards_after_close_cost_nothing_and_give_nothing() -> None:
    model = make_model()
    with capturing(model) as captured:
        _forwards(model, 1)
        assert captured.capture.close(5)
        assert len(captured.got) == 4
        captured.capture.attach(model)
        _forwards(model, 1)
        assert captured.capture.close(5)
        assert len(captured.got) == 4


def test_the_thread_is_named_a_daemon_and_ends_with_close() -> None:
    model = make_model()
    with capturing(model) as captured:
        _forwards(model, 1)
        mine = [thread for thread in threading.enumerate() if thread.name == "nla-monitor-capture"]
        assert len(mine) == 1
        assert mine[0].daemon
        captured.capture.close(5)
        assert not mine[0].is_alive()


def test_flush_of_an_idle_capture_is_immediate() -> None:
    with capturing(make_model()) as captured:
        assert captured.capture.flush(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_disabled_and_does_not_hang() -> None:
    """Also when the parent's background thread holds the lock at that moment."""
    model = make_model()
    with capturing(model) as captured:
        _forwards(model, 1)
        assert captured.capture.flush(5)
        with captured.capture._stager._wake:
            child = os.fork()
            if child == 0:  # pragma: no cover -- another process
                stats = captured.capture.stats
                flushed = captured.capture.flush(1)
                os._exit(0 if not flushed and stats.written == 0 and not captured.capture._stager.alive else 1)
        deadline = time.monotonic() + 20
        done, status = os.waitpid(child, os.WNOHANG)
        while not done and time.monotonic() < deadline:
            time.sleep(0.02)
            done, status = os.waitpid(child, os.WNOHANG)
        assert done == child
        assert os.waitstatus_to_exitcode(status) == 0
        _forwards(model, 1)
        assert captured.capture.flush(5)
        assert captured.capture.stats.written == 8


class _Slow:
    """A job that takes a while to build."""

    event = None
    patient = False

    def count(self) -> int:
        return 1

    def discard(self) -> None:
        pass


def test_a_stream_of_jobs_keeps_no_sample_from_being_written() -> None:
    """Whatever comes meanwhile: what is ready leaves after two intervals at most."""
    written: list[int] = []
    stop = threading.Event()

    def build(_: Any) -> tuple[list[Any], int]:
        time.sleep(0.02)
        return [object()], 0

    queue = QueueConfig(write_interval_seconds=0.1)
    stager = Stager(build, lambda batch: written.append(len(batch)), Guard(), queue)

    def feed() -> None:
        while not stop.wait(0.005):
            if stager.depth < 200:
                stager.put_nowait(_Slow())

    feeder = threading.Thread(target=feed)
    feeder.start()
    time.sleep(1.0)
    before_the_end = sum(written)
    stop.set()
    feeder.join()
    assert before_the_end > 0
    assert stager.close(30)


def test_a_small_queue_is_written_before_it_is_full() -> None:
    """Where ``max_samples`` is below ``write_batch``, too: nothing is dropped for waiting for company."""
    model, got = make_model(), []
    queue = QueueConfig(max_samples=16, write_interval_seconds=60)
    with capturing(model, sink=got.extend, queue=queue) as captured:
        for _ in range(6):
            _forwards(model, 1, rows=1)
            deadline = time.monotonic() + 5
            while captured.capture.depth >= 8 and time.monotonic() < deadline:
                time.sleep(0.01)
        assert len(got) >= 8
        assert captured.capture.stats.dropped == {}
