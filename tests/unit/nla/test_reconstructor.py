"""The AR against plain PyTorch, and its faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from nla_checkpoints import AR_TEMPLATE, CONFIG, WIDTH, edit_sidecar, plain_blocks, tokenizer_of
from safetensors.torch import load_file, save_file

from nla_monitor.errors import ActivationError, CheckpointError, NonFiniteWeightsError, TokenizerContractError
from nla_monitor.nla import TransformersReconstructor, load_reconstructor

Copy = Callable[[str], Path]
TEXTS = ["A log of failing tests.", "x", "", "The model suspects a test. " * 6, "  padded with blanks \n", "A log."]


def plain_vector(reconstructor: TransformersReconstructor, family: str, text: str) -> npt.NDArray[np.float32]:
    """One text by hand: raw template, BOS first, the blocks without final norm, last token, value head."""
    prompt = AR_TEMPLATE.replace("{explanation}", text.strip())
    tokenizer = tokenizer_of(family)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    if family != "qwen2":
        ids = [tokenizer.bos_token_id, *ids]
    table = reconstructor.model.get_input_embeddings().weight
    hidden = plain_blocks(reconstructor.model, table[torch.tensor(ids)])
    return (reconstructor.head @ hidden[-1]).detach().numpy()


def cosine(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


@pytest.mark.parametrize("shape", ["qwen2", "llama"])
def test_vectors_and_scores_equal_plain_pytorch(checkpoints: Path, shape: str) -> None:
    """Gemma 3 is held against its own layers in the next test."""
    reconstructor = load_reconstructor(checkpoints / shape / "ar", CONFIG)
    vectors = np.random.default_rng(0).standard_normal((len(TEXTS), WIDTH)).astype(np.float32)
    expected = [plain_vector(reconstructor, shape, text) for text in TEXTS]
    np.testing.assert_allclose(reconstructor.reconstruct(TEXTS), np.stack(expected), rtol=1e-4, atol=1e-4)
    for score, vector, wanted in zip(reconstructor.score(vectors, TEXTS), vectors, expected, strict=True):
        assert score.cosine == pytest.approx(cosine(vector, wanted), abs=1e-5)
        assert score.mse_nrm == pytest.approx(2 * (1 - cosine(vector, wanted)), abs=2e-5)
        assert (score.fve, score.denominator, score.denominator_name) == (None, None, None)


def test_the_head_reads_the_last_blocks_raw_output(
    checkpoints: Path, reconstructor: TransformersReconstructor, family: str
) -> None:
    """The last block's output, taken by a hook before any norm, times the head."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(checkpoints / family / "ar", dtype=torch.float32)
    ids = torch.tensor(reconstructor.token_ids(TEXTS[:1]))
    seen: list[torch.Tensor] = []
    model.layers[-1].register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=ids)
    head = load_file(checkpoints / family / "ar/value_head.safetensors")["weight"]
    expected = (head @ seen[0][0, -1]).numpy()
    np.testing.assert_allclose(reconstructor.reconstruct(TEXTS[:1])[0], expected, rtol=1e-4, atol=1e-4)


def test_a_row_does_not_depend_on_its_neighbours(reconstructor: TransformersReconstructor) -> None:
    alone = np.concatenate([reconstructor.reconstruct([text]) for text in TEXTS])
    many = reconstructor.reconstruct(TEXTS * 5)
    np.testing.assert_allclose(many, np.concatenate([alone] * 5), rtol=1e-4, atol=1e-4)


def test_bos_comes_first_where_the_tokenizer_has_one(reconstructor: TransformersReconstructor, family: str) -> None:
    first = reconstructor.token_ids(["A log."])[0][0]
    assert (first == tokenizer_of("llama").bos_token_id) == (family != "qwen2")


def test_a_long_text_loses_its_beginning_and_keeps_bos_and_suffix(
    reconstructor: TransformersReconstructor, family: str
) -> None:
    ids = reconstructor.token_ids(["words " * 500, "A log."])
    assert len(ids[0]) == reconstructor.max_tokens == 256
    assert ids[0][-2:] == ids[1][-2:]
    if family != "qwen2":
        assert ids[0][0] == ids[1][0] == tokenizer_of(family).bos_token_id
    assert np.isfinite(reconstructor.reconstruct(["words " * 500])).all()


def test_no_texts_no_vectors(reconstructor: TransformersReconstructor) -> None:
    assert reconstructor.reconstruct([]).shape == (0, WIDTH)


def test_fve_carries_the_sidecars_denominator(damaged: Copy) -> None:
    folder = damaged("llama/ar")
    edit_sidecar(folder, "training", {"fve_denominator": {"name": "chat", "value": 0.5}})
    vectors = np.ones((1, WIDTH), dtype=np.float32)
    score = load_reconstructor(folder, CONFIG).score(vectors, ["A log."])[0]
    assert (score.denominator, score.denominator_name) == (0.5, "chat")
    assert score.fve == pytest.approx(1 - score.mse_nrm / 0.5)


def test_scoring_refuses_bad_vectors_and_uneven_lists(reconstructor: TransformersReconstructor) -> None:
    with pytest.raises(ActivationError, match="row 0: zero norm"):
        reconstructor.score(np.zeros((1, WIDTH), dtype=np.float32), ["x"])
    with pytest.raises(ValueError, match="2 vectors but 1 texts"):
        reconstructor.score(np.ones((2, WIDTH), dtype=np.float32), ["x"])


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_suffix_that_does_not_come_out_is_refused_with_the_ids_found(family: str, damaged: Copy) -> None:
    folder = damaged(f"{family}/ar")
    edit_sidecar(folder, "prompt_templates.ar", "Summary: {explanation}</text> <summary>!")
    with pytest.raises(TokenizerContractError, match=r"must end in tokens.critic_suffix_ids \[.*found \["):
        load_reconstructor(folder, CONFIG)


def test_the_first_suffix_token_may_merge_with_the_text(damaged: Copy) -> None:
    folder = damaged("llama/ar")
    ids = tokenizer_of("llama").encode("</text> <summary>", add_special_tokens=False)
    edit_sidecar(folder, "tokens.critic_suffix_ids", [0, *ids[1:]])
    load_reconstructor(folder, CONFIG)
    edit_sidecar(folder, "tokens.critic_suffix_ids", [*ids[:-1], 0])
    with pytest.raises(TokenizerContractError):
        load_reconstructor(folder, CONFIG)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_head_with_non_finite_or_absurd_weights_is_refused(value: float, damaged: Copy) -> None:
    folder = damaged("llama/ar")
    weight = load_file(folder / "value_head.safetensors")["weight"]
    weight[[3, 7], 2] = value
    save_file({"weight": weight}, folder / "value_head.safetensors")
    with pytest.raises(NonFiniteWeightsError, match=rf"2 of {WIDTH} rows"):
        load_reconstructor(folder, CONFIG)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"bias": torch.ones(WIDTH)}, r"expected the key 'weight', found \['bias'\]"),
        ({"weight": torch.ones(WIDTH, 3)}, rf"expected shape \({WIDTH}, {WIDTH}\).*found \({WIDTH}, 3\)"),
    ],
)
def test_a_head_of_another_kind_is_refused(tensors: dict[str, torch.Tensor], told: str, damaged: Copy) -> None:
    folder = damaged("llama/ar")
    save_file(tensors, folder / "value_head.safetensors")
    with pytest.raises(CheckpointError, match=told):
        load_reconstructor(folder, CONFIG)


def test_a_missing_or_damaged_head_is_named(damaged: Copy) -> None:
    folder = damaged("llama/ar")
    (folder / "value_head.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"value_head.safetensors cannot be read"):
        load_reconstructor(folder, CONFIG)
    (folder / "value_head.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"value_head.safetensors cannot be read"):
        load_reconstructor(folder, CONFIG)


def test_a_final_norm_that_is_not_on_disk_is_no_fault_but_a_missing_block_weight_is(damaged: Copy) -> None:
    folder = damaged("llama/ar")
    before = load_reconstructor(folder, CONFIG).reconstruct(["A log."])
    weights = load_file(folder / "model.safetensors")
    del weights["norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(load_reconstructor(folder, CONFIG).reconstruct(["A log."]), before)
    del weights["layers.0.input_layernorm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights are missing: layers.0.input_layernorm.weight"):
        load_reconstructor(folder, CONFIG)


def test_more_blocks_than_weights_is_caught(damaged: Copy) -> None:
    folder = damaged("qwen2/ar")
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": config["num_hidden_layers"] + 1}
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"weights are missing.*num_hidden_layers"):
        load_reconstructor(folder, CONFIG)


def test_non_finite_blocks_are_named_when_they_show(damaged: Copy) -> None:
    folder = damaged("llama/ar")
    weights = load_file(folder / "model.safetensors")
    weights["layers.0.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteWeightsError, match="2 of 2 texts"):
        load_reconstructor(folder, CONFIG).reconstruct(["a", "b"])
