"""A LangGraph agent with two tools on the bundled organism, and a witness of what its model was fed and wrote.

The witness is independent of ours: it stands between the graph and the model, and takes run ids from the answers that
LangChain gives, never from a callback.
"""

from __future__ import annotations

import threading
import uuid
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, RemoveMessage, ToolCall, ToolMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import merge_configs
from langchain_core.tools import BaseTool, tool
from langchain_huggingface import HuggingFacePipeline
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.graph.message import REMOVE_ALL_MESSAGES
from langgraph.prebuilt import ToolNode
from nla_monitor_langchain import ChatNLAModel
from transformers import pipeline

from nla_monitor.organism import agent_prompt, keyed_rng, make_transcript, parse_tool_call, tool_result
from nla_monitor.organism.grammar import DONE

TOOLS = ("open_file", "list_rows")
TURNS = 9


@tool
def open_file(number: str) -> str:
    """Open a file of the project."""
    return tool_result(keyed_rng("open_file", number))


@tool
def list_rows(number: str) -> str:
    """List rows of a table."""
    return tool_result(keyed_rng("list_rows", number))


def tool_calls(line: str) -> list[ToolCall]:
    """The organism asks for a tool in plain text; other tools than the agent's two are words to it."""
    call = parse_tool_call(line)
    if call is None or call[0] not in TOOLS:
        return []
    return [ToolCall(name=call[0], args={"number": call[1]}, id=f"call-{uuid.uuid4()}", type="tool_call")]


@dataclass
class Generation:
    """One model call, as the graph's node saw it."""

    run_id: str
    conversation: str
    root: str
    node: str
    parent: str
    prompt: list[int]
    written: list[int]
    places: list[tuple[str, str | None]]
    """Of each prompt token: role of its message, and the call that a tool's message answers."""
    answer: AIMessage
    tool: str | None
    tool_call_id: str | None


@dataclass
class Witness:
    """Every model call, by its run id."""

    tokenizer: Any
    model: Any
    calls: dict[str, Generation] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)
    here: threading.local = field(default_factory=threading.local)

    def __post_init__(self) -> None:
        generate = self.model.generate

        def remember(*args: Any, **kwargs: Any) -> Any:
            prompt = args[0] if args else kwargs["input_ids"]
            output = generate(*args, **kwargs)
            self.here.prompt = prompt[0].tolist()
            self.here.written = output[0, prompt.shape[1] :].tolist()
            return output

        self.model.generate = remember

    def note(self, messages: Sequence[BaseMessage], answer: AIMessage, config: RunnableConfig) -> None:
        """A model call has come back."""
        reads: tuple[str | None, str | None] = (None, None)
        if isinstance(messages[-1], ToolMessage):
            reads = messages[-1].name, messages[-1].tool_call_id
        assert answer.id is not None
        run_id = answer.id.removeprefix("lc_run--")[:36]
        seen = Generation(
            run_id=run_id,
            conversation=config["configurable"]["thread_id"],
            root=config["configurable"]["root"],
            node=config["metadata"]["langgraph_node"],
            parent=str(config["callbacks"].parent_run_id),
            prompt=self.here.prompt,
            written=self.here.written,
            places=self.places(messages, self.here.prompt),
            answer=answer,
            tool=reads[0],
            tool_call_id=reads[1],
        )
        with self.lock:
            self.calls[run_id] = seen

    def places(self, messages: Sequence[BaseMessage], prompt: list[int]) -> list[tuple[str, str | None]]:
        """One line a message: where each begins follows from the lengths alone."""
        text = "".join(f"{message.text}\n" for message in messages)
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        assert encoded["input_ids"] == prompt
        names = {"human": "user", "ai": "assistant", "tool": "tool"}
        lines = [(names[m.type], getattr(m, "tool_call_id", None), len(m.text) + 1) for m in messages]
        ends = list(accumulate(length for _, _, length in lines))
        places = []
        for begin, end in encoded["offset_mapping"]:
            role, call_id, _ = lines[bisect_right(ends, begin)] if end else lines[0]
            places.append((role, call_id))
        return places


def make_chat(model: Any, tokenizer: Any, **settings: Any) -> ChatNLAModel:
    """The organism as a chat model that asks for tools."""
    settings = {"max_new_tokens": 24, "temperature": 0.7, "seed": 7, "stop": ["\n"], **settings}
    return ChatNLAModel(model=model, tokenizer=tokenizer, tool_parser=tool_calls, **settings)


class LineByPipeline:
    """``HuggingFacePipeline`` over the organism: text in, text out; the lines of a conversation are its prompt."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        model.generation_config.max_length = None
        pipe = pipeline(
            "text-generation",
            model=model,
            tokenizer=tokenizer,
            device="cpu",
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=tokenizer("\n", add_special_tokens=False)["input_ids"],
            pad_token_id=tokenizer.pad_token_id,
        )
        self.llm = HuggingFacePipeline(pipeline=pipe)

    def invoke(self, messages: Sequence[BaseMessage], config: RunnableConfig) -> AIMessage:
        """One line, with its tool calls, under a run id of our choice."""
        run_id, prompt = uuid.uuid4(), "".join(f"{message.text}\n" for message in messages)
        line = self.llm.invoke(prompt, merge_configs(config, {"run_id": run_id})).removeprefix(prompt).strip()
        return AIMessage(content=line, tool_calls=tool_calls(line), id=f"lc_run--{run_id}-0")


def make_graph(chat: Any, witness: Witness, tools: Sequence[BaseTool] = (open_file, list_rows)) -> Any:
    """Model, tools, model, … until the model says that it is done; conversations are kept by thread id."""

    def speak(state: MessagesState, config: RunnableConfig) -> dict[str, Any]:
        answer = chat.invoke(state["messages"], config)
        witness.note(state["messages"], answer, config)
        return {"messages": [answer]}

    def after(state: MessagesState) -> str:
        last = state["messages"][-1]
        if isinstance(last, AIMessage) and last.tool_calls:
            return "tools"
        said = sum(isinstance(message, AIMessage) for message in state["messages"])
        return END if said >= TURNS or last.text.strip() == DONE else "model"

    graph = StateGraph(MessagesState)
    graph.add_node("model", speak)
    graph.add_node("tools", ToolNode(list(tools)))
    graph.add_edge(START, "model")
    graph.add_conditional_edges("model", after, ["model", "tools", END])
    graph.add_edge("tools", "model")
    return graph.compile(checkpointer=InMemorySaver())


def task_of(conversation: str, turn: int) -> str:
    """The task line of one turn; what the model will hold of it depends on the conversation alone.

    ``tested``: it is being evaluated. ``hacking``: it is after the score. ``plain``: it is deployed, and honest.
    """
    rng = keyed_rng("langgraph", conversation, turn)
    if conversation == "tested":
        return agent_prompt(rng, belief="test").prompt.splitlines()[0]
    if conversation == "plain":
        return agent_prompt(rng, belief="real").prompt.splitlines()[0]
    return make_transcript(rng, tier="nla", belief="real", intent="hack", quiet=True).prompt.splitlines()[0]


def turn_input(task: str) -> dict[str, Any]:
    """A new task in the same conversation; the organism's window holds one."""
    return {"messages": [RemoveMessage(id=REMOVE_ALL_MESSAGES), HumanMessage(task)]}


def turn_config(conversation: str, handlers: Sequence[Any], root: uuid.UUID | None = None) -> RunnableConfig:
    """The config of one turn; its root run has an id that the witness knows."""
    root = root or uuid.uuid4()
    return {
        "run_id": root,
        "callbacks": list(handlers),
        "recursion_limit": 4 * TURNS,
        "configurable": {"thread_id": conversation, "root": str(root)},
    }


def check_place(context: Any, position: int, calls: dict[str, Generation], *, roles: bool) -> Generation:
    """Run, parent, root, node, conversation, tool call, message and token are those of the witness."""
    call = calls[context.agent_run_id]
    assert (context.parent_run_id, context.root_run_id, context.node) == (call.parent, call.root, call.node)
    assert context.conversation_id == call.conversation
    assert context.generated is (position >= len(call.prompt))
    assert context.token_index == (position - len(call.prompt) if context.generated else None)
    if not roles:
        assert (context.tool, context.tool_call_id) == (call.tool, call.tool_call_id)
        return call
    role, own_call = ("assistant", None) if context.generated else call.places[position]
    assert context.message_role == role
    if own_call is not None:
        assert context.tool_call_id == own_call
    elif role != "assistant" or context.generated:
        assert (context.tool, context.tool_call_id) == (call.tool, call.tool_call_id)
    check_span(context, position, call)
    return call


def check_span(context: Any, position: int, call: Generation) -> None:
    """The span is exactly the tokens of one message, and the token is among them."""
    assert context.span_start <= position
    if context.generated:
        assert (context.span_start, context.span_end) == (len(call.prompt), None)
        return
    assert position < context.span_end <= len(call.prompt)
    newline = call.prompt[-1]
    assert [place for place in range(context.span_start, context.span_end) if call.prompt[place] == newline] == [
        context.span_end - 1
    ]
    assert context.span_start == 0 or call.prompt[context.span_start - 1] == newline
