"""Screens: what can be said of a raw activation without a verbalizer, measured where the activation is.

Each screen gives one number per sampled vector: a linear probe, the norm, or the novelty of the direction. All are
computed on the gathered rows ``[n, d_model]`` on their own device, in a few matrix products, without waiting for it;
the numbers travel to the host with the vectors. They choose nothing and drop nothing: they say what is read first.

Novelty is the Mahalanobis distance in a random projection. With v a vector, u = v / |v| (the norm is a screen of its
own, and the verbalizer never sees it), R a seeded Gaussian matrix ``[d_model, k]`` with entries of variance 1/k
(Johnson-Lindenstrauss) and z = u R:

    novelty(v) = sqrt((z - m)^T C^-1 (z - m) / k),    C = (1 - r) S + r (tr S / k) I

m and S are mean and covariance of what this run has shown so far; r is the oracle approximating shrinkage of Chen,
Wiesel, Eldar and Hero (IEEE Trans. Signal Processing 58(10), 2010, eq. 23). The distance is that of Lee et al. 2018
(arXiv:1807.03888), without classes. A typical vector has novelty near 1. Its first value comes when ``4 k`` vectors
have been seen; it is fitted anew whenever that number has doubled, on the background thread.

The priority of a sample is the greatest of its screens' ranks among recent values: 0.99 is rarer than 99 in 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nla_monitor.errors import AttachError

Floats = npt.NDArray[Any]

RECENT = 2048
"""Values that a rank is taken among."""
_FIRST_FIT = 4
"""Vectors per dimension of the projection before the first fit."""


class Screen(Protocol):
    """One number per vector."""

    @property
    def name(self) -> str:
        """As in ``ActivationSample.screens``."""
        ...

    @property
    def two_sided(self) -> bool:
        """Whether small values are as unusual as large ones."""
        ...

    def measure(self, layer: int, rows: Tensor, norms: Tensor) -> Tensor:
        """Values ``[n]`` of float32 ``rows`` ``[n, d_model]`` with ``norms`` ``[n, 1]``; NaN where there is none."""
        ...

    def learn(self, layer: int, vectors: Floats) -> None:
        """Take note of host copies ``[n, d_model]`` (on the background thread)."""
        ...

    def refusal(self, layers: Sequence[int], width: int | None) -> str | None:
        """Why it cannot look at these layers of a model of this ``d_model``; None when it can."""
        ...


@dataclass(frozen=True, slots=True)
class NormScreen:
    """The L2 norm."""

    name: str
    two_sided: bool = True

    def measure(self, layer: int, rows: Tensor, norms: Tensor) -> Tensor:  # noqa: ARG002 -- a Screen
        """See ``Screen``."""
        return norms[:, 0]

    def learn(self, layer: int, vectors: Floats) -> None:
        """Nothing to learn."""

    def refusal(self, layers: Sequence[int], width: int | None) -> str | None:  # noqa: ARG002 -- a Screen
        """Any vector has a norm."""
        return None


@dataclass(eq=False, slots=True)
class LinearScreen:
    """A linear probe: ``w . v + b``, through the logistic function where it is a classifier."""

    name: str
    weight: Floats
    """``[d_model]``."""
    bias: float = 0.0
    logistic: bool = False
    unit: bool = False
    """The vector is divided by its norm first."""
    layer: int | None = None
    """K of the activations that it was made on; others are not measured. None: all are."""
    two_sided: bool = False
    _weights: dict[torch.device, Tensor] = field(default_factory=dict)

    def measure(self, layer: int, rows: Tensor, norms: Tensor) -> Tensor:
        """See ``Screen``."""
        if self.layer is not None and layer != self.layer:
            return torch.full_like(norms[:, 0], torch.nan)
        weight = self._weights.get(rows.device)
        if weight is None:
            weight = self._weights[rows.device] = _upload(torch.from_numpy(self.weight).float(), rows.device)
        value = rows @ weight
        if self.unit:
            value = value / norms[:, 0]
        value = value + self.bias
        return value.sigmoid() if self.logistic else value

    def learn(self, layer: int, vectors: Floats) -> None:
        """Nothing to learn."""

    def refusal(self, layers: Sequence[int], width: int | None) -> str | None:
        """See ``Screen``."""
        if self.layer is not None and self.layer not in layers:
            return f"its probe was made on layer {self.layer}, and capture reads {', '.join(map(str, layers))}"
        if width is not None and width != len(self.weight):
            return f"its probe reads vectors of {len(self.weight)} numbers, the model's d_model is {width}"
        return None


@dataclass(frozen=True, slots=True)
class _Fit:
    """A fitted distance: ``|u A - c|``, with the projection and the whitening in one matrix."""

    matrix: Tensor
    """A, ``[d_model, k]`` float32 on the host."""
    offset: Tensor
    """c, ``[k]``."""


class _Moments:
    """Running mean and covariance of projected directions of one layer (float64, on the host)."""

    def __init__(self, width: int, dims: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.projection = torch.randn(width, dims, generator=generator, dtype=torch.float64) / dims**0.5
        self.count = 0
        self.next_fit = _FIRST_FIT * dims
        self._sum = torch.zeros(dims, dtype=torch.float64)
        self._square = torch.zeros(dims, dims, dtype=torch.float64)

    def add(self, vectors: Floats) -> None:
        rows = torch.from_numpy(np.asarray(vectors, dtype=np.float64))
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        rows = (rows / norms)[norms[:, 0] > 0] @ self.projection
        self.count += rows.shape[0]
        self._sum += rows.sum(dim=0)
        self._square += rows.T @ rows

    def fit(self) -> _Fit:
        mean = self._sum / self.count
        covariance = self._square / self.count - torch.outer(mean, mean)
        # Whitening by the Cholesky factor: C = L L^T, so that |(z - m) L^-T|^2 is the distance squared.
        dims = len(mean)
        factor = torch.linalg.cholesky(shrunk(covariance, self.count))
        whitening = torch.linalg.inv(factor).T / dims**0.5
        return _Fit((self.projection @ whitening).float(), (mean @ whitening).float())


def shrunk(covariance: Tensor, count: int) -> Tensor:
    """A covariance ``[k, k]`` of ``count`` samples, shrunk towards a multiple of the identity (OAS, see the module)."""
    dims = covariance.shape[0]
    trace, square = covariance.trace(), covariance.square().sum()
    spread = (count + 1 - 2 / dims) * (square - trace**2 / dims)
    share = ((1 - 2 / dims) * square + trace**2) / spread if spread > 0 else torch.ones(())
    weight = share.clamp(0.0, 1.0)
    # A trace of 0 (all vectors the same) would leave nothing to divide by.
    level = (trace / dims).clamp_min(torch.finfo(torch.float32).tiny)
    return (1 - weight) * covariance + (weight.clamp_min(1e-6) * level) * torch.eye(dims, dtype=covariance.dtype)


class NoveltyScreen:
    """How far a direction is from those that this run has shown (see the module)."""

    two_sided = False

    def __init__(self, name: str, *, dims: int = 32, seed: int = 0) -> None:
        self.name = name
        self._dims = dims
        self._seed = seed
        self._moments: dict[int, _Moments] = {}
        self._fits: dict[int, _Fit] = {}
        self._placed: dict[tuple[int, torch.device], tuple[_Fit, Tensor, Tensor]] = {}

    def measure(self, layer: int, rows: Tensor, norms: Tensor) -> Tensor:
        """See ``Screen``; NaN until there is a fit."""
        fit = self._fits.get(layer)
        if fit is None:
            return torch.full_like(norms[:, 0], torch.nan)
        placed = self._placed.get((layer, rows.device))
        if placed is None or placed[0] is not fit:
            matrix, offset = _upload(fit.matrix, rows.device), _upload(fit.offset, rows.device)
            placed = self._placed[layer, rows.device] = (fit, matrix, offset)
        distance: Tensor = torch.linalg.vector_norm((rows / norms) @ placed[1] - placed[2], dim=1)
        return distance

    def learn(self, layer: int, vectors: Floats) -> None:
        """See ``Screen``."""
        moments = self._moments.get(layer)
        if moments is None:
            moments = self._moments[layer] = _Moments(vectors.shape[1], self._dims, self._seed)
        moments.add(vectors)
        if moments.count >= moments.next_fit:
            self._fits[layer] = moments.fit()  # one reference: a host thread sees the old fit or the new one
            moments.next_fit = 2 * moments.count

    def refusal(self, layers: Sequence[int], width: int | None) -> str | None:  # noqa: ARG002 -- a Screen
        """See ``Screen``."""
        if width is not None and width < self._dims:
            return (
                f"it projects to {self._dims} dimensions, the model's d_model is {width}; set dims to {width} or less"
            )
        return None


def _upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device``; from pinned memory, since a copy from pageable memory makes the host wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class _Recent:
    """The newest ``RECENT`` values of one screen at one layer."""

    def __init__(self) -> None:
        self._values = np.full(RECENT, np.nan)
        self._count = 0

    def ranks(self, values: Floats) -> Floats:
        """Share of recent values, these included, below each (half of those that equal it)."""
        finite = values[np.isfinite(values)]
        places = (self._count + np.arange(len(finite))) % RECENT
        self._values[places] = finite
        self._count += len(finite)
        known = np.sort(self._values[: min(self._count, RECENT)])
        low, high = (np.searchsorted(known, values, side=side) for side in ("left", "right"))
        return (low + high) / (2 * max(1, len(known)))


class Screens:
    """The screens of one capture.

    Args:
        screens: in the order of their columns.

    ``measure`` runs in host threads, ``judge`` on the background thread.
    """

    def __init__(self, screens: Sequence[Screen]) -> None:
        self._screens = tuple(screens)
        self._recent: dict[tuple[int, int], _Recent] = {}

    def __bool__(self) -> bool:
        return bool(self._screens)

    def check(self, layers: Sequence[int], width: int | None) -> None:
        """Refuse what can never be measured.

        Raises:
            AttachError: a screen cannot look at these layers, or at vectors of this width (None: not known).
        """
        for screen in self._screens:
            why = screen.refusal(layers, width)
            if why is not None:
                raise AttachError(f"screen {screen.name!r}: {why}")

    def measure(self, layer: int, rows: Tensor) -> Tensor | None:
        """Values ``[n, screens]`` float32 of ``rows`` ``[n, d_model]``, on their device; None without screens."""
        if not self._screens:
            return None
        # The host's autocast reaches the hook: products in half precision would not be the documented numbers.
        with torch.autocast(rows.device.type, enabled=False):
            rows = rows.float()
            norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            return torch.stack([screen.measure(layer, rows, norms) for screen in self._screens], dim=1)

    def judge(self, layer: int, values: Floats, vectors: Floats) -> list[tuple[float, dict[str, float]]]:
        """Priority and named values of each vector, from host copies ``[n, screens]`` and ``[n, d_model]``."""
        priorities = np.zeros(len(values))
        for column, screen in enumerate(self._screens):
            recent = self._recent.setdefault((layer, column), _Recent())
            measured = values[:, column]
            ranks = recent.ranks(measured)
            ranks = abs(2 * ranks - 1) if screen.two_sided else ranks
            priorities = np.maximum(priorities, np.where(np.isfinite(measured), ranks, 0.0))
            screen.learn(layer, vectors)
        names = [screen.name for screen in self._screens]
        found = []
        for priority, row in zip(priorities.tolist(), values.tolist(), strict=True):
            found.append(
                (priority, {name: value for name, value in zip(names, row, strict=True) if np.isfinite(value)})
            )
        return found
