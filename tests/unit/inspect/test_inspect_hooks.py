"""Inspect AI over a local model: each forward on its sample and call; a finding may end a sample."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from inspect_ai import Task
from inspect_ai import eval as evaluate_task
from inspect_ai.dataset import Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageTool,
    GenerateConfig,
    Model,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    get_model,
    modelapi,
)
from inspect_ai.solver import Generate, Solver, TaskState, generate, solver, use_tools
from inspect_ai.tool import Tool, tool
from nla_monitor_inspect import NLAHooks, install

from nla_monitor.errors import ConfigError
from nla_monitor.records import AgentContext, Severity
from tests import agents_support
from tests.agents_support import CaptureMonitor, Spoken
from tests.langchain_support import byte_tokenizer, tiny_llama
from tests.store_support import alert as stored_alert
from tests.store_support import sample as stored_sample

# Inspect's own: tenacity's old parameter, and anyio streams that it leaves to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]

PLAN = ("count_rows", "find_owner", None)


class LocalAPI(ModelAPI):
    """Weights in this process, run in a worker thread; what it asks for follows a plan."""

    def __init__(self, model_name: str, *_: Any, weights: Any, tokenizer: Any, **__: Any) -> None:
        super().__init__(model_name)
        self.weights = weights
        self.tokenizer_ = tokenizer
        self.prompts: list[list[int]] = []
        self.fail = 0
        self.hang = False
        self.afterwards: Callable[[], object] = lambda: None

    async def generate(self, input: Any, tools: Any, tool_choice: Any, config: Any) -> ModelOutput:  # noqa: A002
        text = "\n".join(f"{message.role}: {message.text}" for message in input)
        ids = list(self.tokenizer_(text)["input_ids"])
        self.prompts.append(ids)
        if self.weights is not None:
            await anyio.to_thread.run_sync(agents_support.generate, self.weights, ids)
        await anyio.to_thread.run_sync(self.afterwards)
        if self.hang:
            await anyio.sleep_forever()
        if self.fail:
            self.fail -= 1
            raise RuntimeError("the model broke")
        wanted = PLAN[sum(isinstance(message, ChatMessageTool) for message in input)] if tools else None
        output = (
            ModelOutput.from_content("local", "done")
            if wanted is None
            else ModelOutput.for_tool_call("local", wanted, {"table": "sales"})
        )
        output.usage = ModelUsage(input_tokens=len(ids), output_tokens=6, total_tokens=len(ids) + 6)
        return output


modelapi("local")(LocalAPI)


@tool
def count_rows() -> Tool:
    async def execute(table: str) -> str:
        """Count rows.

        Args:
            table: whose rows.
        """
        return f"{table} holds 3 rows"

    return execute


@tool
def find_owner() -> Tool:
    async def execute(table: str) -> str:
        """Find an owner.

        Args:
            table: whose owner.
        """
        return f"{table} belongs to accounting"

    return execute


@pytest.fixture(autouse=True)
def _collected_here() -> Iterator[None]:
    """What Inspect left unclosed is collected where its warning is expected."""
    yield
    gc.collect()


@pytest.fixture
def weights() -> Any:
    return tiny_llama()


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def monitor(weights: Any, tokenizer: Any) -> Iterator[CaptureMonitor]:
    with CaptureMonitor(weights, tokenizer) as made:
        yield made


@pytest.fixture
def hooks(monitor: CaptureMonitor) -> Iterator[NLAHooks]:
    made = install(monitor)
    yield made
    made.close()


def evaluate(model: Model, tmp_path: Path, *, questions: int = 3, tools: bool = True, **settings: Any) -> Any:
    steps = [use_tools(count_rows(), find_owner()), generate()] if tools else [generate()]
    samples = [Sample(input=f"question {number}", id=f"q{number}") for number in range(questions)]
    task = Task(name="task", dataset=samples, solver=steps)
    (log,) = evaluate_task(task, model=model, log_dir=str(tmp_path), display="none", **settings)
    return log


def local(weights: Any, tokenizer: Any) -> tuple[Model, LocalAPI]:
    model = get_model("local/tiny", memoize=False, weights=weights, tokenizer=tokenizer)
    assert isinstance(model.api, LocalAPI)
    return model, model.api


def test_three_samples_at_once(
    weights: Any, tokenizer: Any, monitor: CaptureMonitor, hooks: NLAHooks, tmp_path: Path
) -> None:
    """Each activation on its call; sample, tool and id of the tool's call are those of that call."""
    model, api = local(weights, tokenizer)
    log = evaluate(model, tmp_path)
    assert log.status == "success"
    runs = monitor.runs()
    assert len(runs) == 9
    assert "" not in runs
    uuids = {sample.uuid: sample.id for sample in log.samples}
    seen: dict[str, list[Any]] = {}
    for samples in runs.values():
        context = samples[0].agent
        assert context is not None
        name = uuids[context.conversation_id]
        (prompt,) = {
            tuple(ids)
            for ids in api.prompts
            if all(s.agent.generated or ids[s.position : s.position + 1] == [s.token_id] for s in samples if s.agent)
            and f"question {name[1:]}" in tokenizer.decode(ids)
            and len(ids) == max(s.position + 1 for s in samples if s.agent and not s.agent.generated)
        }
        seen.setdefault(name, []).append((len(prompt), context.tool, context.tool_call_id is not None))
        for sample in samples:
            assert sample.attributes["sample"] == name
            assert sample.attributes["task"] == "task"
            assert sample.attributes["epoch"] == 1
            assert sample.agent is not None
            assert sample.agent.root_run_id == context.conversation_id
    expected = [(None, False), ("count_rows", True), ("find_owner", True)]
    assert {name: [told[1:] for told in sorted(found)] for name, found in seen.items()} == {
        f"q{number}": expected for number in range(3)
    }
    assert hooks.stats.without_activations == {}
    assert hooks.stats.open_spans == 0


@pytest.fixture
def saved(weights: Any, tokenizer: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_hf_provider_batches_in_a_thread_of_its_own(saved: Path, tmp_path: Path) -> None:
    """Rows of one padded batch go to their samples, by the provider's own rendering of each prompt."""
    model = get_model(
        "hf/tiny", model_path=str(saved), device="cpu", do_sample=False, config=GenerateConfig(max_tokens=4)
    )
    with CaptureMonitor(model.api.model, model.api.tokenizer) as monitor:  # type: ignore[attr-defined]
        hooks = install(monitor, model=model)
        try:
            log = evaluate(model, tmp_path / "logs", tools=False)
        finally:
            hooks.close()
        assert log.status == "success"
        runs = monitor.runs()
        assert len(runs) == 3
        roots = {sample.agent.root_run_id for samples in runs.values() for sample in samples if sample.agent}
        assert roots == {sample.uuid for sample in log.samples}
        assert hooks.stats.without_activations == {}
        by_uuid = {sample.uuid: sample.output.completion for sample in log.samples}
        assert {one.text for one in monitor.completions if one} == set(by_uuid.values())
        for samples in runs.values():
            assert {sample.agent.generated for sample in samples if sample.agent} == {False, True}


def test_a_failed_attempt_and_its_retry(
    weights: Any, tokenizer: Any, monitor: CaptureMonitor, hooks: NLAHooks, tmp_path: Path
) -> None:
    """A sample that fails and is tried again: nothing stays open, the second attempt is read as well."""
    model, api = local(weights, tokenizer)
    api.fail = 1
    log = evaluate(model, tmp_path, questions=1, tools=False, retry_on_error=1)
    assert log.status == "success"
    assert len(monitor.runs()) == 2
    assert hooks.stats.open_spans == 0
    assert len(monitor.capture.sessions) == 0


def test_a_model_call_that_is_cancelled(
    weights: Any, tokenizer: Any, monitor: CaptureMonitor, hooks: NLAHooks, tmp_path: Path
) -> None:
    """By the sample's time limit, in the middle of a call: what was read stays, nothing stays open."""
    model, api = local(weights, tokenizer)
    api.hang = True
    log = evaluate(model, tmp_path, questions=2, tools=False, time_limit=1)
    assert [sample.limit.type for sample in log.samples] == ["time", "time"]
    assert len(monitor.runs()) == 2
    assert hooks.stats.open_spans == 0
    assert len(monitor.capture.sessions) == 0
    assert hooks.stats.without_activations == {}


def firing(sample_uuid: str) -> Any:
    agent = AgentContext("call", sample_uuid, sample_uuid)
    return stored_alert(stored_sample(), agent=agent, severity=Severity.HIGH, quote="being tested")


def test_an_alert_ends_its_sample_only_where_asked_for(
    weights: Any, tokenizer: Any, monitor: CaptureMonitor, tmp_path: Path
) -> None:
    """At the next model call, as a limit; the other samples go on."""
    model, api = local(weights, tokenizer)
    api.afterwards = lambda: monitor.capture.flush(10)
    hooks = install(monitor, stop_on="high")
    silent = install(monitor)
    try:
        told: list[str] = []

        def on_sample(samples: Any) -> None:
            for sample in samples:
                if sample.attributes.get("sample") == "q1" and not told:
                    told.append(sample.agent.root_run_id)
                    for listener in monitor.listeners:
                        listener(firing(sample.agent.root_run_id))

        monitor.on_samples = on_sample
        log = evaluate(model, tmp_path)
    finally:
        hooks.close()
        silent.close()
    by_name = {sample.id: sample for sample in log.samples}
    assert told == [by_name["q1"].uuid]
    assert by_name["q1"].limit is not None
    assert by_name["q1"].limit.type == "custom"
    assert len([m for m in by_name["q1"].messages if isinstance(m, ChatMessageAssistant)]) < 3
    for name in ("q0", "q2"):
        assert by_name[name].limit is None
        assert len([m for m in by_name[name].messages if isinstance(m, ChatMessageAssistant)]) == 3


def test_the_visible_side(
    weights: Any, tokenizer: Any, monitor: CaptureMonitor, hooks: NLAHooks, tmp_path: Path
) -> None:
    """Roles, tools and calls of each prompt, and each answer."""
    monitor.transcripts = Spoken()
    model, _ = local(weights, tokenizer)
    evaluate(model, tmp_path, questions=1)
    last = max(monitor.transcripts.prompts.values(), key=len)
    assert [(one.role, one.name) for one in last] == [
        ("user", None),
        ("assistant", None),
        ("tool", "count_rows"),
        ("assistant", None),
        ("tool", "find_owner"),
    ]
    assert last[2].tool_call_id == last[1].tool_calls[0]["id"]
    said = [one for one in monitor.transcripts.answers.values() if one]
    assert [[call["name"] for call in one.tool_calls] for one in said] == [["count_rows"], ["find_owner"], []]
    assert said[-1].text == "done"


def test_a_forward_after_the_answer_is_nobodys(
    weights: Any, tokenizer: Any, monitor: CaptureMonitor, hooks: NLAHooks, tmp_path: Path
) -> None:
    """A solver that runs the weights itself, in the context in which the model has just answered."""

    @solver
    def probing() -> Solver:
        async def solve(state: TaskState, generate: Generate) -> TaskState:
            state = await generate(state)
            agents_support.generate(weights, [5, 6, 7])
            return state

        return solve

    model, api = local(weights, tokenizer)
    task = Task(dataset=[Sample(input="question", id="q")], solver=probing())
    (log,) = evaluate_task(task, model=model, log_dir=str(tmp_path), display="none")
    assert log.status == "success"
    runs = {run: samples for run, samples in monitor.runs().items() if run}
    assert len(runs) == 1
    (samples,) = runs.values()
    (ids,) = api.prompts
    assert all(s.agent and (s.agent.generated or s.token_id == ids[s.position]) for s in samples)
    assert max(s.position for s in samples) >= len(ids)


def test_a_model_without_weights_is_refused_with_a_remedy(monitor: CaptureMonitor) -> None:
    """``model=`` is for the provider whose prompts can be rendered."""
    with pytest.raises(ConfigError, match="replay it through a local model"):
        install(monitor, model=get_model("mockllm/model"))


def test_an_api_model_is_counted(
    monitor: CaptureMonitor, tokenizer: Any, hooks: NLAHooks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No activations to read: said once, counted, and the evaluation is as it was."""
    elsewhere, _ = local(None, tokenizer)
    log = evaluate(elsewhere, tmp_path, tools=False)
    assert log.status == "success", log.error
    assert hooks.stats.without_activations == {"local/tiny": 3}
    assert caplog.text.count("no activations to read") == 1


def test_a_fault_of_ours_reaches_nobody(
    weights: Any, monitor: CaptureMonitor, hooks: NLAHooks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every entry point broken: the evaluation ends as it would."""
    monkeypatch.setenv("NLA_MONITOR_STRICT", "0")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("ours")

    for name in ("start", "end", "_innermost"):
        monkeypatch.setattr(f"nla_monitor.agent_calls.AgentCalls.{name}", broken)
    model, _ = local(weights, monitor.tokenizer)
    assert evaluate(model, tmp_path).status == "success"
    assert "inspect.on_before_model_generate" in monitor.guard.faults
