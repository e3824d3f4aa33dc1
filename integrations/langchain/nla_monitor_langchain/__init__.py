"""nla_monitor for LangChain and LangGraph: an agent's activations, tied to run, tool and token.

    from nla_monitor import Monitor
    from nla_monitor_langchain import NLACallbackHandler

    monitor = Monitor.from_config("nla-monitor.yaml").attach(model, tokenizer)
    agent.invoke(inputs, config={"callbacks": [NLACallbackHandler(monitor, llm=llm)]})

Needs the extra ``nla-monitor[langchain]``.
"""

from __future__ import annotations

from nla_monitor.errors import MissingExtraError

try:
    import langchain_core  # noqa: F401 -- only asks whether it is there, for an error that says what to install
except ModuleNotFoundError as error:
    raise MissingExtraError("langchain-core", "langchain", "nla_monitor_langchain") from error

from nla_monitor.agent_calls import AgentMonitor
from nla_monitor_langchain.ambient import watching
from nla_monitor_langchain.chat_model import ChatNLAModel
from nla_monitor_langchain.extract import LLMPromptEncoder, PromptEncoder, TokenizerPromptEncoder, prompt_encoder
from nla_monitor_langchain.handler import NLACallbackHandler, watch
from nla_monitor_langchain.tracker import TrackerStats

__all__ = [
    "AgentMonitor",
    "ChatNLAModel",
    "LLMPromptEncoder",
    "NLACallbackHandler",
    "PromptEncoder",
    "TokenizerPromptEncoder",
    "TrackerStats",
    "prompt_encoder",
    "watch",
    "watching",
]
