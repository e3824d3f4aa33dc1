"""What every server engine needs of its wire format: a request's body, and what an answer says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

SEED_MASK = 2**63 - 1
"""Servers take seeds of 63 bits; longer ones are cut to them."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request is to be continued."""

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 0.0
    """0: greedy."""
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What a server wrote."""

    tokens: tuple[int, ...] | None
    """Ids, the stop token included; None where the server names none."""
    text: str
    """The same in words, special tokens included."""
    count: int
    """Generated tokens."""
    prompt_tokens: int | None
    """Length of the prompt as the server saw it."""


class AnswerError(ValueError):
    """An answer has another form than documented."""


class Wire(Protocol):
    """One server's language. Bodies are made for one prompt."""

    model: str | None
    """Name under which the server knows the AV, where it goes by names."""

    @property
    def name(self) -> str:
        """As in ``nla.engine``."""
        ...

    @property
    def path(self) -> str:
        """Where requests are posted."""
        ...

    @property
    def models_paths(self) -> tuple[str, ...]:
        """Where a server says what it serves, the newest first."""
        ...

    def body(self, row: torch.Tensor | None, sampling: Sampling) -> bytes:
        """The request for a row ``[d_model]`` in the prompt; for None, the prompt as it is, as embeddings."""
        ...

    def ids_body(self, ids: tuple[int, ...], sampling: Sampling) -> bytes:
        """The request for a prompt given as token ids."""
        ...

    def completion(self, answer: Any) -> Completion:
        """What an answer says.

        Raises:
            AnswerError: it has another form.
        """
        ...

    def simpler(self) -> bool:
        """After a refusal: go over to a plainer form that older servers know; False when there is none left."""
        ...


def decoding(sampling: Sampling) -> dict[str, object]:
    """What both servers call alike: every default that could change a text is said, nothing is cut from an answer."""
    return {
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": list(sampling.stop_ids),
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }


def integers(value: Any) -> tuple[int, ...] | None:
    """A list of token ids, or None where there is none."""
    if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
        return None
    return tuple(value)
