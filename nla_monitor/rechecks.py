"""The controls of a replay's new matches, by the AR that made the readings, loaded when the first match needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nla_monitor.controls import Controls, Neighbourhood
from nla_monitor.errors import NLAMonitorError
from nla_monitor.nla.base import Reconstructor
from nla_monitor.records import Match, Reading, Support
from nla_monitor.rules import RuleSet


class Rechecks:
    """``replay.Checker`` with an AR on demand, used for readings only that the same AR scored.

    Controls that need no AR are measured in any case; those that need the AV are left out.

    Args:
        rules: the rules whose matches are checked.
        load: makes the AR; None: there is none at hand.
        neighbourhood: the store.
        strict: what ``load`` raises is raised, since the AR was asked for by name; else it is kept in ``why``.
    """

    def __init__(
        self,
        rules: RuleSet,
        load: Callable[[], Reconstructor | None],
        *,
        neighbourhood: Neighbourhood | None = None,
        strict: bool = False,
    ) -> None:
        self._rules = rules
        self._load = load
        self._neighbourhood = neighbourhood
        self._strict = strict
        self._plain = Controls(rules, None, None, neighbourhood=neighbourhood)
        self._full: tuple[str, Controls] | None = None
        self._loaded = False
        self.why: str | None = None
        """Why no AR could be had; None while none was needed, or it was."""

    def check(self, matches: Sequence[Match], readings: Mapping[str, Reading]) -> dict[str, Support]:
        """What the controls say, by ``match_id``.

        Raises:
            NLAMonitorError: the AR that was asked for cannot be loaded.
        """
        if not self._loaded:
            self._prepare()
        mine = [match for match in matches if self._scored(readings[match.sample_id])]
        others = [match for match in matches if not self._scored(readings[match.sample_id])]
        if others and self.why is None:
            self.why = "the AR at hand is not the one that scored these readings"
        checked = self._full[1].check(mine, readings) if self._full is not None and mine else {}
        return checked | (self._plain.check(others, readings) if others else {})

    def _prepare(self) -> None:
        self._loaded = True
        try:
            reconstructor = self._load()
        except NLAMonitorError as error:
            if self._strict:
                raise
            self.why = f"the AR of the run cannot be loaded: {error}"
            return
        if reconstructor is None:
            self.why = "no AR"
            return
        full = Controls(self._rules, None, reconstructor, neighbourhood=self._neighbourhood)
        self._full = reconstructor.content_hash, full

    def _scored(self, reading: Reading) -> bool:
        return self._full is not None and reading.fidelity is not None and reading.fidelity.ar_hash == self._full[0]
