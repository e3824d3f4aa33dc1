"""What was said in agents' conversations: kept once, however often a prompt repeats it.

A message's id is the hash of it and of all before it. So the history that every model call is sent again adds nothing,
a history that somebody changed or cut forks, and writing the same twice (a retry, a resumed graph) is harmless.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Engine, func, select

from nla_monitor.store.codec import Row, clean
from nla_monitor.store.dialect import insert_new
from nla_monitor.store.engine import read, write
from nla_monitor.store.models import MessageRow, SampleRow, table


@dataclass(frozen=True, slots=True)
class Message:
    """One message as people see it."""

    role: str
    """``system``, ``user``, ``assistant`` or ``tool``; ``prompt`` for the text that a plain text model is given."""
    text: str
    name: str | None = None
    """Of a tool: which one."""
    tool_call_id: str | None = None
    """Of a tool: the call that it answers."""
    tool_calls: tuple[Mapping[str, object], ...] = ()
    """Of an assistant: what it calls, each ``{"name", "args", "id"}``."""


@dataclass(frozen=True, slots=True)
class Said:
    """A message in its place."""

    message_id: str
    parent_id: str | None
    run_id: str
    conversation: str
    """The conversation's id; where it has none, the id of the outermost run."""
    root_run_id: str | None
    agent_run_id: str
    """The model call that wrote it or, where no model of ours did, that read it first."""
    node: str | None
    place: int
    """How many messages stand before it."""
    written: bool
    """Whether the model call wrote it, rather than read it."""
    created_at: float
    message: Message


def chain_id(parent_id: str | None, run_id: str, conversation: str, message: Message) -> str:
    """The id of a message after ``parent_id`` (None: it is the first): equal for equal histories.

    White space around a text does not count: frameworks trim an answer before they send it back.
    """
    calls = [[call.get("name"), call.get("args"), call.get("id")] for call in message.tool_calls]
    parts = [
        parent_id,
        run_id,
        conversation,
        message.role,
        message.text.strip(),
        message.name,
        message.tool_call_id,
        calls,
    ]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def save_messages(engine: Engine, messages: Iterable[Said]) -> int:
    """Keep messages; those known already stay as they are. Returns how many are new.

    Raises:
        StoreUnavailableError: the database cannot be written.
    """
    rows = [_row(said) for said in messages]
    if not rows:
        return 0
    with write(engine) as connection:
        return insert_new(connection, MessageRow, rows)


def messages_of(engine: Engine, run_id: str, conversation: str) -> list[Said]:
    """The messages of a conversation in the order in which they came to be.

    Raises:
        StoreUnavailableError: the database cannot be read.
    """
    mine = (MessageRow.run_id == run_id, MessageRow.conversation == conversation)
    query = select(*table(MessageRow).c).where(*mine)
    query = query.order_by(MessageRow.created_at, MessageRow.place, MessageRow.message_id)
    with read(engine) as connection:
        return [_said(row) for row in connection.execute(query).mappings()]


@dataclass(frozen=True, slots=True)
class Known:
    """A conversation that left samples or messages."""

    run_id: str
    conversation: str
    first_at: float
    """Unix seconds."""
    samples: int
    messages: int


def conversations(engine: Engine, run_id: str | None = None) -> list[Known]:
    """The conversations of a run (of all runs by default), newest first; without an id, its outermost run names one.

    Raises:
        StoreUnavailableError: the database cannot be read.
    """
    key = func.coalesce(SampleRow.agent_conversation_id, SampleRow.agent_root_run_id, SampleRow.agent_run_id)
    sampled = select(SampleRow.run_id, key, func.min(SampleRow.captured_at), func.count())
    sampled = sampled.where(SampleRow.agent_run_id.is_not(None)).group_by(SampleRow.run_id, key)
    spoken = select(MessageRow.run_id, MessageRow.conversation, func.min(MessageRow.created_at), func.count())
    spoken = spoken.group_by(MessageRow.run_id, MessageRow.conversation)
    if run_id is not None:
        sampled, spoken = sampled.where(SampleRow.run_id == run_id), spoken.where(MessageRow.run_id == run_id)
    with read(engine) as connection:
        found = {(run, name): Known(run, name, at, count, 0) for run, name, at, count in connection.execute(sampled)}
        for run, name, at, count in connection.execute(spoken):
            known = found.get((run, name), Known(run, name, at, 0, 0))
            found[run, name] = Known(run, name, min(at, known.first_at), known.samples, count)
    return sorted(found.values(), key=lambda known: (-known.first_at, known.run_id, known.conversation))


def _row(said: Said) -> dict[str, object]:
    message = said.message
    return {
        "message_id": said.message_id,
        "parent_id": said.parent_id,
        "run_id": said.run_id,
        "conversation": clean(said.conversation),
        "root_run_id": said.root_run_id,
        "agent_run_id": said.agent_run_id,
        "node": clean(said.node),
        "place": said.place,
        "written": said.written,
        "role": clean(message.role),
        "name": clean(message.name),
        "tool_call_id": clean(message.tool_call_id),
        "tool_calls": [clean(json.loads(json.dumps(call, default=str))) for call in message.tool_calls],
        "created_at": said.created_at,
        "text": clean(message.text),
    }


def _said(row: Row) -> Said:
    calls: Sequence[Mapping[str, object]] = row["tool_calls"]
    message = Message(row["role"], row["text"], row["name"], row["tool_call_id"], tuple(calls))
    same = {name: row[name] for name in Said.__slots__ if name != "message"}
    return Said(**same, message=message)
