"""One forward in flight: what is read of it, and how that leaves the host's thread."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nla_monitor.capture import keys, sampling
from nla_monitor.capture.assembly import Job, Origin, Owners
from nla_monitor.capture.budget import Pace
from nla_monitor.capture.generation import Generation
from nla_monitor.capture.held import MOST_BYTES, MOST_TOKENS, HeldJob, HeldPool, HeldRows, Inputs
from nla_monitor.capture.packing import Borders
from nla_monitor.capture.policy import RANDOM, Draw, Policy
from nla_monitor.capture.sampling import Choice
from nla_monitor.capture.screens import Screens
from nla_monitor.capture.staging import StagedJob, to_host
from nla_monitor.capture.tap import Signals, Slots
from nla_monitor.guard import Guard
from nla_monitor.records import Phase, Scalar


@dataclass(eq=False, slots=True)
class Forward:
    """The forward that is under way in one thread."""

    draw: Draw
    origin: Origin
    shape: torch.Size
    """Of ``input_ids``: ``[batch, seq]``."""
    tapped: set[int] = field(default_factory=set, init=False)
    """Layers gathered so far, by their number among those that are read."""

    def fits(self, hidden: Tensor) -> bool:
        """Whether rows of ``hidden.view(-1, d_model)`` are the tokens of ``input_ids`` in their order.

        Not so with virtual tokens, several streams for each token, or time as the first dimension.
        """
        batch, seq = self.shape
        return hidden.shape[:-1] in (self.shape, (batch * seq,), (1, batch * seq))


@dataclass(eq=False, slots=True)
class Plan(Forward):
    """What is read of it."""

    choice: Choice
    slots: Slots
    owners: Owners
    generated: int | None = None

    def jobs(self, layers: Sequence[int], screens: Screens, guard: Guard) -> Sequence[StagedJob]:
        """What was gathered, on its way to the host."""
        return jobs_of(self, layers, screens, guard)

    def release(self) -> None:
        """It is over; copies are under way or done."""
        self.slots.give_back()


@dataclass(eq=False, slots=True)
class HeldPlan(Forward):
    """What is copied of it, to be chosen from later."""

    inputs: Inputs
    slots: HeldRows
    pad_id: int | None
    handed: bool = field(default=False, init=False)

    def jobs(self, layers: Sequence[int], screens: Screens, guard: Guard) -> Sequence[StagedJob]:  # noqa: ARG002 -- as ``Plan``
        """All that was copied."""
        self.handed = True
        numbers = tuple(sorted(self.tapped))
        return [HeldJob(self.slots, self.inputs, self.draw, self.origin, self.pad_id, numbers)]

    def release(self) -> None:
        """It is over; what was handed over is still read."""
        if not self.handed:
            self.slots.give_back()


class HostThread(threading.local):
    """What one host thread is doing."""

    level: int | None = None
    """Level of the hook that opened the current forward."""
    plan: Plan | HeldPlan | None = None
    generation: Generation | None = None
    phase: Phase | None = None
    attributes: Mapping[str, Scalar] = {}
    paused: int = 0


def jobs_of(plan: Plan, layers: Sequence[int], screens: Screens, guard: Guard) -> list[Job]:
    """Copies of what was gathered, under way to the host: one job for each layer, of the same positions."""
    choice = plan.choice
    meta, context = choice.meta, choice.context
    if meta.device.type != "cpu":  # on a CPU nobody else has them
        meta = to_host(meta)
        context = None if context is None else to_host(context)
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


def draw_of(
    pace: Pace, policy: Policy, signals: Signals, origin: Origin, *, ids: Tensor, agent: bool
) -> tuple[Draw, Borders | None]:
    """How much is taken of a forward over ``ids`` ``[batch, seq]``, and what was said of packed sequences."""
    borders = _borders(signals, agent=agent)
    # How many sequences packed rows hold is known on their device only; each has two tokens at least.
    most = ids.shape[0] if borders is None else max(ids.shape[0], ids.numel() // 2)
    trains = origin.phase is Phase.TRAIN
    return pace.train(policy, most, epoch_of(origin)) if trains else pace.other(policy, most), borders


def choose_rows(
    draw: Draw, signals: Signals, borders: Borders | None, *, ids: Tensor, wanted: Tensor | None, agent: bool
) -> tuple[Tensor, Choice | None]:
    """Which tokens of ``ids`` ``[batch, seq]`` are real, and what is chosen."""
    real = sampling.real_tokens(ids, signals.mask, draw.policy.pad_id)
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
    return real, choice


def hold(
    pool: HeldPool,
    draw: Draw,
    signals: Signals,
    borders: Borders | None,
    origin: Origin,
    *,
    ids: Tensor,
    width: int | None,
) -> HeldPlan | None:
    """The forward is copied and chosen from later; None where it must be chosen from now.

    Args:
        pool: of buffers.
        draw: how much is taken.
        signals: what the forward was called with.
        borders: what was said of packed sequences.
        origin: where it comes from.
        ids: ``[batch, seq]`` of a residual stream on the CPU.
        width: ``d_model``; None: not known.
    """
    tokens = ids.numel()
    small = tokens <= MOST_TOKENS and width is not None and 4 * tokens * width <= MOST_BYTES
    if not small or not tokens or draw.sequences <= 0 or ids.device.type != "cpu":
        return None
    mask = signals.mask if signals.mask is not None and signals.mask.shape == ids.shape else None
    inputs = Inputs.copied(ids, mask, usable(signals.labels, ids), borders)
    rows = pool.take()
    return None if rows is None else HeldPlan(draw, origin, ids.shape, inputs, rows, draw.policy.pad_id)


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
