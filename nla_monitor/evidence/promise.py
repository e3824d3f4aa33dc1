"""``Alert.calibration`` in words: the guarantee and what stands behind it, one line each.

Light on purpose: it only reads figures that ``statement`` has made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

ENDED: Final = "drift has ended the set's promise, so no false-alarm rate stands behind this"


def percent(share: float) -> str:
    """A share as a percentage, rounded up to two digits, since it stands where "at most" does."""
    value = 100 * share
    if value <= 0:
        return "0 %"
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{min(math.ceil(round(value / unit, 6)) * unit, 100.0):.6g} %"


def brief(calibration: Mapping[str, object]) -> str:
    """How far the guarantee of an alert goes, in a word or two: for lists."""
    status = str(calibration.get("status", "uncalibrated"))
    return {"certified": "false-alarm rate certified", "void": "guarantee void"}.get(status, status)


def told(calibration: Mapping[str, object]) -> list[tuple[str, str]]:
    """``Alert.calibration`` as named lines; the first one is the guarantee itself.

    Takes what older versions stored, too: figures that are missing are left out.
    """
    status = str(calibration.get("status", "uncalibrated"))
    plain = "uncalibrated: the false-alarm rate of this rule is not known" if status == "uncalibrated" else status
    lines = [("calibration", str(calibration.get("says", plain)))]
    for name, tell in _TELL.items():
        figures = calibration.get(name)
        # What a hit is worth rests on the bound, which drift has ended.
        if isinstance(figures, Mapping) and not (name == "ppv" and status == "void"):
            ended = f"; {ENDED}" if status == "void" and name in _RESTING else ""
            lines.append((_TITLES[name], tell(figures) + ended))
    return lines


def _tell_base_rate(figures: Mapping[str, Any]) -> str:
    span = f"{percent(figures['low'])} to {percent(figures['high'])}"
    return f"{figures['matching']} of {figures['sequences']} benign sequences match before any threshold ({span})"


def _tell_lift(figures: Mapping[str, Any]) -> str:
    span = f"{_times(figures['low'])} to {_times(figures['high'])}"
    meaning = "" if figures["low"] > 1 else ": no more often than by chance"
    return f"hits come {_times(figures['value'])} times as often in this run as in benign traffic ({span}){meaning}"


def _times(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _tell_ppv(figures: Mapping[str, Any]) -> str:
    true, found = (f"{100 * figures[name]:.3g} %" for name in ("prevalence", "recall"))
    basis = f"if {true} of all sequences were true and {found} of those were hit"
    return f"at least {100 * figures['value']:.2g} % of hit sequences would be true ones {basis} (stated by the rule)"


def _tell_run(figures: Mapping[str, Any]) -> str:
    alarm = "alarm" if figures["alarmed"] else "no alarm"
    counts = f"{figures['hits']} of {figures['sequences']} sequences hit"
    return f"{counts}, e-value {figures['e_value']:.3g} ({alarm}; it takes {figures['e_threshold']:.3g})"


def _tell_e_bh(figures: Mapping[str, Any]) -> str:
    kept = "stands" if figures["survives"] else "does not stand"
    others = f"{figures['rules']} calibrated rule" + ("s" if figures["rules"] != 1 else "")
    return f"{kept} at the level of the run among {others} (e-BH at {percent(figures['level'])})"


def _tell_drift(figures: Mapping[str, Any]) -> str:
    values = ", ".join(f"{name} {value:.3g}" for name, value in figures["e_values"].items())
    state = f"found, by {figures['by']}" if figures["void"] else "none found"
    return f"{state} (e-values: {values}; {figures['e_threshold']:.3g} ends the promise)"


_TELL: Final = {
    "base_rate": _tell_base_rate,
    "lift": _tell_lift,
    "ppv": _tell_ppv,
    "run": _tell_run,
    "e_bh": _tell_e_bh,
    "drift": _tell_drift,
}
_RESTING: Final = frozenset({"run", "e_bh"})
"""What is true only while benign traffic is as it was in the set."""
_TITLES: Final = {
    "base_rate": "base rate",
    "lift": "lift",
    "ppv": "worth",
    "run": "whole run",
    "e_bh": "other rules",
    "drift": "drift",
}
