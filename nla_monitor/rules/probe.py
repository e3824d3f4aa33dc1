"""Probes: a direction in activation space, or a trained linear classifier, as a selection of a rule.

A probe is one safetensors file: ``weight`` ``[d_model]`` (or ``[1, d_model]``) and, optionally, ``bias`` (one number);
its metadata says ``kind`` (``direction`` or ``logistic``), ``layer``, ``d_model``, ``model`` and ``normalize``
(``none``, or ``unit``: the vector is divided by its norm first). Its value for an activation v is

- ``direction``: ``w . v + b``, the projection on w (make w a unit vector, as ``fit_probe`` does);
- ``logistic``: ``1 / (1 + exp(-(w . v + b)))``.

Unlike words, a probe reads the raw activation: it costs nothing, and says nothing that a person can read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from nla_monitor.errors import RuleError
from nla_monitor.records import ActivationSample, Vector
from nla_monitor.rules.section import Section

Kind = Literal["direction", "logistic"]
Normalize = Literal["none", "unit"]
Floats = npt.NDArray[np.float64]

BOUNDS: Final = ("gt", "gte", "lt", "lte")
MAX_BYTES: Final = 64 << 20


class ProbeSpec(Section):
    """A probe and the bounds that its value must keep."""

    file: str = Field(min_length=1, description="safetensors file, relative to the rule file")
    gt: float | None = Field(None, allow_inf_nan=False)
    gte: float | None = Field(None, allow_inf_nan=False)
    lt: float | None = Field(None, allow_inf_nan=False)
    lte: float | None = Field(None, allow_inf_nan=False)
    fingerprint: str | None = Field(None, description="written by the loader: content of the file")

    @model_validator(mode="after")
    def _bounded(self) -> ProbeSpec:
        if all(getattr(self, name) is None for name in BOUNDS):
            raise PydanticCustomError("probe", "name a bound: gte, gt, lt or lte")
        return self

    def holds(self, value: float) -> bool:
        """Whether a value keeps all bounds."""
        return (
            (self.gt is None or value > self.gt)
            and (self.gte is None or value >= self.gte)
            and (self.lt is None or value < self.lt)
            and (self.lte is None or value <= self.lte)
        )

    @property
    def upward(self) -> bool:
        """Whether larger values speak for the selection."""
        return self.gt is not None or self.gte is not None


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """A linear probe."""

    weight: Floats
    """``[d_model]``."""
    bias: float = 0.0
    kind: Kind = "direction"
    layer: int | None = None
    """K of the activations that it was made on; None: not known, any layer is taken."""
    model: str | None = None
    normalize: Normalize = "none"

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides its values (not of the file: safetensors orders metadata at random)."""
        about = json.dumps([self.bias, self.kind, self.layer, self.normalize, self.d_model])
        return hashlib.sha256(about.encode() + self.weight.tobytes()).hexdigest()

    @property
    def d_model(self) -> int:
        """Width of the vectors that it reads."""
        return int(self.weight.shape[0])

    def mismatch(self, *, d_model: int, layer: int | None) -> str | None:
        """Why it cannot read vectors of this width and layer; None when it can."""
        if d_model != self.d_model:
            return f"the probe reads vectors of {self.d_model} numbers, the activation has {d_model}"
        if self.layer is not None and layer is not None and layer != self.layer:
            return f"the probe was made on layer {self.layer}, the activation is of layer {layer}"
        return None

    def value(self, vector: Vector) -> float:
        """Its value for one raw activation ``[d_model]``; not a number where the vector is none or has no direction."""
        with np.errstate(all="ignore"):
            raw = np.asarray(vector, dtype=np.float64)
            if self.normalize == "unit":
                raw = raw / np.linalg.norm(raw)
            linear = float(self.weight @ raw) + self.bias
        if self.kind == "direction" or math.isnan(linear):
            return linear
        # The form that cannot overflow on either side.
        return 1 / (1 + math.exp(-linear)) if linear >= 0 else math.exp(linear) / (1 + math.exp(linear))

    def read(self, sample: ActivationSample) -> float | str:
        """Its value for a sample, or why there is none."""
        why = self.mismatch(d_model=sample.d_model, layer=sample.layer)
        if why is not None:
            return why
        value = self.value(sample.vector)
        return "the activation is not finite, or zero" if math.isnan(value) else value


def load_probe(file: str | Path) -> Probe:
    """A probe from its file.

    Raises:
        RuleError: unreadable, no safetensors file, or no probe; names the value and what it should be.
    """
    path = Path(file)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise RuleError(f"the probe cannot be read: {error.strerror or error}", file=str(path)) from error
    if size > MAX_BYTES:
        raise RuleError(f"the probe is larger than {MAX_BYTES >> 20} MiB; a probe is one vector", file=str(path))
    try:
        with safe_open(str(path), framework="numpy") as opened:
            about = dict(opened.metadata() or {})
            tensors = {name: np.asarray(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118 -- no mapping
    except (SafetensorError, OSError, TypeError, ValueError) as error:
        raise RuleError(f"the probe is no safetensors file of plain floats: {error}", file=str(path)) from error
    return _probe(tensors, about, str(path))


def _probe(tensors: Mapping[str, npt.NDArray[Any]], about: Mapping[str, str], file: str) -> Probe:
    if "weight" not in tensors:
        raise RuleError(f"the probe holds no tensor 'weight'; it holds {sorted(tensors)}", file=file)
    weight, bias = tensors["weight"], tensors.get("bias", np.zeros(1))
    if weight.ndim == 2 and weight.shape[0] == 1:
        weight = weight[0]
    if weight.ndim != 1 or weight.size == 0 or bias.size != 1:
        raise RuleError(
            f"the probe's weight must be [d_model] and its bias one number, found {weight.shape} and {bias.shape}",
            file=file,
        )
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise RuleError("the probe holds NaN or Inf", file=file)
    kind = _choice(about, "kind", ("direction", "logistic"), file)
    normalize = _choice(about, "normalize", ("none", "unit"), file)
    stated = _whole(about, "d_model", file)
    if stated is not None and stated != weight.size:
        raise RuleError(f"the probe states d_model {stated} and its weight has {weight.size} numbers", file=file)
    return Probe(
        weight.astype(np.float64),
        float(bias.reshape(-1)[0]),
        cast("Kind", kind),
        _whole(about, "layer", file),
        about.get("model") or None,
        cast("Normalize", normalize),
    )


def _choice(about: Mapping[str, str], name: str, choices: tuple[str, ...], file: str) -> str:
    value = about.get(name, choices[0])
    if value not in choices:
        raise RuleError(f"the probe's {name} is {value!r}; valid: {', '.join(choices)}", file=file)
    return value


def _whole(about: Mapping[str, str], name: str, file: str) -> int | None:
    value = about.get(name)
    if value in {None, "", "None", "null"}:
        return None
    try:
        return int(json.loads(str(value)))
    except (ValueError, TypeError) as error:
        raise RuleError(f"the probe's {name} is {value!r}; it must be a whole number", file=file) from error


def save_probe(probe: Probe, file: str | Path) -> None:
    """Write a probe; the parent folder must exist.

    Raises:
        RuleError: the file cannot be written.
    """
    about = {
        "kind": probe.kind,
        "layer": "" if probe.layer is None else str(probe.layer),
        "d_model": str(probe.d_model),
        "model": probe.model or "",
        "normalize": probe.normalize,
    }
    tensors = {"weight": probe.weight.astype(np.float32), "bias": np.array([probe.bias], dtype=np.float32)}
    try:
        save_file(tensors, str(file), metadata={name: value for name, value in about.items() if value})
    except (SafetensorError, OSError) as error:
        raise RuleError(f"the probe cannot be written: {error}", file=str(file)) from error


def fit_probe(
    vectors: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    kind: Kind = "direction",
    normalize: Normalize = "none",
    layer: int | None = None,
    model: str | None = None,
    ridge: float = 1e-2,
) -> Probe:
    """A probe that tells two groups of activations apart.

    ``direction``: the unit vector from the mean of the negatives to that of the positives (difference in means, Marks &
    Tegmark 2023, arXiv:2310.06824), its bias such that the midpoint has value 0. ``logistic``: logistic regression with
    an L2 penalty on standardised inputs, fitted by L-BFGS.

    Args:
        vectors: raw activations ``[n, d_model]``.
        labels: ``[n]``, true for the positives.
        kind: which probe.
        normalize: ``unit`` divides each vector by its norm first, here and later.
        layer: K of the vectors, kept with the probe.
        model: name of the model they come from, kept with the probe.
        ridge: weight of the penalty (``logistic`` only).

    Raises:
        RuleError: wrong shapes, values that are not finite, or only one kind of label.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    positive = np.asarray(labels).astype(bool)
    if rows.ndim != 2 or positive.shape != rows.shape[:1]:
        raise RuleError(f"a probe is fitted on [n, d] vectors and [n] labels, found {rows.shape} and {positive.shape}")
    if not np.isfinite(rows).all():
        raise RuleError("the vectors hold NaN or Inf")
    if positive.all() or not positive.any():
        raise RuleError(f"a probe needs both kinds of labels, found {int(positive.sum())} of {len(positive)} positive")
    if normalize == "unit":
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        if not norms.all():
            raise RuleError("a zero vector has no direction; leave it out or use normalize='none'")
        rows = rows / norms
    weight, bias = _means(rows, positive) if kind == "direction" else _logistic(rows, positive, ridge)
    return Probe(weight, bias, kind, layer, model, normalize)


def _means(rows: Floats, positive: npt.NDArray[np.bool_]) -> tuple[Floats, float]:
    above, below = rows[positive].mean(axis=0), rows[~positive].mean(axis=0)
    length = float(np.linalg.norm(above - below))
    if length == 0:
        raise RuleError("positives and negatives have the same mean: there is no direction between them")
    weight = (above - below) / length
    return weight, -float(weight @ (above + below)) / 2


def _logistic(rows: Floats, positive: npt.NDArray[np.bool_], ridge: float) -> tuple[Floats, float]:
    import torch  # noqa: PLC0415 -- rules must stay light to import

    mean, spread = rows.mean(axis=0), rows.std(axis=0)
    spread[spread == 0] = 1.0
    inputs = torch.from_numpy((rows - mean) / spread)
    target = torch.from_numpy(positive.astype(np.float64))
    weight = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        error = torch.nn.functional.binary_cross_entropy_with_logits(inputs @ weight + bias, target)
        total: torch.Tensor = error + ridge * weight.square().sum()
        total.backward()  # type: ignore[no-untyped-call]  # torch's own signature
        return total

    solver.step(loss)  # type: ignore[no-untyped-call]  # the same
    plain = weight.detach().numpy() / spread
    return plain, float(bias.detach()) - float(plain @ mean)
