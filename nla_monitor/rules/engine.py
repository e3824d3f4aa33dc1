"""A set of rules: what the worker and the CLI hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path as FilePath

from nla_monitor.errors import RuleError
from nla_monitor.records import Match, Reading, RuleHeader, WindowVerdict
from nla_monitor.rules.embedded import RuleTestResult, run_rule_tests
from nla_monitor.rules.evaluate import evaluate_screened
from nla_monitor.rules.loader import find_files, load_file
from nla_monitor.rules.prefilter import Prefilter, Screened
from nla_monitor.rules.problems import nearest
from nla_monitor.rules.rule import Rule
from nla_monitor.rules.window import judge, next_change, window_start


class RuleSet:
    """Rules with different ids. Immutable; may be shared between threads."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules: tuple[Rule, ...] = tuple(rules)
        self._by_id: dict[str, Rule] = {}
        for rule in self.rules:
            if other := self._by_id.get(rule.id):
                raise RuleError(
                    f"rule id {rule.id!r} is used twice; first in {other.file}",
                    file=rule.file,
                    line=rule.lines.get(("id",)),
                    key="id",
                )
            self._by_id[rule.id] = rule
        self.headers: dict[str, RuleHeader] = {rule.id: rule.header for rule in self.rules}

    def __len__(self) -> int:
        return len(self.rules)

    def get(self, rule_id: str) -> Rule:
        """The rule of that id.

        Raises:
            RuleError: there is none; names the nearest.
        """
        if rule_id not in self._by_id:
            raise RuleError(f"no rule is called {rule_id!r}; {nearest(rule_id, self._by_id)}")
        return self._by_id[rule_id]

    def evaluate(self, readings: Sequence[Reading], screened: Sequence[Screened] | None = None) -> list[Match]:
        """Matches of all rules, by reading and rule in the order given. Pure: same readings, same matches.

        Args:
            readings: what to look at.
            screened: what a ``screening.ScreeningPool`` says of their explanations, where one was asked.
        """
        if screened is None:
            return [match for reading in readings for match in evaluate_screened(self._prefilter, reading)]
        pairs = zip(readings, screened, strict=True)
        return [match for reading, seen in pairs for match in evaluate_screened(self._prefilter, reading, seen)]

    @property
    def regexes(self) -> tuple[str, ...]:
        """All regular expressions, for a ``screening.ScreeningPool``."""
        return self._prefilter.regexes

    @cached_property
    def _prefilter(self) -> Prefilter:
        return Prefilter(self.rules)

    def window_start(self, rule_id: str, *, step: int | None, now: float) -> tuple[int | None, float | None]:
        """Which stored matches a verdict needs: those after this step, or else after this time (None: no bound)."""
        return window_start(self.get(rule_id).spec.window, step=step, now=now)

    def window(self, rule_id: str, matches: Sequence[Match], *, step: int | None, now: float) -> WindowVerdict:
        """Whether the rule's window holds for the matches of one group at a moment. Pure; see ``window.judge``."""
        return judge(self.get(rule_id).spec.window, matches, step=step, now=now)

    def next_change(
        self, rule_id: str, matches: Sequence[Match], *, step: int | None, now: float
    ) -> tuple[float, float]:
        """The step and the time at which the window's verdict may next differ; see ``window.next_change``."""
        return next_change(self.get(rule_id).spec.window, matches, step=step, now=now)

    def run_tests(self) -> list[RuleTestResult]:
        """The embedded tests of all rules."""
        return [result for rule in self.rules for result in run_rule_tests(rule)]

    def verify(self) -> None:
        """Runs the embedded tests.

        Raises:
            RuleError: the first one that failed, with file, line and key; the others as notes.
        """
        failed = [result for result in self.run_tests() if not result.passed]
        if not failed:
            return
        errors = [
            RuleError(
                f"test of {result.rule_id!r} failed: {result.text[:80]!r} {result.message}",
                file=result.file,
                line=result.line,
                key=result.key,
            )
            for result in failed
        ]
        for other in errors[1:]:
            errors[0].add_note(str(other))
        raise errors[0]


def load_rules(names: Sequence[str]) -> RuleSet:
    """Rules from pack names, files and folders; a file named twice is read once.

    Raises:
        RuleError: nothing of that name, a malformed rule (file, line, key), or one id in two files.
    """
    files: dict[FilePath, FilePath] = {}
    for name in [names] if isinstance(names, str) else names:
        for file in find_files(name):
            files.setdefault(file.resolve(), file)
    return RuleSet(load_file(file) for file in files.values())
