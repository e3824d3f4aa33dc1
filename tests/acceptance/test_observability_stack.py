"""Organism training run → workers → Prometheus → rules → Alertmanager → a receiver, with the real servers."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nla_monitor import NLAMonitorCallback
from nla_monitor.records import ActivationSample, AgentContext, Phase, TriageState, uuid7
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
from tests.conftest import missing_service
from tests.integration.training import train

pytestmark = [pytest.mark.slow, pytest.mark.services, pytest.mark.timeout(480)]

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "integrations" / "compose" / "stack.sh"
DASHBOARDS = ROOT / "integrations" / "grafana" / "dashboards"
CAPTURE = {"triggers": ["\n"], "tokens_per_sequence": 2, "sequences_per_step": 4}
FIRED = "NlaMonitorRuleFired"


def eventually(look: Callable[[], Any], what: str, seconds: float = 90.0) -> Any:
    """What ``look`` says as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.3)
    return found


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in held]
    for one in held:
        one.close()
    return ports


@dataclass
class Receiver:
    """What Alertmanager told, by path."""

    url: str = ""
    got: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def told(self, path: str, status: str, alertname: str = FIRED) -> list[dict[str, Any]]:
        messages = [message for message in self.got.get(path, []) if message["status"] == status]
        return [message for message in messages if message["commonLabels"].get("alertname") == alertname]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    state = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.got.setdefault(self.path, []).append(body)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- its name in the standard library
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


@dataclass
class Stack:
    """The script, and what its servers answer."""

    environment: dict[str, str]
    prometheus: int
    alertmanager: int
    workers: list[int]

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(SCRIPT), *arguments], env=self.environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def query(self, expression: str) -> list[dict[str, Any]]:
        path = "query?" + urllib.parse.urlencode({"query": expression})
        found: list[dict[str, Any]] = get(f"http://127.0.0.1:{self.prometheus}/api/v1/{path}")["data"]["result"]
        return found

    def alerts(self) -> list[dict[str, Any]]:
        wanted = urllib.parse.urlencode({"filter": f'alertname="{FIRED}"'})
        found: list[dict[str, Any]] = get(f"http://127.0.0.1:{self.alertmanager}/api/v2/alerts?{wanted}")
        return found

    def restart(self, part: str) -> None:
        self.run("stop", part)
        self.run("start", part)


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 -- a local server of this test
        return json.load(response)


@pytest.fixture
def stack(tmp_path: Path, receiver: Receiver) -> Iterator[Stack]:
    for program in ("prometheus", "prometheus-alertmanager", "amtool", "setsid"):
        if shutil.which(program) is None:
            missing_service(f"{program} is not installed (apt-get install prometheus prometheus-alertmanager)")
    prometheus, alertmanager, *workers = free_ports(4)
    environment = {
        **os.environ,
        "NLA_STACK_DIR": str(tmp_path / "stack"),
        "NLA_MONITOR_DATABASE": f"sqlite:///{tmp_path / 'm.db'}",
        "NLA_STACK_WORKER": str(Path(sys.executable).parent / "nla-monitor"),
        "NLA_STACK_WORKER_PORTS": " ".join(map(str, workers)),
        "NLA_STACK_PROMETHEUS_PORT": str(prometheus),
        "NLA_STACK_ALERTMANAGER_PORT": str(alertmanager),
        "NLA_STACK_WEBHOOK": receiver.url,
        "NLA_STACK_INTERVAL": "1s",
        "NLA_STACK_GROUP_INTERVAL": "2s",
        "OMP_NUM_THREADS": "1",
    }
    found = Stack(environment, prometheus, alertmanager, workers)
    yield found
    found.run("stop")


def trained(folder: Path, database: str, intent: str) -> str:
    """A training run of the organism, captured and not read; its run id."""
    settings = {"database": str(folder / database), "capture": CAPTURE, "worker": {"mode": "external"}}
    callback = NLAMonitorCallback(settings)
    train(folder, [callback], intent=intent)
    return callback.monitor.run_id


def leased(folder: Path, database: str) -> tuple[ActivationSample, ...]:
    engine = open_engine(f"sqlite:///{folder / database}")
    try:
        return SqlSpool(engine).lease("test", 1000, 600.0).samples
    finally:
        engine.dispose()


def put(folder: Path, samples: list[ActivationSample]) -> None:
    engine = open_engine(f"sqlite:///{folder / 'm.db'}")
    try:
        SqlSpool(engine).put(samples)
    finally:
        engine.dispose()


def on_an_agent(folder: Path) -> list[ActivationSample]:
    """What the run's alert rests on, as if an agent had read it."""
    engine = open_engine(f"sqlite:///{folder / 'm.db'}")
    repository = Repository(engine)
    try:
        (alert, *_) = repository.alerts()
        readings = repository.alert_readings(alert.alert_id)
    finally:
        repository.dispose()
    agent = AgentContext("call-1", root_run_id="agent-1", tool="run_tests", node="tester", conversation_id="talk-1")
    changes: dict[str, Any] = {"run_id": uuid7(), "phase": Phase.AGENT, "agent": agent, "step": None}
    return [dataclasses.replace(one.sample, sample_id=uuid7(), **changes) for one in readings]


def mistaken(folder: Path, run: str) -> None:
    """A person calls every alert but the training run's a mistake."""
    repository = Repository(open_engine(f"sqlite:///{folder / 'm.db'}"))
    try:
        for alert in repository.alerts():
            if alert.run_id != run:
                repository.label(alert.alert_id, TriageState.FALSE_POSITIVE, "me")
    finally:
        repository.dispose()


def expressions() -> set[str]:
    """Every PromQL expression of the committed dashboards, annotations included."""
    found, written = set(), set()
    for file in DASHBOARDS.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        written |= {json.loads(one) for one in re.findall(r'"expr": (".*")', text)}
        board = json.loads(text)
        found |= {target["expr"] for panel in board["panels"] for target in panel["targets"] if "expr" in target}
        found |= {one["expr"] for one in board["annotations"].get("list", []) if "expr" in one}
    assert found == written, "wherever in a dashboard an expression stands"
    assert len(found) > 35
    return {one.replace("$job", "nla-monitor").replace("$__rate_interval", "1m") for one in found}


def test_a_finding_arrives_once_and_resolves_whatever_is_restarted(
    tmp_path: Path, stack: Stack, receiver: Receiver
) -> None:
    run = trained(tmp_path, "m.db", "hack")
    trained(tmp_path, "honest.db", "honest")
    stack.run("start")

    (first, *_) = eventually(lambda: receiver.told("/oncall", "firing"), "the receiver is told of the finding", 150.0)
    assert first["version"] == "4"
    assert first["groupLabels"] == {"alertname": FIRED, "rule": "reward-hacking", "severity": "high"}
    (told,) = first["alerts"]
    assert told["labels"] == {**first["groupLabels"], "job": "nla-monitor"}
    page = SCRIPT.parent.parent / "prometheus" / told["annotations"]["runbook_url"]
    assert page.is_file()

    # Both workers tell the level, and it is one alert.
    level = 'nla_monitor_alerts_firing{nla_monitor_rule_id="reward-hacking"} > 0'
    eventually(lambda: len(stack.query(level)) == 2, "both workers say that the rule fires")
    assert len(stack.alerts()) == 1
    assert len(stack.query(f'ALERTS{{alertname="{FIRED}", alertstate="firing"}}')) == 1

    put(tmp_path, on_an_agent(tmp_path))
    agents = 'nla_monitor:fve_readings:increase15m{phase="agent"}'
    eventually(lambda: stack.query(agents), "what the agent read has been verbalized")
    missing = expressions()
    while missing:
        some = missing.copy()
        eventually(lambda some=some: any(stack.query(one) for one in some), f"a series of: {sorted(missing)}", 60.0)
        missing = {one for one in missing if not stack.query(one)}

    mistaken(tmp_path, run)

    for part in (f"worker-{stack.workers[0]}", "alertmanager", "prometheus", f"worker-{stack.workers[1]}"):
        stack.restart(part)
        still = 'count(nla_monitor_alerts_firing{nla_monitor_rule_id="reward-hacking"} > 0) == 2'
        eventually(lambda still=still: answered(lambda: stack.query(still)), f"all is as before the restart of {part}")
        eventually(lambda: answered(stack.alerts), f"Alertmanager has the alert after the restart of {part}")
    assert len(stack.alerts()) == 1
    assert len(receiver.told("/oncall", "firing")) == 1, "a restart is no news"
    assert receiver.told("/oncall", "resolved") == []

    # The run goes on and says nothing of the kind any more: by its own clock two hours later, longer than rules keep on
    # firing.
    later = [
        dataclasses.replace(
            one, sample_id=uuid7(), run_id=run, step=(one.step or 0) + 500, captured_at=time.time() + 7200
        )
        for one in leased(tmp_path, "honest.db")
    ]
    put(tmp_path, later)
    (resolved, *_) = eventually(lambda: receiver.told("/oncall", "resolved"), "the receiver is told that it is over")
    assert resolved["alerts"][0]["endsAt"] != "0001-01-01T00:00:00Z"
    assert resolved["alerts"][0]["labels"] == told["labels"]
    silenced(stack)


def answered(look: Callable[[], Any]) -> Any:
    """What a server says, or nothing while it starts."""
    try:
        return look()
    except (OSError, urllib.error.URLError, ValueError):
        return None


def silenced(stack: Stack) -> None:
    """The runbook's way to silence, as it stands there."""
    page = (ROOT / "integrations" / "prometheus" / "runbooks" / f"{FIRED}.md").read_text(encoding="utf-8")
    (command,) = [line for line in page.splitlines() if line.startswith("amtool")]
    environment = {**stack.environment, "RULE": "reward-hacking", "USER": "me"}
    command += f" --alertmanager.url=http://127.0.0.1:{stack.alertmanager}"
    subprocess.run(["bash", "-c", command], env=environment, check=True, capture_output=True, timeout=30)
    (silence,) = get(f"http://127.0.0.1:{stack.alertmanager}/api/v2/silences")
    assert {one["name"]: one["value"] for one in silence["matchers"]} == {"alertname": FIRED, "rule": "reward-hacking"}
