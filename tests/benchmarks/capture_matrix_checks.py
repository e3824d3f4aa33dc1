"""One case of the capture matrix: run plain and watched, and compare."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from nla_monitor.capture import Capture
from nla_monitor.capture.keys import hash_of, hex_of
from nla_monitor.config import CaptureConfig, QueueConfig
from nla_monitor.guard import Guard
from nla_monitor.records import ActivationSample
from tests.benchmarks.capture_matrix_data import Case
from tests.benchmarks.capture_matrix_drive import drive
from tests.benchmarks.capture_matrix_models import (
    FIRST_WORD,
    LAYER,
    LENGTH,
    PAD,
    ROWS,
    STEPS,
    TOKENS,
    VOCAB,
    batch,
    make_model,
)

NEW_TOKENS = 4
Wrap = Callable[[Any], Any]


class NotRunError(Exception):
    """The case cannot be run here; the message says why."""


@dataclass
class Watch:
    """A capture on a model, and what it took."""

    model: nn.Module
    got: list[ActivationSample] = field(default_factory=list)
    guard: Guard = field(default_factory=Guard)

    def __post_init__(self) -> None:
        config = CaptureConfig(
            tokens_per_sequence=TOKENS, skip_first=0, norm_sink_factor=None, skip_special_tokens=False, store_text=False
        )
        self.capture = Capture(
            config, run_id="matrix", layer=LAYER, sink=self.got.extend, guard=self.guard, queue=QueueConfig()
        )
        self.capture.attach(self.model)

    def samples(self) -> list[ActivationSample]:
        """Everything taken so far, taken out."""
        self.capture.flush(30.0)
        got, self.got[:] = list(self.got), []
        return got


@dataclass
class Trace:
    """What one run of a case computed."""

    values: list[Tensor] = field(default_factory=list)
    """Losses and gradients, or tokens."""
    samples: list[list[ActivationSample]] = field(default_factory=list)
    """By step."""
    graphs: list[int] = field(default_factory=list)
    """Compiled graphs so far, after each step."""
    breaks: int = 0
    said: str | None = None
    faults: int = 0


def check(case: Case, rank: int = 0, wrap: Wrap | None = None, *, reads: bool = True) -> dict[str, Any]:
    """Run a case; the figures of its row, with ``ok`` and the ``reason`` where it is not.

    Args:
        case: the row.
        rank: whose data it runs on.
        wrap: spreads its model over ranks.
        reads: whether this process is the one that samples are expected of.

    Raises:
        NotRunError: it cannot be run here.
    """
    if case.compile == "reduce-overhead" and not torch.cuda.is_available():
        raise NotRunError("no CUDA here: reduce-overhead records CUDA graphs, on a CPU it is the default mode")
    run = _run_training if case.task in {"train", "lora"} else _run_generation
    try:
        plain = run(case, rank, wrap, watch=False)
    except Exception as error:
        raise NotRunError(f"fails without the tap, too: {type(error).__name__}: {str(error)[:200]}") from error
    watched = run(case, rank, wrap, watch=True)
    ids, expected = _reference(case, rank)
    taken = [sample for step in watched.samples for sample in step]
    wanted = STEPS * ROWS * TOKENS if run is _run_training else ROWS * TOKENS
    figures = {
        "bitwise_equal": _equal(plain.values, watched.values),
        "captured": len(taken),
        "expected": wanted if reads else 0,
        "taken_twice": len(taken) - len({(sample.sequence_id, sample.position) for sample in taken}),
        "max_error": _largest_error(watched.samples[0] if watched.samples else [], ids, expected),
        "tolerance": 0.0 if case.bitwise else case.tolerance,
        "recompiles_after_warm_up": watched.graphs[-1] - watched.graphs[0] if watched.graphs else 0,
        "extra_graph_breaks": watched.breaks - plain.breaks,
        "faults": watched.faults,
    }
    reason = _reason(figures, watched.said)
    return {"ok": reason is None, "reason": reason, **figures}


def _reason(figures: dict[str, Any], said: str | None) -> str | None:
    """What is wrong with these figures; None if nothing is."""
    error = figures["max_error"]
    wrong = [
        (not figures["bitwise_equal"], "loss, gradients or tokens differ from those without the tap"),
        (figures["captured"] != figures["expected"], f"captured {figures['captured']} of {figures['expected']}"),
        (figures["taken_twice"] != 0, f"{figures['taken_twice']} positions were taken twice"),
        (error is not None and error > figures["tolerance"], f"vectors differ by {error}"),
        (figures["recompiles_after_warm_up"] > 0, f"{figures['recompiles_after_warm_up']} recompilations"),
        (figures["extra_graph_breaks"] > 0, f"{figures['extra_graph_breaks']} more graph breaks"),
        (figures["faults"] > 0, f"{figures['faults']} faults"),
        (said is not None, said or ""),
    ]
    return "; ".join(reason for bad, reason in wrong if bad) or None


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def _largest_error(samples: list[ActivationSample], ids: list[list[int]], hidden: list[Tensor]) -> float | None:
    """Largest difference to ``hidden`` (``[length, d_model]`` for each sequence), as a share of its largest entry.

    None without samples. A vector that is not finite gives none, so every difference is a number.
    """
    rows = {hex_of(hash_of(row)): number for number, row in enumerate(ids)}
    worst = 0.0
    for sample in samples:
        wanted = hidden[rows[sample.sequence_id]]
        error = (torch.from_numpy(sample.vector.copy()) - wanted[sample.position]).abs().max()
        worst = max(worst, float(error / wanted.abs().max()))
    return worst if samples else None


def _autocast(case: Case) -> contextlib.AbstractContextManager[Any]:
    enabled = case.precision == "autocast"
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def _reference(case: Case, rank: int) -> tuple[list[list[int]], list[Tensor]]:
    """Sequences of the first batch and the ``hidden_states[K + 1]`` that a plain eager model gives for each."""
    model = make_model(case)
    rows = [row.tolist() for row in batch(0, rank)]
    ids: Tensor | None = batch(0, rank)
    mask = None
    if case.task == "left_padding":
        rows, ids, mask = _padded()
    if case.task == "continuous_batching":
        rows = _prompts()
        ids = None
    trains = case.task in {"train", "lora"}
    model.train(trains)
    with torch.no_grad(), _autocast(case):
        if ids is None:
            return rows, [_states(model, torch.tensor([row]), None, cache=True)[0].float() for row in rows]
        states = _states(model, ids, mask, cache=not trains)
    return rows, [states[number, -len(row) :].float() for number, row in enumerate(rows)]


def _states(model: Any, ids: Tensor, mask: Tensor | None, *, cache: bool) -> Tensor:
    # Keys that went through a cache lie otherwise in memory, and products of them round otherwise.
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=cache)
    states: Tensor = output.hidden_states[LAYER + 1]
    return states


# Training.


def _run_training(case: Case, rank: int, wrap: Wrap | None, *, watch: bool) -> Trace:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trace = Trace()
    model = make_model(case).train()
    called = wrap(model) if wrap is not None else model
    if case.compile != "none":
        called = torch.compile(called, backend=case.backend, fullgraph=case.compile == "fullgraph")
    driven = drive(called)
    if case.attached == "after":
        driven.backward(_loss(case, called, batch(0, rank)))
        driven.clear()
    with _watching(called if watch else None, trace) as watcher:
        for step in range(STEPS):
            torch.manual_seed(step)
            loss = _loss(case, called, batch(step, rank))
            driven.backward(loss)
            trace.values += [loss.detach().clone(), *driven.gradients()]
            driven.step()
            trace.graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            if watcher is not None:
                trace.samples.append(watcher.samples())
    trace.breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    return trace


@contextlib.contextmanager
def _watching(model: nn.Module | None, trace: Trace) -> Iterator[Watch | None]:
    if model is None:
        yield None
        return
    watcher = Watch(model)
    try:
        yield watcher
        trace.said = watcher.capture.check_fired()
        trace.faults = sum(watcher.guard.faults.values())
    finally:
        watcher.capture.close(10.0)


def _loss(case: Case, model: Any, ids: Tensor) -> Tensor:
    with _autocast(case):
        loss: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
    return loss


# Generation.


def _run_generation(case: Case, rank: int, wrap: Wrap | None, *, watch: bool) -> Trace:
    del wrap  # generation runs in one process
    trace = Trace()
    model = make_model(case).eval()
    with _watching(model if watch else None, trace) as watcher:
        torch.manual_seed(1)
        if case.task == "continuous_batching":
            trace.values = _generate_continuously(model)
        elif case.task == "left_padding":
            _, ids, mask = _padded()
            trace.values = [model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)]
        else:
            ids = batch(0, rank)
            mask = torch.ones_like(ids)
            trace.values = [model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)]
        if watcher is not None:
            trace.samples.append(watcher.samples())
    return trace


def _generate_continuously(model: Any) -> list[Tensor]:
    settings = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    written = model.generate_batch(inputs=_prompts(), generation_config=settings, progress_bar=False)
    if len(written) != ROWS:
        raise NotRunError(f"continuous batching answered {len(written)} of {ROWS} prompts on this device")
    return [torch.tensor(answer.generated_tokens) for _, answer in sorted(written.items())]


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = (LENGTH, LENGTH - 3)
    return [torch.randint(FIRST_WORD, VOCAB, (length,), generator=generator).tolist() for length in lengths]


def _padded() -> tuple[list[list[int]], Tensor, Tensor]:
    """Two prompts, padded on the left; their ids and their mask."""
    rows = _prompts()
    ids = torch.tensor([[PAD] * (LENGTH - len(row)) + row for row in rows])
    return rows, ids, (ids != PAD).long()
