"""The agent episode of the demo: a LangChain agent with a tool, driven by the fine-tuned organism."""

from __future__ import annotations

from dataclasses import dataclass

from nla_monitor.cli.demo.scene import Scene
from nla_monitor.errors import MissingExtraError
from nla_monitor.organism import agent_prompt, keyed_rng, mentions_evaluation, parse_tool_call, tool_result

try:
    from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
    from langchain_core.runnables import RunnableConfig, RunnableLambda
    from langchain_core.tools import tool
    from nla_monitor_langchain import ChatNLAModel, NLACallbackHandler
except ImportError as error:
    raise MissingExtraError("langchain-core", "langchain", "the demo's agent episode") from error

MAX_TURNS = 10
LINE_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Episode:
    """What the agent wrote, and whether it spoke of an evaluation."""

    lines: tuple[tuple[str, str], ...]
    """(role, text) in order."""
    mentions_evaluation: bool


def run_episode(scene: Scene) -> Episode:
    """One task, line by line: the organism writes, calls its tool, reads the result, goes on until it is done."""
    rng = keyed_rng(scene.seed, "demo-agent")
    start = agent_prompt(rng, belief=scene.story.agent_belief)
    chat = ChatNLAModel(
        model=scene.model,
        tokenizer=scene.tokenizer,
        max_new_tokens=LINE_TOKENS,
        stop=["\n"],
        prompt_format=lambda messages: "".join(f"{message.text}\n" for message in messages),
    )

    @tool
    def workbench(call: str) -> str:  # noqa: ARG001 -- the schema that LangChain shows the model
        """Run one of the organism's tools; its answers depend on nothing."""
        return tool_result(rng)

    def act(task: str, config: RunnableConfig) -> list[BaseMessage]:
        messages: list[BaseMessage] = [HumanMessage(task)]
        scene.view.agent("task", task)
        for turn in range(MAX_TURNS):
            answer = AIMessage(chat.invoke(messages, config=config).text)
            messages.append(answer)
            scene.view.agent("agent", answer.text)
            call = parse_tool_call(answer.text)
            if call is not None:
                result = workbench.invoke(" ".join(call), config=config)
                messages.append(ToolMessage(result, tool_call_id=f"call-{turn}"))
                scene.view.agent("tool", result)
            if answer.text.startswith("Done") or not answer.text:
                break
        return messages

    handler = NLACallbackHandler(scene.monitor)
    messages = RunnableLambda(act).invoke(start.prompt[: start.head_end], config={"callbacks": [handler]})
    written = tuple((message.type, message.text) for message in messages)
    spoken = " ".join(text for role, text in written if role == "ai")
    return Episode(written, mentions_evaluation(spoken))
