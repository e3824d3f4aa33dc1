"""What every source of activations is: told of model calls as they open and close, and giving samples of them.

An agent framework's handler says the same to all of them; which one is asked is the monitor's affair. A tap reads a
model that runs in this process. The others read calls that were answered elsewhere, after the answer: they are given
the tokens of prompt and completion and get the residual stream of these from somewhere (``sources.recorded``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from nla_monitor.capture import CaptureStats, SessionHandle, SessionRegistry
from nla_monitor.capture.screens import Screens
from nla_monitor.config import CaptureConfig, QueueConfig
from nla_monitor.guard import Guard
from nla_monitor.records import ActivationSample, AgentContext, Completion, MessageSpan, Scalar


@dataclass(frozen=True, slots=True)
class SourceContext:
    """What a source is told when it is attached: whose samples, of which layers, and where they go."""

    run_id: str
    layers: tuple[int, ...]
    """K of each layer: the output of decoder block K, ``hidden_states[K + 1]``."""
    width: int
    """``d_model`` that the AV reads."""
    capture: CaptureConfig
    queue: QueueConfig
    sink: Callable[[Sequence[ActivationSample]], None]
    """Takes batches on a background thread; may raise ``StoreUnavailableError`` to be tried again."""
    guard: Guard
    screens: Screens
    rank: int = 0
    on_sampled: Callable[[int], None] | None = None
    on_dropped: Callable[[str, int], None] | None = None
    flush_taps: Callable[[float], bool] | None = None
    """Waits at most so many seconds until the taps of this process know which calls they saw; None without taps."""


@dataclass(eq=False, slots=True)
class Call:
    """One announced model call, as sources that read it afterwards keep it."""

    session: SessionHandle
    """Whose samples: context, trace context and attributes."""
    prompt: tuple[int, ...] | None
    """Token ids ``[token]``; None where the handler cannot tell, or will tell with the answer."""
    tapped: SessionHandle | None = None
    """The same call in the tap of this process, where there is one: what was read there is not read again."""
    completion: Completion | None = None
    closed: bool = False
    closed_at: float = 0.0
    """When it ended, ``time.monotonic()`` seconds."""
    read: bool | None = None
    """Whether its activations were had; None while that is not known."""

    @property
    def context(self) -> AgentContext:
        """Whose call it is."""
        return self.session.context

    def describe(self, outline: Callable[[], Sequence[MessageSpan]]) -> None:
        """See ``SessionHandle.describe``; called once for each place that reads the call."""
        self.session.describe(outline)
        if self.tapped is not None:
            self.tapped.describe(outline)

    def traced(self, find: Callable[[], str | None]) -> None:
        """See ``SessionHandle.traced``."""
        self.session.traced(find)
        if self.tapped is not None:
            self.tapped.traced(find)

    @property
    def forwards(self) -> int | None:
        """Passes that were read of it; None while that is not known."""
        seen = 0 if self.tapped is None else self.tapped.forwards
        return None if self.read is None and not seen else seen + bool(self.read)


Handle: TypeAlias = SessionHandle | Call
"""What ``open_session`` gives and ``close_session`` takes."""


class ActivationSource(Protocol):
    """Where the activations of model calls come from. Safe for use from any thread; sessions never wait."""

    @property
    def tokenizer(self) -> Any:
        """Of the model that is read; None where the source has none."""
        ...

    @property
    def model_name(self) -> str:
        """Of the model that is read, for the run's record."""
        ...

    @property
    def sessions(self) -> SessionRegistry:
        """The calls that are open, and what is remembered of the agents' runs that they belong to."""
        ...

    def start(self, context: SourceContext) -> None:
        """Begin; called once, before any session.

        Raises:
            AttachError: the model or its activations do not fit the AV.
            ConfigError: settings contradict the model.
        """
        ...

    def open_session(
        self,
        context: AgentContext,
        token_ids: Sequence[int] | None,
        *,
        traceparent: str | None = None,
        attributes: Mapping[str, Scalar] | None = None,
        tapped: SessionHandle | None = None,
    ) -> Handle:
        """A model call begins: its prompt's token ids, or None for the forward passes of the calling thread."""
        ...

    def close_session(self, handle: Any, *, completion: Completion | None = None) -> None:
        """The call is over; harmless when repeated."""
        ...

    def burst(self) -> None:
        """An alert fired: look more closely for a while, if ``capture.burst`` is set."""
        ...

    def flush(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until all calls that were closed are read and written."""
        ...

    def close(self, timeout: float) -> bool:
        """Flush, then end; False if something was dropped."""
        ...

    @property
    def stats(self) -> CaptureStats:
        """Counters since the start."""
        ...
