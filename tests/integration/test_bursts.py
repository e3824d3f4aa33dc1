"""An alert makes all ranks of its run look more closely for a while."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nla_monitor import Monitor
from nla_monitor.organism import LAYER, load_target
from nla_monitor.testing import FakeVerbalizer
from nla_monitor.worker import Worker

RULE = """
id: whatever
title: Fires on anything
severity: low
detection:
  any: {norm|gt: 0}
  condition: any
tests:
  positive: [{text: Anything., norm: 1.0}]
  negative: [{text: Anything., norm: 0.0}]
"""
CAPTURE = {"tokens_per_sequence": 1, "sequences_per_step": 1, "skip_first": 0, "norm_sink_factor": None}


def _step(monitor: Monitor, model: Any, number: int) -> int:
    """Samples of one step."""
    before = monitor.stats.sampled
    monitor.step(number)
    model(torch.randint(8, 60, (4, 16), generator=torch.Generator().manual_seed(number)))
    monitor.flush(30.0)
    return monitor.stats.sampled - before


def _monitor(folder: Path) -> tuple[Monitor, Any]:
    model = load_target("planted")[0].train()
    rules = folder / "rules.yml"
    rules.write_text(RULE)
    capture = CAPTURE | {"burst": {"steps": 1000, "factor": 3}}
    monitor = Monitor(
        {"nla": {"ar": None}}, database=str(folder / "m.db"), worker="external", rules=str(rules), capture=capture
    )
    return monitor.attach(model), model


def _read(monitor: Monitor, width: int) -> None:
    worker = Worker(monitor.config, verbalizer=FakeVerbalizer(d_model=width, layer=LAYER), sinks=[])
    while worker.run_once():
        pass


def _counts_until_more(monitor: Monitor, model: Any, plain: int, first: int) -> int:
    until = time.monotonic() + 20.0
    number = first
    while (found := _step(monitor, model, number)) == plain and time.monotonic() < until:
        number += 1
        time.sleep(0.05)
    return found


def test_an_alert_makes_its_rank_look_more_closely(tmp_path: Path) -> None:
    monitor, model = _monitor(tmp_path)
    with monitor:
        assert _step(monitor, model, 0) == 1
        _read(monitor, model.config.hidden_size)
        assert [alert.rule_id for alert in monitor.alerts()] == ["whatever"]
        assert _counts_until_more(monitor, model, 1, 1) == 9


def test_other_ranks_look_more_closely_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor, model = _monitor(tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("nla_monitor.ranks.shared_run_id", lambda _: monitor.run_id)  # there is no rendezvous here
    other, its_model = _monitor(tmp_path)
    with monitor, other:
        assert (_step(monitor, model, 0), _step(other, its_model, 0)) == (1, 1)
        _read(monitor, model.config.hidden_size)
        assert _counts_until_more(other, its_model, 1, 1) == 9
