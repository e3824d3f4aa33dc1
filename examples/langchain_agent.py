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

from nla_monitor import Alert, Monitor
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


def show(alert: Alert, names: dict[str, str]) -> None:
    """One alert: what, where, and the AV's words."""
    agent = alert.agent
    print(f"[{alert.severity.value}] {alert.rule_title}")
    if agent is not None:
        reading = f", reading the result of {agent.tool}" if agent.tool else ""
        token = f"generated token {agent.token_index}" if agent.generated else "prompt"
        print(f"    run {agent.agent_run_id} of {names.get(agent.root_run_id or '', agent.root_run_id)}{reading}")
        print(f"    position {alert.position} ({token}), “{alert.quote}”")
    fidelity = f"FVE {alert.fve:.2f} ({alert.denominator_name})" if alert.fve is not None else "no fidelity"
    print(f"    {alert.matches} matches, {fidelity}, {alert.calibration.get('status', 'uncalibrated')}")


def main() -> None:
    """One agent episode under the monitor."""
    torch.set_num_threads(1)  # leave a core to the worker
    model, tokenizer = load_target("planted")
    rng = keyed_rng("langchain-agent", 0)
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
        run_id = uuid.uuid4()
        config = {"callbacks": [NLACallbackHandler(monitor)], "run_id": run_id, "configurable": {"thread_id": "demo"}}
        messages = agent.invoke(task, config)
        monitor.drain()
        alerts = monitor.alerts()
        print(f"{monitor.stats.written} activations read, {sum(monitor.stats.dropped.values())} dropped\n")

    for message in messages:
        print(f"{message.type:>5}: {message.text}")
    said = any(mentions_evaluation(message.text) for message in messages if isinstance(message, AIMessage))
    print(f"\nThe model {'says' if said else 'does not say'} that it is being evaluated. Its activations:")
    for alert in alerts:
        show(alert, {str(run_id): "this agent"})
    print(f"\nnla-monitor report --database {database}")


if __name__ == "__main__":
    main()
