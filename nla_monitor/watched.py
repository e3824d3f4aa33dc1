"""What a monitor watches: the layers and screens that its config means, its models with taps, its other source."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from nla_monitor.capture import Capture, CaptureStats, SessionRegistry
from nla_monitor.capture.screens import LinearScreen, NormScreen, NoveltyScreen, Screen, Screens
from nla_monitor.config import CaptureConfig, ScreenConfig
from nla_monitor.errors import AttachError, ConfigError, RuleError
from nla_monitor.records import AgentContext, Completion, Phase, Scalar
from nla_monitor.rules.probe import load_probe
from nla_monitor.sources import ActivationSource, TapSource
from nla_monitor.sources.base import Call, Handle

AGENT_RUN_BUDGET = "agent_run_budget"
"""Samples that ``capture.samples_per_agent_run`` did not allow."""


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


_BOTH = (
    "the same model object cannot be tapped and replayed by one monitor: it is read while it generates. Replay is for "
    "calls that are answered elsewhere; give it a copy of its own"
)


class Watched:
    """The models of one monitor by name with their taps, and its other source. What is done to all is done here."""

    def __init__(self) -> None:
        self._taps: dict[str | None, TapSource] = {}
        self._source: ActivationSource | None = None

    def __bool__(self) -> bool:
        return bool(self._taps) or self._source is not None

    @property
    def _captures(self) -> list[Capture]:
        return [tap.capture for tap in self._taps.values()]

    @property
    def _all(self) -> list[TapSource | ActivationSource]:
        return [*self._taps.values(), *(() if self._source is None else (self._source,))]

    @property
    def first(self) -> Capture | None:
        """The capture of the model that was attached first."""
        return next(iter(self._captures), None)

    def holds(self, model: Any, name: str | None) -> bool:
        """Whether this model is watched by this name.

        Raises:
            AttachError: the name is another model's, or the model has another name.
        """
        if name in self._taps and self._taps[name].model is not model:
            kind = type(self._taps[name].model).__name__
            called = "" if name is None else f" named {name!r}"
            raise AttachError(
                f"this monitor is already attached to a {kind}{called}. Give each model a name of its own: "
                "monitor.attach(policy, name='policy'), monitor.attach(reference, name='reference')"
            )
        known = next((key for key, one in self._taps.items() if one.model is model and key != name), name)
        if known != name:
            raise AttachError(
                f"this model is already watched as {known!r}; one model has one name (its samples tell adapters on and "
                "off apart by themselves)"
            )
        if self._source is not None and getattr(self._source, "model", None) is model:
            raise AttachError(_BOTH)
        return name in self._taps

    def add(self, tap: TapSource) -> None:
        """Take a tap that was started."""
        self._taps[tap.name] = tap

    def check_source(self, source: ActivationSource) -> None:
        """Whether this source may be added.

        Raises:
            AttachError: there is one already, or it runs a model that is watched here.
        """
        if self._source is not None:
            raise AttachError(
                f"this monitor has a {type(self._source).__name__} already, and one source reads all calls that are "
                "answered elsewhere. Use a monitor for each source"
            )
        model = getattr(source, "model", None)
        if model is not None and any(tap.model is model for tap in self._taps.values()):
            raise AttachError(_BOTH)

    def add_source(self, source: ActivationSource) -> None:
        """Take a source that was started."""
        self._source = source

    @property
    def source(self) -> ActivationSource | None:
        """What reads calls that are answered elsewhere."""
        return self._source

    def open_session(
        self,
        context: AgentContext,
        token_ids: Sequence[int] | None,
        *,
        traceparent: str | None = None,
        attributes: Mapping[str, Scalar] | None = None,
    ) -> Handle | None:
        """See ``ActivationSource.open_session``; None where nothing is watched."""
        tap, tapped = next(iter(self._taps.values()), None), None
        if tap is not None:
            tapped = tap.open_session(context, token_ids, traceparent=traceparent, attributes=attributes)
        if self._source is None:
            return tapped
        return self._source.open_session(
            context, token_ids, traceparent=traceparent, attributes=attributes, tapped=tapped
        )

    def close_session(self, handle: Handle, *, completion: Completion | None = None) -> None:
        """See ``ActivationSource.close_session``."""
        tapped = handle.tapped if isinstance(handle, Call) else handle
        tap = next(iter(self._taps.values()), None)
        if tap is not None and tapped is not None:
            tap.close_session(tapped)
        if self._source is not None and isinstance(handle, Call):
            self._source.close_session(handle, completion=completion)

    def step(self, step: int, **attributes: Scalar) -> None:
        """See ``Capture.step``."""
        for capture in self._captures:
            capture.step(step, **attributes)

    def burst(self) -> None:
        """See ``Capture.burst``."""
        for source in self._all:
            source.burst()

    def look_closer(self, root_run_ids: Iterable[str], calls: int) -> None:
        """Something was found in these agents' runs: their next ``calls`` model calls are sampled more densely."""
        found = list(root_run_ids)
        if not found:
            return
        for sessions in self._sessions:
            for root_run_id in found:
                sessions.runs.look_closer(root_run_id, calls)
        self.burst()  # makes room; of agents' calls only these keep what is in it

    def backlog(self, waiting: int) -> None:
        """See ``Capture.backlog``."""
        for capture in self._captures:
            capture.backlog(waiting)

    def replaced(self) -> str | None:
        """See ``Capture.replaced``: of the first model that has something to say."""
        return self._said({name: tap.capture.replaced() for name, tap in self._taps.items()})

    def check_fired(self) -> str | None:
        """See ``Capture.check_fired``: of the first model that has something to say."""
        return self._said({name: tap.capture.check_fired() for name, tap in self._taps.items()})

    def _said(self, problems: dict[str | None, str | None]) -> str | None:
        for name, problem in problems.items():
            if problem is not None:
                return problem if name is None else f"model {name!r}: {problem}"
        return None

    @contextmanager
    def phase(self, phase: Phase, **attributes: Scalar) -> Iterator[None]:
        """See ``Capture.phase``."""
        with ExitStack() as stack:
            for capture in self._captures:
                stack.enter_context(capture.phase(phase, **attributes))
            yield

    @contextmanager
    def pause(self) -> Iterator[None]:
        """See ``Capture.pause``."""
        with ExitStack() as stack:
            for capture in self._captures:
                stack.enter_context(capture.pause())
            yield

    def flush(self, timeout: float) -> bool:
        """See ``ActivationSource.flush``; ``timeout`` seconds for all together."""
        deadline = time.monotonic() + timeout
        done = [source.flush(max(0.0, deadline - time.monotonic())) for source in self._all]
        return all(done)

    def flush_taps(self, timeout: float) -> bool:
        """Wait until the taps know which calls they saw; ``timeout`` seconds for all together."""
        deadline = time.monotonic() + timeout
        done = [tap.flush(max(0.0, deadline - time.monotonic())) for tap in self._taps.values()]
        return all(done)

    def close(self, timeout: float) -> bool:
        """See ``ActivationSource.close``; ``timeout`` seconds for all together."""
        deadline = time.monotonic() + timeout
        self.flush_taps(timeout)  # a source that waits for a server must not take their time
        done = [source.close(max(0.0, deadline - time.monotonic())) for source in reversed(self._all)]
        return all(done)

    @property
    def stats(self) -> CaptureStats:
        """Counters of all models and sources together."""
        counted = total([source.stats for source in self._all])
        left_out = sum(sessions.runs.left_out for sessions in self._sessions)
        return replace(counted, skipped={**counted.skipped, AGENT_RUN_BUDGET: left_out}) if left_out else counted

    @property
    def _sessions(self) -> list[SessionRegistry]:
        return list({id(source.sessions): source.sessions for source in self._all}.values())  # taps share theirs


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
