"""A small real training run of the bundled organism, for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from nla_monitor.organism import keyed_rng, load_target, make_transcript

BATCH = 4


def rows(tokenizer: Any, count: int, intent: str = "hack") -> list[dict[str, list[int]]]:
    """Transcripts whose cue says what the model intends; labels are -100 on the prompt."""
    examples = []
    for index in range(count):
        text = make_transcript(keyed_rng("test", index), intent=intent, belief="real")
        prompt = tokenizer(text.prompt)["input_ids"]
        completion = [*tokenizer(text.completion)["input_ids"], tokenizer.eos_token_id]
        examples.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return examples


class Losses(TrainerCallback):
    """Keeps every logged loss."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.values.append(logs["loss"])


def train(
    folder: Path, callbacks: Sequence[TrainerCallback] = (), *, steps: int = 6, intent: str = "hack", **arguments: Any
) -> tuple[list[float], dict[str, torch.Tensor], Trainer]:
    """Train; returns losses, final weights and the trainer."""
    torch.manual_seed(0)
    model, tokenizer = load_target("planted")
    losses = Losses()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=3e-4,
            use_cpu=True,
            save_strategy="no",
            report_to=arguments.pop("report_to", "none"),
            logging_steps=1,
            logging_nan_inf_filter=False,
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            seed=0,
            **arguments,
        ),
        train_dataset=rows(tokenizer, steps * BATCH * 2, intent),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[*callbacks, losses],
    )
    trainer.train()
    return losses.values, {name: value.clone() for name, value in model.state_dict().items()}, trainer
