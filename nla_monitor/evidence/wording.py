"""What an alert's controls mean, in words: one line each, for a person who has just been woken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from nla_monitor.evidence.bounds import Bound
from nla_monitor.records import IMPLAUSIBLE, PROXY

Verdict = Literal["good", "doubtful", "plain"]


@dataclass(frozen=True, slots=True)
class Line:
    """One control of one alert."""

    name: str
    """As people read it."""
    verdict: Verdict
    """``good`` speaks for the alert, ``doubtful`` against it, ``plain`` neither."""
    text: str
    """Number first, then what it means."""

    def __str__(self) -> str:
        return self.text if self.verdict == "plain" else f"{self.verdict}: {self.text}"


@dataclass(frozen=True, slots=True)
class _Words:
    """How to say one control."""

    name: str
    number: Callable[[float], str]
    usual: Bound
    """What is sound where the rule asks for nothing: the defaults of a rule's ``evidence``."""
    good: str
    doubtful: str


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


_WORDS: Final[Mapping[str, _Words]] = {
    "swap_margin": _Words(
        "swap margin",
        _signed,
        Bound(least=0.02),
        ": the text fits the activation better as stated than with the claim's alternatives in its place",
        ": the text fits no better than with the claim's alternatives in its place: the claim may be made up",
    ),
    "claim_probability": _Words(
        "claim probability",
        _percent,
        Bound(least=0.5),
        " is the share that the AV itself gives this claim among its alternatives",
        " is the share that the AV itself gives this claim among its alternatives: it might as well say another",
    ),
    "agreement": _Words(
        "agreement",
        _percent,
        Bound(least=0.5),
        " of further explanations drawn from the AV say the same",
        " of further explanations drawn from the AV say the same: read again, it says something else",
    ),
    "neighbours": _Words(
        "neighbours",
        _percent,
        Bound(least=0.5),
        " of the readings at tokens close by say the same",
        " of the readings at tokens close by say the same: it stands alone",
    ),
    "echo": _Words(
        "echo",
        _percent,
        Bound(most=0.5),
        " of the quote's words stand in the text up to the token: it does not repeat the text",
        " of the quote's words stand in the text up to the token: it may merely repeat what the model saw or wrote",
    ),
    "prediction_echo": _Words(
        "prediction echo",
        _percent,
        Bound(most=0.8),
        " of the quote's words stand in the text that came after the token: it does not forecast words",
        " of the quote's words stand in the text that came after the token: it may forecast the next words, no more",
    ),
    "ablation": _Words(
        "ablation",
        lambda value: f"rank {value:.0f}",
        Bound(most=2),
        " among the sentences by what dropping it costs (1 costs most; a rank, no proof)",
        " among the sentences by what dropping it costs: others carry more of the activation (a rank, no proof)",
    ),
    "null_percentile": _Words(
        "null percentile",
        _percent,
        Bound(least=0.95),
        " of null readings (random, shuffled, mean, other layers) have a lower fidelity",
        " of null readings (random, shuffled, mean, other layers) have a lower fidelity: the others, which mean "
        "nothing, do as well",
    ),
    "null_match_rate": _Words(
        "null matches",
        _percent,
        Bound(most=0.2),
        " of random vectors are read so, too",
        " of random vectors are read so, too: this AV says it of anything",
    ),
    "norm": _Words(
        "norm",
        lambda value: f"{value:.2f} times the run's median",
        Bound(least=0.25, most=4.0),
        ": a usual size",
        ": an attention sink, or an activation out of range: read it with care",
    ),
}

_READ_ELSEWHERE: Final[Mapping[str, str]] = {
    PROXY: "read in another model than the one that answered: how that model takes this text, and no evidence of what "
    "the answering one represents",
    IMPLAUSIBLE: "the model that was read would hardly have given this answer: another one may have given it",
}

USUAL: Final[Mapping[str, Bound]] = {name: words.usual for name, words in _WORDS.items()}
"""What is sound where a rule asks for nothing."""


def lines(evidence: Mapping[str, object]) -> Iterator[Line]:
    """The controls of an alert's ``evidence``, in the order of their weight, then what was not measured.

    What is not known here (a later version's controls) comes as it is.
    """
    recurrence = evidence.get("recurrence")
    if isinstance(recurrence, Mapping):
        counts = ", ".join(f"{what} {count}" for what, count in recurrence.items() if what != "needed")
        yield Line("recurrence", "plain", f"{counts} (the rule asks for {recurrence.get('needed', '?')})")
    for name, words in _WORDS.items():
        found = evidence.get(name)
        if isinstance(found, Mapping) and any(isinstance(found.get(key), int | float) for key in ("exhibit", "median")):
            yield _line(words, found)
    norm = evidence.get("raw_norm")
    if isinstance(norm, int | float):
        yield Line("raw norm", "plain", f"{norm:.4g} (L2, which the AV does not see)")
    not_run = evidence.get("not_run")
    yield from _missing(not_run if isinstance(not_run, Mapping) else {}, evidence)
    if evidence.get("truncated"):
        yield Line("cut short", "doubtful", "the explanation reached its length limit; its end is missing")
    yield from (Line(name, "doubtful", text) for name, text in _READ_ELSEWHERE.items() if evidence.get(name))
    known = {*_WORDS, *_READ_ELSEWHERE, "recurrence", "raw_norm", "not_run", "truncated"}
    yield from (Line(name, "plain", _flat(value)) for name, value in evidence.items() if name not in known)


def summary(found: Iterable[Line]) -> str:
    """How many controls speak for the alert, and which against it; empty without any."""
    told = [line for line in found if line.verdict != "plain"]
    against = [line.name for line in told if line.verdict == "doubtful"]
    if not told:
        return ""
    return f"{len(told) - len(against)} of {len(told)} good" + (f"; doubtful: {', '.join(against)}" if against else "")


def _line(words: _Words, found: Mapping[str, object]) -> Line:
    shown = found.get("exhibit", found.get("median"))
    value = float(shown) if isinstance(shown, int | float) else 0.0
    demand = found.get("required")
    limits = demand if isinstance(demand, Mapping) else {}
    bound = Bound(limits.get("min"), limits.get("max")) if limits else words.usual
    sound = bound.holds(value)
    notes = [f"the rule asks for {_limits(limits, words)}"] if limits else []
    middle, measured = found.get("median"), found.get("measured")
    if isinstance(middle, int | float) and isinstance(measured, int) and measured > 1:
        notes.append(f"median of {measured} matches {words.number(middle)}")
    aside = f" ({'; '.join(notes)})" if notes else ""
    return Line(
        words.name,
        "good" if sound else "doubtful",
        f"{words.number(value)}{aside}{words.good if sound else words.doubtful}",
    )


def _limits(limits: Mapping[str, object], words: _Words) -> str:
    told = {"min": "at least", "max": "at most"}
    return " and ".join(
        f"{told[key]} {words.number(value)}" for key, value in limits.items() if isinstance(value, int | float)
    )


def _missing(not_run: Mapping[str, object], evidence: Mapping[str, object]) -> Iterator[Line]:
    """Required ones apart: a person must see that the alert rests on less than its rule asks for."""
    optional: dict[str, list[str]] = {}
    for name, why in not_run.items():
        label = _WORDS[name].name if name in _WORDS else name
        found = evidence.get(name)
        if name.startswith("selection "):
            yield Line(label, "doubtful", f"nobody could be asked, so it counts as not met: {why}")
        elif isinstance(found, Mapping) and "required" in found:
            yield Line(label, "doubtful", f"required by the rule, but not measured: {why}")
        else:
            optional.setdefault(str(why), []).append(label)
    if optional:
        told = (f"{', '.join(labels)} ({why})" for why, labels in optional.items())
        yield Line("not measured", "plain", "; ".join(told))


def _flat(value: object) -> str:
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, Mapping) else str(value)
