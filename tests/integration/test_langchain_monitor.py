"""A real monitor under LangChain without any config: what is stored, and how a finding changes the sampling."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableLambda
from nla_monitor_langchain import ChatNLAModel

from nla_monitor import Monitor
from nla_monitor.attached import LANGCHAIN_VARIABLE, attached
from nla_monitor.organism import LAYER, load_target
from nla_monitor.store.queries import SampleView
from nla_monitor.store.stream import stream_readings
from nla_monitor.testing import FakeVerbalizer
from nla_monitor.worker import Worker
from tests.langgraph_kit import Witness, check_place, make_chat, make_graph, task_of, turn_input

RULE = """
id: said-so
title: Fires where the text says so
severity: low
detection:
  word: {keywords: [aha]}
  condition: word
window: {count: 1, group_by: [run_id], within: {seconds: 600}}
tests:
  positive: [{text: Aha.}]
  negative: [{text: Nothing.}]
"""


@pytest.fixture(scope="module")
def target() -> tuple[Any, Any]:
    return load_target("planted")


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Monitor]:
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULE)
    capture = {"tokens_per_sequence": 1, "generated_tokens": 2, "burst": {"steps": 2, "factor": 4}}
    with Monitor(
        {"nla": {"ar": None}},
        database=str(tmp_path / "m.db"),
        worker="external",
        rules=str(rules),
        capture=capture,
    ) as made:
        yield made


def _stored(monitor: Monitor) -> list[SampleView]:
    assert monitor.flush(30)
    return monitor.repository.samples(run_id=monitor.run_id, limit=10_000)


@pytest.mark.parametrize("switch", ["block", "environment"])
def test_a_graph_is_watched_without_touching_it(
    target: tuple[Any, Any], monitor: Monitor, switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that a sample knows of its place survives the database."""
    model, tokenizer = target
    if switch == "environment":
        monkeypatch.setenv(LANGCHAIN_VARIABLE, "1")
    monitor.attach(model, tokenizer)
    witness = Witness(tokenizer, model)
    graph = make_graph(make_chat(model, tokenizer), witness)
    root = uuid.uuid4()
    config: Any = {"run_id": root, "configurable": {"thread_id": "talk", "root": str(root)}}
    if switch == "environment":
        graph.invoke(turn_input(task_of("tested", 0)), config)
    else:
        with monitor.langchain():
            graph.invoke(turn_input(task_of("tested", 0)), config)
    samples = _stored(monitor)
    assert {sample.agent.agent_run_id for sample in samples if sample.agent} == set(witness.calls)
    for sample in samples:
        check_place(sample.agent, sample.position, witness.calls, roles=True)
        assert "nla_monitor.agent" not in sample.attributes
    _read(monitor, model.config.hidden_size, "Nothing.")
    pages = stream_readings(monitor.repository.engine, run_ids=[monitor.run_id], vectors=False)
    again = {reading.sample_id: reading.sample for page in pages for reading in page}
    assert {key: (one.agent, one.attributes) for key, one in again.items()} == {
        sample.sample_id: (sample.agent, sample.attributes) for sample in samples
    }
    monitor.close()
    assert monitor not in attached()


def _read(monitor: Monitor, width: int, *texts: str) -> None:
    worker = Worker(monitor.config, verbalizer=FakeVerbalizer(texts, d_model=width, layer=LAYER), sinks=[])
    while worker.run_once():
        pass


def _call(monitor: Monitor, chat: ChatNLAModel, root: uuid.UUID, text: str) -> int:
    """Samples of one model call of an agent's run."""
    before = monitor.stats.sampled
    with monitor.langchain():
        RunnableLambda(lambda _: chat.invoke([HumanMessage(text)])).invoke("", {"run_id": root})
    assert monitor.flush(30)
    return monitor.stats.sampled - before


def test_a_match_makes_the_next_calls_of_its_run_denser_and_no_other(target: tuple[Any, Any], monitor: Monitor) -> None:
    model, tokenizer = target
    monitor.attach(model, tokenizer)
    chat = ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=12)
    found, other = uuid.uuid4(), uuid.uuid4()
    texts = [task_of("tested", number) for number in range(8)]
    plain = _call(monitor, chat, found, texts[0])
    _read(monitor, model.config.hidden_size, "Aha.")
    runs = monitor.capture.sessions.runs if monitor.capture is not None else None
    assert runs is not None
    until = time.monotonic() + 20
    while not runs.of(str(found)).closer and time.monotonic() < until:
        time.sleep(0.05)
    assert _call(monitor, chat, other, texts[1]) <= plain
    assert _call(monitor, chat, found, texts[2]) > plain
    assert _call(monitor, chat, found, texts[3]) > plain
    assert _call(monitor, chat, found, texts[4]) <= plain


def test_what_a_runs_budget_left_out_is_counted(target: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = target
    capture = {"samples_per_agent_run": 4, "generated_tokens": 4}
    database = str(tmp_path / "m.db")
    with Monitor({"nla": {"ar": None}}, database=database, worker="external", capture=capture) as monitor:
        monitor.attach(model, tokenizer)
        chat = ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=12)
        root = uuid.uuid4()
        taken = [_call(monitor, chat, root, task_of("tested", number)) for number in range(3)]
        assert taken[0] > 0 == taken[2]
        assert monitor.stats.skipped["agent_run_budget"] > 0
