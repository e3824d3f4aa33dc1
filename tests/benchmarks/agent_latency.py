"""Latency of agent runs with and without the handler, in turns on one machine."""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from langchain_core.messages import AIMessage, HumanMessage, ToolCall
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode
from nla_monitor_langchain import ChatNLAModel, NLACallbackHandler
from transformers import LlamaConfig, LlamaForCausalLM

from nla_monitor import Monitor
from tests.benchmarks.capture_arms import write_sidecar
from tests.langchain_support import byte_tokenizer
from tests.langgraph_kit import list_rows, open_file

WIDTH, BLOCKS = 768, 12
TOKENS = 24
CALLS = 3
FLUSH_SECONDS = 30.0
TASK = "Repair the search module of the project: find the file, look at its rows, and say what was wrong with it."


def make_model(width: int = WIDTH, blocks: int = BLOCKS) -> LlamaForCausalLM:
    """About 85M parameters, random; its agent is greedy, so that every run does the same work."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def make_agent(model: Any) -> Any:
    """Model, tool, model, the other tool, model: three generations of ``TOKENS`` tokens."""
    script = (open_file.name, list_rows.name)
    chat = ChatNLAModel(model=model, tokenizer=byte_tokenizer(), max_new_tokens=TOKENS)

    def speak(state: MessagesState) -> dict[str, Any]:
        answer = chat.invoke(state["messages"])
        said = sum(isinstance(message, AIMessage) for message in state["messages"])
        if said < CALLS - 1:
            call = ToolCall(name=script[said], args={"number": str(said)}, id=f"call-{uuid.uuid4()}", type="tool_call")
            answer = AIMessage(content=answer.text, tool_calls=[call])
        return {"messages": [answer]}

    graph = StateGraph(MessagesState)
    graph.add_node("model", speak)
    graph.add_node("tools", ToolNode([open_file, list_rows]))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", lambda state: "tools" if state["messages"][-1].tool_calls else END)
    graph.add_edge("tools", "model")
    return graph.compile()


@dataclass
class Arm:
    """One of the agents that take turns."""

    agent: Any
    callbacks: Sequence[Any] = ()
    after: Callable[[], object] = lambda: None
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    text: str = ""

    def run(self) -> None:
        """One agent run; what its watching leaves behind is written before the next one goes on."""
        wall, cpu = time.perf_counter(), time.process_time()
        state = self.agent.invoke({"messages": [HumanMessage(TASK)]}, {"callbacks": list(self.callbacks)})
        self.seconds.append(time.perf_counter() - wall)
        self.cpu_seconds.append(time.process_time() - cpu)
        self.text = "\n".join(message.text for message in state["messages"])
        self.after()


def latency(folder: Path, pairs: int, *, skip: int = 3, width: int = WIDTH, blocks: int = BLOCKS) -> dict[str, Any]:
    """Paired ratios of ``pairs`` runs; the first ``skip`` are warm-up."""
    folder.mkdir()
    model, sidecar = make_model(width, blocks), write_sidecar(folder / "av", width, 2 * blocks // 3)
    settings = {"nla": {"av": str(sidecar), "ar": None}, "worker": {"mode": "external"}}
    monitor = Monitor(settings, database=f"sqlite:///{folder / 'agent.db'}").attach(model, byte_tokenizer())
    with monitor:
        handler = NLACallbackHandler(monitor)
        watched = Arm(make_agent(model), [handler], lambda: monitor.flush(FLUSH_SECONDS))
        # The other two run a model of their own, without a tap, of the same weights.
        plain, again = (Arm(make_agent(make_model(width, blocks))) for _ in range(2))
        for number in range(pairs + skip):
            for arm in (plain, watched, again) if number % 2 else (again, watched, plain):
                arm.run()
        stats, calls = monitor.stats, handler.stats
    if not watched.text == plain.text == again.text:
        raise RuntimeError("the watched agent said something else")
    return {
        "latency_ratio": ratios(watched.seconds[skip:], plain.seconds[skip:]),
        "latency_ratio_cpu": ratios(watched.cpu_seconds[skip:], plain.cpu_seconds[skip:]),
        "latency_a_a_ratio": ratios(again.seconds[skip:], plain.seconds[skip:]),
        "latency_a_a_ratio_cpu": ratios(again.cpu_seconds[skip:], plain.cpu_seconds[skip:]),
        "agent_run_seconds": round(statistics.median(plain.seconds[skip:]), 4),
        "agent_runs": pairs,
        "latency_samples": stats.sampled,
        "latency_sessions": calls.sessions,
        "latency_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "faults": dict(stats.faults),
    }


def ratios(left: Sequence[float], right: Sequence[float]) -> dict[str, float]:
    """Median of the paired ratios; ratio of the 99th percentiles, which pairs would not give."""
    paired = [one / other for one, other in zip(left, right, strict=True)]
    return {"p50": round(statistics.median(paired), 4), "p99": round(_p99(left) / _p99(right), 4)}


def _p99(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
