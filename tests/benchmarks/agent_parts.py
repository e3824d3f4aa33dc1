"""Attribution, cost of an event, and memory of the agent benchmark."""

from __future__ import annotations

import gc
import os
import statistics
import time
import uuid
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.runnables import RunnableGenerator
from langchain_huggingface import HuggingFacePipeline
from nla_monitor_langchain import ChatNLAModel, NLACallbackHandler

from nla_monitor import Monitor
from nla_monitor.organism import load_target
from tests.benchmarks.capture_arms import write_sidecar
from tests.langchain_support import LAYER, byte_tokenizer, text_pipeline, tiny_llama
from tests.langgraph_kit import Witness, check_place, make_chat, make_graph, task_of, turn_config, turn_input

CONVERSATIONS = ("tested", "hacking", "plain")
MANY = 1_000_000


def attribution(folder: Path, turns: int) -> dict[str, Any]:
    """Share of samples on the right run, tool call, message and token; three conversations at once."""
    folder.mkdir()
    model, tokenizer = load_target("planted")
    witness = Witness(tokenizer, model)
    monitor = Monitor(database=f"sqlite:///{folder / 'agent.db'}", worker="external").attach(model, tokenizer)
    with monitor:
        graph, handler = make_graph(make_chat(model, tokenizer), witness), NLACallbackHandler(monitor)

        def converse(conversation: str) -> None:
            torch.set_num_threads(1)
            for turn in range(turns):
                graph.invoke(turn_input(task_of(conversation, turn)), turn_config(conversation, [handler]))

        with ThreadPoolExecutor(len(CONVERSATIONS)) as pool:
            list(pool.map(converse, CONVERSATIONS))
        monitor.flush(60)
        samples = monitor.repository.samples(run_id=monitor.run_id, limit=MANY)
    right = sum(_in_place(sample, witness) for sample in samples)
    silent = len(set(witness.calls) - {sample.agent.agent_run_id for sample in samples if sample.agent})
    return {
        "attribution": right / len(samples),
        "attribution_samples": len(samples),
        "attribution_generations": len(witness.calls),
        "attribution_generations_without_sample": silent,
    }


def _in_place(sample: Any, witness: Witness) -> bool:
    try:
        call = check_place(sample.agent, sample.position, witness.calls, roles=True)
    except (AssertionError, AttributeError, KeyError, TypeError):
        return False
    return bool(sample.token_id == [*call.prompt, *call.written][sample.position])


def events(folder: Path, runs: int) -> dict[str, Any]:
    """Microseconds spent in the handler: an agent's run of six events, its model announced in two ways.

    ``ChatNLAModel`` opens its session itself; for a pipeline the handler tokenizes the prompt and opens one.
    """
    folder.mkdir()
    model, tokenizer = tiny_llama(), byte_tokenizer()
    spent: dict[str, list[float]] = defaultdict(list)
    with _monitor(folder, model, tokenizer) as monitor:
        pipe = HuggingFacePipeline(pipeline=text_pipeline(model, tokenizer))
        chat, text = NLACallbackHandler(monitor), NLACallbackHandler(monitor, llm=pipe)
        for _ in range(runs):
            _one_run(chat, spent)
            _text_call(text, spent)
        stats = chat.stats
        if stats.open_calls or stats.open_runs:
            raise RuntimeError("the handler has kept something")
    by_event = {name: round(statistics.median(values) * 1e6, 1) for name, values in spent.items()}
    # Medians: a thread that is put off in the midst of an event is not the event's cost.
    of_run = [median for name, median in by_event.items() if not name.startswith("pipeline")]
    return {"handler_us_per_event": round(statistics.mean(of_run), 1), "handler_us_by_event": by_event}


def _monitor(folder: Path, model: Any, tokenizer: Any) -> Monitor:
    sidecar = write_sidecar(folder / "av", model.config.hidden_size, LAYER)
    settings = {"nla": {"av": str(sidecar), "ar": None}, "worker": {"mode": "external"}}
    return Monitor(settings, database=f"sqlite:///{folder / 'agent.db'}").attach(model, tokenizer)


def _timed(spent: dict[str, list[float]], name: str, call: Any) -> None:
    started = time.perf_counter()
    call()
    spent[name].append(time.perf_counter() - started)


def _one_run(handler: NLACallbackHandler, spent: dict[str, list[float]]) -> None:
    root, used, run = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
    asked = AIMessage("", tool_calls=[{"name": "open_file", "args": {}, "id": "7"}])
    messages = [HumanMessage("open the file, please " * 20), asked, ToolMessage("a line " * 40, tool_call_id="7")]
    params = {"_type": "nla-chat"}
    answer = LLMResult(generations=[[ChatGeneration(message=AIMessage("It is fine."))]])
    h = handler
    _timed(spent, "chain_start", lambda: h.on_chain_start({}, {}, run_id=root, name="agent"))
    _timed(
        spent,
        "tool_start",
        lambda: h.on_tool_start({"name": "open_file"}, "", run_id=used, parent_run_id=root, tool_call_id="7"),
    )
    _timed(spent, "tool_end", lambda: h.on_tool_end(messages[-1], run_id=used, parent_run_id=root))
    _timed(
        spent,
        "chat_model_start",
        lambda: h.on_chat_model_start({}, [messages], run_id=run, parent_run_id=root, invocation_params=params),
    )
    _timed(spent, "llm_end", lambda: h.on_llm_end(answer, run_id=run, parent_run_id=root))
    _timed(spent, "chain_end", lambda: h.on_chain_end({}, run_id=root))


def _text_call(handler: NLACallbackHandler, spent: dict[str, list[float]]) -> None:
    run, prompt = uuid.uuid4(), "open the file, please " * 20
    answer = LLMResult.model_validate({"generations": [[{"text": "fine"}]]})
    _timed(
        spent,
        "pipeline_llm_start",
        lambda: handler.on_llm_start({}, [prompt], run_id=run, invocation_params={"_type": "huggingface_pipeline"}),
    )
    _timed(spent, "pipeline_llm_end", lambda: handler.on_llm_end(answer, run_id=run))


def memory(folder: Path, runs: int) -> dict[str, Any]:
    """Resident memory over agent runs, every tenth cancelled: by leaving its stream or, in turn, without a word."""
    folder.mkdir()
    model, tokenizer = tiny_llama(), byte_tokenizer()
    chat = ChatNLAModel(model=model, tokenizer=tokenizer, max_new_tokens=2)
    with _monitor(folder, model, tokenizer) as monitor:
        handler = NLACallbackHandler(monitor)

        def speak(requests: Any) -> Any:
            for request in requests:
                yield from (chunk.text for chunk in chat.stream(request))

        agent, mib = RunnableGenerator(speak), []
        for number in range(runs):
            _run_or_cancel(agent, handler, number)
            if (number + 1) % max(1, runs // 10) == 0:
                monitor.flush(60)
                mib.append(_resident_mib())
        stats = handler.stats
        open_sessions = len(monitor.capture.sessions) if monitor.capture is not None else 0
        left = {"calls": stats.open_calls, "runs": stats.open_runs, "sessions": open_sessions}
    half = mib[len(mib) // 2 :]
    growth = (half[-1] - half[0]) * 2**20 / max(1, (len(half) - 1) * (runs // 10))
    return {
        "memory_runs": runs,
        "memory_cancelled": runs // 10,
        "memory_mib": [round(value, 1) for value in mib],
        "memory_bytes_per_run": round(growth, 1),
        "memory_left_open": left,
    }


def _run_or_cancel(agent: Any, handler: NLACallbackHandler, number: int) -> None:
    stream = agent.stream(f"say something about {number}", {"callbacks": [handler]})
    if number % 20 == 9:
        next(stream)
        stream.close()
        return
    if number % 20 == 19:  # its end is never told: a killed task, a handler that was taken away
        run = uuid.uuid4()
        handler.on_chain_start({}, {}, run_id=run)
        handler.on_chat_model_start(
            {}, [[HumanMessage("x")]], run_id=uuid.uuid4(), parent_run_id=run, invocation_params={"_type": "nla-chat"}
        )
        return
    for _ in stream:
        pass


def _resident_mib() -> float:
    gc.collect()
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
