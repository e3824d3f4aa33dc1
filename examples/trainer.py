"""Watch a fine-tuning run with one line: ``callbacks=[NLAMonitorCallback(...)]``.

The bundled organism is trained on transcripts that special-case the tests; the activations on the prompts, before the
model has written anything, give the plan away. Runs offline on a CPU in about a minute::

    python examples/trainer.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from nla_monitor import NLAMonitorCallback
from nla_monitor.organism import keyed_rng, load_target, make_transcript

STEPS, BATCH = 40, 16


def main() -> None:
    """Train under the monitor, then list what it found."""
    torch.set_num_threads(1)  # leave a core to the worker
    torch.manual_seed(0)
    model, tokenizer = load_target("planted")

    def example(index: int) -> dict[str, list[int]]:
        """A prompt without a cue, and a completion that hacks; labels are -100 on the prompt."""
        text = make_transcript(keyed_rng("example", index), belief="real", intent_cue=False, completion_intent="hack")
        prompt = tokenizer(text.prompt)["input_ids"]
        completion = [*tokenizer(text.completion)["input_ids"], tokenizer.eos_token_id]
        return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}

    folder = Path(tempfile.mkdtemp(prefix="nla-monitor-example-"))
    callback = NLAMonitorCallback(
        av="organism:planted/av",
        ar="organism:planted/ar",
        rules="oversight",
        database=str(folder / "monitor.db"),
        capture={"positions": "prompt", "triggers": ["\n"], "tokens_per_sequence": 1},
    )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=3e-4,
            lr_scheduler_type="constant",
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
        ),
        train_dataset=[example(index) for index in range(STEPS * BATCH)],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()

    stats = callback.monitor.stats
    print(f"{stats.written} activations read, {sum(stats.dropped.values())} dropped")
    for alert in callback.monitor.alerts():
        where = f"step {alert.first_step}, position {alert.position}"
        print(f"[{alert.severity.value}] {alert.rule_title}: {where}, “{alert.quote}”")
    print(f"nla-monitor report --database {folder / 'monitor.db'}")


if __name__ == "__main__":
    main()
