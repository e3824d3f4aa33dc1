"""What monitoring costs a training run on the host: paired step times with and without ``NLAMonitorCallback``.

Three real ``Trainer`` runs of one 50M-parameter model (12-layer, d 512 Qwen2), same seed, same data: plain, plain again
(the A/A row shows the noise) and monitored with the default capture config into an SQLite file. They take turns in
blocks of steps, so that a change of the machine's load meets all three; only one runs at a time. The background work of
the monitored run falls into its own blocks: what is left at the end of a block is written before the next run goes on.
The worker is external: verbalizing costs another device or core, and is not what is measured here.

    python -m tests.benchmarks.overhead --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback, TrainingArguments

from nla_monitor import NLAMonitorCallback
from tests.benchmarks.capture_arms import write_sidecar

VOCAB, D_MODEL, BLOCKS, LAYER = 16_384, 512, 12, 8
BATCH, LENGTH = 4, 64
FLUSH_SECONDS = 30.0


def make_model() -> Qwen2ForCausalLM:
    """About 50M parameters, random."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=1536,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    return Qwen2ForCausalLM(config)


def make_rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Token sequences with word-like (Zipf) frequencies."""
    generator = torch.Generator().manual_seed(1)
    weights = 1.0 / torch.arange(1, VOCAB + 1, dtype=torch.float64)
    ids = torch.multinomial(weights.expand(count, -1), LENGTH, replacement=True, generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


class Turns:
    """Lets one of several threads run at a time, in a ring."""

    def __init__(self, names: Sequence[str]) -> None:
        self._ring = list(names)
        self._changed = threading.Condition()

    def wait(self, name: str) -> None:
        """Return when it is ``name``'s turn."""
        with self._changed:
            self._changed.wait_for(lambda: self._ring[0] == name)

    def pass_on(self) -> None:
        """The next one's turn."""
        with self._changed:
            self._ring.append(self._ring.pop(0))
            self._changed.notify_all()

    def leave(self, name: str) -> None:
        """``name`` has finished."""
        with self._changed:
            self._ring.remove(name)
            self._changed.notify_all()


@dataclass
class Run:
    """One training run and its measurements."""

    name: str
    folder: Path
    callbacks: list[TrainerCallback] = field(default_factory=list)
    after_block: Callable[[], object] = lambda: None
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    error: BaseException | None = None


class _Clock(TrainerCallback):
    """First of the callbacks: waits for the turn, then starts the clock."""

    def __init__(self, run: Run, turns: Turns, block: int) -> None:
        self.run, self.turns, self.block = run, turns, block
        self.started = (0.0, 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and state.global_step % self.block == 0:
            self.run.after_block()
            self.turns.pass_on()
        self.turns.wait(self.run.name)
        self.started = (time.perf_counter(), time.process_time())


class _Stop(TrainerCallback):
    """Last of the callbacks: stops the clock."""

    def __init__(self, clock: _Clock) -> None:
        self.clock = clock

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = (time.perf_counter(), time.process_time())
        self.clock.run.seconds.append(now[0] - self.clock.started[0])
        self.clock.run.cpu_seconds.append(now[1] - self.clock.started[1])


class _LossKeeper(Trainer):
    kept: list[torch.Tensor]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.kept.append((loss[0] if isinstance(loss, tuple) else loss).detach().clone())
        return loss


def train(run: Run, turns: Turns, rows: list[dict[str, torch.Tensor]], steps: int, block: int) -> None:
    """One Trainer run, in turns with the others."""
    try:
        torch.set_num_threads(1)  # a setting of the thread
        turns.wait(run.name)
        clock = _Clock(run, turns, block)
        arguments = TrainingArguments(
            output_dir=str(run.folder / run.name),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-4,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=0,
            data_seed=0,
        )
        trainer = _LossKeeper(
            model=make_model(), args=arguments, train_dataset=rows, callbacks=[clock, *run.callbacks, _Stop(clock)]
        )
        trainer.kept = run.losses
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        run.weights = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    except BaseException as error:  # noqa: BLE001 -- carried to the main thread
        run.error = error
    finally:
        turns.leave(run.name)


def summary(left: Sequence[float], right: Sequence[float], skip: int) -> dict[str, float]:
    """Median and 90th percentile of the paired ratios ``left / right``, without the first steps."""
    ratios = sorted(one / other for one, other in zip(left[skip:], right[skip:], strict=True))
    return {
        "median": round(statistics.median(ratios), 4),
        "p90": round(ratios[min(len(ratios) - 1, int(0.9 * len(ratios)))], 4),
    }


def same(left: Run, right: Run) -> tuple[bool, bool]:
    """Whether losses and final weights are equal bit for bit."""
    losses = len(left.losses) == len(right.losses) > 0
    losses = losses and all(torch.equal(one, other) for one, other in zip(left.losses, right.losses, strict=True))
    return losses, all(torch.equal(value, right.weights[name]) for name, value in left.weights.items())


def measure(steps: int, block: int, skip: int, folder: Path) -> dict[str, Any]:
    """Run the three; the figures as a flat mapping."""
    callback = NLAMonitorCallback(
        {
            "database": f"sqlite:///{folder / 'overhead.db'}",
            "nla": {"av": str(write_sidecar(folder / "av", D_MODEL, LAYER)), "ar": None},
            "worker": {"mode": "external"},
        },
        close_timeout=FLUSH_SECONDS,
    )

    def written() -> None:
        callback.monitor.flush(FLUSH_SECONDS)

    runs = [
        Run("plain", folder),
        Run("plain_again", folder),
        Run("monitored", folder, callbacks=[callback], after_block=written),
    ]
    turns, rows = Turns([run.name for run in runs]), make_rows(64)
    threads = [threading.Thread(target=train, args=(run, turns, rows, steps, block)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in runs:
        if run.error is not None:
            raise run.error
    plain, again, monitored = runs
    losses_equal, weights_equal = same(plain, monitored)
    stats = callback.monitor.stats
    captured = callback.monitor.capture.stats if callback.monitor.capture is not None else None
    hooks = captured.host_seconds / max(1, captured.forwards) if captured else 0.0
    return {
        "overhead_ratio": summary(monitored.seconds, plain.seconds, skip),
        "overhead_ratio_cpu": summary(monitored.cpu_seconds, plain.cpu_seconds, skip),
        "a_a_ratio": summary(again.seconds, plain.seconds, skip),
        "a_a_ratio_cpu": summary(again.cpu_seconds, plain.cpu_seconds, skip),
        "hook_cpu_seconds": round(hooks, 6),
        "hook_share_of_step": round(hooks / statistics.median(plain.cpu_seconds[skip:]), 5),
        "loss_bitwise_equal": losses_equal,
        "weights_bitwise_equal": weights_equal,
        "step_seconds": round(statistics.median(plain.seconds[skip:]), 4),
        "steps": steps - skip,
        "parameters": sum(parameter.numel() for parameter in make_model().parameters()),
        "batch": [BATCH, LENGTH],
        "samples": stats.sampled,
        "dropped": stats.dropped,
        "faults": dict(stats.faults),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; exit code 1 if the losses differ or nothing was sampled."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--block", type=int, default=2, help="steps of one run before the next takes its turn")
    parser.add_argument("--skip", type=int, default=4, help="first steps that are not counted (warm-up)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.steps, options.block, options.skip, Path(folder))
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:24} {value}")
    return 0 if result["loss_bitwise_equal"] and result["samples"] else 1


if __name__ == "__main__":
    sys.exit(main())
