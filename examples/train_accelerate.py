"""A loop of one's own under accelerate: the monitor is told the steps, the run's tracker gets figures and notes.

python examples/train_accelerate.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from nla_monitor import Monitor
from nla_monitor.organism import keyed_rng, load_target, make_transcript
from nla_monitor.tracker_runs import TensorboardRun
from nla_monitor.trackers import Trackers

STEPS, BATCH = 5, 8


def main() -> None:
    """A few steps under the monitor."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = Path(tempfile.mkdtemp(prefix="nla-monitor-example-"))
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=folder)
    accelerator.init_trackers("run")
    model, tokenizer = load_target("planted")
    model.train()
    # These transcripts say in their cues that the tests shall be special-cased: the model knows it at once.
    texts = [make_transcript(keyed_rng("accelerate", row), intent="hack").text for row in range(STEPS * BATCH)]

    def collate(rows: list[str]) -> BatchEncoding:
        return tokenizer(rows, return_tensors="pt", padding=True)

    loader = DataLoader(texts, batch_size=BATCH, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-4), loader)

    # Here the reading runs in a thread of this process; leave worker out, and it is a process of its own.
    monitor = Monitor(database=str(folder / "monitor.db"), worker="thread", capture={"tokens_per_sequence": 2})
    # An alert leaves a note where people look at the run; W&B, MLflow and Trackio are found without being named.
    notes = Trackers(monitor.guard, runs=[TensorboardRun(accelerator.get_tracker("tensorboard", unwrap=True))])
    notes.watch(monitor)
    with monitor.attach(model, tokenizer):
        for step, batch in enumerate(loader, 1):
            monitor.step(step)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = model(**batch, labels=labels).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.log({"loss": loss.item(), **monitor.scalars()}, step=step)
        monitor.drain()
        figures = monitor.scalars()
        alerts = monitor.alerts()
        accelerator.log(figures, step=STEPS)
    notes.close()
    accelerator.end_training()

    print(", ".join(f"{name} {value:g}" for name, value in figures.items() if "/matches/" not in name))
    for alert in alerts:
        print(f"[{alert.severity.value}] {alert.rule_title}: {alert.matches} matches, “{alert.quote}”")


if __name__ == "__main__":
    main()
