"""One forward in flight: what is read of it, and how that leaves the host's thread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nla_monitor.capture import keys, sampling
from nla_monitor.capture.assembly import Job, Origin, Owners
from nla_monitor.capture.budget import Pace
from nla_monitor.capture.generation import Generation
from nla_monitor.capture.packing import Borders
from nla_monitor.capture.policy import RANDOM, Draw, Policy
from nla_monitor.capture.sampling import Choice
from nla_monitor.capture.screens import Screens
from nla_monitor.capture.staging import to_host
from nla_monitor.capture.tap import Signals, Slots
from nla_monitor.guard import Guard
from nla_monitor.records import Phase


@dataclass(eq=False, slots=True)
class Plan:
    """What is read of the forward that is under way in one thread."""

    choice: Choice
    draw: Draw
    slots: Slots
    origin: Origin
    owners: Owners
    shape: torch.Size
    """Of ``input_ids``: ``[batch, seq]``."""
    generated: int | None = None
    tapped: set[int] = field(default_factory=set)
    """Layers gathered so far, by their number among those that are read."""

    def fits(self, hidden: Tensor) -> bool:
        """Whether rows of ``hidden.view(-1, d_model)`` are the tokens of ``input_ids`` in their order.

        Not so with virtual tokens, several streams for each token, or time as the first dimension.
        """
        batch, seq = self.shape
        return hidden.shape[:-1] in (self.shape, (batch * seq,), (1, batch * seq))


def jobs_of(plan: Plan, layers: Sequence[int], screens: Screens, guard: Guard) -> list[Job]:
    """Copies of what was gathered, under way to the host: one job for each layer, of the same positions."""
    choice = plan.choice
    meta = to_host(choice.meta)
    context = None if choice.context is None else to_host(choice.context)
    beside = _event(choice.meta.device)
    jobs = []
    for number in sorted(plan.tapped):
        buffer = plan.slots.buffers[number]
        if buffer is None:
            raise RuntimeError(f"layer {layers[number]} was tapped and has no buffer")
        rows = buffer[: plan.slots.count]
        measured = None
        with guard("capture.screen"):  # a screen that fails costs its numbers, not the samples
            measured = screens.measure(layers[number], rows)
        job = Job(
            vectors=to_host(rows),
            meta=meta,
            context=context,
            event=None,
            origin=plan.origin,
            owners=plan.owners,
            layer=layers[number],
            screens=None if measured is None else to_host(measured),
            draw=plan.draw,
            generated=plan.generated,
        )
        job.event = _after(buffer.device, beside, choice.meta.device)
        if job.event is not None:
            plan.slots.ready[buffer.device] = job.event
        jobs.append(job)
    return jobs


def _event(device: torch.device) -> torch.cuda.Event | None:
    """An event behind all work of the device's current stream; None on the CPU, where work is done when it returns."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch annotates no events
    event.record(torch.cuda.current_stream(device))
    return event


def _after(device: torch.device, beside: torch.cuda.Event | None, where: torch.device) -> torch.cuda.Event | None:
    """An event behind the copies from ``device``, and behind ``beside`` where that is of another device."""
    if device.type != "cuda":
        return beside
    if beside is not None and where != device:
        torch.cuda.current_stream(device).wait_event(beside)
    return _event(device)


def choose_rows(
    pace: Pace, policy: Policy, signals: Signals, origin: Origin, *, ids: Tensor, wanted: Tensor | None, agent: bool
) -> tuple[Draw, Tensor, Choice | None]:
    """How much is taken of a forward over ``ids`` ``[batch, seq]``, which tokens are real, and what is chosen."""
    borders = _borders(signals, agent=agent)
    # How many sequences packed rows hold is known on their device only; each has two tokens at least.
    most = ids.shape[0] if borders is None else max(ids.shape[0], ids.numel() // 2)
    trains = origin.phase is Phase.TRAIN
    draw = pace.train(policy, most, epoch_of(origin)) if trains else pace.other(policy, most)
    real = sampling.real_tokens(ids, signals.mask, policy.pad_id)
    choice = sampling.choose(
        draw,
        ids,
        real,
        usable(signals.labels, ids),
        wanted=wanted,
        agent=agent,
        borders=borders,
        masked=signals.mask is not None and signals.mask.shape == ids.shape,
    )
    return draw, real, choice


def _borders(signals: Signals, *, agent: bool) -> Borders | None:
    """What was said of packed sequences, where it matters.

    A generation with a mask or a cache has one sequence in each row, and its positions restart nowhere.
    """
    return None if agent and (signals.mask is not None or signals.cache is not None) else signals.borders


def epoch_of(origin: Origin) -> int:
    """The epoch that the host named with ``step``, begun ones counted from 0; 0 where it names none."""
    epoch = origin.attributes.get("epoch")
    return int(epoch) if isinstance(epoch, (int, float)) and math.isfinite(epoch) else 0


def settle(pace: Pace, job: Job, samples: int) -> None:
    """Tell the pace what came of a job, on the background thread."""
    pace.settle(job.draw.expected if job.generated is None else 0.0, samples)
    if pace.has_reservoir and job.origin.phase is Phase.TRAIN:
        meta = job.meta
        taken = meta[(meta[:, sampling.VALID] == 1) & (meta[:, sampling.KIND] == RANDOM)]
        scores = keys.score(job.draw.policy.seed, keys.SALT_THIN, taken[:, sampling.HASH], taken[:, sampling.POSITION])
        pace.offer(epoch_of(job.origin), scores.tolist())


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
