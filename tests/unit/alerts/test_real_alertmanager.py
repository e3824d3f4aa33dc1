"""What the real Alertmanager makes of our posts: weird names, clocks that differ, two workers, its own restart."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nla_monitor.alerts.alertmanager import AlertmanagerSink
from nla_monitor.alerts.sinks import DeliveryError, WebhookSink
from nla_monitor.records import Alert, AlertState
from tests.conftest import missing_service
from tests.store_support import alert, sample

pytestmark = pytest.mark.services

NONE = "route: {receiver: none}\nreceivers: [{name: none}]\n"
EXAMPLE = Path(__file__).parents[3] / "integrations/alertmanager/alertmanager.example.yaml"
WEIRD = ['a "quoted" one', "two\nlines\r\n", "🙈" * 50, "x" * 10_000, "{{ $labels }}", "back\\slash", " ", "\ud800"]


class Alertmanager:
    """One process on a free port."""

    def __init__(self, folder: Path, config: str = NONE) -> None:
        (folder / "am.yaml").write_text(config, encoding="utf-8")
        self.binary = shutil.which("prometheus-alertmanager") or missing_service("prometheus-alertmanager is missing")
        with socket.create_server(("127.0.0.1", 0)) as held:
            self.port = held.getsockname()[1]
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            str(self.binary),
            f"--config.file={self.folder / 'am.yaml'}",
            f"--storage.path={self.folder / 'data'}",
        ]
        command += ["--cluster.listen-address=", f"--web.listen-address=127.0.0.1:{self.port}"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.known()
            except OSError:
                assert time.monotonic() < deadline, "it starts"
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def known(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(f"{self.url}/api/v2/alerts", timeout=5) as response:  # noqa: S310 -- of this test
            found: list[dict[str, Any]] = json.load(response)
        return found


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Alertmanager]:
    found = Alertmanager(tmp_path)
    found.start()
    yield found
    found.stop()


def over(one: Alert, when: float) -> Alert:
    return alert(sample(3), fired_at=one.fired_at, state=AlertState.RESOLVED, resolved_at=when)


def test_two_workers_are_one_alert_through_a_restart_until_its_end(server: Alertmanager) -> None:
    one = alert(sample(3), fired_at=time.time() - 5)
    sinks = [AlertmanagerSink(server.url, number=number, content=True) for number in (0, 1)]
    for sink in sinks * 3:
        sink.remind([one])
    assert [found["labels"]["rule"] for found in server.known()] == ["hack"]
    server.stop()
    with pytest.raises(DeliveryError):
        sinks[0].remind([one])
    server.start()
    sinks[1].remind([one])
    assert len(server.known()) == 1
    sinks[0].send("resolved", over(one, time.time()))
    assert server.known() == []


def test_it_takes_whatever_stands_in_an_alert(server: Alertmanager) -> None:
    sink = AlertmanagerSink(server.url, content=True)
    for number, text in enumerate(WEIRD):
        texts = {"rule_id": text, "run_id": text, "rule_title": text, "explanation": text}
        sink.send("fired", alert(sample(3), fired_at=time.time() - 5, fingerprint=str(number), **texts))
    found = {one["labels"]["fingerprint"]: one["labels"].get("rule") for one in server.known()}
    assert set(found) == {str(number) for number in range(len(WEIRD))}
    assert [found[str(number)] for number in (0, 1, 2)] == WEIRD[:3]
    assert found["3"] == "x" * 256


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_a_worker_whose_clock_is_wrong_is_heard_and_its_end_too(server: Alertmanager, skew: float) -> None:
    """An hour slow: an end of ours would be over before it came. An hour fast: it would fire an hour too long."""
    sink = AlertmanagerSink(server.url, clock=lambda: time.time() + skew)
    one = alert(sample(3), fired_at=time.time() + skew - 5)
    sink.send("fired", one)
    (found,) = server.known()
    assert found["status"]["state"] in {"unprocessed", "active"}
    sink.send("resolved", over(one, time.time() + skew))
    # Its answer's clock has whole seconds.
    deadline = time.monotonic() + 3
    while server.known():
        assert time.monotonic() < deadline, "it is over"
        time.sleep(0.1)


def test_the_example_keeps_what_follows_from_something_worse_quiet(tmp_path: Path) -> None:
    server = Alertmanager(tmp_path, EXAMPLE.read_text(encoding="utf-8"))
    server.start()
    try:
        told = (
            ("NlaMonitorWorkerDown", "nla-monitor", ""),
            ("NlaMonitorLag", "nla-monitor", ""),
            ("NlaMonitorLag", "another-job", ""),
            ("NlaMonitorNlaStale", "nla-monitor", "train"),
            ("NlaMonitorFidelityFell", "nla-monitor", "train"),
            ("NlaMonitorFidelityFell", "nla-monitor", "agent"),
        )
        labels = [{"alertname": name, "job": job} | ({"phase": phase} if phase else {}) for name, job, phase in told]
        WebhookSink(f"{server.url}/api/v2/alerts").post([{"labels": one} for one in labels])

        def quiet() -> set[tuple[str, ...]]:
            found = [one["labels"] for one in server.known() if one["status"]["inhibitedBy"]]
            return {tuple(one.get(name, "") for name in ("alertname", "job", "phase")) for one in found}

        expected = {("NlaMonitorLag", "nla-monitor", ""), ("NlaMonitorFidelityFell", "nla-monitor", "train")}
        deadline = time.monotonic() + 20
        while quiet() != expected:
            assert time.monotonic() < deadline, quiet()
            time.sleep(0.2)
    finally:
        server.stop()
