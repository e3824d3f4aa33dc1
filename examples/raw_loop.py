"""The same without a trainer: a raw loop tells the monitor its steps.

python examples/raw_loop.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from nla_monitor import Monitor
from nla_monitor.organism import keyed_rng, load_target, make_transcript


def main() -> None:
    """A few steps of plain PyTorch under the monitor."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tokenizer = load_target("planted")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    database = Path(tempfile.mkdtemp(prefix="nla-monitor-example-")) / "monitor.db"

    with Monitor(database=str(database), capture={"tokens_per_sequence": 2}).attach(model, tokenizer) as monitor:
        for step in range(1, 6):
            # These transcripts say in their cues that the tests shall be special-cased: the model knows it at once.
            texts = [make_transcript(keyed_rng(step, row), intent="hack").text for row in range(8)]
            batch = tokenizer(texts, return_tensors="pt", padding=True)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            monitor.step(step)
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        monitor.drain()
        alerts = monitor.alerts()
        print(f"{monitor.stats.written} activations read in {step} steps, last loss {loss.item():.3f}")
    for alert in alerts:
        print(f"[{alert.severity.value}] {alert.rule_title}: {alert.matches} matches, “{alert.quote}”")


if __name__ == "__main__":
    main()
