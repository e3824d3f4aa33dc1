"""The compose file is one by its schema, and what it names exists."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

COMPOSE = Path(__file__).parents[3] / "integrations" / "compose"
FILE: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text(encoding="utf-8"))
# The Compose Specification's schema, Apache-2.0, as docker-compose 1.29.2 ships it.
SCHEMA = json.loads((Path(__file__).parent / "compose_spec.json").read_text(encoding="utf-8"))


def test_it_is_valid_by_the_schema_of_the_compose_specification() -> None:
    jsonschema.Draft201909Validator(SCHEMA).validate({key: value for key, value in FILE.items() if key != "name"})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft201909Validator(SCHEMA).validate({"services": {"a": {"imagee": "x"}}})


def test_it_has_every_part_and_exposes_none_to_the_network() -> None:
    assert set(FILE["services"]) == {
        "postgres", "worker", "prometheus", "alertmanager", "grafana", "collector", "phoenix",
    }  # fmt: skip
    for service in FILE["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        assert ("image" in service) != ("build" in service)


def test_every_file_volume_and_service_that_it_names_exists() -> None:
    for service in FILE["services"].values():
        assert set(service.get("depends_on", ())) <= set(FILE["services"])
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert (COMPOSE / source).exists() if source.startswith(".") else source in FILE["volumes"], mount
    assert (COMPOSE / FILE["services"]["worker"]["build"]["dockerfile"]).is_file()


def test_no_secret_stands_in_it() -> None:
    text = (COMPOSE / "compose.yaml").read_text(encoding="utf-8")
    for line in re.findall(r"^\s+\S*PASSWORD: (.+)$", text, re.MULTILINE):
        assert line.startswith("${"), line


def test_no_password_has_a_default_and_none_is_part_of_an_address() -> None:
    text = (COMPOSE / "compose.yaml").read_text(encoding="utf-8")
    named = re.findall(r"\$\{(\w*PASSWORD)(\S*?)\}", text)
    assert {name for name, _ in named} == {"NLA_MONITOR_POSTGRES_PASSWORD", "NLA_MONITOR_GRAFANA_PASSWORD"}
    assert not [rest for _, rest in named if rest.startswith((":-", "-"))]
    for name in {name for name, _ in named}:
        assert f"${{{name}:?" in text, f"{name} must be asked for"
    assert not re.search(r"://\S*\$\{", text), "a password with an @ would break the address"


def test_each_image_is_of_one_version_and_says_whether_it_is_well() -> None:
    for name, service in FILE["services"].items():
        if "image" in service:
            tag = re.search(r":-[^:}]+:([^}]+)\}", service["image"])
            assert tag, name
            assert re.search(r"\d", tag[1]), f"{name}: {tag[1]} is another image tomorrow"
        assert "healthcheck" in service or name in {"collector", "phoenix"}, name


def test_the_workers_config_is_one_and_its_image_is_built_with_our_constraints() -> None:
    from nla_monitor.config import load_config

    assert load_config(COMPOSE / "monitor.yaml").nla.av == "organism:planted/av"
    assert "--config monitor.yaml" in FILE["services"]["worker"]["command"][-1]
    root = COMPOSE.parent.parent / "constraints.txt"
    assert (COMPOSE / "worker.constraints.txt").read_bytes() == root.read_bytes()
    assert "--constraint /build/worker.constraints.txt" in (COMPOSE / "worker.Dockerfile").read_text(encoding="utf-8")


def test_grafanas_role_reads_and_changes_nothing(postgres_server: str) -> None:
    import psycopg

    role = f"nla_reader_{os.getpid()}"
    address = postgres_server.replace("+psycopg", "").replace("///", "///postgres")
    with psycopg.connect(address, autocommit=True) as owner:
        info = owner.info
        environment = {
            **os.environ, "POSTGRES_USER": info.user, "POSTGRES_DB": "postgres", "NLA_MONITOR_READER": role,
            "NLA_MONITOR_READER_PASSWORD": "a ' quoted @ one", "PGHOST": info.host, "PGPORT": str(info.port),
        }  # fmt: skip
        try:
            subprocess.run([str(COMPOSE / "postgres-reader.sh")], env=environment, check=True, capture_output=True)
            with psycopg.connect(address, autocommit=True) as reader:
                reader.execute(f"SET SESSION AUTHORIZATION {role}")
                assert reader.execute("SELECT 1").fetchone() == (1,)
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    reader.execute("SET transaction_read_only = off; CREATE TABLE public.x (y int)")
        finally:
            owner.execute(f"DROP ROLE IF EXISTS {role}")


def test_the_collectors_pipelines_use_what_is_defined() -> None:
    config = yaml.safe_load((COMPOSE / "collector.yaml").read_text(encoding="utf-8"))
    for pipeline in config["service"]["pipelines"].values():
        for kind in ("receivers", "processors", "exporters"):
            assert set(pipeline[kind]) <= set(config[kind])
    assert set(config["service"]["pipelines"]) == {"traces", "metrics", "logs"}


def test_the_script_says_what_is_not_running_and_what_it_does_not_know(tmp_path: Path) -> None:
    environment = {**os.environ, "NLA_STACK_DIR": str(tmp_path / "stack")}

    def stack(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(COMPOSE / "stack.sh"), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert stack("status").stdout.splitlines() == [
        "alertmanager: does not run", "prometheus: does not run", "worker-9464: does not run",
    ]  # fmt: skip
    assert stack("stop", "prometheus").stdout == "prometheus: does not run\n"
    assert stack("start", "grafana").returncode == 2
    assert "no part is called grafana" in stack("start", "grafana").stderr
    assert stack("dance").returncode == 2


# -- stack.sh -----------------------------------------------------------------------------------------------------

WORKER = """#!/usr/bin/env bash
# Stands for a worker: a web server on its metrics port.
[[ -z "${NLA_TEST_BROKEN:-}" ]] || { echo "no AV of that name" >&2; exit 2; }
exec "$NLA_TEST_PYTHON" -m http.server --bind 127.0.0.1 --directory "$NLA_TEST_PAGES" "$3"
"""


@dataclasses.dataclass
class Script:
    """``stack.sh`` with a worker that starts in no time."""

    folder: Path
    port: int

    def environment(self, **changes: str) -> dict[str, str]:
        return {
            **os.environ,
            "NLA_STACK_DIR": str(self.folder / "a stack"),
            "NLA_STACK_WORKER": str(self.folder / "worker"),
            "NLA_STACK_WORKER_PORTS": str(self.port),
            "NLA_TEST_PYTHON": sys.executable,
            "NLA_TEST_PAGES": str(self.folder / "pages"),
            **changes,
        }

    def __call__(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        command = [str(COMPOSE / "stack.sh"), *arguments]
        return subprocess.run(
            command, env=self.environment(**changes), capture_output=True, text=True, check=False, timeout=60
        )

    @property
    def worker(self) -> str:
        return f"worker-{self.port}"

    def process(self) -> int:
        return int((self.folder / "a stack" / f"{self.worker}.pid").read_text(encoding="utf-8").split()[0])


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    (tmp_path / "worker").write_text(WORKER, encoding="utf-8")
    (tmp_path / "worker").chmod(0o755)
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "metrics").write_text("up 1\n", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    found = Script(tmp_path, port)
    yield found
    found("stop", found.worker)


def gone(process: int) -> bool:
    """Whether a process has ended; where nobody waits for orphans its corpse stays."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_the_stack_starts_and_stops_twice_over(script: Script) -> None:
    for _ in range(2):
        assert script("start", script.worker).stdout.startswith(f"{script.worker}: started")
        again = script("start", script.worker)
        assert (again.returncode, again.stdout) == (0, f"{script.worker}: runs already\n")
        process = script.process()
        assert script("stop", script.worker).stdout == f"{script.worker}: stopped\n"
        assert gone(process)
        assert script("stop", script.worker).stdout == f"{script.worker}: does not run\n"


def test_two_starts_at_once_start_one(script: Script) -> None:
    command = [str(COMPOSE / "stack.sh"), "start", script.worker]
    both = [subprocess.Popen(command, env=script.environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=60)[0] for process in both)
    assert said[0] == f"{script.worker}: runs already\n"
    assert ": started" in said[1]


def test_a_part_that_does_not_come_up_is_said_with_its_reason(script: Script) -> None:
    done = script("start", script.worker, NLA_TEST_BROKEN="1")
    assert done.returncode == 1
    assert "did not come up" in done.stderr
    assert "no AV of that name" in done.stderr
    assert script("status", script.worker).stdout == f"{script.worker}: does not run\n"


def test_a_port_that_is_taken_is_said_and_whoever_has_it_is_left_alone(script: Script) -> None:
    with socket.create_server(("127.0.0.1", script.port)):
        done = script("start", script.worker)
        assert done.returncode == 1
        assert "somebody else answers" in done.stderr


def test_a_process_that_has_the_number_of_one_that_ended_is_not_killed(script: Script) -> None:
    """After a reboot the number in the file is anybody's."""
    script("start", script.worker)
    file = script.folder / "a stack" / f"{script.worker}.pid"
    number, began = file.read_text(encoding="utf-8").split()
    try:
        with subprocess.Popen(["sleep", "60"]) as stranger:
            file.write_text(f"{stranger.pid} {began}\n", encoding="utf-8")
            said, ended = script("stop", script.worker).stdout, stranger.poll()
            stranger.kill()
    finally:
        file.write_text(f"{number} {began}\n", encoding="utf-8")
    assert said == f"{script.worker}: does not run\n"
    assert ended is None


def test_ctrl_c_while_it_starts_leaves_nothing_behind(script: Script) -> None:
    (script.folder / "pages" / "metrics").unlink()  # it answers, and never well
    command = [str(COMPOSE / "stack.sh"), "start", script.worker]
    with subprocess.Popen(command, env=script.environment(), stderr=subprocess.PIPE, text=True) as starting:
        file = script.folder / "a stack" / f"{script.worker}.pid"
        deadline = time.monotonic() + 30
        while not file.is_file() or not file.read_text(encoding="utf-8").strip():
            assert time.monotonic() < deadline, "it starts the worker"
            time.sleep(0.05)
        process = script.process()
        starting.send_signal(signal.SIGINT)
        _, said = starting.communicate(timeout=60)
    assert starting.returncode == 130
    assert "interrupted" in said
    assert gone(process)


def test_an_address_with_letters_that_mean_something_to_sed_stays_as_it_is(script: Script) -> None:
    address = "http://localhost:9/hook?a=1&b=x|y"
    script("start", script.worker, NLA_STACK_WEBHOOK=address)
    written = (script.folder / "a stack" / "alertmanager.yaml").read_text(encoding="utf-8")
    assert f"url: {address}/oncall" in written
