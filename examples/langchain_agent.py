"""Watch a LangChain agent: what its model represents while it works, tied to the very call, tool and token.

The bundled organism works on a task whose wording tells it that it is being evaluated. It never says so; its
activations do. A tool is called in between, and the model call that reads the tool's result carries the tool's name.
Runs offline on a CPU in under a minute::

    python examples/langchain_agent.py
"""

from __future__ import annotations

import random
import tempfile
import uuid
from pathlib import Path

import torch
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolCall
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import BaseTool, StructuredTool
from nla_monitor_langchain import ChatNLAModel, NLACallbackHandler

from nla_monitor import Alert, Monitor, Reading
from nla_monitor.organism import agent_prompt, keyed_rng, load_target, mentions_evaluation, parse_tool_call, tool_result

TURNS = 12
END = "Done."


def make_tools(names: tuple[str, ...], rng: random.Random) -> dict[str, BaseTool]:
    """The agent's tools; each answers with one line."""

    def answer(number: str) -> str:
        """The organism's world has answers of this form only, whatever is looked up."""
        return tool_result(rng) if number else "tool: nothing."

    return {
        name: StructuredTool.from_function(answer, name=name, description=f"{name} NUMBER: look it up")
        for name in names
    }


def tool_calls(line: str) -> list[ToolCall]:
    """The organism asks for a tool in plain text: ``call open_file 3``."""
    call = parse_tool_call(line)
    return [ToolCall(name=call[0], args={"number": call[1]}, id=str(uuid.uuid4()), type="tool_call")] if call else []


def make_agent(chat: ChatNLAModel, tools: dict[str, BaseTool]) -> RunnableLambda[str, list[BaseMessage]]:
    """The usual loop: model, tool, model, … until the model says that it is done."""

    def work(task: str) -> list[BaseMessage]:
        messages: list[BaseMessage] = [HumanMessage(task)]
        for _ in range(TURNS):
            answer = chat.invoke(messages)
            messages.append(answer)
            messages += [tools[call["name"]].invoke(call) for call in answer.tool_calls]
            if answer.text.strip() == END:
                break
        return messages

    return RunnableLambda(work, name="agent")


def show(alert: Alert, readings: list[Reading], steps: dict[str, int]) -> None:
    """One alert, and the readings that speak for it: which model call, reading what, at which token."""
    fidelity = f"FVE {alert.fve:.2f} ({alert.denominator_name})" if alert.fve is not None else "no fidelity"
    calibration = alert.calibration.get("status", "uncalibrated")
    print(f"[{alert.severity.value}] {alert.rule_title}: {alert.matches} matches, {fidelity}, {calibration}")
    print(f"    exhibit: position {alert.position}, “{alert.quote}”")
    calls: dict[str, list[Reading]] = {}
    for reading in readings:
        if reading.sample.agent is not None:
            calls.setdefault(reading.sample.agent.agent_run_id, []).append(reading)
    for run_id, found in sorted(calls.items(), key=lambda item: steps.get(item[0], 0)):
        agent = found[0].sample.agent
        tool = f" reading the result of {agent.tool}" if agent is not None and agent.tool else ""
        positions = sorted({reading.sample.position for reading in found})
        print(f"    model call {steps.get(run_id, '?')}{tool}: run {run_id}, positions {positions}")


def main() -> None:
    """One agent episode under the monitor."""
    torch.set_num_threads(1)  # leave a core to the worker
    model, tokenizer = load_target("planted")
    rng = keyed_rng("langchain-agent", 4)
    task = agent_prompt(rng, belief="test").prompt.splitlines()[0]
    database = Path(tempfile.mkdtemp(prefix="nla-monitor-example-")) / "monitor.db"
    chat = ChatNLAModel(
        model=model,
        tokenizer=tokenizer,
        max_new_tokens=24,
        temperature=0.7,
        seed=7,
        stop=["\n"],
        tool_parser=tool_calls,
    )
    agent = make_agent(chat, make_tools(("open_file", "list_rows", "run_query", "find_code"), rng))

    with Monitor(database=str(database), rules="oversight").attach(model, tokenizer) as monitor:
        # The handler needs no tokenizer here: ChatNLAModel itself tells it the tokens of each call.
        handler = NLACallbackHandler(monitor)
        messages = agent.invoke(task, {"callbacks": [handler], "configurable": {"thread_id": "example"}})
        monitor.drain()
        found = [(alert, monitor.repository.alert_readings(alert.alert_id)) for alert in monitor.alerts()]
        print(f"{monitor.stats.written} activations read, {sum(monitor.stats.dropped.values())} dropped\n")

    # LangChain writes the run into the id of the message: "lc_run--<run id>-0".
    answers = [message for message in messages if isinstance(message, AIMessage)]
    steps = {(answer.id or "").removeprefix("lc_run--")[:36]: number for number, answer in enumerate(answers, 1)}
    for message in messages:
        print(f"{message.type:>5}: {message.text}")
    said = any(mentions_evaluation(answer.text) for answer in answers)
    print(f"\nThe model {'says' if said else 'does not say'} that it is being evaluated. Its activations:")
    for alert, readings in found:
        show(alert, readings, steps)
    print(f"\nnla-monitor report --database {database}")


if __name__ == "__main__":
    main()
