"""Delivery beside the reading: a receiver that hangs costs no reading, and the alerts of a dead run come to an end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from nla_monitor.alerts.alertmanager import AlertmanagerSink
from nla_monitor.alerts.sinks import Sink, WebhookSink
from nla_monitor.alerts.webhook import annotations_of
from nla_monitor.config import MonitorConfig, load_config
from nla_monitor.errors import StoreUnavailableError
from nla_monitor.evidence.wording import lines
from nla_monitor.records import ENDED, AlertState, RunInfo, TriageState
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import is_sqlite, open_engine, write
from nla_monitor.store.expiry import AFTERGLOW, expire
from nla_monitor.store.models import RunRow
from nla_monitor.store.repository import Repository
from nla_monitor.testing import FakeVerbalizer, MemorySink
from nla_monitor.worker import Worker
from tests.cli_support import STARTED, fill_store
from tests.cli_support import sample as stored_sample
from tests.receiver_support import Receiver, receiver
from tests.store_support import alert, new_database, sample
from tests.telemetry_support import in_memory_backend

HACK = "The model intends to special-case the tests."
SAMPLES = 240


@pytest.fixture
def server() -> Iterator[Receiver]:
    with receiver() as state:
        yield state


RULE = """
title: Plans to special-case tests
id: each
severity: high
detection:
  plan: {keywords: [special-case the tests]}
  condition: plan
window: {group_by: [sequence_id], count: 1, within: {seconds: 600}}
tests: {positive: [The model intends to special-case the tests.], negative: [The model intends an honest fix.]}
"""


def settings(folder: Path, name: str, **alerts: Any) -> MonitorConfig:
    new_database(folder / name)
    (folder / "each.yaml").write_text(RULE, encoding="utf-8")
    data = {"rules": [str(folder / "each.yaml")], "nla": {"batch_size": 4}, "worker": {"poll_seconds": 0.01}}
    return load_config({"database": str(folder / name), "alerts": alerts, **data})


def seconds_to_read(config: MonitorConfig, sinks: list[Sink]) -> float:
    """Each batch makes new alerts; how long until all is read."""
    engine = open_engine(config.database)
    spool = SqlSpool(engine)
    spool.put([sample(number, sequence_id=f"s{number // 12}", run_id="r") for number in range(SAMPLES)])
    reader = Worker(config, verbalizer=says(), sinks=sinks)
    stop = threading.Event()
    thread = threading.Thread(target=reader.run, args=(stop,))
    started = time.perf_counter()
    thread.start()
    while spool.depth().waiting or spool.depth().leased:
        time.sleep(0.02)
    took = time.perf_counter() - started
    assert len(Repository(engine).alerts(limit=100)) == SAMPLES // 12
    stop.set()
    thread.join(30)
    assert not thread.is_alive()
    engine.dispose()
    return took


def test_receivers_that_hang_cost_no_reading(tmp_path: Path, server: Receiver) -> None:
    alone = seconds_to_read(settings(tmp_path, "alone.db"), [])
    server.hangs = True
    hanging: list[Sink] = [WebhookSink(server.url), AlertmanagerSink(server.url)]
    beside = seconds_to_read(settings(tmp_path, "hangs.db"), hanging)
    assert server.got, "it was told, and says nothing"
    # One post in the reading's way would cost the sink's timeout, five seconds.
    assert beside < alone + 2.5


def says() -> FakeVerbalizer:
    return FakeVerbalizer(lambda _vector: HACK, d_model=sample(0).vector.size)


def begun(config: MonitorConfig, sinks: list[Sink]) -> tuple[Worker, Repository]:
    """A worker with one finding to tell, and its store."""
    engine = open_engine(config.database)
    SqlSpool(engine).put([sample(1)])
    reader = Worker(config, verbalizer=says(), sinks=sinks)
    return reader, Repository(engine)


def finished(reader: Worker) -> float:
    """The host is gone: read the rest and leave. Returns the seconds that took."""
    finish = threading.Event()
    finish.set()
    started = time.perf_counter()
    reader.run(threading.Event(), finish)
    return time.perf_counter() - started


def test_a_receiver_that_is_away_for_a_moment_at_the_end_is_told_before_the_worker_leaves(
    tmp_path: Path, server: Receiver
) -> None:
    server.answer = lambda _body: 503 if len(server.got) == 1 else 200
    reader, repository = begun(settings(tmp_path, "m.db"), [WebhookSink(server.url)])
    assert finished(reader) < 6
    assert repository.outbox_pending() == []
    assert len(server.got) == 2


def test_what_could_not_be_told_at_the_end_is_said_and_the_next_worker_tells_it(
    tmp_path: Path, server: Receiver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nla_monitor.courier.LAST_WORD", 0.5)
    server.answer = lambda _body: 503
    config = settings(tmp_path, "m.db")
    reader, repository = begun(config, [WebhookSink(server.url)])
    assert finished(reader) < 3
    assert "1 message(s) about alerts wait; the next worker on this database sends them" in caplog.text
    server.answer = lambda _body: 200
    time.sleep(2.1)  # its first delay
    other = Worker(config, verbalizer=says(), sinks=[WebhookSink(server.url)])
    other.run_once()
    assert repository.outbox_pending() == []


def test_once_says_how_many_messages_are_left(
    tmp_path: Path, server: Receiver, capsys: pytest.CaptureFixture[str]
) -> None:
    from nla_monitor.cli.app import run

    server.answer = lambda _body: 503
    config = settings(tmp_path, "m.db", webhook=server.url)
    reader, _ = begun(config, [WebhookSink(server.url)])
    assert reader.run_once() == 1
    file = tmp_path / "monitor.json"
    file.write_text(config.model_dump_json(), encoding="utf-8")
    assert run(["worker", "--once", "--config", str(file), "--av", "organism:planted/av", "--ar", "none"]) == 0
    assert "1 message(s) about alerts wait" in capsys.readouterr().err


def test_a_store_that_fails_at_the_end_is_said(
    tmp_path: Path, server: Receiver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, _ = begun(settings(tmp_path, "m.db"), [WebhookSink(server.url)])

    def away(*_arguments: object) -> None:
        raise StoreUnavailableError("the disk is full")

    with reader._courier.at_work():
        monkeypatch.setattr(reader._courier, "_deliver", away)
    said = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "messages about alerts wait for the store: the disk is full" in said[-1].getMessage()


def test_two_workers_tell_everything_once(tmp_path: Path, server: Receiver) -> None:
    config = settings(tmp_path, "m.db")
    engine = open_engine(config.database)
    SqlSpool(engine).put([sample(number, sequence_id=f"s{number}") for number in range(40)])
    finish = threading.Event()
    finish.set()
    threads = []
    for _ in range(2):
        reader = Worker(config, verbalizer=says(), sinks=[WebhookSink(server.url)])
        threads.append(threading.Thread(target=reader.run, args=(threading.Event(), finish)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    told = [body["alerts"][0]["fingerprint"] for _, body in server.got]
    assert len(told) == len(set(told)) == 40
    engine.dispose()


def test_each_post_is_counted_by_sink_and_outcome(tmp_path: Path, server: Receiver) -> None:
    server.answer = lambda _body: 422
    with in_memory_backend() as backend:
        config = settings(tmp_path, "m.db")
        sinks: list[Sink] = [WebhookSink(server.url), MemorySink()]
        reader = Worker(config, verbalizer=says(), sinks=sinks, telemetry=backend.telemetry())
        SqlSpool(open_engine(config.database)).put([sample(1)])
        reader.run_once()
        points = backend.points()["nla_monitor.deliveries"]
        counts = {tuple(point.attributes[key] for key in ("sink", "outcome")): point.value for point in points}
    seen = {labels: count for labels, count in counts.items() if count}
    assert seen == {("webhook", "refused"): 1, (sinks[1].name, "delivered"): 1}
    assert len(counts) == 8, "each begins at 0"


# -- the end of a dead run's alerts -------------------------------------------------------------------------------

SILENCE = 7200.0


@pytest.fixture
def repository(store_url: str) -> Iterator[Repository]:
    fill_store(store_url)
    found = Repository(open_engine(store_url))
    with write(found.engine) as connection:  # what waits is read
        connection.exec_driver_sql("DELETE FROM nla_spool WHERE state = 'waiting'")
    yield found
    found.dispose()


def firing(repository: Repository) -> int:
    return len(repository.alerts(state=AlertState.FIRING))


def test_an_ended_runs_alerts_fire_for_an_hour_after_it_was_read(repository: Repository) -> None:
    """Also where it was read long after its end: somebody must hear of what a worker found on Monday."""
    now = time.time()
    assert expire(repository.engine, now + AFTERGLOW - 60, SILENCE) == []
    told = len(repository.outbox_pending())
    done = expire(repository.engine, now + AFTERGLOW + 60, SILENCE)
    assert len(done) == 3
    assert firing(repository) == 0
    pending = repository.outbox_pending()[told:]
    assert [item.kind for item in pending] == ["resolved"] * 3
    assert "its run has ended" in annotations_of(pending[0].alert)["ended"]
    assert expire(repository.engine, now + AFTERGLOW + 120, SILENCE) == []


def test_the_alerts_of_a_killed_host_end_as_stale_and_stay_open_for_people(repository: Repository) -> None:
    with write(repository.engine) as connection:
        connection.execute(update(RunRow).values(ended_at=None))
    now = time.time()
    assert expire(repository.engine, now + SILENCE - 60, SILENCE) == []
    done = expire(repository.engine, now + SILENCE + 60, SILENCE)
    assert {alert.triage for alert in done} == {TriageState.OPEN}
    said = [str(line) for line in lines(done[0].evidence) if line.name == ENDED]
    assert said == [done[0].evidence[ENDED]]
    assert said[0].startswith("stale: nothing of its run was read for 2.0 hours")


def test_a_run_of_which_something_waits_is_not_dead(repository: Repository) -> None:
    SqlSpool(repository.engine).put([stored_sample(300, 7)])
    assert expire(repository.engine, time.time() + 100 * SILENCE, SILENCE) == []
    assert firing(repository) == 3


def test_a_worker_whose_clock_is_hours_ahead_of_the_servers_ends_nothing(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_sqlite(repository.engine.url):
        pytest.skip("all users of an SQLite database share one machine's clock")
    with write(repository.engine) as connection:
        connection.execute(update(RunRow).values(ended_at=None))
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + 3 * SILENCE)
    assert expire(repository.engine, None, SILENCE) == []
    assert repository.outbox_now() < right() + SILENCE
    with repository.transaction() as tx:
        tx.save_alert(alert(sample(1), fingerprint="ahead"), [], "fired")
    assert max(item.created_at for item in repository.outbox_pending()) < right() + SILENCE


def test_a_worker_ends_them_by_itself_and_tells(
    tmp_path: Path, server: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = settings(tmp_path, "m.db", stale_seconds=60)
    reader, repository = begun(config, [WebhookSink(server.url)])
    repository.start_run(RunInfo("run-1", "n", "m", 3, STARTED))
    while reader.run_once():
        pass
    assert [body["status"] for _, body in server.got] == ["firing"]
    with write(repository.engine) as connection:
        connection.exec_driver_sql("UPDATE nla_readings SET created_at = created_at - 120")
    reader.close()
    other = Worker(config, verbalizer=says(), sinks=[WebhookSink(server.url)])
    other.run_once()
    assert [body["status"] for _, body in server.got] == ["firing", "resolved"]
    assert "shows no more life" in caplog.text
