"""Tables of agents' conversations: what was said, and what was decided on findings."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Index, Integer, Text
from sqlalchemy.orm import Mapped, mapped_column

from nla_monitor.store.base import Base, Document


class MessageRow(Base):
    """One message of an agent's conversation, as people see it (``capture.store_transcript``)."""

    __tablename__ = "nla_messages"
    __table_args__ = (Index(None, "run_id", "conversation"), Index(None, "conversation"), Index(None, "created_at"))

    message_id: Mapped[str] = mapped_column(primary_key=True)
    """Hash of the message and of all before it: the same history, sent again with every call, is kept once."""
    parent_id: Mapped[str | None]
    """The message before it; null: it opens a prompt. Two with one parent: the history was changed, or forked."""
    run_id: Mapped[str]
    conversation: Mapped[str]
    """The conversation's id; where it has none, the id of the outermost run."""
    root_run_id: Mapped[str | None]
    agent_run_id: Mapped[str]
    """The model call that wrote it or, where no model of ours did, that read it first."""
    node: Mapped[str | None]
    place: Mapped[int] = mapped_column(Integer)
    """How many messages stand before it."""
    written: Mapped[bool]
    """Whether the model call wrote it, rather than read it."""
    role: Mapped[str]
    name: Mapped[str | None]
    tool_call_id: Mapped[str | None]
    tool_calls: Mapped[list[Any]] = mapped_column(Document)
    created_at: Mapped[float]
    text: Mapped[str] = mapped_column(Text)


class DecisionRow(Base):
    """What was decided on the findings of a conversation, and by whom: the record of what we did to an agent."""

    __tablename__ = "nla_decisions"
    __table_args__ = (Index(None, "run_id", "conversation"),)

    decision_id: Mapped[str] = mapped_column(primary_key=True)
    run_id: Mapped[str]
    conversation: Mapped[str]
    root_run_id: Mapped[str | None]
    point: Mapped[str]
    """Where the agent stood: ``tool``, ``model`` (it has answered), or what the caller named."""
    tool: Mapped[str | None]
    tool_call_id: Mapped[str | None]
    verdict: Mapped[str]
    """``proceed``, ``review`` or ``block``."""
    decided_by: Mapped[str]
    """``findings``, ``callback``, ``person``, ``undecided`` (not all was read in time) or ``fault``."""
    alerts: Mapped[list[Any]] = mapped_column(Document)
    rules: Mapped[list[Any]] = mapped_column(Document)
    complete: Mapped[bool]
    """Whether all that was sampled of the conversation had been read by then."""
    seconds: Mapped[float]
    """How long the agent waited for it."""
    note: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[float]
