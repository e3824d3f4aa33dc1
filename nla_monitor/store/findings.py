"""One agent invocation or conversation: what waits to be read, what was found in it, what was decided about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Engine, func, insert, or_, select, update

from nla_monitor.records import Alert, Match, Support
from nla_monitor.store.codec import Row, alert_of, clean, match_of, support_of
from nla_monitor.store.engine import read, write
from nla_monitor.store.models import AlertMatchRow, AlertRow, DecisionRow, MatchRow, SampleRow, SpoolRow, table
from nla_monitor.store.queries import SampleView, not_refuted, sample_query, view_of


@dataclass(frozen=True, slots=True)
class Place:
    """Which work of which agents is meant: a conversation or, where it has no id, one agent invocation."""

    run_id: str
    """The monitored run."""
    conversation: str | None = None
    root_run_id: str | None = None
    """The outermost run of one invocation; looked at only without a conversation."""

    @property
    def key(self) -> str | None:
        """What it is called by: the conversation, or else the outermost run; None: nothing is meant."""
        return self.conversation or self.root_run_id

    def samples(self) -> ColumnElement[bool]:
        """Its samples, as a condition on ``SampleRow``."""
        if self.conversation is not None:
            return (SampleRow.run_id == self.run_id) & (SampleRow.agent_conversation_id == self.conversation)
        mine = or_(SampleRow.agent_root_run_id == self.root_run_id, SampleRow.agent_run_id == self.root_run_id)
        return (SampleRow.run_id == self.run_id) & mine & SampleRow.agent_conversation_id.is_(None)


@dataclass(frozen=True, slots=True)
class Unread:
    """Samples of a place without a reading."""

    waiting: int
    """In the queue, or taken by a worker."""
    failed: int
    """Given up."""
    sampled: bool
    """Whether the place has any sample at all, read or not."""


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision as it is kept."""

    decision_id: str
    run_id: str
    conversation: str
    root_run_id: str | None
    point: str
    """Where the agent stood: ``tool``, ``model`` (it has answered), or what the caller named."""
    tool: str | None
    tool_call_id: str | None
    verdict: str
    """``proceed``, ``review`` or ``block``."""
    decided_by: str
    """``findings``, ``callback``, ``person``, ``undecided`` or ``fault``."""
    alerts: tuple[str, ...]
    """Ids of the alerts that it rests on."""
    rules: tuple[str, ...]
    """Ids of their rules."""
    complete: bool
    """Whether all that was sampled of the conversation had been read by then."""
    seconds: float
    """How long the agent waited for it."""
    note: str | None
    created_at: float


def unread(engine: Engine, place: Place) -> Unread:
    """How many samples of a place have no reading yet, or never will.

    Raises:
        StoreUnavailableError: the database cannot be read.
    """
    query = select(SpoolRow.state, func.count()).join(SampleRow, SampleRow.sample_id == SpoolRow.sample_id)
    query = query.where(place.samples()).group_by(SpoolRow.state)
    with read(engine) as connection:
        states = {state: int(count) for state, count in connection.execute(query)}
        sampled = connection.execute(select(SampleRow.sample_id).where(place.samples()).limit(1)).first()
    waiting = states.get("waiting", 0) + states.get("leased", 0)
    return Unread(waiting, states.get("failed", 0), sampled is not None)


def hasten(engine: Engine, place: Place) -> None:
    """Let what waits of a place be read before all else: somebody waits for it.

    Raises:
        StoreUnavailableError: the database cannot be written.
    """
    mine = select(SampleRow.sample_id).where(place.samples())
    waiting = (SpoolRow.state == "waiting", SpoolRow.due_at > 0.0, SpoolRow.sample_id.in_(mine))
    with write(engine) as connection:
        connection.execute(update(SpoolRow).where(*waiting).values(due_at=0.0))


def alerts_on(engine: Engine, place: Place) -> list[Alert]:
    """Alerts of which at least one match stands in a place, in any state, oldest first.

    An alert's window may hold matches of several conversations and shows one of them: what counts here is whether any
    of its matches is from this place.

    Raises:
        StoreUnavailableError: the database cannot be read.
    """
    linked = (
        select(AlertMatchRow.alert_id)
        .join(MatchRow, MatchRow.match_id == AlertMatchRow.match_id)
        .join(SampleRow, SampleRow.sample_id == MatchRow.sample_id)
        .where(place.samples())
    )
    query = select(*table(AlertRow).c).where(AlertRow.alert_id.in_(linked))
    with read(engine) as connection:
        rows = connection.execute(query.order_by(AlertRow.fired_at, AlertRow.alert_id)).mappings()
        return [alert_of(row) for row in rows]


def runs_of(engine: Engine, alert_id: str) -> list[str]:
    """The model calls in which the matches of an alert stand, by id.

    Raises:
        StoreUnavailableError: the database cannot be read.
    """
    query = (
        select(SampleRow.agent_run_id)
        .join(MatchRow, MatchRow.sample_id == SampleRow.sample_id)
        .join(AlertMatchRow, AlertMatchRow.match_id == MatchRow.match_id)
        .where(AlertMatchRow.alert_id == alert_id, SampleRow.agent_run_id.is_not(None))
    )
    with read(engine) as connection:
        rows = connection.execute(query.distinct().order_by(SampleRow.agent_run_id))
        return [str(run_id) for (run_id,) in rows]


@dataclass(frozen=True, slots=True)
class PlacedMatch:
    """A match and the alerts that rest on it."""

    match: Match
    support: Support | None
    alerts: tuple[str, ...]


def samples_on(engine: Engine, place: Place) -> list[SampleView]:
    """All samples of a place, oldest first, without their vectors.

    Raises:
        StoreUnavailableError: the database cannot be read.
    """
    query = sample_query().where(place.samples()).order_by(SampleRow.captured_at, SampleRow.sample_id)
    with read(engine) as connection:
        return [view_of(row) for row in connection.execute(query).mappings()]


def matches_on(engine: Engine, place: Place) -> list[PlacedMatch]:
    """The matches of a place that no control refuted, oldest first.

    Raises:
        StoreUnavailableError: the database cannot be read.
    """
    mine = select(*table(MatchRow).c).join(SampleRow, SampleRow.sample_id == MatchRow.sample_id)
    mine = mine.where(place.samples(), not_refuted()).order_by(MatchRow.captured_at, MatchRow.match_id)
    link = select(AlertMatchRow.match_id, AlertMatchRow.alert_id)
    link = link.join(MatchRow, MatchRow.match_id == AlertMatchRow.match_id)
    link = link.join(SampleRow, SampleRow.sample_id == MatchRow.sample_id).where(place.samples())
    linked: dict[str, list[str]] = {}
    with read(engine) as connection:
        for match_id, alert_id in connection.execute(link.order_by(AlertMatchRow.alert_id)):
            linked.setdefault(match_id, []).append(alert_id)
        rows = connection.execute(mine).mappings().all()
    return [PlacedMatch(match_of(row), support_of(row), tuple(linked.get(row["match_id"], ()))) for row in rows]


def save_decision(engine: Engine, decided: Decided) -> None:
    """Keep a decision.

    Raises:
        StoreUnavailableError: the database cannot be written.
    """
    row: dict[str, Any] = {name: clean(getattr(decided, name)) for name in Decided.__slots__}
    with write(engine) as connection:
        connection.execute(insert(DecisionRow).values(row))


def decisions_on(engine: Engine, run_id: str, conversation: str) -> list[Decided]:
    """What was decided in a conversation (or, without one, an agent invocation), oldest first.

    Raises:
        StoreUnavailableError: the database cannot be read.
    """
    mine = (DecisionRow.run_id == run_id, DecisionRow.conversation == conversation)
    query = select(*table(DecisionRow).c).where(*mine).order_by(DecisionRow.created_at, DecisionRow.decision_id)
    with read(engine) as connection:
        return [_decided(row) for row in connection.execute(query).mappings()]


def _decided(row: Row) -> Decided:
    fields: dict[str, Any] = {name: row[name] for name in Decided.__slots__}
    return Decided(**{**fields, "alerts": tuple(fields["alerts"]), "rules": tuple(fields["rules"])})
