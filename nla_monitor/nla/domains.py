"""Denominators of one's own: how much the activations of a domain vary about their mean direction.

A checkpoint's denominator speaks of its training data, and other text varies more or less (Gemma-12B: 0.0302 there,
0.042 on pretraining text), so that the same cosine is a good score in one domain and a bad one in another. From
activations of one's own, each domain (a phase, a role, a label) gets the mean ``mu`` of its unit vectors, and with it

- ``denominator = mean ||v/|v| - mu||^2 = 1 - |mu|^2``, what an FVE is divided by,
- ``constant_cosine = mean cos(v, mu) = |mu|``, what the constant direction ``mu`` reconstructs without reading.

Both hold exactly over the set they are taken from. An AR that does not beat the constant direction tells nothing of
that domain.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nla_monitor.errors import ConfigError, VectorFileError
from nla_monitor.nla.base import Score
from nla_monitor.nla.fidelity import score_of
from nla_monitor.nla.sidecar import Denominator
from nla_monitor.records import ActivationSample

TRAINING: Final = "training"
"""The value of ``nla.denominator`` that means the checkpoint's own."""
ALL: Final = "all"
"""Label of all activations together; also what a sample of no known domain is held against."""
FEWEST: Final = 100
"""Activations from which a domain gets a denominator: the one measured is too small by one part in their number."""
_KEY: Final = "nla_monitor_denominators"
_FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Domain:
    """One domain's activations, summed up."""

    vectors: int
    """How many activations stand behind it."""
    mean: npt.NDArray[np.float64]
    """``[d_model]``, mean of their unit vectors."""

    @property
    def constant_cosine(self) -> float:
        """Mean cosine of the activations with their mean direction."""
        return float(np.linalg.norm(self.mean))

    @property
    def denominator(self) -> float:
        """Mean of ``||v/|v| - mean||^2``."""
        return 1.0 - self.constant_cosine**2


@dataclass(frozen=True, slots=True)
class Denominators:
    """The denominators of a set of activations, per domain and for all together."""

    name: str
    """Of the set; FVEs carry it as ``name/domain``."""
    layer: int | None
    """K of the activations; None: their file did not say."""
    by: str | None
    """What tells domains apart: ``phase``, ``role``, ``meta.<key>``, or a column of a file; None: there is one."""
    overall: Domain
    domains: Mapping[str, Domain]
    source: tuple[str, ...] = ()
    """Run ids or files that they come from."""

    @property
    def d_model(self) -> int:
        """Width of the activations."""
        return len(self.overall.mean)

    def domain(self, label: str | None) -> tuple[str, Domain]:
        """The name and figures of the domain of a label; those of all activations where the label is not known."""
        known = label is not None and label in self.domains
        key = str(label) if known else ALL
        return f"{self.name}/{key}", self.domains[key] if known else self.overall

    def rescored(self, score: Score, label: str | None) -> Score:
        """The same fidelity, its FVE over the denominator of a label's domain."""
        name, found = self.domain(label)
        return score_of(score.cosine, Denominator(name, found.denominator))

    def rescored_samples(self, scores: Sequence[Score], samples: Sequence[ActivationSample]) -> list[Score]:
        """The same for the scores of stored samples, each by its own label."""
        labels = (label_of(sample, self.by) for sample in samples)
        return [self.rescored(score, label) for score, label in zip(scores, labels, strict=True)]

    def require_fit(self, d_model: int, layer: int | None, where: str) -> None:
        """Raises ``ConfigError`` if the activations are of another width or layer than an NLA reads."""
        if d_model != self.d_model:
            raise ConfigError(
                f"{where}: denominators of activations of d_model {self.d_model}, the AV reads {d_model}. Measure them "
                "on the model that is monitored: nla-monitor denominator"
            )
        if None not in (layer, self.layer) and layer != self.layer:
            raise ConfigError(
                f"{where}: denominators of layer {self.layer}, the AV reads layer {layer}. Measure them at its layer: "
                "nla-monitor denominator"
            )


def label_of(sample: ActivationSample, by: str | None) -> str | None:
    """The domain's label of a sample; None where it has none."""
    if by is None:
        return None
    value = sample.attributes.get(by.removeprefix("meta.")) if by.startswith("meta.") else getattr(sample, by, None)
    return None if value is None else str(value)


class DomainStatistics:
    """Sums activations up, batch by batch; memory holds one vector a domain.

    Args:
        d_model: width of the activations.
    """

    def __init__(self, d_model: int) -> None:
        self.d_model = d_model
        self._sums: dict[str | None, npt.NDArray[np.float64]] = {}
        self._counts: dict[str | None, int] = {}

    @property
    def vectors(self) -> int:
        """How many activations were added."""
        return sum(self._counts.values())

    def add(self, vectors: npt.NDArray[np.float32], labels: Sequence[str | None]) -> None:
        """Take ``[n, d_model]`` activations (finite, not zero) with the label of each."""
        rows = vectors.astype(np.float64)
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for label in dict.fromkeys(labels):
            chosen = unit[[other == label for other in labels]]
            self._sums[label] = self._sums.get(label, np.zeros(self.d_model)) + chosen.sum(axis=0)
            self._counts[label] = self._counts.get(label, 0) + len(chosen)

    def finish(
        self, name: str, *, layer: int | None, by: str | None, source: Sequence[str], fewest: int = FEWEST
    ) -> Denominators:
        """The denominators; domains of fewer than ``fewest`` activations count among all only.

        Raises:
            VectorFileError: there are too few activations at all, or they do not vary.
        """
        if self.vectors < fewest:
            raise VectorFileError(
                f"{self.vectors} readable activations are too few for a denominator; it takes at least {fewest}. Name "
                "more runs or a larger file"
            )
        overall = Domain(self.vectors, sum(self._sums.values(), np.zeros(self.d_model)) / self.vectors)
        if overall.denominator <= 1e-9:
            raise VectorFileError(
                "the activations all point the same way, so that nothing is left to explain; name activations of "
                "different tokens and texts"
            )
        domains = {
            label: Domain(count, self._sums[label] / count)
            for label, count in sorted(self._counts.items(), key=str)
            if label is not None and count >= fewest
        }
        varied = {label: domain for label, domain in domains.items() if domain.denominator > 1e-9}
        return Denominators(name, layer, by, overall, varied, tuple(source))


def save_denominators(file: Path, found: Denominators) -> None:
    """Write them as safetensors: ``mean`` ``[1 + domains, d_model]`` float64, all activations first.

    Raises:
        VectorFileError: the file cannot be written.
    """
    labels = list(found.domains)
    told = {
        "format": _FORMAT,
        "name": found.name,
        "layer": found.layer,
        "by": found.by,
        "vectors": [found.overall.vectors, *(found.domains[label].vectors for label in labels)],
        "domains": labels,
        "source": list(found.source),
    }
    means = np.stack([found.overall.mean, *(found.domains[label].mean for label in labels)])
    try:
        save_file({"mean": means}, file, metadata={_KEY: json.dumps(told)})
    except (OSError, SafetensorError) as error:
        raise VectorFileError(f"{file} cannot be written: {error}. Correct the path, or make room") from error


def load_denominators(file: str | Path) -> Denominators:
    """What ``save_denominators`` wrote.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    remedy = f"Make one with: nla-monitor denominator RUN --output FILE; or say '{TRAINING}' for the checkpoint's own"
    try:
        with safe_open(str(file), framework="numpy") as stored:
            told = json.loads((stored.metadata() or {}).get(_KEY, "null"))
            means = stored.get_tensor("mean") if told is not None else None
        return _denominators(told, means)
    except FileNotFoundError as error:
        raise ConfigError(f"nla.denominator: there is no file {str(file)!r}. {remedy}") from error
    except (OSError, SafetensorError, struct.error, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"nla.denominator: {file} holds no denominators ({error}). {remedy}") from error


def _denominators(told: Any, means: Any) -> Denominators:
    if not isinstance(told, dict) or told.get("format") != _FORMAT:
        raise ValueError("no such metadata, or of another version")
    if means.shape[0] != 1 + len(told["domains"]) or not np.isfinite(means).all():
        raise ValueError("its means do not fit its domains")
    rows = [Domain(int(count), np.asarray(mean)) for count, mean in zip(told["vectors"], means, strict=True)]
    if not all(0.0 < row.denominator <= 1.0 + 1e-9 and math.isfinite(row.denominator) for row in rows):
        raise ValueError("a mean of unit vectors must be shorter than 1")
    domains = dict(zip(told["domains"], rows[1:], strict=True))
    return Denominators(told["name"], told["layer"], told["by"], rows[0], domains, tuple(told["source"]))


def denominators_for(setting: str, d_model: int, layer: int | None) -> Denominators | None:
    """What ``nla.denominator`` means for an NLA; None: the checkpoint's own.

    Raises:
        ConfigError: the file is missing, holds something else, or speaks of another width or layer.
    """
    if setting == TRAINING:
        return None
    found = load_denominators(setting)
    found.require_fit(d_model, layer, f"nla.denominator = {setting}")
    return found
