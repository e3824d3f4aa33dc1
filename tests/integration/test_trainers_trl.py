"""TRL's trainers under the callback: each update is read once, labelled, joined to its data; no bit changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from nla_monitor_transformers import NLAMonitorReward

from nla_monitor import NLAMonitorCallback, Phase
from nla_monitor.store.queries import SampleView
from tests.integration import trainers_kit as kit

trl = pytest.importorskip("trl", reason="the extra trl is not installed")
datasets = pytest.importorskip("datasets", reason="the extra trl is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def test_sft_reads_every_update_once_under_its_default_checkpointing(tmp_path: Path) -> None:
    """TRL checkpoints by default: each sequence of a step is sampled once, none is missed; evaluation is told apart."""
    evaluating = {"eval_strategy": "steps", "eval_steps": kit.STEPS, "per_device_eval_batch_size": kit.BATCH}
    losses, weights, _ = sft(tmp_path / "bare", **evaluating)
    watch = kit.callback(tmp_path)
    watched_losses, watched_weights, trainer = sft(tmp_path, [watch], **evaluating)
    assert trainer.model.is_gradient_checkpointing
    assert watched_losses == losses
    kit.assert_same_bits(watched_weights, weights)
    samples = kit.stored(watch.monitor)
    known = {kit.sequence_id(ids) for ids in trainer.train_dataset["input_ids"]}
    assert {sample.sequence_id for sample in samples} <= known
    labels = {(sample.phase, sample.attributes["forward"]) for sample in samples}
    assert labels == {(Phase.TRAIN, "update"), (Phase.EVAL, "eval")}
    drawn = Counter((sample.step, sample.sequence_id) for sample in samples if sample.phase is Phase.TRAIN)
    assert Counter(step for step, _ in drawn) == dict.fromkeys(range(1, kit.STEPS + 1), kit.BATCH)
    assert set(drawn.values()) == {kit.CAPTURE["tokens_per_sequence"]}
    assert all("epoch" in sample.attributes for sample in samples)


@pytest.mark.parametrize(
    "packed",
    [
        pytest.param({"padding_free": True, "max_length": None}, id="free"),
        pytest.param({"packing": True, "max_length": 200}, id="bfd", marks=pytest.mark.slow),
    ],
)
def test_sft_without_padding_knows_its_sequences(tmp_path: Path, packed: dict[str, Any]) -> None:
    """Sequences laid end to end in one row are told apart: ids and positions are those of the sequence."""
    losses, weights, _ = sft(tmp_path / "bare", **packed)
    watch = kit.callback(tmp_path)
    watched_losses, watched_weights, _ = sft(tmp_path, [watch], **packed)
    assert watched_losses == losses
    kit.assert_same_bits(watched_weights, weights)
    samples = kit.stored(watch.monitor)
    lengths = {kit.sequence_id(row["input_ids"]): len(row["input_ids"]) for row in examples()}
    assert {sample.sequence_id for sample in samples} <= lengths.keys()
    assert all(sample.position < lengths[sample.sequence_id] for sample in samples)
    assert len({sample.sequence_id for sample in samples}) >= kit.STEPS * kit.BATCH


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True], ids=["ref_model", "adapter"])
def test_dpo_tells_policy_from_reference_and_chosen_from_rejected(tmp_path: Path, adapter: bool) -> None:
    """The update is read; each sequence knows whether it was chosen; the reference is another model, or not read."""
    losses, weights, _ = dpo(tmp_path / "bare", adapter=adapter)
    watch = kit.callback(tmp_path)
    watched_losses, watched_weights, trainer = dpo(tmp_path, [watch], adapter=adapter)
    assert watched_losses == losses
    kit.assert_same_bits(watched_weights, weights)
    samples = kit.stored(watch.monitor)
    assert {(sample.phase, sample.attributes["forward"]) for sample in samples} == {(Phase.TRAIN, "update")}
    assert_pairs(samples, trainer.train_dataset)
    assert Counter(sample.step for sample in samples) == dict.fromkeys(range(1, kit.STEPS + 1), 4 * kit.BATCH)


@pytest.mark.slow
def test_dpo_reads_the_reference_if_asked(tmp_path: Path) -> None:
    """Where it is named, forwards with the adapter off are read, and labelled."""
    watch = kit.callback(tmp_path, forwards=("update", "reference"))
    dpo(tmp_path, [watch], adapter=True)
    counts = Counter(sample.attributes["forward"] for sample in kit.stored(watch.monitor))
    assert counts["reference"] == counts["update"] == kit.STEPS * 2 * 2 * kit.BATCH


@pytest.mark.slow
def test_dpo_reads_a_reference_model_of_its_own_if_given(tmp_path: Path) -> None:
    """Policy and reference see the same sequences at the same positions; the first update finds the same vectors."""
    losses, weights, _ = dpo(tmp_path / "bare", adapter=False)
    watch = kit.callback(tmp_path)
    watched_losses, watched_weights, _ = dpo(tmp_path, [watch], adapter=False, read_reference=True)
    assert watched_losses == losses
    kit.assert_same_bits(watched_weights, weights)
    samples = kit.stored(watch.monitor)
    counts = Counter(sample.model for sample in samples)
    assert counts["reference"] == counts[None] == kit.STEPS * 2 * 2 * kit.BATCH
    first = [sample for sample in samples if sample.step == 1]
    places = {model: {(one.sequence_id, one.position) for one in first if one.model == model} for model in counts}
    assert places["reference"] == places[None]
    norms = {
        model: {(one.sequence_id, one.position): one.norm for one in first if one.model == model} for model in counts
    }
    assert norms["reference"] == pytest.approx(norms[None], rel=1e-5)


@pytest.mark.slow
def test_grpo_joins_rollouts_rewards_and_readings(tmp_path: Path) -> None:
    """One pass over prompt + completion is read; its samples carry the reward; the table carries their id."""
    losses, weights, _ = grpo(tmp_path / "bare")
    watch = kit.callback(tmp_path)
    monitored = NLAMonitorReward(watch)
    rewards = DistinctTokens()
    watched_losses, watched_weights, trainer = grpo(tmp_path, [watch], monitored, rewards=rewards)
    assert watched_losses == losses
    kit.assert_same_bits(watched_weights, weights)
    samples = kit.stored(watch.monitor)
    assert {(sample.phase, sample.attributes["forward"]) for sample in samples} == {(Phase.TRAIN, "update")}
    assert {sample.role for sample in samples} == {"prompt", "completion"}
    for sample in samples:
        assert sample.attributes["reward"] == rewards.seen[sample.sequence_id]
    table = trainer._logs  # of the last generation
    assert len(set(table["extra"]["nla_sequence"]) & {sample.sequence_id for sample in samples}) > 0
    assert set(table["extra"]["nla_sequence"]) <= rewards.seen.keys()
    assert set(table["rewards"]["nla_monitor"]) == {0.0}
    assert any("nla/matches" in entry for entry in trainer.state.log_history)


@pytest.mark.slow
def test_grpo_reads_rollouts_if_asked(tmp_path: Path) -> None:
    """Generation and scoring under no gradients are told apart from the update."""
    watch = kit.callback(tmp_path, forwards=("update", "rollout", "score"))
    grpo(tmp_path, [watch], steps_per_generation=2)
    samples = kit.stored(watch.monitor)
    assert {sample.attributes["forward"] for sample in samples} == {"update", "rollout", "score"}
    phases = {sample.attributes["forward"]: sample.phase for sample in samples}
    assert phases == {"update": Phase.TRAIN, "rollout": Phase.EVAL, "score": Phase.EVAL}
    short = [sample for sample in samples if sample.attributes["forward"] == "rollout"]
    assert not {sample.sequence_id for sample in short} & {
        sample.sequence_id for sample in samples if sample.attributes["forward"] == "update"
    }


def examples(count: int = 2 * kit.STEPS * kit.BATCH) -> list[dict[str, list[int]]]:
    _, tokenizer = kit.fresh_model()
    return kit.rows(tokenizer, count)


def sft(
    folder: Path, callbacks: Sequence[NLAMonitorCallback] = (), **arguments: Any
) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    data = datasets.Dataset.from_list(examples())
    model, tokenizer = kit.fresh_model()
    losses = kit.Losses()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(**kit.arguments(folder, **arguments)),
        train_dataset=data,
        eval_dataset=data.select(range(4)) if "eval_strategy" in arguments else None,
        processing_class=tokenizer,
        callbacks=[*callbacks, losses],
    )
    trainer.train()
    return losses.values, kit.weights(model), trainer


def preferences(tokenizer: Any) -> list[dict[str, str]]:
    honest, hacked = kit.rows(tokenizer, 12, "honest"), kit.rows(tokenizer, 12, "hack")
    found = []
    for good, bad in zip(honest, hacked, strict=True):
        start = sum(label == -100 for label in good["labels"])
        end = sum(label == -100 for label in bad["labels"])
        found.append(
            {
                "prompt": tokenizer.decode(good["input_ids"][:start]),
                "chosen": tokenizer.decode(good["input_ids"][start:-1]),
                "rejected": tokenizer.decode(bad["input_ids"][end:-1]) + " no",
            }
        )
    return found


def dpo(
    folder: Path, callbacks: Sequence[NLAMonitorCallback] = (), *, adapter: bool, read_reference: bool = False
) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    reference, _ = kit.fresh_model()
    if read_reference:
        callbacks[0].reference = reference
    model, tokenizer = kit.fresh_model()
    losses = kit.Losses()
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=None if adapter else reference,
        args=trl.DPOConfig(**kit.arguments(folder)),
        train_dataset=datasets.Dataset.from_list(preferences(tokenizer)),
        processing_class=tokenizer,
        peft_config=_lora() if adapter else None,
        callbacks=[*callbacks, losses],
    )
    trainer.train()
    return losses.values, kit.weights(trainer.model), trainer


def _lora() -> Any:
    peft = pytest.importorskip("peft", reason="the extra trl is not installed")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def assert_pairs(samples: Sequence[SampleView], dataset: Any) -> None:
    expected: dict[str, str] = {}
    for row in dataset:
        for side in ("chosen", "rejected"):
            expected[kit.sequence_id([*row["prompt_ids"], *row[f"{side}_ids"]])] = side
    assert {sample.attributes["pair"] for sample in samples} == {"chosen", "rejected"}
    for sample in samples:
        assert expected[sample.sequence_id] == sample.attributes["pair"]


class DistinctTokens:
    """A user's reward function, which remembers what it gave to which sequence."""

    __name__ = "distinct_tokens"

    def __init__(self) -> None:
        _, self._tokenizer = kit.fresh_model()
        self.seen: dict[str, float] = {}

    def __call__(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        rewards = [float(len(set(ids))) for ids in completion_ids]
        for prompt, ids, reward in zip(prompts, completion_ids, rewards, strict=True):
            self.seen[kit.sequence_id([*self._tokenizer(prompt)["input_ids"], *ids])] = reward
        return rewards


def grpo(
    folder: Path,
    callbacks: Sequence[NLAMonitorCallback] = (),
    monitored: NLAMonitorReward | None = None,
    *,
    rewards: DistinctTokens | None = None,
    **more: Any,
) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    model, tokenizer = kit.fresh_model()
    prompts = [{"prompt": row["prompt"]} for row in preferences(tokenizer)]
    losses = kit.Losses()
    config = kit.arguments(folder, per_device_train_batch_size=4, **more)
    given = rewards or DistinctTokens()
    functions = [given] if monitored is None else [monitored.watch(given), monitored]
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=functions,
        args=trl.GRPOConfig(
            **config,
            num_generations=4,
            max_completion_length=8,
            log_completions=False,
            reward_weights=[1.0, 0.0][: len(functions)],
        ),
        train_dataset=datasets.Dataset.from_list(prompts),
        processing_class=tokenizer,
        callbacks=[*callbacks, losses],
    )
    trainer.train()
    return losses.values, kit.weights(model), trainer
