"""What our telemetry itself says of what arrived and what was lost, against a real receiver."""

from __future__ import annotations

import logging
import os
import socket
import time
import urllib.request
from signal import SIGKILL
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_monitor.errors import ConfigError
from nla_monitor.telemetry import sdk
from nla_monitor.telemetry.delivery import REASONS, Tally
from tests.otlp_receiver import HANG, attributes, receiver

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal is sent at once, and waited for not long."""
    for name, value in {
        "OTEL_BSP_SCHEDULE_DELAY": "20",
        "OTEL_BLRP_SCHEDULE_DELAY": "20",
        "OTEL_METRIC_EXPORT_INTERVAL": "60000",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "0.5",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(autouse=True)
def as_in_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else pytest listens at loggers that do not propagate, where no log of an application would."""
    monkeypatch.setattr(logging.getLogger("opentelemetry.exporter.otlp"), "propagate", True)


def dead_endpoint() -> str:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def emit(handle: sdk.SdkHandle, make_alert: Any, count: int) -> float:
    """``count`` alerts, each a span and an event; seconds that it took."""
    telemetry = handle.telemetry()
    started = time.perf_counter()
    for _ in range(count):
        telemetry.alert(make_alert(), "fired", 1.0)
    return time.perf_counter() - started


def wait(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def whole(counts: dict[str, int]) -> bool:
    return counts["emitted"] == counts["exported"] + sum(counts[reason] for reason in REASONS) + counts["waiting"]


def test_what_arrives_is_what_was_emitted_and_the_last_metrics_say_so(
    monkeypatch: pytest.MonkeyPatch, make_alert: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with receiver() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        handle = sdk.configure()
        emit(handle, make_alert, 40)
        assert handle.shutdown()
    assert (len(found.spans), len(found.logs)) == (40, 40)
    for signal in ("traces/otlp", "logs/otlp"):
        assert handle.counts[signal] == {
            "emitted": 40,
            "exported": 40,
            "queue_full": 0,
            "export_failed": 0,
            "unsent": 0,
            "waiting": 0,
        }
    told = {attributes(point)["signal"]: point.as_int for point in found.points["nla_monitor.telemetry.exported"]}
    assert (told["traces"], told["logs"]) == (40, 40)
    lost = found.points["nla_monitor.telemetry.lost"]
    assert {attributes(point)["reason"] for point in lost} == set(REASONS)
    assert all(point.as_int == 0 for point in lost)
    assert "telemetry: traces/otlp: 40 exported, none lost" in caplog.text


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "HTTP 401"), (HANG, "no answer within its timeout"), (None, "ConnectionError")],
)
def test_nothing_arrives_and_every_record_is_counted(
    monkeypatch: pytest.MonkeyPatch, make_alert: Any, caplog: pytest.LogCaptureFixture, status: int | None, reason: str
) -> None:
    """Wrong credentials, an endpoint that takes and never answers, no endpoint at all."""
    with receiver(lambda _path, _number: status or HANG, path="/SECRET-PATH") as found:
        url = found.url if status is not None else f"{dead_endpoint()}/SECRET-PATH"
        if status is None:  # time for a second try, which the exporter's own log announces with the whole URL
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1.7")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Bearer%20SECRET-TOKEN")
        handle = sdk.configure()
        assert emit(handle, make_alert, 30) < 2.0
        wait(lambda: handle.counts["traces/otlp"]["export_failed"] > 0)
        started = time.perf_counter()
        handle.shutdown(timeout=1.0)
        assert time.perf_counter() - started < 2.0
    for counts in handle.counts.values():
        assert whole(counts)
        assert (counts["exported"], counts["waiting"]) == (0, 0)
    assert handle.counts["traces/otlp"]["emitted"] == handle.counts["logs/otlp"]["emitted"] == 30
    assert found.spans == []
    assert caplog.text.count("traces cannot be exported") == 1
    (said,) = [record.getMessage() for record in caplog.records if "traces cannot" in record.getMessage()]
    assert any(one in said for one in reason.split("|")), said
    assert "lost (export_failed)" in caplog.text
    assert "SECRET" not in caplog.text, "neither the endpoint's path nor a header"


def test_an_outage_is_told_once_and_so_is_its_end(
    monkeypatch: pytest.MonkeyPatch, make_alert: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """503 asks for another try; what a batch's time does not suffice for is lost and counted, then all goes well."""
    with receiver(lambda _path, number: 503 if number < 2 else 200) as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        handle = sdk.configure()
        emit(handle, make_alert, 5)
        wait(lambda: handle.counts["traces/otlp"]["export_failed"] == 5)
        for _ in range(20):
            emit(handle, make_alert, 5)
            time.sleep(0.05)
        wait(lambda: handle.counts["traces/otlp"]["exported"] > 0)
        assert handle.shutdown(timeout=5.0)
    for signal, arrived in (("traces/otlp", found.spans), ("logs/otlp", found.logs)):
        counts = handle.counts[signal]
        assert whole(counts)
        assert counts["exported"] == len(arrived) > 0
        assert counts["emitted"] == 105
    assert caplog.text.count("traces cannot be exported") == 1
    assert caplog.text.count("traces are exported again") == 1


def test_a_full_queue_loses_the_rest_says_so_once_and_never_waits(
    monkeypatch: pytest.MonkeyPatch, make_alert: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "64")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "16")
    monkeypatch.setenv("OTEL_BLRP_MAX_QUEUE_SIZE", "32")
    monkeypatch.setenv("OTEL_BLRP_MAX_EXPORT_BATCH_SIZE", "16")
    with receiver(lambda *_: HANG) as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        handle = sdk.configure(metrics_port=0)
        assert emit(handle, make_alert, 500) < 2.0
        with urllib.request.urlopen(f"http://localhost:{handle.metrics_port}/metrics", timeout=5) as response:
            served = response.read().decode()
        handle.shutdown(timeout=0.8)
    for signal, room in (("traces", 64), ("logs", 32)):
        counts = handle.counts[f"{signal}/otlp"]
        assert (counts["emitted"], counts["exported"], counts["waiting"]) == (500, 0, 0)
        assert 500 - counts["queue_full"] >= room
        assert whole(counts)
        (line,) = [
            line
            for line in served.splitlines()
            if line.startswith("nla_monitor_telemetry_lost_total{")
            and f'signal="{signal}"' in line
            and 'reason="queue_full"' in line
        ]
        assert float(line.rsplit(" ", maxsplit=1)[1]) > 300
        assert caplog.text.count(f"{signal} come faster than they are exported") == 1
    assert "Queue full" not in caplog.text, "the SDK's own queue never overflows, so that no drop escapes the count"


def test_an_exporter_that_raises_is_counted_and_its_words_stay_unsaid(
    monkeypatch: pytest.MonkeyPatch, make_alert: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def export(self, batch: Any) -> None:
            raise OSError("SECRET-URL")

        def shutdown(self) -> None:
            pass

    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setattr(sdk, "_exporter", lambda *_: Broken())
    handle = sdk.configure()
    emit(handle, make_alert, 3)
    handle.shutdown()
    counts = handle.counts["traces/otlp"]
    assert (counts["emitted"], counts["export_failed"]) == (3, 3)
    assert "SECRET" not in caplog.text


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many", r"OTEL_BSP_MAX_QUEUE_SIZE='many' is not a positive whole number"),
        ("OTEL_BLRP_MAX_QUEUE_SIZE", "0", r"OTEL_BLRP_MAX_QUEUE_SIZE='0' is not a positive"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "100", r"OTEL_BSP_MAX_EXPORT_BATCH_SIZE is 512, more than"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "-1", r"OTEL_METRIC_EXPORT_INTERVAL is not a positive number"),
    ],
)
def test_a_wrong_size_is_an_error_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", dead_endpoint())
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        sdk.configure()


def test_console_exporters_are_counted_too(monkeypatch: pytest.MonkeyPatch, make_alert: Any) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    handle = sdk.configure()
    emit(handle, make_alert, 3)
    handle.shutdown()
    assert handle.counts["traces/console"]["exported"] == 3


Step = tuple[str, int]


@given(st.lists(st.tuples(st.sampled_from(["enter", "export", "fail"]), st.integers(1, 5))), st.integers(1, 6))
def test_the_sum_is_whole_at_any_moment(steps: list[Step], capacity: int) -> None:
    tally, queued = Tally("traces", "otlp", capacity), 0
    for what, count in steps:
        if what == "enter":
            queued += sum(tally.enter() for _ in range(count))
            assert queued <= capacity
        else:
            sent = min(count, queued)
            queued -= sent
            tally.leave(sent)
            tally.done(sent, None if what == "export" else "HTTP 500")
        assert whole(tally.counts)
        assert tally.counts["waiting"] == queued
    tally.close()
    assert whole(tally.counts)
    assert tally.counts["waiting"] == 0
    assert tally.counts["unsent"] == queued


def test_after_a_fault_the_end_is_short_so_that_its_message_comes(
    monkeypatch: pytest.MonkeyPatch, make_alert: Any
) -> None:
    with receiver(lambda *_: HANG) as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "10")
        started = time.perf_counter()
        handle = sdk.configure()
        emit(handle, make_alert, 3)
        with pytest.raises(ConfigError), handle:
            raise ConfigError("a wrong rule")
        assert time.perf_counter() - started < 4.5
    assert handle.counts["traces/otlp"]["unsent"] == 3


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_the_child_of_a_fork_counts_anew_and_has_its_queue_to_itself() -> None:
    tally = Tally("traces", "otlp", capacity=3)
    for _ in range(5):
        tally.enter()
    tally._lock.acquire()  # some thread of the parent was just counting
    child = os.fork()
    if child == 0:
        found = [tally.enter() for _ in range(4)]
        os._exit(0 if found == [True, True, True, False] and tally.counts["emitted"] == 4 else 1)
    tally._lock.release()
    deadline = time.monotonic() + 10
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, SIGKILL)
        time.sleep(0.01)
    assert ended[1] == 0
    assert tally.counts["emitted"] == 5
