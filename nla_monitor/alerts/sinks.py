"""Where alerts go besides the database, and working the outbox with bounded, ever slower retries."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from nla_monitor.alerts.base import DeliveryError, Sink
from nla_monitor.alerts.finding import IN_PROXY, facts_of, guarantee
from nla_monitor.alerts.webhook import WebhookSink
from nla_monitor.records import Alert, Severity

__all__ = ["DeliveryError", "Drained", "LogSink", "Sink", "WebhookSink", "drain", "may_tell"]

logger = logging.getLogger("nla_monitor.alerts")

CLAIM_SECONDS: Final = 120.0
"""How long a claimed item is hidden from other workers; longer than one sink may take, and renewed between sinks."""
FIRST_DELAY: Final = 2.0
HELD_DELAY: Final = 15.0
"""Seconds until it is looked again whether a sink has what comes before a message."""
LONGEST_DELAY: Final = 600.0
_LEAVING: Final = ("webhook", "alertmanager", "notify", "phoenix", "langfuse")
_NAMED_SINKS: Final = {"log": "log"} | dict.fromkeys(_LEAVING, "webhook")
"""Sinks that a rule's ``response`` may name, by the start of their name: all that leave the machine are ``webhook``."""
LEAST_ATTEMPTS: Final = 12
"""Attempts before a message can be too old: a worker whose clock is hours ahead gives up nothing that is new."""
LONE_ATTEMPTS: Final = 8
"""Where only the item itself has to wait (see ``DeliveryError.alone``): four minutes."""
LONGEST_WAIT: Final = 86_400.0
"""Seconds for which a sink that fails is tried."""
LAST_RESORT: Final = 2 * LONGEST_WAIT
"""Seconds after which a message is given up, however seldom it was tried: what bounds the outbox."""
REFUSED: Final = "!"
"""``name!`` among those that have an item: the sink refused it for good, and is not asked again."""
NO_SPAN: Final = "?"
"""``name?`` among those that have an item: the sink has nothing to show it on, and is not asked again."""


Tell = Callable[[str, str], None]


class _Item(Protocol):
    """One thing to tell, as the store keeps it."""

    @property
    def outbox_id(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def alert(self) -> Alert: ...
    @property
    def attempts(self) -> int: ...
    @property
    def delivered(self) -> tuple[str, ...]: ...
    @property
    def created_at(self) -> float: ...
    @property
    def error(self) -> str | None: ...
    @property
    def before(self) -> Sequence[Sequence[str]]: ...


class _Outbox(Protocol):
    """What ``drain`` needs of the store; ``store.repository.Repository`` has it."""

    def outbox_now(self) -> float: ...
    def outbox_claim(self, limit: int, seconds: float) -> Sequence[_Item]: ...
    def outbox_renew(self, outbox_id: int, seconds: float) -> None: ...
    def outbox_done(self, outbox_id: int) -> None: ...
    def outbox_failed(
        self,
        outbox_id: int,
        error: str,
        retry_at: float | None,
        *,
        delivered: Sequence[str] = (),
        attempted: bool = True,
    ) -> None: ...


class LogSink:
    """One log line per alert, on logger ``nla_monitor.alerts``; warning from severity medium on, else info.

    Args:
        content: also log the quote (logs are often shipped elsewhere; off by default).
        target: another logger.
    """

    name = "log"

    def __init__(self, *, content: bool = False, target: logging.Logger | None = None) -> None:
        self._content = content
        self._logger = target or logger

    def send(self, kind: str, alert: Alert) -> None:
        """Log it."""
        loud = kind == "fired" and alert.severity.rank >= Severity.MEDIUM.rank
        self._logger.log(logging.WARNING if loud else logging.INFO, "%s", self._line(kind, alert))

    def _line(self, kind: str, alert: Alert) -> str:
        parts = [f"alert {alert.alert_id} {kind}: [{alert.severity}] {alert.rule_title} ({alert.rule_id})"]
        parts.append(f"run {alert.run_id}")
        if alert.last_step is not None:
            parts.append(f"step {alert.last_step}")
        parts.append(f"position {alert.position}")
        parts.append(f"{alert.matches} matches")
        if alert.fve is not None:
            parts.append(f"fve {alert.fve:.3f} (denominator {alert.denominator_name})")
        elif alert.cosine is not None:
            parts.append(f"cosine {alert.cosine:.3f}")
        facts = facts_of(alert)
        parts.append(guarantee(facts))
        if "proxy" in facts:
            parts.append(IN_PROXY)
        if self._content and alert.quote:
            parts.append(f"quote {alert.quote!r}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Drained:
    """What one pass over the outbox did."""

    delivered: int = 0
    """Items that every sink has now, or can never show."""
    delayed: int = 0
    """Items to be tried again later."""
    given_up: int = 0


def drain(
    outbox: _Outbox,
    sinks: Sequence[Sink],
    *,
    responses: Mapping[str, Sequence[str] | None] | None = None,
    limit: int = 50,
    clock: Callable[[], float] | None = None,
    tell: Tell | None = None,
) -> Drained:
    """One pass over what is due in the outbox; never raises for a sink, whatever the sink raises.

    Each sink hears of one condition in order, and one that fails holds up only itself. It is not asked again in this
    pass, so that a dead receiver costs one timeout, not one per alert. Its items come back after
    ``FIRST_DELAY * 2 ** attempts`` seconds (at most ``LONGEST_DELAY``), for ``LONGEST_WAIT`` seconds and at least
    ``LEAST_ATTEMPTS`` times. A sink that refuses an item for good is not asked again about it; the others are, and then
    the item counts as given up. Where the receiver is well and only lacks what the item belongs to (a span), that is
    tried ``LONE_ATTEMPTS`` times; then the item is done for that sink, for nobody has missed a message.

    Args:
        outbox: what is to be told.
        sinks: whom to tell.
        responses: by rule id, what its alerts may set off. A rule that names responses reaches the sinks called ``log``
            and ``webhook`` (whatever leaves the machine counts as such) only if it names them; sinks of another
            name are the host's own and always hear.
        limit: items in one pass.
        clock: Unix seconds; by default the outbox's own clock.
        tell: hears of each delivery: the sink's name, and ``delivered``, ``failed`` (tried again perhaps), ``refused``
            (for good) or ``no_span`` (what it belongs to never came).

    Raises:
        StoreUnavailableError: the outbox can't be read or written; undone items come back.
    """
    delivery = _Pass(outbox, sinks, clock or outbox.outbox_now, responses or {}, tell or _nobody)
    # One claim at a time: what this pass does not reach is not hidden from other workers.
    for _ in range(limit):
        items = outbox.outbox_claim(1, CLAIM_SECONDS)
        if not items:
            break
        delivery.deliver(items[0])
    return Drained(delivery.delivered, delivery.delayed, delivery.given_up)


def may_tell(sink: Sink, alert: Alert, responses: Mapping[str, Sequence[str] | None]) -> bool:
    """Whether an alert's rule lets it go to a sink; see ``drain``."""
    named = responses.get(alert.rule_id)
    kind = _NAMED_SINKS.get(sink.name.partition(":")[0])
    return named is None or kind is None or kind in named


def _nobody(_sink: str, _outcome: str) -> None:
    """Nobody counts."""


class _Pass:
    """Working memory of one ``drain``."""

    def __init__(
        self,
        outbox: _Outbox,
        sinks: Sequence[Sink],
        clock: Callable[[], float],
        responses: Mapping[str, Sequence[str] | None],
        tell: Tell,
    ) -> None:
        self._outbox = outbox
        self._tell = tell
        self._responses = responses
        self._sinks = sinks
        self._clock = clock
        self._down: dict[str, float] = {}
        """Sinks that failed in this pass, and when to ask them again."""
        self.delivered = 0
        self.delayed = 0
        self.given_up = 0

    def deliver(self, item: _Item) -> None:
        """Give an item to every sink that lacks it, and write down what came of it."""
        have = set(item.delivered)
        errors: dict[str, DeliveryError] = {}
        waiting = held = False
        claimed = time.monotonic()
        for sink in self._sinks:
            if _settled(sink.name, have) or not may_tell(sink, item.alert, self._responses):
                continue
            behind = any(not _settled(sink.name, older) for older in item.before)
            if behind or sink.name in self._down:
                waiting, held = True, held or behind
                continue
            if time.monotonic() - claimed > CLAIM_SECONDS / 4:
                self._outbox.outbox_renew(item.outbox_id, CLAIM_SECONDS)
                claimed = time.monotonic()
            if (error := self._ask(sink, item, have)) is not None:
                errors[sink.name] = error
        not_before = [self._clock() + HELD_DELAY] if held else []
        self._settle(item, have, errors, waiting, not_before)

    def _ask(self, sink: Sink, item: _Item, have: set[str]) -> DeliveryError | None:
        """Give an item to one sink; what is settled by that goes into ``have``."""
        error = _given(sink, item)
        outcome = "failed"
        if error is None:
            have.add(sink.name)
            outcome = "delivered"
        elif error.permanent:
            have.add(sink.name + REFUSED)
            outcome = "refused"
        elif error.alone and item.attempts + 1 >= LONE_ATTEMPTS:
            have.add(sink.name + NO_SPAN)
            logger.info("alert %s (%s) is not shown by %s: %s", item.alert.alert_id, item.kind, sink.name, error)
            error, outcome = None, "no_span"
        self._tell(sink.name, outcome)
        return error

    def _settle(
        self,
        item: _Item,
        have: set[str],
        errors: dict[str, DeliveryError],
        waiting: bool,
        not_before: Sequence[float],
    ) -> None:
        now = self._clock()
        again = now + min(FIRST_DELAY * 2 ** min(item.attempts, 16), LONGEST_DELAY)
        left = {name: error for name, error in errors.items() if not error.permanent}
        self._down |= {name: again for name, error in left.items() if not error.alone}
        text = _said(item, errors)
        if not left and not waiting and not any(name.endswith(REFUSED) for name in have):
            self._outbox.outbox_done(item.outbox_id)
            self.delivered += 1
        elif (left or waiting) and not _too_old(now - item.created_at, item.attempts + bool(errors)):
            retry_at = max([*([again] if errors else not_before), *self._down.values()])
            self._outbox.outbox_failed(
                item.outbox_id,
                text or "put off: a sink failed just now, or lacks what comes before it",
                retry_at,
                delivered=sorted(have),
                attempted=bool(errors),
            )
            self.delayed += 1
            if errors and (not item.attempts or len(left) < len(errors)):
                logger.warning(
                    "alert %s (%s) is not delivered yet, trying on: %s", item.alert.alert_id, item.kind, text
                )
        else:
            text = text or "put off for too long"
            logger.error("alert %s (%s) was not delivered and is given up: %s", item.alert.alert_id, item.kind, text)
            self._outbox.outbox_failed(item.outbox_id, text, None, delivered=sorted(have))
            self.given_up += 1


def _settled(sink: str, have: Container[str]) -> bool:
    """Whether a sink need not be asked: it has the item, refused it for good, or can never show it."""
    return any(sink + mark in have for mark in ("", REFUSED, NO_SPAN))


def _too_old(age: float, attempts: int) -> bool:
    return age >= LAST_RESORT or (age >= LONGEST_WAIT and attempts >= LEAST_ATTEMPTS)


def _said(item: _Item, errors: Mapping[str, DeliveryError]) -> str | None:
    """What went wrong: of this attempt, and who refused it before. None: nothing ever did."""
    before = [name for name in item.delivered if name.endswith(REFUSED)]
    parts = [f"{name.removesuffix(REFUSED)}: refused for good" for name in before]
    parts += [f"{name}: {error}" for name, error in errors.items()]
    return "; ".join(parts) or item.error


def _given(sink: Sink, item: _Item) -> DeliveryError | None:
    """Why a sink did not take an item; None: it has it."""
    try:
        sink.send(item.kind, item.alert)
    except DeliveryError as error:
        return error
    except Exception as error:  # noqa: BLE001 -- somebody's own sink: its fault is no worker's, its text may be secret
        return DeliveryError(f"fault of the sink ({type(error).__name__})")
    return None
