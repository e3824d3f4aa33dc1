"""Several draws for each vector, from any AV that can resample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nla_monitor.nla.base import Resampler, Verbalization

_SEED_BITS = 63


def sample(
    resampler: Resampler,
    vectors: npt.NDArray[np.float32],
    seeds: Sequence[int],
    *,
    samples: int,
    temperature: float = 1.0,
) -> list[list[Verbalization]]:
    """``samples`` explanations of each of ``[batch, d_model]``, in order; all are drawn as one batch.

    A draw depends on vector, seed, number and temperature alone: neither on the other rows nor on how many draws are
    asked for. Draw 0 is what ``resample`` gives for the same seed.

    Args:
        resampler: the AV.
        vectors: raw activations.
        seeds: one per vector, from 0 to below 2**63.
        samples: draws for each vector, at least 1.
        temperature: of the softmax, above 0.

    Raises:
        ActivationError: a vector is not finite, has zero norm or the wrong width.
        ValueError: fewer than one draw, not one seed for each vector, a seed out of range, or the temperature is not
            above 0.
    """
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1 (greedy reading is verbalize)")
    if len(seeds) != len(vectors):
        raise ValueError(f"{len(vectors)} vectors but {len(seeds)} seeds: give one seed for each vector")
    wrong = [seed for seed in seeds if not 0 <= seed < 2**_SEED_BITS]
    if wrong:
        raise ValueError(f"seed {wrong[0]} is out of range: seeds are from 0 to below 2**{_SEED_BITS}")
    # The number goes above the seed's bits: no two draws of any two seeds share a key.
    keys = [seed | number << _SEED_BITS for seed in seeds for number in range(samples)]
    drawn = resampler.resample(np.repeat(vectors, samples, axis=0), keys, temperature=temperature)
    return [drawn[start : start + samples] for start in range(0, len(drawn), samples)]
