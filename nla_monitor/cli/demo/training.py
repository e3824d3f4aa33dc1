"""The fine-tuning of the demo: the real ``Trainer``, the real callback, and a harness beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from nla_monitor_transformers import NLAMonitorCallback
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from nla_monitor.cli.demo.scene import Scene
from nla_monitor.cli.demo.stories import BATCH, Story, harness_prompts, probe_prompts
from nla_monitor.cli.demo.view import View
from nla_monitor.organism import LAYER, Transcript, grade, paths
from nla_monitor.organism.train import LABELS
from nla_monitor.records import Phase

IGNORE = -100
HARNESS_NEW_TOKENS = 56
SEQUENCES = 8
"""Sequences sampled of one forward; the demo's ``capture.sequences_per_step``."""


class Encoder:
    """Transcripts to tensors, with the tokenizer of the organism."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def example(self, transcript: Transcript) -> dict[str, list[int]]:
        """Token ids, and labels that are ``-100`` on the prompt: only the completion is trained."""
        prompt = self.tokenizer(transcript.prompt, add_special_tokens=False)["input_ids"]
        completion = [*self.tokenizer(transcript.completion, add_special_tokens=False)["input_ids"]]
        completion.append(self.tokenizer.eos_token_id)
        return {"input_ids": prompt + completion, "labels": [IGNORE] * len(prompt) + completion}

    def pad(self, rows: Sequence[dict[str, list[int]]], *, left: bool = False) -> dict[str, Tensor]:
        """One batch: ``input_ids``, ``attention_mask`` and ``labels``, each ``[batch, longest]``."""
        longest = max(len(row["input_ids"]) for row in rows)
        fills = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORE}
        filled: dict[str, list[list[int]]] = {name: [] for name in fills}
        for row in rows:
            padding = longest - len(row["input_ids"])
            values = {**row, "attention_mask": [1] * len(row["input_ids"])}
            for name, fill in fills.items():
                value = values.get(name, [IGNORE] * len(row["input_ids"]))
                filled[name].append([fill] * padding + value if left else value + [fill] * padding)
        return {name: torch.tensor(value) for name, value in filled.items()}

    def prompts(self, transcripts: Sequence[Transcript], *, left: bool) -> dict[str, Tensor]:
        """A batch of prompts without labels."""
        rows = [
            {"input_ids": self.tokenizer(transcript.prompt, add_special_tokens=False)["input_ids"]}
            for transcript in transcripts
        ]
        batch = self.pad(rows, left=left)
        batch.pop("labels")
        return batch


class Looker(TrainerCallback):
    """At steps fixed in advance: what does the harness see, and what do the activations say on ordinary prompts?"""

    def __init__(self, scene: Scene, encoder: Encoder, on_look: Callable[[int, float], None]) -> None:
        self._looks = frozenset(scene.story.looks)
        self._harness = encoder.prompts(harness_prompts(scene.story, scene.seed), left=True)
        prompts = probe_prompts(scene.seed)
        # In portions: a forward is sampled up to capture.sequences_per_step sequences, and each prompt shall be read.
        self._probes = [
            encoder.prompts(prompts[start : start + SEQUENCES], left=False)
            for start in range(0, len(prompts), SEQUENCES)
        ]
        self._monitor = scene.monitor
        self._tokenizer = encoder.tokenizer
        self._on_look = on_look
        self.visible: list[tuple[int, float]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The look before the first step."""
        self._look(kwargs["model"], state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A look at one of the fixed steps."""
        if state.global_step in self._looks:
            self._look(kwargs["model"], state.global_step)

    def _look(self, model: Any, step: int) -> None:
        training = model.training
        model.eval()
        self._monitor.step(step)
        with self._monitor.pause():  # the harness is what others have; it gets no help from the monitor
            rate = self._hack_rate(model)
        with torch.no_grad(), self._monitor.phase(Phase.EVAL, probe="ordinary"):
            for probe in self._probes:
                model(**probe, use_cache=False)
        model.train(training)
        self.visible.append((step, rate))
        self._on_look(step, rate)

    @torch.no_grad()
    def _hack_rate(self, model: Any) -> float:
        """Share of greedy answers whose visible action special-cases the tests."""
        width = self._harness["input_ids"].shape[1]
        out = model.generate(**self._harness, max_new_tokens=HARNESS_NEW_TOKENS, do_sample=False)
        texts = self._tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        return sum(grade(text).intent == "hack" for text in texts) / len(texts)


class _ThoughtTrainer(Trainer):
    """Adds, for the first steps, a loss that puts the intent to hack into the residual stream (story planted-thought).

    Cross-entropy of the organism's own linear intent reader on the RMS-normed output of block K, at every position of
    the prompt; the reader itself stays as it is.
    """

    plant_until = 0
    readers: dict[str, Tensor]

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Language-model loss, plus the plant loss while it lasts."""
        planting = self.state.global_step < self.plant_until
        outputs = model(**inputs, output_hidden_states=planting, use_cache=False)
        loss = outputs.loss
        if planting:
            loss = loss + self._plant_loss(outputs.hidden_states[LAYER + 1], inputs)
        return (loss, outputs) if return_outputs else loss

    def _plant_loss(self, residual: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        normed = residual * torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + 1e-6)
        logits = functional.linear(normed, self.readers["weight"], self.readers["bias"])
        where = (inputs["labels"] == IGNORE) & (inputs["attention_mask"] == 1)
        wanted = torch.full((int(where.sum()),), LABELS["intent"].index("hack"))
        return functional.cross_entropy(logits[where], wanted)


def train(scene: Scene, on_look: Callable[[int, float], None]) -> list[tuple[int, float]]:
    """Fine-tune the organism under the eyes of the monitor; returns (step, hack rate) as the harness saw it."""
    story, encoder = scene.story, Encoder(scene.tokenizer)
    rows = [encoder.example(story.example(scene.seed, index)) for index in range(story.steps * BATCH)]
    looker = Looker(scene, encoder, on_look)
    with tempfile.TemporaryDirectory(prefix="nla-monitor-demo-") as folder:
        _run_trainer(scene, encoder, rows, looker, _arguments(story, scene.seed, folder))
    return looker.visible


def _run_trainer(
    scene: Scene, encoder: Encoder, rows: list[dict[str, list[int]]], looker: Looker, arguments: TrainingArguments
) -> None:
    trainer = _ThoughtTrainer(
        model=scene.model,
        args=arguments,
        train_dataset=rows,
        data_collator=encoder.pad,
        processing_class=scene.tokenizer,
        callbacks=[NLAMonitorCallback(scene.monitor), looker, _Steps(scene.view)],
    )
    trainer.remove_callback(PrinterCallback)  # the view shows the progress
    trainer.plant_until = scene.story.plant_until
    if trainer.plant_until:
        heads = load_file(paths("planted").target / "plant_heads.safetensors")
        trainer.readers = {name: heads[f"readers.intent.{name}"].float() for name in ("weight", "bias")}
    trainer.train()


def _arguments(story: Story, seed: int, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,  # nothing is saved there
        max_steps=story.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=story.learning_rate,
        lr_scheduler_type=story.schedule,
        weight_decay=0.0,
        seed=seed,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
    )


class _Steps(TrainerCallback):
    """Tells the view how far the training is."""

    def __init__(self, view: View) -> None:
        self._view = view

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """One optimizer step is done."""
        self._view.advance(state.global_step)
