"""The worker on a real database: everything is read once, whatever goes wrong, and alerts do not depend on how."""

from __future__ import annotations

import dataclasses
import json
import logging
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nla_monitor.config import MonitorConfig, load_config
from nla_monitor.errors import ConfigError, NonFiniteWeightsError, StoreError
from nla_monitor.evidence import AWAITED
from nla_monitor.evidence.wording import lines
from nla_monitor.nla.base import Score
from nla_monitor.records import ActivationSample, Alert, AlertState
from nla_monitor.rules.evidence_schema import CONTROLS
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
from nla_monitor.testing import FakeReconstructor, FakeVerbalizer, MemorySink
from nla_monitor.worker import Worker
from tests.organism_support import training_samples
from tests.store_support import new_database, sample

HACK = "The model intends to special-case the tests."
HONEST = "The model intends an honest fix."


def config(folder: Path, **changes: Any) -> MonitorConfig:
    worker = {"lease_seconds": 60.0, "poll_seconds": 0.01, **changes.pop("worker", {})}
    return load_config({"database": str(folder / "w.db"), "worker": worker, **changes})


def fill(settings: MonitorConfig, samples: Sequence[ActivationSample]) -> Repository:
    engine = open_engine(settings.database)
    repository = Repository(engine)
    SqlSpool(engine).put(samples)
    return repository


def small(number: int, **changes: Any) -> ActivationSample:
    """A sample for the fake AV: eight numbers, the first of which is ``number``."""
    vector = np.full(8, 0.5, dtype=np.float32)
    vector[0] = number + 1
    return sample(number, vector=vector, **changes)


def says(hits: set[int], **special: Callable[[], str]) -> Callable[[Any], str]:
    """What the fake AV says of ``small(number)``."""

    def text(vector: Any) -> str:
        number = round(float(vector[0])) - 1
        if f"n{number}" in special:
            return special[f"n{number}"]()
        return HACK if number in hits else HONEST

    return text


class ClaimReader(FakeReconstructor):
    """An AR to which every claim is true but those of ``lies``."""

    def __init__(self, lies: str = "nothing") -> None:
        super().__init__(0.9)
        self.lies = lies

    def score(self, vectors: Any, texts: Sequence[str]) -> list[Score]:
        (base,) = super().score(vectors[:1], texts[:1])
        return [dataclasses.replace(base, cosine=0.9 if text in (HACK, HONEST) else 0.5) for text in texts]


def worker(settings: MonitorConfig, text: Any, ar: Any = None, sinks: Any = ()) -> Worker:
    new_database(Path(settings.database.removeprefix("sqlite:///")))
    return Worker(settings, verbalizer=FakeVerbalizer(text), reconstructor=ar, sinks=sinks)


def read_all(reader: Worker) -> None:
    while reader.run_once():
        pass


def failures(settings: MonitorConfig) -> list[tuple[str, str, str, int]]:
    with sqlite3.connect(settings.database.removeprefix("sqlite:///")) as connection:
        rows = connection.execute("SELECT sample_id, stage, error, retryable FROM nla_failures ORDER BY 1").fetchall()
    connection.close()
    return rows


# -- what is read -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hacking() -> list[ActivationSample]:
    """Forty activations of the planted organism: three steps of honest work, two that plan a hack."""
    return [*training_samples(24, intent="honest"), *training_samples(16, intent="hack", first=24)]


def test_bad_rows_fail_alone_and_the_rest_of_the_batch_is_read(tmp_path: Path, hacking: list[ActivationSample]) -> None:
    """NaN, Inf, zero and a wrong width in one batch with good rows: each says what it is, and is not tried again."""
    nan, inf = hacking[0].vector.copy(), hacking[0].vector.copy()
    nan[3], inf[5] = np.nan, -np.inf
    bad = {
        "NaN": sample(1, vector=nan),
        "Inf": sample(2, vector=inf),
        "zero norm": sample(3, vector=np.zeros(128, dtype=np.float32)),
        "(64,)": sample(4, vector=np.ones(64, dtype=np.float32)),
        "norm beyond": sample(5, vector=np.full(128, 3e38, dtype=np.float32)),
    }
    settings = config(tmp_path)
    new_database(tmp_path / "w.db")
    mixed = [*hacking[:3], *bad.values(), *hacking[3:6]]
    repository = fill(settings, mixed)
    reader = Worker(settings, sinks=[])
    read_all(reader)
    counts = repository.reading_counts()
    assert (counts.samples, counts.readings, counts.failed, counts.waiting, counts.leased) == (11, 6, 5, 0, 0)
    found = {sample_id: (stage, error, retryable) for sample_id, stage, error, retryable in failures(settings)}
    for words, one in bad.items():
        stage, error, retryable = found[one.sample_id]
        assert (stage, bool(retryable)) == ("verbalize", False)
        assert words in error
    reader.close()


@pytest.mark.parametrize("error", [KeyError("poison"), RuntimeError("CUDA error"), NonFiniteWeightsError("logits")])
def test_a_row_that_breaks_the_av_harms_only_itself(tmp_path: Path, error: Exception) -> None:
    """Whatever it raises: the batch is halved until it stands alone, tried as often as configured, set aside."""
    settings = config(tmp_path, nla={"batch_size": 16, "ar": None})

    def broken() -> str:
        raise error

    reader = worker(settings, says({2}, n7=broken))
    repository = fill(settings, [small(number) for number in range(20)])
    read_all(reader)
    counts = repository.reading_counts()
    assert (counts.readings, counts.failed, counts.waiting, counts.leased) == (19, 1, 0, 0)
    rows = failures(settings)
    assert len(rows) == settings.worker.max_attempts
    assert all(type(error).__name__ in text for _, _, text, _ in rows)
    reader.close()


def test_rules_or_controls_that_break_cost_no_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)

    class Broken(ClaimReader):
        def score(self, vectors: Any, texts: Sequence[str]) -> list[Score]:
            if set(texts) != {HACK}:
                raise RuntimeError("out of memory")
            return super().score(vectors, texts)

    reader = worker(settings, says({0, 1, 2, 3, 9}), Broken())
    repository = fill(settings, [small(number, step=1) for number in range(4)])
    read_all(reader)
    (alert,) = repository.alerts()
    assert alert.evidence["not_run"]["swap_margin"] == "RuntimeError: out of memory"  # type: ignore[index]
    assert repository.reading_counts().readings == 4

    def refuse(_: Any) -> Any:
        raise ValueError("a rule met what it cannot judge")

    monkeypatch.setattr(reader.rules, "evaluate", refuse)
    fill(settings, [small(9)])
    read_all(reader)
    counts = repository.reading_counts()
    assert (counts.readings, counts.failed, counts.waiting) == (5, 1, 0)
    assert [stage for _, stage, _, _ in failures(settings)] == ["evaluate"]
    reader.close()


def test_any_text_survives_the_way_to_the_database(tmp_path: Path) -> None:
    """Lone surrogates, NUL, bidirectional marks, a megabyte: of a model's words nothing may be trusted."""
    texts = {
        "n0": "\ud800 lone",
        "n1": "nul \x00 inside",
        "n2": "\u202eabc 😈 " + HACK,
        "n3": "x" * 1_000_000,
        "n4": "",
    }
    settings = config(tmp_path, nla={"ar": None})
    reader = worker(settings, says(set(), **{key: (lambda text=text: text) for key, text in texts.items()}))
    repository = fill(settings, [small(n, context="\ud800\x00 ctx", token_text="\udfff") for n in range(5)])  # noqa: S106 -- a token, no password
    read_all(reader)
    counts = repository.reading_counts()
    assert (counts.readings, counts.failed, counts.matches) == (5, 0, 1)
    reader.close()


def test_an_av_and_an_ar_of_different_models_are_refused(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with pytest.raises(ConfigError, match="d_model 8, the AR 16"):
        worker(settings, [HACK], FakeReconstructor(d_model=16))


# -- evidence ----------------------------------------------------------------------------------------------------


def test_without_an_ar_the_alert_says_what_was_not_run(tmp_path: Path) -> None:
    settings = config(tmp_path, nla={"ar": None})
    reader = worker(settings, says(set(range(4))))
    repository = fill(settings, [small(number, step=1) for number in range(4)])
    read_all(reader)
    (alert,) = repository.alerts()
    assert alert.evidence["not_run"]["swap_margin"] == "no AR is configured"  # type: ignore[index]
    assert alert.evidence["swap_margin"] == {"required": {"min": 0.02}}
    assert (alert.cosine, alert.fve) == (None, None)
    reader.close()


def test_refuted_matches_are_kept_and_count_nowhere(tmp_path: Path) -> None:
    """An AR to which any claim is as good as the stated one: matches stored, no alert, no rate."""
    settings = config(tmp_path)
    reader = worker(settings, says(set(range(6))), FakeReconstructor(0.9))
    samples = [small(number, step=1) for number in range(6)]
    repository = fill(settings, samples)
    read_all(reader)
    counts = repository.reading_counts()
    assert (counts.readings, counts.matches, counts.alerts) == (6, 6, 0)
    assert repository.match_rate("run-1", "reward-hacking") == [(1, 0, 6)]
    reader.close()


def test_the_organisms_alert_carries_its_controls(tmp_path: Path, hacking: list[ActivationSample]) -> None:
    settings = config(tmp_path)
    new_database(tmp_path / "w.db")
    repository = fill(settings, hacking)
    reader = Worker(settings, sinks=[])
    read_all(reader)
    counts = repository.reading_counts()
    assert (counts.readings, counts.failed, counts.waiting, counts.leased) == (40, 0, 0, 0)
    (alert,) = [one for one in repository.alerts() if one.rule_id == "reward-hacking"]
    assert alert.first_step == 3
    assert alert.quote in alert.explanation
    assert alert.fve is not None
    assert alert.denominator_name
    margin = alert.evidence["swap_margin"]
    assert margin["median"] >= margin["required"]["min"]  # type: ignore[index]
    assert alert.evidence["recurrence"]["positions"] >= 3  # type: ignore[index]
    told = {line.name: line.verdict for line in lines(alert.evidence)}
    for name in ("swap margin", "claim probability", "agreement", "null percentile", "null matches", "norm"):
        assert told[name] == "good", name
    assert set(alert.evidence["not_run"]) == {"echo", "neighbours", "prediction_echo"}, "nothing is stored around it"  # type: ignore[call-overload]
    reader.close()


def sure(folder: Path) -> MonitorConfig:
    """A config with one rule, whose every match alerts when swapping its claim costs fidelity."""
    rules = folder / "sure.yaml"
    rules.write_text(
        "{title: t, id: sure, severity: high, detection: {words: {keywords: [special-case]}, condition: words}, "
        "evidence: {swap_margin: {alternatives: [Nothing is planned.]}}, "
        "tests: {positive: [special-case], negative: [honest]}}"
    )
    return config(folder, rules=[str(rules)])


def test_an_alert_whose_worker_dies_before_its_dear_controls_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alert is committed before the AV is asked again: nothing is lost, and nothing is claimed."""
    reader = worker(settings := sure(tmp_path), says({0}), ClaimReader())
    repository = fill(settings, [small(0, context="words")])

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(reader.controls, "complete", killed)
    with pytest.raises(KeyboardInterrupt):
        read_all(reader)
    (alert,) = repository.alerts()
    assert alert.evidence["swap_margin"]["passed"]  # type: ignore[index]
    assert alert.evidence["echo"]["exhibit"] == 0.0  # type: ignore[index]
    assert "null_percentile" not in alert.evidence
    assert alert.evidence["not_run"]["null_percentile"] == AWAITED  # type: ignore[index]
    assert repository.reading_counts().leased == 0
    reader.close()


def test_the_next_worker_completes_an_alert_whose_worker_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When nothing waits to be read, once, before sinks hear of it, and only by the NLA that had read it."""
    settings = sure(tmp_path)

    def next_worker() -> tuple[Worker, MemorySink]:
        sink = MemorySink()
        return worker(settings, says({0}), ClaimReader(), [sink]), sink

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    dying, _ = next_worker()
    repository = fill(settings, [small(0, context="words")])
    monkeypatch.setattr(dying.controls, "complete", killed)
    with pytest.raises(KeyboardInterrupt):
        read_all(dying)
    dying.close()
    (before,) = repository.alerts()
    other, _ = next_worker()
    monkeypatch.setattr(other.verbalizer, "content_hash", "sha256:another")
    monkeypatch.setattr(other, "_deliver", lambda: None)
    read_all(other)
    other.close()
    assert repository.alerts() == [before], "another AV would measure something else"

    reader, sink = next_worker()
    read_all(reader)
    (after,) = repository.alerts()
    assert AWAITED not in str(after.evidence)
    assert before.evidence["swap_margin"] == after.evidence["swap_margin"]
    assert after.evidence["recurrence"] == before.evidence["recurrence"]
    missing = set(CONTROLS) - set(after.evidence) - set(after.evidence["not_run"])  # type: ignore[call-overload]
    assert not missing
    assert [told.evidence for told in sink.alerts] == [after.evidence]
    monkeypatch.setattr(reader.controls, "complete", killed)
    read_all(reader)
    reader.close()
    again, _ = next_worker()
    monkeypatch.setattr(again.controls, "complete", killed)
    read_all(again)
    again.close()
    assert repository.alerts() == [after]


def test_neighbours_in_the_queue_are_read_ahead_so_that_batches_change_nothing(tmp_path: Path) -> None:
    """Ten tokens of one sequence, of which some claim the hack; a rule that asks for company."""
    rules = tmp_path / "company.yaml"
    rules.write_text(
        "{title: t, id: company, severity: high, detection: {words: {keywords: [special-case]}, condition: words}, "
        "evidence: {neighbours: {min: 0.6, within: 3}, norm: {}, prediction_echo: {max: 0.5}}, "
        "tests: {positive: [special-case], negative: [honest]}}"
    )
    words = [f"word{number}" for number in range(20)]
    samples = [
        small(
            number,
            sequence_id="s",
            step=1,
            captured_at=1000.0,
            norm=float(number % 5 + 1),
            context=" ".join(words[: number + 1]),
            sample_id=f"sample-{number:02}",
        )
        for number in range(20)
    ]
    outcomes = []
    for size in (1, 3, 64):
        folder = tmp_path / str(size)
        folder.mkdir()
        settings = config(folder, rules=[str(rules)], nla={"batch_size": size})
        reader = worker(settings, says({0, 5, 6, 7, 8, 9, 18}), ClaimReader())
        repository = fill(settings, samples)
        read_all(reader)
        with repository.transaction() as tx:
            matches = [match for one in repository.alerts() for match in repository.alert_matches(one.alert_id)]
            found = tx.supports([match.match_id for match in matches])
        outcomes.append({match.position: found[match.match_id].controls["neighbours"] for match in matches})
        reader.close()
    company = pytest.approx(4 / 6)
    assert outcomes[0] == {16: company, 17: company, 18: company}, "the others are refuted: half or less say the same"
    assert outcomes[0] == outcomes[1] == outcomes[2]


# -- alerts ------------------------------------------------------------------------------------------------------


def test_an_alert_fires_goes_on_and_resolves(tmp_path: Path) -> None:
    settings = config(tmp_path, nla={"ar": None, "batch_size": 8})
    sink = MemorySink()
    hits = {*range(3, 9), 15}
    reader = worker(settings, says(hits), sinks=[sink])
    repository = fill(settings, [small(n, step=n, captured_at=1000.0 + 20 * n) for n in range(120)])
    read_all(reader)
    assert [kind for kind, _ in sink.sent] == ["fired", "resolved"]
    (alert,) = repository.alerts()
    assert alert.state is AlertState.RESOLVED
    assert (alert.first_step, alert.last_step, alert.matches) == (3, 15, 7)
    assert sink.sent[0][1].last_step == 5, "at the third match, not at the end of its batch"
    assert alert.resolved_at == 1000.0 + 20 * (15 + 50)
    reader.close()


def stripped(alert: Alert) -> dict[str, Any]:
    """All that must not change; numbers that a model computes may differ in the last bits."""
    found = dataclasses.asdict(alert)
    numbers = [found.pop("cosine"), found.pop("fve")]
    for name in ("swap_margin", "claim_probability", "norm"):
        numbers += found["evidence"].pop(name).values()
    assert numbers
    return found


def test_the_size_of_batches_changes_no_alert(tmp_path: Path, hacking: list[ActivationSample]) -> None:
    """The same stored samples through fresh databases: same matches, same alerts with all their fields."""
    outcomes = []
    for size in (1, 7, 64):
        folder = tmp_path / str(size)
        folder.mkdir()
        settings = config(folder, nla={"batch_size": size})
        new_database(folder / "w.db")
        repository = fill(settings, hacking)
        reader = Worker(settings, sinks=[])
        read_all(reader)
        alerts = sorted(repository.alerts(), key=lambda one: one.alert_id)
        links = {one.alert_id: [match.match_id for match in repository.alert_matches(one.alert_id)] for one in alerts}
        outcomes.append(([stripped(one) for one in alerts], links))
        numbers = [one.cosine for one in alerts]
        reader.close()
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0][0], "nothing fired"
    assert all(number is not None for number in numbers)


# -- several workers ---------------------------------------------------------------------------------------------


def assert_read_once(repository: Repository, count: int) -> None:
    counts = repository.reading_counts()
    assert (counts.samples, counts.readings) == (count, count)
    assert (counts.waiting, counts.leased, counts.failed) == (0, 0, 0)


def test_worker_threads_share_a_database(tmp_path: Path) -> None:
    """Four threads: every sample is read by one of them, no alert is doubled, each is told once."""
    settings = config(tmp_path, nla={"ar": None, "batch_size": 7})
    sink = MemorySink()
    readers = [worker(settings, says(set(range(0, 300, 3))), sinks=[sink]) for _ in range(4)]
    repository = fill(settings, [small(n, step=n // 10, captured_at=1000.0 + n // 10) for n in range(300)])
    finish = threading.Event()
    finish.set()
    threads = [threading.Thread(target=one.run, args=(threading.Event(), finish)) for one in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert_read_once(repository, 300)
    # Beside the samples: the null vectors by which an alert's exhibit is judged, and its neighbours in the queue.
    given = [vector for one in readers for vector in one.verbalizer.vectors]  # type: ignore[attr-defined]
    assert 300 <= sum(vector[1] == 0.5 for vector in given) <= 303
    (alert,) = repository.alerts()
    assert alert.matches == 100
    assert [kind for kind, _ in sink.sent] == ["fired"]
    for one in readers:
        one.close()


def test_worker_processes_share_a_database(tmp_path: Path, hacking: list[ActivationSample]) -> None:
    settings = config(tmp_path, nla={"batch_size": 4})
    new_database(tmp_path / "w.db")
    repository = fill(settings, hacking)
    (tmp_path / "m.yaml").write_text(json.dumps(settings.model_dump(mode="json")))
    command = [sys.executable, "-c", "from nla_monitor.cli import main; main()", "worker", "--once", "--json"]
    pair = [
        subprocess.Popen(
            [*command, "--config", str(tmp_path / "m.yaml")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert sum(json.loads(out)["read"] for out, _ in outputs) == len(hacking)
    assert_read_once(repository, len(hacking))
    assert len({one.fingerprint for one in repository.alerts()}) == len(repository.alerts()) > 0


def test_a_batch_that_another_worker_took_over_is_thrown_away(tmp_path: Path) -> None:
    """A lease ran out while its holder still worked: the second worker's result stands, alone."""
    settings = config(tmp_path, nla={"ar": None}, worker={"lease_seconds": 0.05})
    slow = worker(settings, says(set(range(5))))
    fast = worker(settings, says(set(range(5))))
    repository = fill(settings, [small(n, step=1) for n in range(5)])
    first, entered, go = slow.verbalizer.verbalize, threading.Event(), threading.Event()

    def late(vectors: Any) -> Any:
        entered.set()
        go.wait(30)
        return first(vectors)

    slow.verbalizer.verbalize = late  # type: ignore[method-assign]
    thread = threading.Thread(target=slow.run_once)
    thread.start()
    assert entered.wait(30)
    time.sleep(0.1)
    read_all(fast)
    go.set()
    thread.join(30)
    assert_read_once(repository, 5)
    (alert,) = repository.alerts()
    assert alert.matches == 5
    slow.close()
    fast.close()


# -- when the database or a receiver fails -------------------------------------------------------------------------


def running(reader: Worker) -> tuple[threading.Thread, threading.Event]:
    finish = threading.Event()
    thread = threading.Thread(target=reader.run, args=(threading.Event(), finish))
    thread.start()
    return thread, finish


def test_a_locked_database_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process holds the write lock for longer than SQLite waits: a warning, then everything is read."""
    monkeypatch.setattr("nla_monitor.store.engine.BUSY_SECONDS", 0.1)
    settings = config(tmp_path, nla={"ar": None}, worker={"lease_seconds": 0.3})
    reader = worker(settings, says({1}))
    repository = fill(settings, [small(n) for n in range(10)])
    holder = sqlite3.connect(tmp_path / "w.db", isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    with caplog.at_level(logging.WARNING, "nla_monitor.worker"):
        thread, finish = running(reader)
        deadline = time.monotonic() + 30
        while "store unavailable" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
        assert "held its lock for too long" in caplog.text
        holder.execute("COMMIT")
        holder.close()
        finish.set()
        thread.join(60)
    assert_read_once(repository, 10)
    reader.close()


def test_a_fault_costs_its_batch_a_second_try_not_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, nla={"ar": None}, worker={"lease_seconds": 0.1})
    reader = worker(settings, says({1}))
    repository = fill(settings, [small(n) for n in range(10)])
    whole, left = reader.repository.transaction, [1, 2]

    def faulty(*arguments: Any) -> Any:
        if left:
            left.pop()
            raise StoreError("a row contradicts another one")
        return whole(*arguments)

    monkeypatch.setattr(reader.repository, "transaction", faulty)
    thread, finish = running(reader)
    finish.set()
    thread.join(60)
    assert not left
    assert_read_once(repository, 10)
    reader.close()


def test_faults_without_end_end_the_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, nla={"ar": None})
    reader = worker(settings, [HONEST])

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(reader.spool, "lease", broken)
    with pytest.raises(ZeroDivisionError):
        reader.run(threading.Event())
    reader.close()


def test_a_worker_without_host_does_not_wait_for_a_lost_database_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nla_monitor.worker._LAST_PATIENCE", 0.1)
    settings = config(tmp_path, nla={"ar": None})
    reader = worker(settings, [HONEST])
    fill(settings, [small(1)])
    reader.close()
    (tmp_path / "w.db").rename(tmp_path / "elsewhere.db")
    (tmp_path / "w.db").mkdir()
    finish = threading.Event()
    finish.set()
    reader.run(threading.Event(), finish)


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[dict[str, Any]], list[int]]]:
    """A webhook server: its URL, what it got, and the statuses that it answers first."""
    got: list[dict[str, Any]] = []
    answers: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(answers.pop(0) if answers else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook", got, answers
    server.shutdown()
    server.server_close()
    thread.join()


def test_alerts_reach_a_webhook_also_after_a_failure(
    tmp_path: Path, receiver: tuple[str, list[dict[str, Any]], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receiver is down at first: the outbox keeps the alert and delivers it later, once."""
    monkeypatch.setattr("nla_monitor.alerts.sinks.FIRST_DELAY", 0.05)
    url, got, answers = receiver
    answers.append(503)
    settings = config(tmp_path, nla={"ar": None}, alerts={"webhook": url})
    reader = worker(settings, says(set(range(4))), sinks=None)
    repository = fill(settings, [small(number, step=1) for number in range(4)])
    read_all(reader)
    deadline = time.monotonic() + 30
    while repository.outbox_pending() and time.monotonic() < deadline:
        reader.run_once()
        time.sleep(0.02)
    assert not repository.outbox_pending()
    assert len(got) == 2
    assert got[0] == got[1]
    assert got[1]["status"] == "firing"
    assert "special-case" not in json.dumps(got), "content stays home"
    reader.close()
