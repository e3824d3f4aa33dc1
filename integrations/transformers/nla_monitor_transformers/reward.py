"""``NLAMonitorReward``: joins TRL's rollouts and rewards to what the monitor reads of them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Final, TypeAlias

from torch import nn

from nla_monitor.annotations import sequence_id
from nla_monitor.errors import ConfigError
from nla_monitor_transformers.callback import NLAMonitorCallback

Reward: TypeAlias = Callable[..., Any]
"""TRL's: keywords in; a number or None for each completion, or a coroutine that gives them."""

_TOTALS: Final = ("nla/alerts_firing", "nla/read", "nla/lag_steps")
"""Figures that are logged with the rollouts, beside the matches of all rules."""


class NLAMonitorReward:
    """A reward function of TRL's ``GRPOTrainer`` and ``RLOOTrainer`` that rewards nothing.

    ::

        watch = NLAMonitorCallback("nla-monitor.yaml")
        monitored = NLAMonitorReward(watch)
        GRPOTrainer(
            reward_funcs=[monitored.watch(accuracy), monitored],
            args=GRPOConfig(reward_weights=[1.0, 0.0], ...), callbacks=[watch], ...
        )

    It gives 0.0 for every completion, so that rewards and advantages stay what they are. Into the completions table
    (``log_completions``) it writes ``nla_sequence``, the id under which the samples of a completion are stored,
    ``nla_tokens``, how many tokens it has, and the run's figures by then: ``nla_alerts_firing`` and ``nla_matches``.
    ``log_metric`` gets the same figures. (A rollout is read by the update that follows it, so that nothing is known of
    it yet.) What a watched function gave goes to the samples, as ``meta.reward``.

    Args:
        callback: the callback of the same trainer.
        template: keywords that the trainer gives to ``apply_chat_template`` (``tools``, ``chat_template``, those of
            ``chat_template_kwargs``): the ids of conversational prompts depend on them.
    """

    __name__ = "nla_monitor"
    """Under which TRL logs the (zero) reward."""

    def __init__(self, callback: NLAMonitorCallback, **template: Any) -> None:
        self._callback = callback
        self._template = template
        self._source: Any = None
        self._tokenizer: Any = None

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **kwargs: Any
    ) -> list[float]:
        """Zeros, one a completion; the signature is TRL's."""
        monitor = self._callback.monitor
        with monitor.guard("reward.log"):
            if "log_extra" in kwargs and "log_metric" in kwargs:
                self._report(
                    self._sequences(prompts, completion_ids), completion_ids, kwargs["log_extra"], kwargs["log_metric"]
                )
        return [0.0] * len(completions)

    def watch(self, function: Reward, key: str = "reward") -> Reward:
        """The same reward function; what it gives becomes ``meta.<key>`` of the samples of each completion.

        Raises:
            ConfigError: it is a reward model, which TRL calls with tokens of another tokenizer.
        """
        if isinstance(function, (str, nn.Module)) or not callable(function):
            raise ConfigError(
                f"watch() takes a reward function, not a {type(function).__name__}: give the trainer a reward model as "
                "it is (its rewards are then not joined to samples), or call it in a function of your own"
            )
        if _is_async(function):

            @wraps(function)
            async def awaited(**kwargs: Any) -> Sequence[float | None]:
                rewards: Sequence[float | None] = await function(**kwargs)
                self._remember(kwargs, rewards, key)
                return rewards

            return awaited

        @wraps(function)
        def watched(**kwargs: Any) -> Sequence[float | None]:
            rewards: Sequence[float | None] = function(**kwargs)
            self._remember(kwargs, rewards, key)
            return rewards

        return watched

    def _remember(self, kwargs: Mapping[str, Any], rewards: Sequence[float | None], key: str) -> None:
        monitor = self._callback.monitor
        with monitor.guard("reward.watch"):
            sequences = self._sequences(kwargs["prompts"], kwargs["completion_ids"])
            for sequence, reward in zip(sequences, rewards, strict=True):
                if reward is not None:
                    monitor.annotations.add(sequence, {key: float(reward)})

    def _report(
        self,
        sequences: list[str],
        ids: Sequence[Sequence[int]],
        log_extra: Callable[[str, list[Any]], None],
        log_metric: Callable[[str, float], None],
    ) -> None:
        scalars = self._callback.monitor.scalars()
        matches = sum(value for name, value in scalars.items() if name.startswith("nla/matches/"))
        log_extra("nla_sequence", sequences)
        log_extra("nla_tokens", [len(row) for row in ids])
        log_extra("nla_alerts_firing", [int(scalars.get("nla/alerts_firing", 0))] * len(sequences))
        log_extra("nla_matches", [int(matches)] * len(sequences))
        log_metric("nla/matches", matches)
        for name in _TOTALS:
            if name in scalars:
                log_metric(name, scalars[name])

    def _sequences(self, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]]) -> list[str]:
        prompt_ids = self._prompt_ids(list(prompts))
        return [sequence_id([*prompt, *ids]) for prompt, ids in zip(prompt_ids, completion_ids, strict=True)]

    def _prompt_ids(self, prompts: list[Any]) -> Sequence[Sequence[int]]:
        """As TRL makes them; with a tokenizer of our own, whose settings nobody else depends on."""
        source = self._callback.processing_class
        if self._source is not source:
            self._source, self._tokenizer = source, copy.deepcopy(source)
        if isinstance(prompts[0], str):
            found = self._tokenizer(text=prompts)["input_ids"]
        else:
            found = self._tokenizer.apply_chat_template(
                conversation=prompts, add_generation_prompt=True, tokenize=True, return_dict=True, **self._template
            )["input_ids"]
        return list(found)


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
