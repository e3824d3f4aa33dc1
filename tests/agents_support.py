"""What the agent integrations' tests share: a real capture over a tiny model, whose samples end in a list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch

from nla_monitor.capture import Capture, SessionHandle
from nla_monitor.config import CaptureConfig, QueueConfig
from nla_monitor.guard import Guard
from nla_monitor.records import ActivationSample, AgentContext, Alert, Completion, Scalar
from nla_monitor.transcripts import Message
from tests.langchain_support import LAYER

TOKENS = 6


class Spoken:
    """What integrations tell of a call's visible side, by run id: prompt and answer."""

    enabled = True

    def __init__(self) -> None:
        self.prompts: dict[str, list[Message]] = {}
        self.answers: dict[str, Message | None] = {}

    def prompt(self, context: AgentContext, messages: Callable[[], Sequence[Message]]) -> None:
        assert context.agent_run_id not in self.prompts
        self.prompts[context.agent_run_id] = list(messages())

    def answer(self, agent_run_id: str, message: Callable[[], Message | None]) -> None:
        assert agent_run_id in self.prompts
        self.answers[agent_run_id] = message()


class CaptureMonitor:
    """The part of ``Monitor`` that span-driven integrations use."""

    def __init__(self, model: Any, tokenizer: Any = None, *, layer: int = LAYER, **config: Any) -> None:
        self.guard = Guard()
        self.tokenizer = tokenizer
        self.samples: list[ActivationSample] = []
        self.source: Any = None
        self.transcripts: Spoken | None = None
        self.completions: list[Completion | None] = []
        self.listeners: list[Callable[[Alert], None]] = []
        self.on_samples: Callable[[Sequence[ActivationSample]], None] | None = None
        settings = {"tokens_per_sequence": 3, "generated_tokens": 4, "skip_special_tokens": False, **config}
        self.capture = Capture(
            CaptureConfig.model_validate(settings),
            run_id="run",
            layer=layer,
            sink=self._take,
            guard=self.guard,
            queue=QueueConfig(write_interval_seconds=0.01),
            tokenizer=tokenizer,
        )
        self.capture.attach(model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.capture.close(10)

    def _take(self, samples: Sequence[ActivationSample]) -> None:
        self.samples.extend(samples)
        if self.on_samples is not None:
            self.on_samples(samples)

    def on_alert(self, listener: Callable[[Alert], None]) -> None:
        self.listeners.append(listener)

    def open_session(
        self,
        context: AgentContext,
        token_ids: Sequence[int] | None,
        *,
        traceparent: str | None = None,
        attributes: Mapping[str, Scalar] | None = None,
    ) -> SessionHandle:
        return self.capture.sessions.open(context, token_ids, traceparent=traceparent, attributes=attributes)

    def close_session(self, handle: SessionHandle, *, completion: Completion | None = None) -> None:
        self.completions.append(completion)
        self.capture.sessions.close(handle)

    def runs(self) -> dict[str, list[ActivationSample]]:
        """Samples by agent run; those of no agent under an empty name."""
        assert self.capture.flush(30)
        assert self.guard.faults == {}
        found: dict[str, list[ActivationSample]] = {}
        for sample in self.samples:
            found.setdefault(sample.agent.agent_run_id if sample.agent else "", []).append(sample)
        return found


def generate(model: Any, ids: Sequence[int], tokens: int = TOKENS) -> list[int]:
    """What the model writes greedily behind a prompt ``[token]``."""
    prompt = torch.tensor([list(ids)])
    with torch.no_grad():
        out = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
    return list(out[0, len(ids) :].tolist())


def key(sample: ActivationSample) -> tuple[Any, ...]:
    """What a sample is, whoever drove the model."""
    agent = sample.agent
    return sample.sequence_id, sample.position, sample.token_id, agent.generated if agent else None, sample.trigger


def vectors(samples: Sequence[ActivationSample]) -> dict[tuple[Any, ...], bytes]:
    """Vectors of samples, bit for bit, by what each sample is."""
    return {key(sample): sample.vector.tobytes() for sample in samples}
