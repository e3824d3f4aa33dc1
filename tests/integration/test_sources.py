"""One agent over the bundled organism, read in every way: the same samples, whoever ran the model and whoever reads it.

Real langchain-core, langchain-huggingface, transformers, the monitor with its database, and in the last tests its AV.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import StructuredTool
from langchain_huggingface import HuggingFacePipeline
from nla_monitor_langchain import ChatNLAModel, NLACallbackHandler

from nla_monitor import Monitor
from nla_monitor.alerts.responses import describe
from nla_monitor.errors import AttachError, CheckpointError, ConfigError
from nla_monitor.evidence.wording import lines
from nla_monitor.organism import agent_prompt, keyed_rng, load_target, parse_tool_call, paths, tool_result
from nla_monitor.records import ActivationSample, AgentContext, Completion
from nla_monitor.sources import ReplaySource
from tests.langchain_support import text_pipeline

TOLERANCE = 1e-5
"""Of a vector's norm: float32, one pass over prompt and answer against a pass for each token. Stated in the README."""
TURNS = 4
NEW_TOKENS = 16
POLICY = {"triggers": ["\n"], "tokens_per_sequence": 3, "generated_tokens": 6}


@pytest.fixture(scope="module")
def organism() -> Any:
    torch.set_num_threads(1)
    return load_target("planted")


def agent(ask: Callable[[str], str]) -> RunnableLambda[str, str]:
    """Model, tool, model, …: the transcript grows by what both say."""
    rng = random.Random(5)
    tool = StructuredTool.from_function(lambda number: tool_result(rng), name="look", description="look NUMBER")

    def work(task: str) -> str:
        text = task
        for _ in range(TURNS):
            line = ask(text).split("\n")[0]
            text += line + "\n"
            call = parse_tool_call(line)
            if call is not None:
                text += f"{tool.invoke({'number': call[1]})}\n"
        return text

    return RunnableLambda(work, name="agent")


def task(belief: str = "test") -> str:
    return agent_prompt(keyed_rng("langchain-agent", 4), belief=belief).prompt.splitlines()[0] + "\n"


def pipeline_agent(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    llm = HuggingFacePipeline(pipeline=text_pipeline(model, tokenizer, max_new_tokens=NEW_TOKENS), pipeline_kwargs={})
    return agent(lambda text: llm.invoke(text).removeprefix(text)), llm


def chat_agent(model: Any, tokenizer: Any) -> tuple[Any, Any]:
    chat = ChatNLAModel(
        model=model,
        tokenizer=tokenizer,
        max_new_tokens=NEW_TOKENS,
        prompt_format=lambda messages: str(messages[0].text),
    )
    return agent(lambda text: chat.invoke([HumanMessage(text)]).text), None


@contextmanager
def watching(database: str, **settings: Any) -> Iterator[Monitor]:
    with Monitor(database=database, capture=POLICY, **({"worker": "external"} | settings)) as monitor:
        yield monitor


def samples_of(monitor: Monitor) -> list[ActivationSample]:
    assert monitor.flush(60)
    assert monitor.stats.dropped == {}
    assert monitor.stats.faults == {}
    return list(monitor.spool.lease("test", 10_000, 60).samples)


def in_order(samples: list[ActivationSample]) -> dict[tuple[int, int, str], ActivationSample]:
    """By model call, position and trigger; ids of runs, which are made anew each time, become numbers."""
    calls: dict[str, int] = {}
    for sample in sorted(samples, key=lambda one: one.captured_at):
        if sample.agent is not None:
            calls.setdefault(sample.agent.agent_run_id, len(calls))
    found = {}
    for sample in samples:
        assert sample.agent is not None
        number = calls[sample.agent.agent_run_id]
        # A text pipeline is told of no roles; its prompt has none.
        unsaid: dict[str, Any] = {"message_role": None, "span_start": None, "span_end": None}
        context = replace(sample.agent, agent_run_id=str(number), parent_run_id=None, root_run_id=None, **unsaid)
        found[number, sample.position, sample.trigger] = replace(sample, agent=context)
    assert len(found) == len(samples)
    return found


APART = {"sample_id", "run_id", "captured_at", "vector", "norm", "attributes", "screens"}


def difference(left: list[ActivationSample], right: list[ActivationSample], *, answered: int | None = None) -> float:
    """The largest difference of two vectors in the norm of one, of samples that say the same.

    ``answered``: tokens of each answer, where ``right`` knew the answers as texts: their last token, which a tap never
    sees because it goes into no pass, may then be read, too.
    """
    ours, theirs = in_order(left), in_order(right)
    last = {place for place, one in theirs.items() if answered and one.agent and one.agent.token_index == answered - 1}
    assert theirs.keys() - last == ours.keys()
    assert len(ours) >= 3 * TURNS
    worst = 0.0
    for place, one in ours.items():
        other = theirs[place]
        for item in fields(one):
            if item.name not in APART:
                assert getattr(one, item.name) == getattr(other, item.name), item.name
        worst = max(worst, float(np.linalg.norm(one.vector - other.vector)) / one.norm)
    return worst


@pytest.fixture(scope="module")
def by_pipeline(organism: Any, tmp_path_factory: pytest.TempPathFactory) -> list[ActivationSample]:
    """What the tap takes while ``HuggingFacePipeline`` answers."""
    with watching(f"sqlite:///{tmp_path_factory.mktemp('tap') / 'nla.db'}") as monitor:
        monitor.attach(*organism)
        work, llm = pipeline_agent(*organism)
        work.invoke(task(), {"callbacks": [NLACallbackHandler(monitor, llm=llm)]})
        return samples_of(monitor)


def test_the_chat_model_gives_the_pipelines_samples_bit_for_bit(
    organism: Any, by_pipeline: list[ActivationSample], sqlite_url: str
) -> None:
    with watching(sqlite_url) as monitor:
        monitor.attach(*organism)
        work, _ = chat_agent(*organism)
        work.invoke(task(), {"callbacks": [NLACallbackHandler(monitor)]})
        found = samples_of(monitor)
    assert difference(by_pipeline, found) == 0.0


def test_a_replay_gives_the_pipelines_samples_up_to_rounding(
    organism: Any, by_pipeline: list[ActivationSample], sqlite_url: str
) -> None:
    """The model that answers is not attached; a copy of it, from its folder, is run again, as the config says."""
    model, tokenizer = organism
    target = str(paths("planted").target)
    with watching(sqlite_url, source={"kind": "replay", "model": target, "proxy": False}) as monitor:
        monitor.attach_source()
        assert monitor.capture is None
        work, llm = pipeline_agent(model, tokenizer)
        work.invoke(task(), {"callbacks": [NLACallbackHandler(monitor, llm=llm)]})
        found = samples_of(monitor)
    assert {sample.attributes["source"] for sample in found} == {"replay"}
    assert 0.0 < difference(by_pipeline, found, answered=NEW_TOKENS) <= TOLERANCE


def test_a_replay_of_what_the_chat_model_says_gives_the_very_same_samples(
    organism: Any, by_pipeline: list[ActivationSample], sqlite_url: str
) -> None:
    """It tells the ids of prompt and answer, so that nothing is left to tokenizing again."""
    copy, tokenizer = load_target("planted")
    with watching(sqlite_url) as monitor:
        monitor.attach_source(ReplaySource(copy, tokenizer, proxy=False))
        work, _ = chat_agent(*organism)
        work.invoke(task(), {"callbacks": [NLACallbackHandler(monitor)]})
        found = samples_of(monitor)
    assert {sample.attributes.get("retokenized") for sample in found} == {None}
    assert 0.0 < difference(by_pipeline, found) <= TOLERANCE


def test_what_the_tap_has_seen_is_not_replayed_and_what_it_has_not_is(organism: Any, sqlite_url: str) -> None:
    """One monitor, a model in this process, and calls that another server answers with the same weights."""
    model, tokenizer = organism
    copy, _ = load_target("planted")
    ids = tokenizer(task())["input_ids"]
    with watching(sqlite_url) as monitor:
        monitor.attach(model, tokenizer).attach_source(ReplaySource(copy, tokenizer, proxy=False))
        here = monitor.open_session(AgentContext("here"), ids)
        tokens = torch.tensor([ids])
        written = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False)
        answer = Completion(token_ids=tuple(written[0, len(ids) :].tolist()))
        monitor.close_session(here, completion=answer)
        elsewhere = monitor.open_session(AgentContext("elsewhere"), ids)
        monitor.close_session(elsewhere, completion=answer)
        found = samples_of(monitor)
        assert monitor.stats.skipped == {"tapped": 1}
        assert (here.forwards, elsewhere.forwards) == (1, 1)
    by_run = {
        run: [one for one in found if one.agent and one.agent.agent_run_id == run] for run in ("here", "elsewhere")
    }
    assert {one.attributes.get("source") for one in by_run["here"]} == {None}
    assert {one.attributes.get("source") for one in by_run["elsewhere"]} == {"replay"}
    assert len(by_run["here"]) == len(by_run["elsewhere"]) > 0


@pytest.mark.parametrize("belief", ["test", "real"])
def test_a_replayed_agent_raises_the_alert_that_its_belief_deserves(
    belief: str, organism: Any, sqlite_url: str
) -> None:
    """From the answer of an unattached model to the alert, and no alert for the agent that believes otherwise."""
    model, tokenizer = organism
    copy, _ = load_target("planted")
    with watching(sqlite_url, worker="thread", rules="oversight") as monitor:
        monitor.attach_source(ReplaySource(copy, tokenizer, proxy=False))
        work, llm = pipeline_agent(model, tokenizer)
        work.invoke(task(belief), {"callbacks": [NLACallbackHandler(monitor, llm=llm)]})
        assert monitor.drain(120)
        assert monitor.stats.written > 0
        fired = {alert.rule_id for alert in monitor.alerts()}
    assert ("evaluation-awareness" in fired) == (belief == "test")


def test_an_alert_from_a_proxy_says_in_every_place_that_it_is_one(organism: Any, sqlite_url: str) -> None:
    """Another model answers, of which nothing can be read; how the local one takes its text is no evidence of it."""
    model, tokenizer = organism
    ids = tokenizer(task())["input_ids"]
    with watching(sqlite_url, worker="thread", rules="oversight") as monitor:
        monitor.attach_source(ReplaySource(model, tokenizer, proxy=True))
        for number in range(6):
            handle = monitor.open_session(AgentContext(f"run-{number}"), ids)
            monitor.close_session(handle, completion=Completion(text="I look at row 2.\nThere are 8 files.\n"))
        assert monitor.drain(120)
        alert = next(alert for alert in monitor.alerts() if alert.rule_id == "evaluation-awareness")
    assert alert.evidence["proxy"] is True
    assert "read in a proxy of the model that answered" in describe(alert)
    (told,) = [str(line) for line in lines(alert.evidence) if line.name == "proxy"]
    assert told.startswith("doubtful: read in another model than the one that answered")


def test_a_source_that_is_stuck_at_the_end_costs_no_sample_of_the_tap(organism: Any, sqlite_url: str) -> None:
    """At the end of the process there is little time, and a pass that does not end must not take it."""
    model, tokenizer = organism
    copy, _ = load_target("planted")
    gate = threading.Event()
    copy.model.layers[0].register_forward_pre_hook(lambda *_: gate.wait(30) and None)
    ids = tokenizer(task())["input_ids"]
    with watching(sqlite_url, queue={"write_interval_seconds": 60}) as monitor:
        monitor.attach(model, tokenizer).attach_source(ReplaySource(copy, tokenizer, proxy=False))
        monitor.close_session(monitor.open_session(AgentContext("never"), [5, 6, 7]))
        handle = monitor.open_session(AgentContext("here"), ids)
        model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=4, do_sample=False)
        monitor.close_session(handle)
        assert not monitor.close(2.0)
        gate.set()
        assert monitor.stats.dropped == {}
        assert monitor.stats.written > 0


def test_what_cannot_be_attached_is_refused_with_what_to_do(organism: Any, sqlite_url: str) -> None:
    model, tokenizer = organism
    with watching(sqlite_url) as monitor:
        with pytest.raises(ConfigError, match=r"the config has no section source.*kind: replay"):
            monitor.attach_source()
        monitor.attach(model, tokenizer)
        with pytest.raises(AttachError, match="the same model object cannot be tapped and replayed"):
            monitor.attach_source(ReplaySource(model, tokenizer, proxy=False))
        copy, _ = load_target("planted")
        monitor.attach_source(ReplaySource(copy, tokenizer, proxy=False))
        with pytest.raises(AttachError, match="has a ReplaySource already"):
            monitor.attach_source(ReplaySource(copy, tokenizer, proxy=False))
        with pytest.raises(AttachError, match="the same model object"):
            monitor.attach(copy, tokenizer, name="copy")
    with pytest.raises(AttachError, match="this monitor is closed"):
        monitor.attach_source(ReplaySource(copy, tokenizer, proxy=False))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"kind": "replay", "model": "x"}, "a source of kind 'replay' needs proxy"),
        ({"kind": "vllm_files"}, "needs folder"),
        ({"kind": "vllm_replica", "folder": "x"}, "needs url and proxy"),
        ({"kind": "replay", "model": "x", "proxy": False, "modle": 1}, "did you mean 'model'"),
        ({"kind": "vllm_replica", "folder": "x", "proxy": True, "url": "http://me:pw@host"}, "api_key_env"),
    ],
)
def test_a_source_that_cannot_be_meant_is_an_error_of_the_config(source: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Monitor(source=source)


def test_a_local_copy_that_is_not_there_is_an_error_that_says_so(sqlite_url: str, tmp_path: Path) -> None:
    source = {"kind": "replay", "model": str(tmp_path / "no"), "proxy": False}
    with (
        watching(sqlite_url, source=source) as monitor,
        pytest.raises(CheckpointError, match="there is no such folder"),
    ):
        monitor.attach_source()


def test_a_relative_folder_is_meant_beside_the_config_file(tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    file = tmp_path / "nla-monitor.yaml"
    file.write_text("source: {kind: vllm_files, folder: hidden}\n")
    source = Monitor(file, database=f"sqlite:///{tmp_path / 'nla.db'}").config.source
    assert source is not None
    assert source.folder == str(tmp_path / "hidden")
