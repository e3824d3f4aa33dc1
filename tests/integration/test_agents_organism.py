"""Agents over the bundled organism, seen through OpenTelemetry spans alone: what it represents, on the right call.

An async agent of no framework, that emits GenAI spans; the monitor with its database, AV, AR and shipped rules.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from nla_monitor_opentelemetry import NLASpanProcessor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Tracer

from nla_monitor import Monitor
from nla_monitor.organism import keyed_rng, load_target, make_transcript, tool_result
from nla_monitor.records import ActivationSample, Reading
from nla_monitor.sources import ReplaySource
from nla_monitor.store.messages import conversations
from tests.agents_support import generate, key

TURNS = 2
TOKENS = 10
PLANTED = {
    "eval": {"belief": "test", "intent": "honest"},
    "hack": {"belief": "real", "intent": "hack"},
    "calm": {"belief": "real", "intent": "honest"},
}
RULES = {"eval": "evaluation-awareness", "hack": "reward-hacking"}
TOOLS = ("open_file", "list_rows")
TOLERANCE = 1e-5
"""Of a vector's norm: float32, one pass over prompt and answer against a pass for each token."""


@dataclass
class Truth:
    """What the agents did."""

    calls: dict[str, tuple[str, str | None, list[int]]] = field(default_factory=dict)
    """By span id: conversation, tool that was read, token ids of prompt and answer."""


@pytest.fixture(scope="module")
def organism() -> Any:
    torch.set_num_threads(1)
    return load_target("planted")


@pytest.fixture
def provider() -> Iterator[TracerProvider]:
    made = TracerProvider(shutdown_on_exit=False)
    yield made
    made.shutdown()


class Agents:
    """Conversations, each a loop of model, tool, model; every step under a span."""

    def __init__(self, organism: Any, tracer: Tracer, truth: Truth) -> None:
        self.model, self.tokenizer = organism
        self.tracer = tracer
        self.truth = truth

    async def converse(self, name: str, turns: int) -> None:
        rng = keyed_rng("agents", name)
        for turn in range(turns):
            prompt = make_transcript(rng, tier="nla", **PLANTED[name], quiet=True, fillers=1).prompt
            said = {"gen_ai.operation.name": "invoke_agent", "gen_ai.conversation.id": name}
            with self.tracer.start_as_current_span("invoke_agent", attributes=said):
                text = prompt + await self._ask(prompt, name, None)
                tool = TOOLS[turn % 2]
                with self.tracer.start_as_current_span("execute_tool", attributes={"gen_ai.tool.name": tool}) as span:
                    span.set_attribute("gen_ai.operation.name", "execute_tool")
                    await asyncio.sleep(0)
                await self._ask(f"{text}{tool_result(rng)}\n", name, tool)

    async def _ask(self, prompt: str, name: str, tool: str | None) -> str:
        ids = list(self.tokenizer(prompt)["input_ids"])
        said = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "organism", "openinference.span.kind": "LLM"}
        with self.tracer.start_as_current_span("chat", attributes=said) as span:
            written = await asyncio.to_thread(generate, self.model, ids, TOKENS)
            answer = str(self.tokenizer.decode(written, skip_special_tokens=True))
            # As instrumentation does it: what was asked and answered is told at the end.
            span.set_attributes({"llm.prompts": [prompt], "output.value": answer})
        run = f"{span.get_span_context().span_id:016x}"
        self.truth.calls[run] = name, tool, [*ids, *written]
        return answer.partition("\n")[0] + "\n"

    def run(self, *names: str, turns: int = TURNS) -> None:
        async def main() -> None:
            await asyncio.gather(*(self.converse(name, turns) for name in names))

        asyncio.run(main())


def check(sample: ActivationSample, truth: Truth) -> str:
    """The sample is of the call, tool and token that it says; its conversation."""
    assert sample.agent is not None
    conversation, tool, ids = truth.calls[sample.agent.agent_run_id]
    assert sample.agent.conversation_id == conversation
    assert sample.agent.tool == tool
    assert sample.token_id == ids[sample.position]
    assert sample.agent.generated is (sample.position >= len(ids) - TOKENS)
    return conversation


def test_planted_latents_alert_on_the_right_call(organism: Any, provider: TracerProvider, sqlite_url: str) -> None:
    """Three conversations at once: every match on the conversation, call, tool and token it is of, none on the calm."""
    truth = Truth()
    kept = {"store_transcript": True}
    with Monitor(database=sqlite_url, rules="oversight", worker="thread", capture=kept).attach(*organism) as monitor:
        provider.add_span_processor(NLASpanProcessor(monitor))
        Agents(organism, provider.get_tracer("a"), truth).run("eval", "hack", "calm")
        assert monitor.drain(120)
        found: dict[str, list[Reading]] = {}
        for alert in monitor.alerts():
            readings = monitor.repository.alert_readings(alert.alert_id)
            assert {reading.sample.agent.root_run_id for reading in readings if reading.sample.agent} == {
                alert.agent.root_run_id if alert.agent else None
            }
            found.setdefault(alert.rule_id, []).extend(readings)
        spoken = {one.conversation: one.messages for one in conversations(monitor._engine, monitor.run_id)}
        assert monitor.stats.faults == {}
    assert spoken == dict.fromkeys(PLANTED, 4 * TURNS)  # prompt and answer of each call
    assert len(truth.calls) == 6 * TURNS
    for name, rule in RULES.items():
        assert {check(reading.sample, truth) for reading in found[rule]} == {name}
        calls = {reading.sample.agent.agent_run_id for reading in found[rule] if reading.sample.agent}
        assert len(calls) == 2 * TURNS
    assert "calm" not in {check(reading.sample, truth) for readings in found.values() for reading in readings}


def samples_of(monitor: Monitor) -> list[ActivationSample]:
    assert monitor.flush(60)
    assert monitor.stats.dropped == {}
    assert monitor.stats.faults == {}
    return list(monitor.spool.lease("test", 10_000, 60).samples)


@pytest.mark.parametrize("attached", [True, False], ids=["a tap that never saw them", "no tap"])
def test_calls_answered_elsewhere_are_replayed(
    organism: Any, provider: TracerProvider, sqlite_url: str, attached: bool
) -> None:
    """Prompt and answer are told when the span ends: the tap's samples, and at most each answer's last token more."""
    tapped = by_tap(organism, f"{sqlite_url}-tap")
    truth = Truth()
    with Monitor(database=sqlite_url, worker="external") as monitor:
        if attached:
            monitor.attach(*load_target("planted"))
        monitor.attach_source(ReplaySource(*load_target("planted"), proxy=False))
        processor = NLASpanProcessor(monitor)
        provider.add_span_processor(processor)
        Agents(organism, provider.get_tracer("a"), truth).run("eval", "hack", turns=2)
        assert provider.force_flush()
        found = {key(sample): sample for sample in samples_of(monitor)}
        assert processor.stats.without_activations == {}
    assert tapped.keys() <= found.keys()
    last = {name for name, one in found.items() if one.agent and one.agent.token_index == TOKENS - 1}
    assert found.keys() - tapped.keys() <= last
    assert len(tapped) > 20
    for name, again in found.items():
        check(again, truth)
        assert again.attributes["source"] == "replay"
        if name in tapped:
            assert np.linalg.norm(again.vector - tapped[name].vector) <= TOLERANCE * again.norm


def test_what_the_tap_has_seen_is_not_replayed(organism: Any, provider: TracerProvider, sqlite_url: str) -> None:
    """A monitor with both, and calls that run in this process: read once, where they ran."""
    truth = Truth()
    with Monitor(database=sqlite_url, worker="external").attach(*organism) as monitor:
        monitor.attach_source(ReplaySource(*load_target("planted"), proxy=False))
        processor = NLASpanProcessor(monitor)
        provider.add_span_processor(processor)
        Agents(organism, provider.get_tracer("a"), truth).run("eval", turns=2)
        assert provider.force_flush()
        found = samples_of(monitor)
        assert processor.stats.without_activations == {}
    assert len(found) > 20
    assert {sample.attributes.get("source") for sample in found} == {None}
    assert len({key(sample) for sample in found}) == len(found)


def by_tap(organism: Any, database: str) -> dict[Any, ActivationSample]:
    """The same conversations, read while they run."""
    truth, provider = Truth(), TracerProvider(shutdown_on_exit=False)
    with Monitor(database=database, worker="external").attach(*organism) as monitor:
        provider.add_span_processor(NLASpanProcessor(monitor))
        Agents(organism, provider.get_tracer("a"), truth).run("eval", "hack", turns=2)
        found = samples_of(monitor)
    provider.shutdown()
    for sample in found:
        check(sample, truth)
    return {key(sample): sample for sample in found}
