"""How often a rule's alerts were right, by what people said of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Engine

from nla_monitor.evidence.calibration import interval
from nla_monitor.records import TriageState
from nla_monitor.store.labels import count_labels

_VERDICTS = (TriageState.TRUE_POSITIVE, TriageState.FALSE_POSITIVE, TriageState.BENIGN)


@dataclass(frozen=True, slots=True)
class Precision:
    """The labelled alerts of one version of a rule."""

    rule_id: str
    version: str
    true_positive: int
    false_positive: int
    benign: int
    """Right about the words, and nothing to worry about: counts against the precision, since somebody was woken."""
    unlabelled: int
    """Open or acknowledged."""

    @property
    def labelled(self) -> int:
        """Alerts with a verdict."""
        return self.true_positive + self.false_positive + self.benign

    @property
    def value(self) -> float | None:
        """Share of true positives among the labelled; None before the first label."""
        return self.true_positive / self.labelled if self.labelled else None

    def bounds(self, confidence: float = 0.95) -> tuple[float, float]:
        """Exact (Clopper and Pearson) interval of the share; (0, 1) before the first label.

        It speaks of the alerts that people chose to label: a biased choice biases it.
        """
        return interval(self.true_positive, self.labelled, confidence)


def precisions(engine: Engine, *, rule_ids: Collection[str] | None = None) -> list[Precision]:
    """Per rule and version that ever fired, by id and version.

    Args:
        engine: from ``store.session.open_engine``.
        rule_ids: of these rules only.

    Raises:
        StoreUnavailableError: the database cannot be read.
    """
    found: dict[tuple[str, str], dict[TriageState, int]] = defaultdict(dict)
    for rule_id, version, triage, count in count_labels(engine, rule_ids=rule_ids):
        found[rule_id, version][triage] = count
    return [_precision(*key, counts) for key, counts in sorted(found.items())]


def _precision(rule_id: str, version: str, counts: dict[TriageState, int]) -> Precision:
    right, wrong, benign = (counts.get(state, 0) for state in _VERDICTS)
    unlabelled = sum(count for state, count in counts.items() if state not in _VERDICTS)
    return Precision(rule_id, version, right, wrong, benign, unlabelled)
