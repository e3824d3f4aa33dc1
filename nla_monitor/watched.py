"""What a monitor watches: which layers and screens its config means, and its models, each with a capture of its own."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from nla_monitor.capture import Capture, CaptureStats
from nla_monitor.capture.screens import LinearScreen, NormScreen, NoveltyScreen, Screen, Screens
from nla_monitor.config import CaptureConfig, ScreenConfig
from nla_monitor.errors import AttachError, ConfigError, RuleError
from nla_monitor.records import Phase, Scalar
from nla_monitor.rules.probe import load_probe


@dataclass(frozen=True, slots=True)
class Layers:
    """The layers that are read of each model."""

    verbalized: int
    """K of the AV: its samples are explained."""
    stored: frozenset[int]
    """Other layers: their samples are screened and stored, and no AV is given them."""

    @property
    def all(self) -> tuple[int, ...]:
        """Every layer, in order."""
        return tuple(sorted({self.verbalized, *self.stored}))


def layers_of(config: CaptureConfig, trained: int | None) -> Layers:
    """The layers that a config means.

    Args:
        config: the section ``capture``.
        trained: K that the AV was trained on, as its sidecar says; None where it says nothing.

    Raises:
        ConfigError: a layer is to be verbalized that the AV was not trained on, or none is named.
    """
    named = config.layers or (() if config.layer is None else (config.layer,))
    verbalized = [layer for layer in dict.fromkeys(named) if layer not in config.screen_only]
    key = "capture.layers" if config.layers else "capture.layer"
    wrong = [layer for layer in verbalized if trained is not None and layer != trained]
    if wrong:
        raise ConfigError(
            f"{key} is {', '.join(map(str, wrong))}, but the AV was trained on the output of block {trained} "
            f"(hidden_states[{(trained or 0) + 1}]); off-layer explanations look fluent and mean nothing. "
            f"Leave {key} out, or name such layers in capture.screen_only: stored and screened, never verbalized"
        )
    if trained is not None and trained in config.screen_only:
        raise ConfigError(f"capture.screen_only holds {trained}, the very layer that the AV reads. Leave it out there")
    if len(verbalized) > 1:
        raise ConfigError(
            f"{key} is {', '.join(map(str, verbalized))}, and the AV's sidecar does not say which of them it reads. "
            "Name one, the K of your NLA, and the others in capture.screen_only"
        )
    layer = verbalized[0] if verbalized else trained
    if layer is None:
        raise ConfigError(
            "neither capture.layer nor the AV's sidecar names a layer; set capture.layer to the K of your NLA"
        )
    return Layers(layer, frozenset(config.screen_only))


def screens_of(config: CaptureConfig) -> Screens:
    """The screens that a config names, new and knowing nothing yet.

    Raises:
        ConfigError: a probe's file cannot be used.
    """
    return Screens([_screen(one, config.seed) for one in config.screens])


def _screen(config: ScreenConfig, seed: int) -> Screen:
    if config.kind == "norm":
        return NormScreen(config.name)
    if config.kind == "novelty":
        return NoveltyScreen(config.name, dims=config.dims, seed=seed)
    try:
        probe = load_probe(config.file or "")
    except RuleError as error:
        raise ConfigError(f"capture.screens: the probe of {config.name!r} cannot be used: {error}") from error
    return LinearScreen(
        config.name,
        probe.weight,
        bias=probe.bias,
        logistic=probe.kind == "logistic",
        unit=probe.normalize == "unit",
        layer=probe.layer,
    )


class Watched:
    """The models of one monitor by name, and their captures. What is done to all of them is done here."""

    def __init__(self) -> None:
        self._captures: dict[str | None, Capture] = {}
        self._models: dict[str | None, Any] = {}

    def __bool__(self) -> bool:
        return bool(self._captures)

    @property
    def first(self) -> Capture | None:
        """The capture of the model that was attached first."""
        return next(iter(self._captures.values()), None)

    def holds(self, model: Any, name: str | None) -> bool:
        """Whether this model is watched by this name.

        Raises:
            AttachError: the name is another model's, or the model has another name.
        """
        if name in self._models and self._models[name] is not model:
            kind = type(self._models[name]).__name__
            called = "" if name is None else f" named {name!r}"
            raise AttachError(
                f"this monitor is already attached to a {kind}{called}. Give each model a name of its own: "
                "monitor.attach(policy, name='policy'), monitor.attach(reference, name='reference')"
            )
        known = next((key for key, one in self._models.items() if one is model and key != name), name)
        if known != name:
            raise AttachError(
                f"this model is already watched as {known!r}; one model has one name (its samples tell adapters on and "
                "off apart by themselves)"
            )
        return name in self._models

    def add(self, model: Any, name: str | None, capture: Capture) -> None:
        """Take a capture that is attached to ``model``."""
        self._captures[name], self._models[name] = capture, model

    def step(self, step: int, **attributes: Scalar) -> None:
        """See ``Capture.step``."""
        for capture in self._captures.values():
            capture.step(step, **attributes)

    def burst(self) -> None:
        """See ``Capture.burst``."""
        for capture in self._captures.values():
            capture.burst()

    def backlog(self, waiting: int) -> None:
        """See ``Capture.backlog``."""
        for capture in self._captures.values():
            capture.backlog(waiting)

    def replaced(self) -> str | None:
        """See ``Capture.replaced``: of the first model that has something to say."""
        return self._said({name: capture.replaced() for name, capture in self._captures.items()})

    def check_fired(self) -> str | None:
        """See ``Capture.check_fired``: of the first model that has something to say."""
        return self._said({name: capture.check_fired() for name, capture in self._captures.items()})

    def _said(self, problems: dict[str | None, str | None]) -> str | None:
        for name, problem in problems.items():
            if problem is not None:
                return problem if name is None else f"model {name!r}: {problem}"
        return None

    @contextmanager
    def phase(self, phase: Phase, **attributes: Scalar) -> Iterator[None]:
        """See ``Capture.phase``."""
        with ExitStack() as stack:
            for capture in self._captures.values():
                stack.enter_context(capture.phase(phase, **attributes))
            yield

    @contextmanager
    def pause(self) -> Iterator[None]:
        """See ``Capture.pause``."""
        with ExitStack() as stack:
            for capture in self._captures.values():
                stack.enter_context(capture.pause())
            yield

    def flush(self, timeout: float) -> bool:
        """See ``Capture.flush``; ``timeout`` seconds for all together."""
        deadline = time.monotonic() + timeout
        done = [capture.flush(max(0.0, deadline - time.monotonic())) for capture in self._captures.values()]
        return all(done)

    def close(self, timeout: float) -> bool:
        """See ``Capture.close``; ``timeout`` seconds for all together."""
        deadline = time.monotonic() + timeout
        done = [capture.close(max(0.0, deadline - time.monotonic())) for capture in self._captures.values()]
        return all(done)

    @property
    def stats(self) -> CaptureStats:
        """Counters of all models together."""
        return total([capture.stats for capture in self._captures.values()])


def total(stats: Sequence[CaptureStats]) -> CaptureStats:
    """The sums of several captures that share their sessions."""
    dropped: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for one in stats:
        dropped.update(one.dropped)
        skipped.update(one.skipped)
    return CaptureStats(
        forwards=sum(one.forwards for one in stats),
        sampled=sum(one.sampled for one in stats),
        written=sum(one.written for one in stats),
        dropped=dict(dropped),
        skipped=dict(skipped),
        unmatched_sessions=max((one.unmatched_sessions for one in stats), default=0),
        host_seconds=sum(one.host_seconds for one in stats),
        retries=sum(one.retries for one in stats),
    )
