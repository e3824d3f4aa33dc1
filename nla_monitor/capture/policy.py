"""Policy: what of ``CaptureConfig`` concerns one forward pass, resolved against a model and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nla_monitor.capture import triggers as resolving
from nla_monitor.capture.keys import FULL
from nla_monitor.capture.triggers import TextTriggers, Trigger
from nla_monitor.config import CaptureConfig, Positions
from nla_monitor.errors import ConfigError

CANDIDATE, RANDOM, PROMPT_END, FIRST_TRIGGER = -1, 0, 1, 2
"""Kinds of a sampled position; codes from FIRST_TRIGGER on are indices into ``Policy.triggers``. A CANDIDATE becomes a
sample on the background thread, if a text trigger matches there."""
SPECIAL = 1
"""In the token table only."""

_MOST_NAMES = 253


@dataclass(frozen=True, slots=True)
class Policy:
    """What is sampled of a forward pass."""

    seed: int
    sequences: int
    random: int
    trigger_limit: int
    generated: int
    skip_first: int
    positions: Positions
    context: int
    """Tokens of context kept with a sample; 0: none."""
    triggers: tuple[str, ...]
    tables: dict[torch.device, Tensor]
    """Per device ``[max known id + 2]`` uint8: 0 ordinary, 1 special, ``FIRST_TRIGGER + i`` trigger i; last entry 0."""
    pad_id: int | None
    patterns: tuple[tuple[tuple[int, ...], int], ...] = ()
    """Triggers of several tokens, shortest first, each with its kind."""
    trigger_ends: frozenset[int] = frozenset()
    """Token ids with which a trigger may end: at any other none does."""
    candidates: int = 0
    """Positions per sequence that text triggers are tried on."""
    per_agent_run: int | None = None
    """Samples of one agent's run, at most; None: as many as there are."""
    burst: int = 1
    """Most times that ``times`` will be asked for: buffers are sized for it."""
    on_device: dict[torch.device, tuple[tuple[Tensor, int], ...]] = field(default_factory=dict)
    """``patterns`` where they are matched."""

    @property
    def closer(self) -> int:
        """Times as many generated tokens as else of an agent in whose run something was found: a power of two."""
        return 1 << (self.burst.bit_length() - 1)

    @property
    def per_sequence(self) -> int:
        """Slots that one sequence of a forward may take."""
        return self.random + (self.trigger_limit if self.triggers else 0) + self.candidates + 1

    @property
    def slots(self) -> int:
        """Rows of the tap's buffer."""
        largest = self.times(self.burst)
        return largest.sequences * largest.per_sequence

    @property
    def window(self) -> int:
        """Token ids that are gathered before each sampled one, itself included."""
        return max(self.context, resolving.TEXT_WINDOW) if self.candidates else self.context

    @property
    def history(self) -> int:
        """Newest tokens of a generation that must be remembered."""
        return max([self.window, *(len(tokens) for tokens, _ in self.patterns)])

    def times(self, factor: int) -> Policy:
        """The same policy for a closer look: ``factor`` times the sequences, random positions and triggers.

        Choices are by rank of keyed scores, so what the plain policy takes of a sequence is among what this one takes.
        """
        if factor == 1:
            return self
        return replace(
            self,
            sequences=self.sequences * factor,
            random=self.random * factor,
            trigger_limit=self.trigger_limit * factor,
        )

    def kinds(self, ids: Tensor) -> Tensor:
        """Table entry of each token id, same shape; ids beyond the table are ordinary."""
        table = self.tables.get(ids.device)
        if table is None:
            # Once per device; a pageable copy of a few bytes is stream-ordered and does not wait for the device.
            table = self.tables[ids.device] = self.tables[torch.device("cpu")].to(ids.device)
        return table[ids.clamp(0, table.numel() - 1)].long()

    def patterns_on(self, device: torch.device) -> Iterator[tuple[Tensor, int]]:
        """Triggers of several tokens, ``[tokens]`` int64 each, with their kinds."""
        found = self.on_device.get(device)
        if found is None:
            made = [(torch.tensor(tokens, dtype=torch.int64, device=device), kind) for tokens, kind in self.patterns]
            found = self.on_device[device] = tuple(made)
        yield from found

    def name(self, kind: int) -> str:
        """Name of a kind of position, as it is written in ``ActivationSample.trigger``."""
        if kind >= FIRST_TRIGGER:
            return self.triggers[kind - FIRST_TRIGGER]
        return "prompt_end" if kind == PROMPT_END else "random"


@dataclass(frozen=True, slots=True)
class Draw:
    """How one forward is sampled: what the inclusion probabilities of its samples follow from."""

    policy: Policy
    sequences: int
    """Most sequences that are taken of this forward."""
    sure: int = 0
    """Sequences that would have been taken whatever the step's lot."""
    lot: float = 0.0
    """Chance that it was one more than ``sure``."""
    rate: int = FULL
    """Samples whose thinning score is not below it are not taken."""
    reservoir: int = FULL
    """The same for random samples only."""
    expected: float = 0.0
    """Samples of each layer that were taken from the budget per second for it."""

    @property
    def thins(self) -> bool:
        """Whether any sample may be left out by its thinning score."""
        return min(self.rate, self.reservoir) < FULL

    def probability(self, kind: int, sequences: int, drawn_from: int, *, generated: bool = False) -> float | None:
        """Chance with which a position of this forward became a sample; None: not known.

        The product of the chances of its sequence among the forward's, of the position among those of its kind in the
        sequence, and of the sample to stay below the thresholds. Each depends on what happened before this forward and
        on this forward's sizes alone, not on its scores; so sums of ``value / probability`` over the samples of a kind
        are unbiased for sums over all such positions of the forwards that ``every_n_steps`` lets through (adaptive
        thresholds: Ting 2017; of a reservoir: the historic inverse probability of Cohen 2015, whose threshold is that
        of bottom-k sampling, Cohen & Kaplan 2007, at arrival).

        Args:
            kind: of the sample.
            sequences: how many sequences the forward drew from; 0: not known.
            drawn_from: how many positions of this kind the sequence had.
            generated: it is a generated token: one in ``drawn_from`` is drawn.
        """
        if not sequences:
            return None
        threshold = min(self.rate, self.reservoir) if kind == RANDOM else self.rate
        return self._of_sequence(sequences) * self._of_position(kind, drawn_from, generated) * (threshold / FULL)

    def _of_sequence(self, sequences: int) -> float:
        return (1.0 - self.lot) * share(self.sure, sequences) + self.lot * share(self.sure + 1, sequences)

    def _of_position(self, kind: int, drawn_from: int, generated: bool) -> float:
        policy = self.policy
        if kind == PROMPT_END:
            return 1.0
        if kind >= FIRST_TRIGGER:
            return share(policy.trigger_limit, drawn_from)
        if kind == CANDIDATE:
            return share(policy.candidates, drawn_from)
        return share(1 if generated else policy.random, drawn_from)


def share(taken: int, available: int) -> float:
    """Chance of one of ``available`` when ``taken`` of them are drawn."""
    return 1.0 if available <= taken else taken / available


def whole(policy: Policy, sequences: int | None = None) -> Draw:
    """The draw of a forward that stands for itself: no budget, no reservoir."""
    limit = policy.sequences if sequences is None else min(sequences, policy.sequences)
    return Draw(policy, sequences=limit, sure=limit)


def build_policy(config: CaptureConfig, tokenizer: Any = None, model_config: Any = None) -> Policy:
    """The policy for a model and its tokenizer.

    Raises:
        ConfigError: a trigger can never match with this tokenizer and vocabulary, or nothing could ever be sampled.
    """
    named = config.triggers or config.role_triggers
    if config.tokens_per_sequence == 0 and not (named and config.triggers_per_sequence) and not config.text_triggers:
        raise ConfigError(
            "nothing can ever be sampled: capture.tokens_per_sequence is 0 and there is no trigger. "
            "Set capture.tokens_per_sequence to 1 or more, or name capture.triggers"
        )
    _check_text_triggers(config, tokenizer)
    found = resolving.resolve(config, tokenizer, _vocabulary(tokenizer, model_config))
    names = tuple(dict.fromkeys(trigger.name for trigger in found))
    if len(names) > _MOST_NAMES:
        raise ConfigError(f"capture.triggers names {len(names)} triggers; at most {_MOST_NAMES} are possible")
    used = found if config.triggers_per_sequence else ()
    table = _table(_special_ids(tokenizer, model_config) if config.skip_special_tokens else set(), used, names)
    several = sorted((trigger for trigger in used if len(trigger.tokens) > 1), key=lambda trigger: len(trigger.tokens))
    return Policy(
        seed=config.seed,
        sequences=config.sequences_per_step,
        random=config.tokens_per_sequence,
        trigger_limit=config.triggers_per_sequence,
        generated=config.generated_tokens,
        skip_first=config.skip_first,
        positions=config.positions,
        context=config.context_tokens if config.store_text else 0,
        triggers=names if used else (),
        tables={table.device: table},
        pad_id=_pad_id(tokenizer, model_config),
        patterns=tuple((trigger.tokens, FIRST_TRIGGER + names.index(trigger.name)) for trigger in several),
        trigger_ends=frozenset(trigger.tokens[-1] for trigger in used),
        candidates=config.text_candidates if config.text_triggers else 0,
        per_agent_run=config.samples_per_agent_run,
        burst=config.burst.factor if config.burst is not None else 1,
    )


def _table(special: set[int], triggers: tuple[Trigger, ...], names: tuple[str, ...]) -> Tensor:
    single = {trigger.tokens[0]: trigger.name for trigger in triggers if len(trigger.tokens) == 1}
    table = torch.zeros(max([*special, *single], default=-1) + 2, dtype=torch.uint8, device="cpu")
    table[sorted(special)] = SPECIAL
    for token, name in single.items():
        table[token] = FIRST_TRIGGER + names.index(name)
    return table


def _check_text_triggers(config: CaptureConfig, tokenizer: Any) -> None:
    TextTriggers(config.text_triggers)
    if config.text_triggers and tokenizer is None:
        raise ConfigError(
            "capture.text_triggers match decoded text, and there is no tokenizer to decode with. Give the tokenizer to "
            "attach(), or name token ids under capture.triggers"
        )


def _vocabulary(tokenizer: Any, model_config: Any) -> int | None:
    """Number of token ids that can occur, where it is known."""
    text_config = getattr(model_config, "get_text_config", lambda: model_config)()
    sizes = [getattr(text_config, "vocab_size", None), len(tokenizer.get_vocab()) if tokenizer is not None else None]
    return max((size for size in sizes if isinstance(size, int)), default=None)


def _special_ids(tokenizer: Any, model_config: Any) -> set[int]:
    found = set(getattr(tokenizer, "all_special_ids", None) or ())
    if not found:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(model_config, name, None)
            found.update(value if isinstance(value, (list, tuple)) else [value])
    return {int(token) for token in found if token is not None and int(token) >= 0}


def _pad_id(tokenizer: Any, model_config: Any) -> int | None:
    """Id that marks padding where no mask says so; None when an ordinary token shares it."""
    for source in (tokenizer, model_config):
        pad = getattr(source, "pad_token_id", None)
        if pad is not None:
            eos = getattr(source, "eos_token_id", None)
            shared = pad in (eos if isinstance(eos, (list, tuple)) else [eos])
            return None if shared else int(pad)
    return None
