"""``response`` of a rule acts: who is told, whether the run stops, which run is tagged."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from nla_monitor.alerts.responses import Responses
from nla_monitor.alerts.sinks import DeliveryError, Drained, drain
from nla_monitor.records import Alert, RuleHeader, Severity
from nla_monitor.store.engine import open_engine
from nla_monitor.store.repository import Repository
from nla_monitor.store.session import upgrade
from tests.store_support import AGENT, alert, sample


def soon() -> float:
    """A moment at which everything in the outbox is due; the same for the outbox and for who works it."""
    return SOON


SOON = time.time() + 3600  # a suite may take a while to get here


def responses(
    named: Sequence[str] | None, *, log: bool = True, stop_on: Severity | None = None, rule: str = "hack"
) -> Responses:
    header = RuleHeader(rule, "A rule", "v", Severity.LOW, responses=None if named is None else tuple(named))
    return Responses({rule: header}, log=log, stop_on=stop_on)


def fired(rule: str = "hack", severity: Severity = Severity.LOW, **changes: object) -> Alert:
    return replace(alert(sample(1)), rule_id=rule, severity=severity, **changes)


@pytest.mark.parametrize(
    ("named", "stop_on", "severity", "stops"),
    [
        (None, None, Severity.CRITICAL, False),
        (None, Severity.HIGH, Severity.HIGH, True),
        (None, Severity.HIGH, Severity.MEDIUM, False),
        (["stop"], None, Severity.INFO, True),
        (["log"], Severity.HIGH, Severity.CRITICAL, False),
        ([], Severity.HIGH, Severity.CRITICAL, False),
    ],
)
def test_stopping_is_the_rules_word_or_else_the_configs(
    named: list[str] | None, stop_on: Severity | None, severity: Severity, stops: bool
) -> None:
    found = responses(named, stop_on=stop_on)
    assert found.stops(fired(severity=severity)) is stops
    assert found.may_stop is (stop_on is not None or "stop" in (named or ()))
    assert found.stops(fired("another", severity)) is (stop_on is not None and severity.rank >= stop_on.rank)


@pytest.mark.parametrize(
    ("named", "log", "logs"), [(None, True, True), (["stop"], True, False), (["log"], False, False)]
)
def test_logging_in_the_host(named: list[str] | None, log: bool, logs: bool) -> None:
    assert responses(named, log=log).logs(fired()) is logs


def test_tags_stand_on_the_agents_run_and_its_outermost() -> None:
    found = responses(["tag"])
    found.tag(fired(agent=AGENT))
    found.tag(fired(agent=AGENT))
    assert found.tags("call-1") == found.tags("root-1") == found.tags() == ("hack",)
    assert found.tags("call-2") == ()
    plain = responses(["tag"])
    plain.tag(fired(agent=None))
    assert plain.tags("run-1") == ("hack",)
    silent = responses(["log"])
    silent.tag(fired(agent=AGENT))
    assert silent.tags() == ()


class Hears:
    """A sink that keeps what it is told."""

    def __init__(self, name: str, *, fails: bool = False) -> None:
        self.name, self.fails = name, fails
        self.told: list[str] = []

    def send(self, kind: str, alert: Alert) -> None:
        self.told.append(alert.rule_id)
        if self.fails:
            raise DeliveryError("the cable is cut")


@pytest.fixture
def repository() -> Iterator[Repository]:
    engine = open_engine("sqlite://", in_process=True)
    upgrade(engine)
    yield Repository(engine, soon)
    engine.dispose()


@pytest.mark.parametrize(
    ("named", "told"),
    [
        (None, {"log", "webhook", "pager"}),
        (["log"], {"log", "pager"}),
        (["webhook", "stop"], {"webhook", "pager"}),
        (["tag"], {"pager"}),
    ],
)
def test_only_the_named_sinks_are_told_and_the_hosts_own_always(
    repository: Repository, named: list[str] | None, told: set[str]
) -> None:
    """An alert whose rule leaves a sink out is done without it: nothing waits in the outbox."""
    with repository.transaction() as tx:
        tx.save_alert(fired(), [], "fired")
    sinks = [Hears("log"), Hears("webhook"), Hears("pager")]
    done = drain(repository, sinks, responses={"hack": named}, clock=soon)
    assert done == Drained(delivered=1)
    assert {sink.name for sink in sinks if sink.told} == told
    assert drain(repository, sinks, responses={"hack": named}, clock=soon) == Drained()


def test_a_sink_left_out_that_is_down_delays_nobody(repository: Repository) -> None:
    with repository.transaction() as tx:
        tx.save_alert(fired("other", fingerprint="1"), [], "fired")
        tx.save_alert(fired("hack", fingerprint="2"), [], "fired")
    sinks = [Hears("webhook", fails=True), Hears("log")]
    done = drain(repository, sinks, responses={"hack": ["log"]}, clock=soon)
    assert done == Drained(delivered=1, delayed=1)
    assert sinks[1].told == ["other", "hack"]
