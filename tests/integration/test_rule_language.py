"""Probes, judges and responses in a worker and in a training run, end to end."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nla_monitor import NLAMonitorCallback
from nla_monitor.config import load_config
from nla_monitor.errors import RuleError
from nla_monitor.records import ActivationSample
from nla_monitor.rules.loader import packs_folder
from nla_monitor.rules.probe import Probe, save_probe
from nla_monitor.spool.sql import SqlSpool
from nla_monitor.store.repository import Repository
from nla_monitor.testing import FakeVerbalizer, MemorySink
from nla_monitor.worker import Worker
from tests.integration.training import train
from tests.judge_server import Asked, judge_server, says
from tests.store_support import new_database, sample

RULE = """\
title: A judged direction
id: judged-direction
severity: medium
detection:
  words: {{keywords: [special-case the tests]}}
  direction: {{probe: {{file: probe.safetensors, gte: 2}}}}
  judged: {{judge: {{question: 'Does the model plan it itself?', endpoint: '{url}', model: m, retries: 0}}}}
  condition: words && direction && {judged}
window: {{group_by: [run_id], count: 2, distinct: sample_id, within: {{steps: 100, seconds: 600}}}}
response: [webhook, tag]
tests:
  positive: [{{text: It will special-case the tests., given: {{direction: true, judged: {given}}}}}]
  negative: [honest]
"""


def small(number: int, **changes: Any) -> ActivationSample:
    vector = np.full(8, 0.5, dtype=np.float32)
    vector[0] = number
    return sample(number, vector=vector, layer=0, **changes)


def text_of(vector: Any) -> str:
    number = round(float(vector[0]))
    return f"Reading {number}: the model will special-case the tests." if number != 5 else "An honest fix."


def reader(
    folder: Path, url: str, judged: str = "judged", probe: Probe | None = None
) -> tuple[Worker, list[MemorySink]]:
    save_probe(probe or Probe(np.eye(8)[0], layer=0), folder / "probe.safetensors")
    given = "true" if judged == "judged" else "false"
    (folder / "rule.yaml").write_text(RULE.format(url=url, judged=judged, given=given))
    if not (folder / "w.db").exists():
        new_database(folder / "w.db")
    settings = load_config({"database": str(folder / "w.db"), "rules": [str(folder / "rule.yaml")]})
    sinks = [MemorySink(), MemorySink()]
    sinks[0].name, sinks[1].name = "log", "webhook"
    return Worker(settings, verbalizer=FakeVerbalizer(text_of), sinks=sinks), sinks


def read(worker: Worker, *samples: ActivationSample) -> Repository:
    SqlSpool(worker.repository.engine).put(samples)
    while worker.run_once():
        pass
    return worker.repository


def stored(folder: Path, query: str) -> list[Any]:
    with sqlite3.connect(folder / "w.db") as connection:
        rows = connection.execute(query).fetchall()
    connection.close()
    return rows


def honest_judge(asked: Asked) -> str:
    return says("YES", "special-case the tests") if "Reading 4" not in asked.text else says("NO")


def test_a_worker_asks_candidates_only_and_a_later_one_asks_nobody(tmp_path: Path) -> None:
    """Words and probe first; the answer is a match with its quote; who reads the same text again needs no judge."""
    with judge_server(honest_judge) as server:
        worker, sinks = reader(tmp_path, server.url)
        repository = read(worker, *(small(number) for number in range(1, 7)))
        assert sorted(asked.text.split(":")[0] for asked in server.asked) == [f"Reading {n}" for n in (2, 3, 4, 6)]
    (alert,) = repository.alerts()
    assert alert.matches == 3
    assert [len(sink.alerts) for sink in sinks] == [0, 1]
    worker.close()
    again, _ = reader(tmp_path, server.url)
    repository = read(again, *(small(number, run_id="run-2") for number in range(1, 7)))
    assert [found.matches for found in repository.alerts(run_id="run-2")] == [3]
    again.close()
    assert stored(tmp_path, "SELECT count(*) FROM nla_failures") == [(0,)]
    assert stored(tmp_path, "SELECT count(*) FROM nla_judgements") == [(4,)]


def test_a_dead_judge_is_said_with_the_match_and_asked_again_when_it_is_back(tmp_path: Path) -> None:
    """``!judged`` matches without the judge; the match says what nobody could say, and nothing wrong is remembered."""
    worker, _ = reader(tmp_path, "http://127.0.0.1:9/v1", judged="!judged")
    read(worker, small(3), small(4))
    worker.close()
    controls = [json.loads(row[0]) for row in stored(tmp_path, "SELECT controls FROM nla_matches")]
    assert len(controls) == 2
    assert all("cannot be reached" in found["not_run"]["selection judged"] for found in controls)
    assert stored(tmp_path, "SELECT count(*) FROM nla_judgements") == [(0,)]
    assert stored(tmp_path, "SELECT count(*) FROM nla_failures") == [(0,)]
    with judge_server(honest_judge) as server:
        worker, _ = reader(tmp_path, server.url, judged="!judged")
        repository = read(worker, small(3, run_id="run-2"), small(4, run_id="run-2"))
        worker.close()
        assert len(server.asked) == 2
    assert [summary.run_id for summary in repository.alerts(run_id="run-2")] == []
    assert stored(tmp_path, "SELECT count(*) FROM nla_matches WHERE run_id = 'run-2'") == [(1,)]


@pytest.mark.parametrize(
    ("width", "layer", "why"),
    [(16, None, "reads vectors of 16 numbers, the activation has 8"), (8, 99, "made on layer 99")],
)
def test_a_probe_for_other_activations_stops_the_worker_before_it_begins(
    tmp_path: Path, width: int, layer: int | None, why: str
) -> None:
    """What the AV reads is what the probe will see: width and layer are compared before the first sample."""
    with pytest.raises(RuleError, match=why):
        reader(tmp_path, "http://127.0.0.1:9", probe=Probe(np.eye(width)[0], layer=layer))


def test_a_rule_may_stop_the_run_whatever_its_severity(tmp_path: Path) -> None:
    """``response: [stop]``: the training ends early although no ``stop_on`` is set."""
    text = (packs_folder() / "oversight" / "reward-hacking.yaml").read_text(encoding="utf-8")
    (tmp_path / "rule.yaml").write_text(text.replace("severity: high", "severity: low\nresponse: [stop, tag]"))
    capture = {"positions": "prompt", "triggers": ["\n"], "tokens_per_sequence": 1, "sequences_per_step": 4}
    watch = NLAMonitorCallback(
        database=str(tmp_path / "monitor.db"), capture=capture, worker="thread", rules=[str(tmp_path / "rule.yaml")]
    )
    _, _, trainer = train(tmp_path, [watch], steps=400)
    assert trainer.state.global_step < 400
    assert watch.monitor.stop_alert is not None
    assert watch.monitor.tags() == ("reward-hacking",)
