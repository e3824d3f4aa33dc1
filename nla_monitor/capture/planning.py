"""One forward in flight: what is read of it, and how that leaves the host's thread."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nla_monitor.capture.assembly import Job, Origin, Owners
from nla_monitor.capture.generation import Generation
from nla_monitor.capture.sampling import Choice
from nla_monitor.capture.staging import to_host
from nla_monitor.capture.tap import Signals, Slots


@dataclass(eq=False, slots=True)
class Plan:
    """What is read of the forward that is under way in one thread."""

    choice: Choice
    slots: Slots
    origin: Origin
    owners: Owners
    tokens: int
    generated: int | None = None
    tapped: bool = False


def job_of(plan: Plan) -> Job:
    """Copies of what was gathered, under way to the host."""
    slots, choice = plan.slots, plan.choice
    buffer = slots.buffer
    if buffer is None:
        raise RuntimeError("a tapped plan has no buffer")
    vectors, meta = to_host(buffer[: slots.count]), to_host(choice.meta)
    context = None if choice.context is None else to_host(choice.context)
    event = None
    if buffer.device.type == "cuda":
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch annotates no events
        event.record(torch.cuda.current_stream(buffer.device))
        slots.ready = event
    return Job(
        vectors=vectors,
        meta=meta,
        context=context,
        event=event,
        origin=plan.origin,
        owners=plan.owners,
        sequences=len(choice.rows),
        generated=plan.generated,
    )


def usable(labels: Tensor | None, ids: Tensor) -> Tensor | None:
    """Labels that can be laid beside ``ids``, else None."""
    fits = labels is not None and labels.shape == ids.shape and labels.device == ids.device
    return labels if fits else None


def is_recompute() -> bool:
    """Whether this forward is a recomputation inside a backward pass (activation checkpointing of the whole model)."""
    return bool(torch._C._current_graph_task_id() != -1)  # noqa: SLF001 -- the idiom of PyTorch's own ModTracker


def is_continuation(signals: Signals, ids: Tensor, generation: Generation | None) -> bool:
    """Whether earlier tokens of these rows are in a KV cache and not in ``ids``; told from shapes, without waiting."""
    mask = signals.mask
    if mask is not None and mask.dim() == 2:
        return mask.shape[1] > ids.shape[1]
    if signals.cache is None:
        return False
    if generation is not None and generation.cache is not None and generation.cache() is signals.cache:
        return True
    length = getattr(signals.cache, "get_seq_length", int)()
    return length > 0 if isinstance(length, int) else ids.shape[1] == 1
