"""The tap: hooks on a model that runs in this process. Samples are taken in its own forward passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nla_monitor.capture import Capture, CaptureStats, SessionHandle, SessionRegistry
from nla_monitor.records import AgentContext, Completion, Scalar
from nla_monitor.sources.base import SourceContext


class TapSource:
    """A model of this process as a source of activations: a ``Capture`` and its sessions.

    Args:
        model: a transformers model (also wrapped by PEFT, DDP, FSDP or torch.compile).
        tokenizer: gives samples their text and triggers their meaning.
        name: of the model, where several are watched.
        sessions: shared with the taps of other models; its own otherwise.
    """

    def __init__(
        self, model: Any, tokenizer: Any = None, *, name: str | None = None, sessions: SessionRegistry | None = None
    ) -> None:
        self.model = model
        self.name = name
        self._tokenizer = tokenizer
        self._sessions = sessions

    @property
    def tokenizer(self) -> Any:
        """See ``ActivationSource``."""
        return self._tokenizer

    @property
    def model_name(self) -> str:
        """See ``ActivationSource``."""
        return str(getattr(getattr(self.model, "config", None), "name_or_path", "") or type(self.model).__name__)

    @property
    def sessions(self) -> SessionRegistry:
        """See ``ActivationSource``."""
        return self.capture.sessions

    def start(self, context: SourceContext) -> None:
        """See ``ActivationSource``: puts the hooks on the model."""
        self.capture = Capture(
            context.capture,
            run_id=context.run_id,
            layer=context.layers,
            sink=context.sink,
            guard=context.guard,
            queue=context.queue,
            tokenizer=self._tokenizer,
            rank=context.rank,
            name=self.name,
            sessions=self._sessions,
            screens=context.screens,
            on_sampled=context.on_sampled,
            on_dropped=context.on_dropped,
        )
        self.capture.attach(self.model)

    def open_session(
        self,
        context: AgentContext,
        token_ids: Sequence[int] | None,
        *,
        traceparent: str | None = None,
        attributes: Mapping[str, Scalar] | None = None,
    ) -> SessionHandle:
        """See ``SessionRegistry.open``."""
        return self.capture.sessions.open(context, token_ids, traceparent=traceparent, attributes=attributes)

    def close_session(self, handle: SessionHandle, *, completion: Completion | None = None) -> None:  # noqa: ARG002 -- an ActivationSource
        """See ``SessionRegistry.close``; the answer went through the hooks token by token."""
        self.capture.sessions.close(handle)

    def burst(self) -> None:
        """See ``ActivationSource``."""
        self.capture.burst()

    def flush(self, timeout: float) -> bool:
        """See ``ActivationSource``."""
        return self.capture.flush(timeout)

    def close(self, timeout: float) -> bool:
        """See ``ActivationSource``: takes the hooks off, too."""
        return self.capture.close(timeout)

    @property
    def stats(self) -> CaptureStats:
        """See ``ActivationSource``."""
        return self.capture.stats
