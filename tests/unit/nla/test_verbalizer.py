"""The AV against plain PyTorch written from the documented contract, and its faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from nla_checkpoints import (
    CONFIG,
    SCALES,
    closing_id,
    edit_sidecar,
    marker_position,
    plain_greedy,
    plain_prompt,
    tokenizer_of,
)
from safetensors.torch import load_file, save_file

from nla_monitor.config import NLAConfig
from nla_monitor.errors import (
    ActivationError,
    CheckpointError,
    ConfigError,
    NonFiniteWeightsError,
    SidecarError,
    TokenizerContractError,
)
from nla_monitor.nla import TransformersVerbalizer, load_verbalizer
from nla_monitor.nla.explanation import parse_explanation

Copy = Callable[[str], Path]
Vectors = npt.NDArray[np.float32]


def test_prompt_embeddings_equal_the_documented_rule_to_the_bit(
    verbalizer: TransformersVerbalizer, family: str, vectors: Vectors
) -> None:
    seen = verbalizer.prompt_embeddings(vectors)
    at = marker_position(family)
    for row, vector in zip(seen, vectors, strict=True):
        expected = plain_prompt(verbalizer.model, family, torch.from_numpy(vector))
        others = torch.arange(len(expected)) != at
        assert torch.equal(row[others], expected[others])
        torch.testing.assert_close(row[at], expected[at], rtol=1e-6, atol=1e-6)
        assert row[at].norm().item() == pytest.approx(SCALES[family], rel=1e-5)


def test_greedy_tokens_equal_uncached_one_by_one_computation(
    verbalizer: TransformersVerbalizer, family: str, vectors: Vectors
) -> None:
    stop = {int(tokenizer_of(family).eos_token_id), *([closing_id(family)] if closing_id(family) else [])}
    assert verbalizer.stop_ids == stop
    expected = [plain_greedy(verbalizer.model, family, torch.from_numpy(row), 24, stop) for row in vectors]
    assert verbalizer.generate(vectors) == expected
    assert len({len(tokens) for tokens in expected}) > 2, "rows should end at different lengths, or this shows little"


def test_greedy_tokens_equal_generate_with_embeddings(
    verbalizer: TransformersVerbalizer, family: str, vectors: Vectors
) -> None:
    embeds = verbalizer.prompt_embeddings(vectors)
    rows = verbalizer.model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2]),
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=sorted(verbalizer.stop_ids),
        pad_token_id=int(tokenizer_of(family).pad_token_id),
    ).tolist()
    ours = verbalizer.generate(vectors)
    assert [row[: len(tokens)] for row, tokens in zip(rows, ours, strict=True)] == ours


def test_tokens_do_not_depend_on_the_batch(
    checkpoints: Path, verbalizer: TransformersVerbalizer, family: str, vectors: Vectors
) -> None:
    """Alone, in another order, in long batches over several chunks, after a smaller and a larger batch: the same."""
    expected = verbalizer.generate(vectors)
    assert [verbalizer.generate(row[None])[0] for row in vectors] == expected
    assert verbalizer.generate(vectors[::-1])[::-1] == expected
    wide = load_verbalizer(checkpoints / family / "av", CONFIG.model_copy(update={"batch_size": 64}))
    many = np.concatenate([vectors] * 4)
    assert wide.generate(vectors[:3]) == expected[:3]
    assert wide.generate(many) == expected * 4


def test_no_vectors_no_explanations(verbalizer: TransformersVerbalizer) -> None:
    assert verbalizer.verbalize(np.zeros((0, verbalizer.d_model), dtype=np.float32)) == []


def test_explanations_report_truncation_and_length(
    verbalizer: TransformersVerbalizer, family: str, vectors: Vectors
) -> None:
    readings, tokens = verbalizer.verbalize(vectors), verbalizer.generate(vectors)
    assert [reading.tokens for reading in readings] == [len(row) for row in tokens]
    closing = closing_id(family)
    for reading, row in zip(readings, tokens, strict=True):
        assert reading.truncated == (closing not in row)
        assert "<eos>" not in reading.text
        assert "<pad>" not in reading.text


@pytest.mark.parametrize(
    ("raw", "text", "truncated"),
    [
        ("<explanation>It plans.</explanation>", "It plans.", False),
        ("noise <explanation>\n It plans. \n</explanation> noise", "It plans.", False),
        ("It plans.</explanation>", "It plans.", False),
        ("<explanation></explanation>", "", False),
        ("<explanation>It plans to", "It plans to", True),
        ("<explanation>It plans to</expl", "It plans to", True),
        ("<explanation>a < b", "a < b", True),
        ("It plans", "It plans", True),
        ("", "", True),
    ],
)
def test_the_text_between_the_tags(raw: str, text: str, truncated: bool) -> None:
    assert parse_explanation(raw) == (text, truncated)


def test_unusable_vectors_are_refused_by_row(verbalizer: TransformersVerbalizer, vectors: Vectors) -> None:
    rows = vectors[:3].copy()
    rows[2, 5] = np.nan
    with pytest.raises(ActivationError, match="row 2: 1 NaN"):
        verbalizer.verbalize(rows)
    with pytest.raises(ActivationError, match="instead of"):
        verbalizer.verbalize(rows[:, :-1])


def test_end_tokens_come_from_generation_config_too(damaged: Copy) -> None:
    folder = damaged("gemma3/av")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [1, 106]}))
    assert {1, 106, tokenizer_of("gemma3").eos_token_id} <= load_verbalizer(folder, CONFIG).stop_ids


def test_raw_injection_leaves_the_vector_alone(damaged: Copy, vectors: Vectors) -> None:
    folder = damaged("llama/av")
    edit_sidecar(folder, "extraction.injection_scale", "raw")
    seen = load_verbalizer(folder, CONFIG).prompt_embeddings(vectors)[:, marker_position("llama")]
    np.testing.assert_array_equal(seen.numpy(), vectors)


def test_layer_hash_and_dtype(verbalizer: TransformersVerbalizer) -> None:
    assert verbalizer.layer == 1
    assert verbalizer.content_hash.startswith("sha256:")
    assert verbalizer.model.dtype == torch.float32, "auto is float32 on CPU"


def test_bfloat16_on_request(checkpoints: Path, vectors: Vectors) -> None:
    av = load_verbalizer(checkpoints / "qwen2/av", CONFIG.model_copy(update={"dtype": "bfloat16"}))
    assert av.prompt_embeddings(vectors).dtype == torch.bfloat16
    assert len(av.verbalize(vectors)) == len(vectors)


@pytest.mark.parametrize("device", ["warp", "cuda:99"])
def test_a_device_that_is_not_there_is_a_config_error(device: str, checkpoints: Path) -> None:
    with pytest.raises(ConfigError, match=f"nla.device = '{device}'"):
        load_verbalizer(checkpoints / "qwen2/av", NLAConfig(device=device))


def test_a_changed_tokenizer_is_caught_at_load(damaged: Copy) -> None:
    folder = damaged("llama/av")
    edit_sidecar(folder, "tokens.injection_left_neighbor_id", 3)
    with pytest.raises(TokenizerContractError, match="neighbours"):
        load_verbalizer(folder, CONFIG)


def test_an_ar_in_place_of_the_av_is_caught(checkpoints: Path) -> None:
    with pytest.raises(SidecarError, match="exchange"):
        load_verbalizer(checkpoints / "llama/ar", CONFIG)


def test_weights_that_are_missing_are_not_made_up(damaged: Copy) -> None:
    folder = damaged("llama/av")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights are missing: model.layers.2.mlp.up_proj.weight"):
        load_verbalizer(folder, CONFIG)


def test_weights_of_another_shape_are_refused(damaged: Copy) -> None:
    folder = damaged("llama/av")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(5)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_verbalizer(folder, CONFIG)


def test_absent_or_damaged_weights_are_checkpoint_errors(damaged: Copy) -> None:
    folder = damaged("llama/av")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=r"model in .* cannot be loaded"):
        load_verbalizer(folder, CONFIG)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"pickled weights are refused"):
        load_verbalizer(folder, CONFIG)


def test_remote_code_is_refused(damaged: Copy) -> None:
    folder = damaged("llama/av")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="remote code"):
        load_verbalizer(folder, CONFIG)


def test_non_finite_weights_are_named_when_they_show(damaged: Copy, vectors: Vectors) -> None:
    folder = damaged("llama/av")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteWeightsError, match=r"NaN or Inf for 5 of 5 vectors.*bfloat16"):
        load_verbalizer(folder, CONFIG).verbalize(vectors[:5])


def test_ids_beyond_the_embedding_are_caught(damaged: Copy) -> None:
    folder = damaged("llama/av")
    weights = load_file(folder / "model.safetensors")
    rows = 100
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = weights[name][:rows].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": rows, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerContractError, match=f"embeds only {rows} tokens"):
        load_verbalizer(folder, CONFIG)


def test_loading_leaves_the_hosts_logging_alone(checkpoints: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_verbalizer(checkpoints / "qwen2/av", CONFIG)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
