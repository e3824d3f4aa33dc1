"""Would this model have given that answer? A test of whether a local copy is the model that answered.

For each written token the model gives a distribution p. If the answer was drawn from it, the surprise ``-log p(token)``
has the mean H (the entropy of p) and the variance ``V = E[(log p)^2] - H^2``, whatever was written before. So

    z = sum(surprise - H) / sqrt(sum(V))

has mean 0 and variance 1, and is near normal for answers of some length (a sum of martingale differences). Greedy
decoding, temperatures below 1 and truncated sampling only lower it. Other weights, other tokens or another prompt raise
it without bound; so do temperatures above 1, penalties and grammars that force tokens. A high z is therefore a doubt
for a person, never a proof.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

DOUBT: Final = 6.0
"""z above which an answer counts as implausible: one in 10^9 by chance, if z were normal."""
MOST_TOKENS: Final = 64
"""Written tokens that are looked at: enough to tell, and few enough for the logits of a large vocabulary."""


def surprise(logits: Tensor, tokens: Tensor) -> float | None:
    """The z of an answer; None where the model leaves nothing to chance, or says nothing finite.

    Args:
        logits: ``[token, vocabulary]`` for each written token, before any temperature.
        tokens: ``[token]`` int64 ids that were written.
    """
    log_p = torch.log_softmax(logits.float(), dim=-1)
    p = log_p.exp()
    terms = torch.where(p > 0, log_p, 0.0)
    entropy = -(p * terms).sum(dim=-1)
    variance = (p * terms.square()).sum(dim=-1) - entropy.square()
    seen = -log_p.gather(1, tokens.unsqueeze(1)).squeeze(1)
    spread = variance.clamp(min=0).sum().sqrt()
    z = float((seen - entropy).sum() / spread) if float(spread) > 0 else float("nan")
    return None if z != z else z  # noqa: PLR0124 -- NaN; an infinite surprise is a surprise
