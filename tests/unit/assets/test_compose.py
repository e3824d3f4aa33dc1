"""The compose file is one by its schema, and what it names exists."""

from __future__ import annotations

import json
import os
import re
import subprocess
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
