"""Acting on findings: a gate at which an agent waits, for at most so long, for what its activations were read as.

Off unless somebody builds a ``Gate`` and asks it. Reading is asynchronous, so that an answer may be late: what happens
then (``fail="open"`` goes on, ``fail="closed"`` stops) is the user's choice, and has no default. Whatever fails inside,
the answer is one of these two; no exception leaves ``decide``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, Literal, Protocol, TypeVar

from nla_monitor.errors import ConfigError, NLAMonitorError
from nla_monitor.guard import Guard
from nla_monitor.records import Alert, Severity, TriageState, uuid7
from nla_monitor.store.findings import Decided, Place, alerts_on, hasten, save_decision, unread
from nla_monitor.store.repository import Repository
from nla_monitor.verdicts import DecidedBy, Decision, Point, Verdict

__all__ = ["Decision", "Gate", "GateStats", "Gated", "Place", "Point", "Verdict"]

logger = logging.getLogger("nla_monitor")

Fail = Literal["open", "closed"]
Kind = TypeVar("Kind", bound=StrEnum)

AFTER_MODEL: Final = Point()
"""The model has answered."""

_POLL_SECONDS: Final = 0.02
_SLOWEST_POLL_SECONDS: Final = 0.2
_REMEMBERED: Final = 65_536
_GRACE_SECONDS: Final = 0.05
"""For a decision at the very deadline to arrive."""
_TOLD_SECONDS: Final = 5.0
_HANGING: Final = 8
"""Decisions that did not come back by their deadline; beyond so many no further one is begun."""
_FAILED: Final = ""
_RULE: Final = "rule:"
"""Names, beside ids of alerts, of what is settled in a place."""


@dataclass(frozen=True, slots=True)
class GateStats:
    """Counters since the start."""

    asked: int
    verdicts: Mapping[str, int]
    """By verdict; a person's answers are not among them."""
    undecided: int
    """Answers that ``fail`` gave because not all was read in time."""
    faults: int
    """Answers that ``fail`` gave because the store or the callback failed."""
    late: int
    """Decisions that had not come back at the deadline: the callback or the store hung."""


class Gated(Protocol):
    """What a gate needs of a ``Monitor``."""

    @property
    def guard(self) -> Guard:
        """The monitor's host boundary."""
        ...

    @property
    def repository(self) -> Repository:
        """Where findings are."""
        ...

    @property
    def run_id(self) -> str:
        """The monitored run."""
        ...

    def flush(self, timeout: float = 30.0) -> bool:
        """Wait until everything sampled so far is in the spool."""
        ...


OnAlert = Callable[[Alert], "Verdict | str | None"]


class Gate:
    """Asks, before an agent goes on, whether anything was found in its activations.

        gate = Gate(monitor, severity="high", fail="open", deadline_seconds=2.0)
        decision = gate.decide(gate.place(conversation="talk-1"))
        if decision.stops: ...

    Safe for use from any thread. What a person let pass holds for that rule in that conversation: a graph that goes on
    after an answer is another run, whose alert is another one. The callback is asked once for each alert.

    Args:
        monitor: attached to the model.
        fail: what to do when not everything was read in time, or something failed: ``open`` goes on, ``closed`` stops.
        severity: findings of this severity or above stop; alerts below are not looked at.
        rules: of these rules only; by default of all.
        deadline_seconds: how long an agent waits at most, the callback included.
        stop: what to do at a finding: wait for a person (``review``), or not do it (``block``).
        on_alert: asked of each new finding, on a thread of ours: a verdict, or None for what ``stop`` says.

    Raises:
        ConfigError: an argument is none of the possible ones.
    """

    def __init__(
        self,
        monitor: Gated,
        *,
        fail: Fail,
        severity: Severity | str = Severity.HIGH,
        rules: Collection[str] | None = None,
        deadline_seconds: float = 5.0,
        stop: Verdict | str = Verdict.REVIEW,
        on_alert: OnAlert | None = None,
    ) -> None:
        self._monitor = monitor
        self._stop = _one_of(Verdict, stop, "stop")
        self._severity = _one_of(Severity, severity, "severity")
        if fail not in ("open", "closed"):
            raise ConfigError(
                f"fail={fail!r}: give 'open' (go on when it is not known in time) or 'closed' (stop then)"
            )
        if self._stop is Verdict.PROCEED:
            raise ConfigError("stop='proceed' would stop nothing; give 'review' or 'block'")
        if not deadline_seconds > 0:
            raise ConfigError(f"deadline_seconds={deadline_seconds!r}: must be above 0")
        self._otherwise = Verdict.PROCEED if fail == "open" else self._stop
        self._rules = None if rules is None else frozenset([rules] if isinstance(rules, str) else rules)
        self._deadline = deadline_seconds
        self._on_alert = on_alert
        self._lock = threading.Lock()
        self._settled: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._hanging = 0
        self._said: set[str] = set()

    def place(self, conversation: str | None = None, root_run_id: str | None = None) -> Place:
        """Which agent is meant: its conversation or, without one, the id of its outermost run."""
        return Place(self._monitor.run_id, conversation, root_run_id)

    def decide(self, place: Place, point: Point = AFTER_MODEL) -> Decision:
        """Wait until what was sampled of the place is read, and say what to do. Never raises.

        Waits at most ``deadline_seconds``, whatever hangs: all work is done on a thread of ours. Where nothing was
        sampled there is nothing to wait for, and nothing is known: ``fail`` decides at once.
        """
        case = _Case(place, point, time.monotonic())
        with self._monitor.guard("decide"):
            self._hear(case)
        found = case.found or self._fallback(place, point, "undecided" if case.late else "fault")
        case.final = replace(found, seconds=time.monotonic() - case.started, at=time.time())
        case.told.set()
        self._tell(case.final, late=case.late)
        return case.final

    def _hear(self, case: _Case) -> None:
        with self._lock:
            full = self._hanging >= _HANGING
        if full:
            self._say("hanging", f"{_HANGING} earlier decisions still hang, so that no further one is begun")
            return
        threading.Thread(target=self._work, args=(case,), name="nla-monitor-decision", daemon=True).start()
        if not case.done.wait(self._deadline + _GRACE_SECONDS):
            with self._lock:
                case.late = not case.done.is_set()
                self._hanging += case.late
        if case.error is not None:
            raise case.error

    def _work(self, case: _Case) -> None:
        try:
            case.found = self._decide(case.place, case.point, case.started)
        except Exception as error:  # noqa: BLE001 -- raised again where the guard is: in the asking thread
            case.error = error
        finally:
            case.done.set()
        with self._lock:
            self._hanging -= case.late
        # The asking thread is about to say what it made of it, or was interrupted and never will.
        if case.told.wait(_TOLD_SECONDS) and case.final is not None and (case.final.alerts or case.final.stops):
            with self._monitor.guard("decide.keep"):
                self._keep(case.final)

    async def adecide(self, place: Place, point: Point = AFTER_MODEL) -> Decision:
        """The same without holding up the event loop, or a thread of its pool."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Decision] = loop.create_future()

        def give(decision: Decision | None, error: Exception | None) -> None:
            if answer.done():  # cancelled
                return
            if decision is not None:
                answer.set_result(decision)
            elif error is not None:
                answer.set_exception(error)

        def run() -> None:
            decision: Decision | None = None
            failure: Exception | None = None
            try:
                decision = self.decide(place, point)
            except Exception as error:  # noqa: BLE001 -- in tests faults of ours are raised: in the asking task
                failure = error
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(give, decision, failure)

        threading.Thread(target=run, name="nla-monitor-decision", daemon=True).start()
        return await answer

    def answer(
        self,
        decision: Decision,
        verdict: Verdict | str,
        *,
        who: str = "",
        note: str | None = None,
        label: TriageState | str | None = None,
    ) -> Decision:
        """What a person said of a decision; it is kept, and what they let pass stops nobody there again.

        Args:
            decision: what they were asked about.
            verdict: ``proceed`` or ``block``.
            who: the person.
            note: why.
            label: what the alerts are (``true_positive``, ``false_positive``, ...), if they said so.

        Raises:
            ConfigError: the verdict or the label is none of the possible ones.
        """
        given = _one_of(Verdict, verdict, "verdict")
        triage = None if label is None else _one_of(TriageState, label, "label")
        if given is Verdict.PROCEED:
            rules = [f"{_RULE}{alert.rule_id}" for alert in decision.alerts]
            self._settle(decision.place, rules, failed=decision.failed)
        told = ": ".join(part for part in (who, note) if part) or None
        answered = replace(decision, decision_id=uuid7(), verdict=given, decided_by="person", note=told, at=time.time())
        with self._monitor.guard("decide.answer"):
            self._keep(answered)
            if triage is not None:
                for alert in decision.alerts:
                    self._monitor.repository.label(alert.alert_id, triage, who or "reviewer", note)
        return answered

    def recall(self, payload: Mapping[str, Any]) -> Decision:
        """The decision that a payload tells of, in whatever process it was made; alerts that are gone are left out."""
        alerts: list[Alert] = []
        with self._monitor.guard("decide.recall"):
            found = (self._monitor.repository.alert(told["alert_id"]) for told in payload["findings"])
            alerts = [alert for alert in found if alert is not None]
        return Decision(
            decision_id=payload["decision_id"],
            verdict=Verdict(payload["verdict"]),
            decided_by=payload["decided_by"],
            place=Place(payload["run_id"], payload["conversation"], payload["root_run_id"]),
            point=Point(payload["point"], payload["tool"], payload["tool_call_id"]),
            alerts=tuple(alerts),
            complete=payload["complete"],
            failed=payload["failed"],
        )

    @property
    def stats(self) -> GateStats:
        """Counters since the start."""
        with self._lock:
            counts = dict(self._counts)
        return GateStats(
            asked=counts.get("asked", 0),
            verdicts={verdict.value: counts.get(verdict.value, 0) for verdict in Verdict},
            undecided=counts.get("undecided", 0),
            faults=counts.get("fault", 0),
            late=counts.get("late", 0),
        )

    # -- inside ------------------------------------------------------------------------------------------------------

    def _decide(self, place: Place, point: Point, started: float) -> Decision:
        if place.key is None:
            self._say("place", "a gate was asked about no conversation and no run: nothing is known of it")
            return self._fallback(place, point, "fault")
        deadline = started + self._deadline
        try:
            return self._look(place, point, deadline)
        except NLAMonitorError as error:
            self._say("store", f"findings cannot be looked up now: {error}")
            return self._fallback(place, point, "fault")

    def _look(self, place: Place, point: Point, deadline: float) -> Decision:
        passed: list[Alert] = []
        while True:
            complete, failed = self._read_by(place, deadline)
            alerts = self._new_alerts(place)
            if not alerts:
                break
            decision = self._judge(place, point, alerts)
            if decision.stops or decision.decided_by != "callback":
                return replace(decision, complete=complete, failed=failed)
            passed += alerts  # the callback let them pass: go on looking at what else is read in time
        if complete:
            decision = self._made(place, point, Verdict.PROCEED, "callback" if passed else "findings", tuple(passed))
        else:
            decision = replace(self._fallback(place, point, "undecided"), alerts=tuple(passed))
        return replace(decision, complete=complete, failed=failed)

    def _read_by(self, place: Place, deadline: float) -> tuple[bool, int]:
        """Whether all samples of the place are read, and how many never will be; waits for it until the deadline."""
        engine, pause, hurried = self._monitor.repository.engine, _POLL_SECONDS, False
        flushed = self._monitor.flush(max(0.0, deadline - time.monotonic()))
        while True:
            left = unread(engine, place)
            if not left.waiting:
                if not left.sampled:
                    self._say("unsampled", "an agent has no activation sampled at all (is its handler installed?)")
                complete = flushed and left.sampled and left.failed <= self._failed_before(place)
                return complete, left.failed
            if not hurried:
                hasten(engine, place)
                hurried = True
            rest = deadline - time.monotonic()
            if rest <= 0 or self._new_alerts(place):
                return False, left.failed
            time.sleep(min(pause, rest))
            pause = min(1.5 * pause, _SLOWEST_POLL_SECONDS)

    def _new_alerts(self, place: Place) -> tuple[Alert, ...]:
        found = alerts_on(self._monitor.repository.engine, place)
        with self._lock:
            return tuple(alert for alert in found if self._counts_here(alert, place))

    def _failed_before(self, place: Place) -> int:
        """Samples that were given up, and that a person has let pass."""
        with self._lock:
            return self._settled.get((place.key or "", _FAILED), 0)

    def _counts_here(self, alert: Alert, place: Place) -> bool:
        names = (alert.alert_id, f"{_RULE}{alert.rule_id}")
        settled = any((place.key or "", name) in self._settled for name in names)
        chosen = self._rules is None or alert.rule_id in self._rules
        return chosen and not settled and alert.severity.rank >= self._severity.rank

    def _judge(self, place: Place, point: Point, alerts: tuple[Alert, ...]) -> Decision:
        if self._on_alert is None:
            return self._made(place, point, self._stop, "findings", alerts)
        try:
            answers = [self._asked(self._on_alert(alert)) for alert in alerts]
        except Exception as error:  # noqa: BLE001 -- the user's code: whatever it raises is said, and ``fail`` holds
            self._say("callback", f"on_alert failed: {error!r}")
            return self._made(place, point, self._otherwise, "fault", alerts)
        pairs = zip(alerts, answers, strict=True)
        self._settle(place, [alert.alert_id for alert, answer in pairs if answer is Verdict.PROCEED])
        return self._made(place, point, max(answers, key=lambda one: one.rank), "callback", alerts)

    def _asked(self, given: Verdict | str | None) -> Verdict:
        return self._stop if given is None else _one_of(Verdict, given, "on_alert")

    def _fallback(self, place: Place, point: Point, why: Literal["undecided", "fault"]) -> Decision:
        return self._made(place, point, self._otherwise, why)

    def _made(
        self,
        place: Place,
        point: Point,
        verdict: Verdict,
        by: DecidedBy,
        alerts: tuple[Alert, ...] = (),
    ) -> Decision:
        return Decision(uuid7(), verdict, by, place, point, alerts, complete=by == "findings")

    def _settle(self, place: Place, names: Sequence[str], *, failed: int = 0) -> None:
        with self._lock:
            if failed:
                self._settled[place.key or "", _FAILED] = failed
            for name in names:
                self._settled[place.key or "", name] = 0
            while len(self._settled) > _REMEMBERED:
                self._settled.popitem(last=False)

    def _tell(self, decision: Decision, *, late: bool) -> None:
        with self._lock:
            self._counts.update(("asked", decision.verdict.value))
            self._counts["late"] += late
            if decision.decided_by in ("undecided", "fault"):
                self._counts[decision.decided_by] += 1
        if decision.decided_by == "undecided" and decision.seconds >= self._deadline:
            self._say("undecided", "not all activations of an agent were read at the deadline")

    def _keep(self, decision: Decision) -> None:
        place, point = decision.place, decision.point
        try:
            save_decision(
                self._monitor.repository.engine,
                Decided(
                    decision_id=decision.decision_id,
                    run_id=place.run_id,
                    conversation=place.key or "",
                    root_run_id=place.root_run_id,
                    point=point.name,
                    tool=point.tool,
                    tool_call_id=point.tool_call_id,
                    verdict=decision.verdict.value,
                    decided_by=decision.decided_by,
                    alerts=tuple(alert.alert_id for alert in decision.alerts),
                    rules=tuple(dict.fromkeys(alert.rule_id for alert in decision.alerts)),
                    complete=decision.complete,
                    seconds=decision.seconds,
                    note=decision.note,
                    created_at=decision.at,
                ),
            )
        except NLAMonitorError as error:
            self._say("keep", f"a decision could not be stored: {error}")

    def _say(self, kind: str, text: str) -> None:
        with self._lock:
            if kind in self._said:
                return
            self._said.add(kind)
        logger.warning("nla_monitor: %s; the agent %s. Counted in stats, not said again", text, self._consequence)

    @property
    def _consequence(self) -> str:
        return "goes on (fail='open')" if self._otherwise is Verdict.PROCEED else "is stopped (fail='closed')"


@dataclass(slots=True)
class _Case:
    """One question, between the asking thread and ours."""

    place: Place
    point: Point
    started: float
    done: threading.Event = field(default_factory=threading.Event)
    found: Decision | None = None
    error: Exception | None = None
    late: bool = False
    final: Decision | None = None
    """What the agent was told."""
    told: threading.Event = field(default_factory=threading.Event)


def _one_of(kind: type[Kind], value: str, name: str) -> Kind:
    try:
        return kind(value)
    except ValueError:
        raise ConfigError(f"{name}={value!r}: valid are {', '.join(kind)}") from None
