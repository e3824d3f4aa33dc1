"""Every released packaging and dialect against plain PyTorch written from the documented contract."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nla_monitor.config import NLAConfig
from nla_monitor.errors import CheckpointError, ConfigError, NonFiniteWeightsError, SidecarError, TokenizerContractError
from nla_monitor.nla import load_reconstructor, load_sidecar, load_verbalizer
from nla_monitor.nla.fidelity import cosines
from nla_monitor.nla.loading import blocks_of
from nla_monitor.nla.sidecar import Dialect
from tests.nla_formats import (
    ALPHA,
    AR_TEMPLATE,
    AV_TEMPLATE,
    BLOCKS,
    DEPTH_AR_TEMPLATE,
    DEPTH_AV_TEMPLATE,
    FAMILIES,
    LAYER,
    MARKER,
    ORACLE_QUESTION,
    RANK,
    SCALE,
    WIDTH,
    Nla,
    Plain,
    marker_id,
    prompt_ids,
    sidecar,
    tokenizer_of,
    without_scale,
    write_adapter,
    write_added,
    write_base,
    write_depth,
    write_described_adapter,
    write_oracle,
    write_peft,
    write_released,
    write_yaml,
)

CONFIG = NLAConfig(max_new_tokens=10, batch_size=4)
TEXTS = ["A log of failing tests.", "", "The model suspects a test."]
RS = ALPHA / math.sqrt(RANK)
Vectors = npt.NDArray[np.float32]
Write = Callable[..., Nla]


class Case(NamedTuple):
    """One format, and how to compute it by hand."""

    write: Callable[[Path, str], Nla]
    config: NLAConfig = CONFIG
    av: str = AV_TEMPLATE
    ar: str = AR_TEMPLATE
    adds: bool = False
    av_scaling: float | None = None
    """Of LoRA weights; None where there are none."""
    ar_scaling: float | None = None
    ar_blocks: int = LAYER + 1


def _merged(root: Path, family: str) -> Nla:
    return write_added(root, family, merged=True)


def _oracle_prompt(placeholders: int) -> str:
    return f"Layer: {LAYER}\n{' ?' * placeholders} \n{ORACLE_QUESTION}"


_ORACLE = CONFIG.model_copy(update={"question": ORACLE_QUESTION, "layer": LAYER, "placeholders": 3})
_DEPTH = CONFIG.model_copy(update={"layer": LAYER})
_UNMERGED = CONFIG.model_copy(update={"merge_adapter": False})
CASES = {
    "released": Case(write_released),
    "added": Case(write_added, adds=True, av_scaling=RS, ar_scaling=RS),
    "added, unmerged": Case(write_added, _UNMERGED, adds=True, av_scaling=RS, ar_scaling=RS),
    "added, merged": Case(_merged, CONFIG.model_copy(update={"dialect": "add"}), adds=True, ar_blocks=LAYER + 2),
    "depth": Case(
        write_depth,
        _DEPTH,
        # Layer 2 of 4 blocks is at 50 %; 47 is the nearest percentage that was trained on.
        DEPTH_AV_TEMPLATE.replace("{pct}", "47"),
        DEPTH_AR_TEMPLATE.replace("{pct}", "47").replace("{inj}", MARKER),
        av_scaling=ALPHA / RANK,
        ar_scaling=ALPHA / RANK,
    ),
    "oracle": Case(write_oracle, _ORACLE, _oracle_prompt(3), adds=True, av_scaling=ALPHA / RANK),
    "peft": Case(write_peft, av_scaling=ALPHA / RANK, ar_scaling=ALPHA / RANK),
}
COMBINATIONS = [("released", family) for family in FAMILIES] + [
    ("added", "qwen2"),
    ("added", "gemma3"),
    ("added, unmerged", "llama"),
    ("added, merged", "gemma3_text"),
    ("depth", "qwen2"),
    ("oracle", "llama"),
    ("oracle", "gemma3"),
    ("peft", "qwen2"),
]


@pytest.fixture(scope="module", params=COMBINATIONS, ids=" ".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, str, Nla]:
    name, family = request.param
    case = CASES[name]
    return case, family, case.write(tmp_path_factory.mktemp("nla"), family)


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    """``[6, WIDTH]`` random activations of very different norms."""
    rng = np.random.default_rng(3)
    return (rng.standard_normal((12, WIDTH)) * rng.uniform(0.1, 100, (12, 1))).astype(np.float32)


class ByHand(NamedTuple):
    """An AV's prompt and decoder, computed without the product."""

    plain: Plain
    ids: list[int]
    markers: list[int]

    def rows(self, case: Case, vector: torch.Tensor) -> torch.Tensor:
        """The prompt's embeddings; the marker's replaced where the dialect does so."""
        rows = self.plain.embed(self.ids)
        if not case.adds:
            rows[self.markers[0]] = vector * SCALE / vector.norm()
        return rows

    def add(self, case: Case, vector: torch.Tensor) -> dict[int, tuple[list[int], torch.Tensor]]:
        """What is added after which block."""
        return {1: (self.markers, vector)} if case.adds else {}


def by_hand(case: Case, family: str, nla: Nla) -> ByHand:
    lora = None if case.av_scaling is None else nla.av / "adapter_model.safetensors"
    plain = Plain(nla.av_weights, lora=lora, scaling=case.av_scaling or 0.0)
    ids = prompt_ids(family, case.av.replace("{injection_char}", MARKER))
    if case.write is write_oracle:
        (token,) = tokenizer_of(family).encode(" ?", add_special_tokens=False)
        return ByHand(plain, ids, [at for at, found in enumerate(ids) if found == token][:3])
    return ByHand(plain, ids, [ids.index(marker_id(family))])


def test_embeddings_injected_row_and_greedy_tokens(made: tuple[Case, str, Nla], vectors: Vectors) -> None:
    case, family, nla = made
    av = load_verbalizer(nla.av, case.config)
    hand, seen = by_hand(case, family, nla), av.prompt_embeddings(vectors)
    assert list(av.prompt.ids) == hand.ids
    expected = []
    for row, vector in zip(seen, torch.from_numpy(vectors), strict=True):
        rows = hand.rows(case, vector)
        others = torch.tensor([at not in hand.markers for at in range(len(rows))])
        assert torch.equal(row[others], rows[others]), "the prompt's own embeddings, to the bit"
        torch.testing.assert_close(row, rows, rtol=1e-6, atol=1e-6)
        stop = set(av.stop_ids)
        expected.append(hand.plain.greedy(rows, limit=10, stop=stop, add=hand.add(case, vector)))
    assert av.generate(vectors) == expected
    assert len({tuple(tokens) for tokens in expected}) > 1, "or this shows little"


def test_what_is_added_stands_after_block_1_and_only_once(made: tuple[Case, str, Nla], vectors: Vectors) -> None:
    case, family, nla = made
    av = load_verbalizer(nla.av, case.config)
    hand = by_hand(case, family, nla)
    seen: list[torch.Tensor] = []
    # What block 2 is given is what block 1 gave after every hook.
    watch = blocks_of(av.model)[2].register_forward_pre_hook(lambda _block, args: seen.append(args[0].clone()))
    av.generate(vectors[:2])
    watch.remove()
    first = Plain(nla.av_weights, blocks=2)
    first.weights = hand.plain.weights
    for number, vector in enumerate(torch.from_numpy(vectors[:2])):
        stream = first.stream(hand.rows(case, vector), hand.add(case, vector))
        torch.testing.assert_close(seen[0][number], stream[hand.markers[0] :], rtol=1e-4, atol=1e-4)
    assert all(not block._forward_hooks for block in blocks_of(av.model)), "a hook was left behind"


def test_reconstructions_and_scores(made: tuple[Case, str, Nla], vectors: Vectors) -> None:
    case, family, nla = made
    if nla.ar is None or nla.ar_weights is None:
        with pytest.raises(SidecarError, match=r"has no nla_meta.yaml"):
            load_reconstructor(nla.av, case.config)
        return
    ar = load_reconstructor(nla.ar, case.config)
    assert len(blocks_of(ar.model)) == case.ar_blocks
    lora, head = _reconstructor_weights(case, nla.ar)
    plain = Plain(nla.ar_weights, lora=lora, scaling=case.ar_scaling or 0.0, blocks=case.ar_blocks)
    expected = []
    for text in TEXTS:
        ids = tokenizer_of(family).encode(case.ar.replace("{explanation}", text), add_special_tokens=True)
        expected.append((plain.stream(plain.embed(ids))[-1] @ head.T).numpy())
    found = ar.reconstruct(TEXTS)
    assert cosines(found, np.stack(expected)).min() >= 1 - 1e-5
    scores = ar.score(vectors[: len(TEXTS)], TEXTS)
    known = cosines(vectors[: len(TEXTS)], np.stack(expected))
    np.testing.assert_allclose([score.cosine for score in scores], known, atol=1e-5)
    np.testing.assert_allclose([score.mse_nrm for score in scores], 2 * (1 - known), atol=2e-5)


def _reconstructor_weights(case: Case, folder: Path) -> tuple[Path | None, torch.Tensor]:
    packed = folder / "ar_lora_value_head.safetensors"
    if packed.exists():
        return packed, load_file(packed)["value_head.weight"]
    lora = None if case.ar_scaling is None else folder / "adapter_model.safetensors"
    file = folder / "value_head.safetensors"
    return lora, load_file(file)["weight"] if file.exists() else torch.eye(WIDTH)


def test_the_dialect_is_found_where_the_checkpoint_allows_it(made: tuple[Case, str, Nla]) -> None:
    case, _, nla = made
    expected = Dialect.ADD if case.adds else Dialect.REPLACE
    if case.write is write_depth:
        expected = Dialect.DEPTH
    elif case.write is write_oracle:
        expected = Dialect.ORACLE
    assert load_sidecar(nla.av, "av", config=case.config).dialect is expected


def test_claims_are_scored_with_the_vector_in_place(tmp_path: Path, vectors: Vectors) -> None:
    """Teacher forcing sees the same injection as decoding: the likelihood of what greedy decoding wrote is the best."""
    from nla_monitor.nla.base import Choice

    av = load_verbalizer(write_oracle(tmp_path, "llama").av, _ORACLE)
    text = av.verbalize(vectors[:1])[0].text
    (scores,) = av.score_continuations(vectors[:1], [Choice("", (text, text[::-1]))])
    (others,) = av.score_continuations(-vectors[:1], [Choice("", (text, text[::-1]))])
    assert scores[0].logprob != pytest.approx(others[0].logprob, abs=1e-3)


# -- provenance -----------------------------------------------------------------------------------------------------


def test_provenance_names_base_adapter_sidecar_and_question(tmp_path: Path) -> None:
    nla = write_oracle(tmp_path, "qwen2")
    known = load_verbalizer(nla.av, _ORACLE).content_hash
    assert known == load_verbalizer(nla.av, _ORACLE).content_hash
    asked = _ORACLE.model_copy(update={"question": "What is planned?"})
    assert load_verbalizer(nla.av, asked).content_hash != known
    config = nla.av_weights / "config.json"
    config.write_text(config.read_text() + " ")
    assert load_verbalizer(nla.av, _ORACLE).content_hash != known


def test_provenance_names_a_sidecar_in_the_root(tmp_path: Path) -> None:
    nla = write_added(tmp_path, "qwen2")
    known = load_verbalizer(nla.av, CONFIG).content_hash
    with (tmp_path / "nla_meta.yaml").open("a") as stream:
        stream.write("# a note\n")
    assert load_verbalizer(nla.av, CONFIG).content_hash != known


# -- packaging ------------------------------------------------------------------------------------------------------


def test_a_root_holds_both_halves(tmp_path: Path, vectors: Vectors) -> None:
    nla = write_added(tmp_path, "qwen2")
    assert load_verbalizer(tmp_path, CONFIG).generate(vectors) == load_verbalizer(nla.av, CONFIG).generate(vectors)
    root = load_reconstructor(tmp_path, CONFIG)
    assert root.layer == LAYER
    (tmp_path / "ar").rename(tmp_path / "critic")
    np.testing.assert_array_equal(load_reconstructor(tmp_path, CONFIG).reconstruct(TEXTS), root.reconstruct(TEXTS))


def test_a_root_with_several_candidates_asks_which(tmp_path: Path) -> None:
    nla = write_added(tmp_path, "qwen2")
    for name in ("av_sft_lora", "av_rl_lora"):
        shutil.copytree(nla.av, tmp_path / name)
    shutil.rmtree(nla.av)
    with pytest.raises(CheckpointError, match=r"several AV checkpoints: av_rl_lora, av_sft_lora. Name the folder"):
        load_verbalizer(tmp_path, CONFIG)
    assert load_verbalizer(tmp_path / "av_rl_lora", CONFIG).layer == LAYER


def test_several_named_sidecars_ask_which(tmp_path: Path) -> None:
    nla = write_peft(tmp_path, "qwen2")
    for name in ("one", "two"):
        shutil.copy(nla.av / "av.nla_meta.yaml", nla.av / f"{name}.nla_meta.yaml")
    assert load_sidecar(nla.av, "av").role == "av"
    (nla.av / "av.nla_meta.yaml").unlink()
    with pytest.raises(SidecarError, match=r"several sidecars: one.*, two.*Rename the AV's to av.nla_meta.yaml"):
        load_sidecar(nla.av, "av")


def test_an_adapter_on_an_adapter(tmp_path: Path, vectors: Vectors) -> None:
    """A later stage's LoRA is stacked on the earlier one's: both count."""
    nla = write_added(tmp_path, "qwen2")
    write_adapter(nla.av_weights, tmp_path / "later", rslora=True, seed=30)
    stacked = CONFIG.model_copy(update={"base": str(nla.av)})
    av = load_verbalizer(tmp_path / "later", stacked)
    hand = by_hand(CASES["added"], "qwen2", nla)
    second = Plain(nla.av_weights, lora=tmp_path / "later/adapter_model.safetensors", scaling=RS)
    first = Plain(nla.av_weights)
    for name, weight in second.weights.items():
        hand.plain.weights[name] = hand.plain.weights[name] + weight - first.weights[name]
    for vector, tokens in zip(torch.from_numpy(vectors), av.generate(vectors), strict=True):
        rows, add = hand.rows(CASES["added"], vector), hand.add(CASES["added"], vector)
        assert hand.plain.greedy(rows, limit=10, stop=set(av.stop_ids), add=add) == tokens


def test_a_reconstructor_that_kept_its_final_norm(tmp_path: Path) -> None:
    """Adapters of early training code were trained with the norm in place; their description says so."""
    base = write_base(tmp_path, "qwen2")
    folder = write_described_adapter(tmp_path / "ar", base, stripped=False)
    write_yaml(folder / "nla_meta.yaml", sidecar("qwen2", "ar"))
    plain = Plain(base, lora=folder / "ar_lora_value_head.safetensors", scaling=RS, blocks=LAYER + 1)
    plain.weights["norm.weight"] = torch.linspace(0.1, 3, WIDTH)
    stored = load_file(base / "model.safetensors") | {"model.norm.weight": plain.weights["norm.weight"]}
    save_file(stored, base / "model.safetensors", metadata={"format": "pt"})
    ids = tokenizer_of("qwen2").encode(AR_TEMPLATE.replace("{explanation}", TEXTS[0]))
    head = load_file(folder / "ar_lora_value_head.safetensors")["value_head.weight"]
    expected = plain.final_norm(plain.stream(plain.embed(ids))[-1]) @ head.T
    found = load_reconstructor(folder, CONFIG).reconstruct(TEXTS[:1])
    assert cosines(found, expected.numpy()[None]).min() >= 1 - 1e-5


def test_float32_on_disk_is_loaded_as_bfloat16_where_asked(tmp_path: Path, vectors: Vectors) -> None:
    nla = write_added(tmp_path, "qwen2")
    half = CONFIG.model_copy(update={"dtype": "bfloat16"})
    av, ar = load_verbalizer(nla.av, half), load_reconstructor(tmp_path / "ar", half)
    assert {value.dtype for value in av.model.parameters()} == {torch.bfloat16}
    assert len(av.generate(vectors)) == len(vectors)
    exact = load_reconstructor(tmp_path / "ar", CONFIG).reconstruct(TEXTS)
    assert cosines(ar.reconstruct(TEXTS), exact).min() > 0.99


# -- what is told apart, and refused -------------------------------------------------------------------------------


def test_an_adapter_of_unclear_dialect_is_refused_until_told(tmp_path: Path) -> None:
    nla = write_added(tmp_path, "qwen2")
    write_yaml(tmp_path / "nla_meta.yaml", sidecar("qwen2", "av"))
    with pytest.raises(SidecarError, match=r"rsLoRA adapter with an injection_scale.*Set nla.dialect: replace.*add"):
        load_verbalizer(nla.av, CONFIG)
    for told in ("replace", "add"):
        assert load_verbalizer(nla.av, CONFIG.model_copy(update={"dialect": told})).contract.dialect == told
    write_yaml(tmp_path / "nla_meta.yaml", sidecar("qwen2", "av") | {"dialect": "add"})
    assert load_verbalizer(nla.av, CONFIG).contract.dialect is Dialect.ADD


@pytest.mark.parametrize(("told", "found"), [("depth", r"one of \{pct\}"), ("oracle", "ao_config.json beside")])
def test_a_dialect_that_the_checkpoint_contradicts_is_refused(told: str, found: str, tmp_path: Path) -> None:
    nla = write_released(tmp_path, "qwen2")
    with pytest.raises(SidecarError, match=found):
        load_verbalizer(nla.av, CONFIG.model_copy(update={"dialect": told}))


def test_an_oracle_is_nothing_else(tmp_path: Path) -> None:
    nla = write_oracle(tmp_path, "qwen2")
    with pytest.raises(SidecarError, match=r"makes this an activation oracle, but nla.dialect is 'add'"):
        load_verbalizer(nla.av, CONFIG.model_copy(update={"dialect": "add"}))
    with pytest.raises(SidecarError, match=r"the layer \(act_layers, or nla.layer in the config\) is missing"):
        load_verbalizer(nla.av, CONFIG)


def test_an_oracle_of_one_layer_needs_no_more(tmp_path: Path) -> None:
    nla = write_oracle(tmp_path, "qwen2", act_layers=[1])
    av = load_verbalizer(nla.av, CONFIG)
    assert (av.layer, len(av.prompt.offsets)) == (1, 1)


def test_a_placeholder_that_is_no_single_token_is_refused(tmp_path: Path) -> None:
    nla = write_oracle(tmp_path, "qwen2", special_token=" \u2603\u2603")  # noqa: S106 - a text
    with pytest.raises(TokenizerContractError, match="expected 3 side by side"):
        load_verbalizer(nla.av, _ORACLE)


def test_a_block_that_is_not_there_is_refused(tmp_path: Path) -> None:
    nla = write_oracle(tmp_path, "qwen2", hook_onto_layer=BLOCKS)
    with pytest.raises(
        CheckpointError, match=rf"after block {BLOCKS}, and the model has {BLOCKS} \(0 to {BLOCKS - 1}\)"
    ):
        load_verbalizer(nla.av, _ORACLE)


def test_a_nla_for_any_layer_asks_for_one(tmp_path: Path) -> None:
    nla = write_depth(tmp_path, "qwen2")
    for role in ("av", "ar"):
        with pytest.raises(SidecarError, match=r"reads any. Set nla.layer"):
            load_sidecar(tmp_path / role, role, config=CONFIG)
    assert load_sidecar(nla.av, "av", config=_DEPTH).layer == LAYER


def test_a_nla_for_one_layer_takes_no_other(tmp_path: Path) -> None:
    nla = write_released(tmp_path, "qwen2")
    with pytest.raises(SidecarError, match=rf"expected 3 \(nla.layer\), found {LAYER}. This NLA reads one layer"):
        load_verbalizer(nla.av, CONFIG.model_copy(update={"layer": 3}))
    assert load_verbalizer(nla.av, CONFIG.model_copy(update={"layer": LAYER})).layer == LAYER


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    nla = write_added(tmp_path, "qwen2")
    file = nla.av / "adapter_model.safetensors"
    weights = load_file(file)
    first = next(iter(weights))
    for changed, told in (
        ({name: value for name, value in weights.items() if name != first}, "are missing: layers.0.self_attn"),
        ({name.replace("layers.3", "layers.9"): value for name, value in weights.items()}, "have no place in it"),
        (weights | {first: torch.zeros(RANK, WIDTH + 1)}, "have another shape"),
    ):
        save_file(changed, file)
        with pytest.raises(CheckpointError, match=f"does not fit its base model: weights .*{told}"):
            load_verbalizer(nla.av, CONFIG)


def test_a_base_that_is_not_there_is_named(tmp_path: Path) -> None:
    nla = write_added(tmp_path, "qwen2")
    shutil.move(nla.av_weights, tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"is a LoRA adapter of .*neither an existing folder.*Or set nla.base"):
        load_verbalizer(nla.av, CONFIG)
    moved = CONFIG.model_copy(update={"base": str(tmp_path / "moved")})
    assert load_verbalizer(nla.av, moved).layer == LAYER


def test_pickled_adapters_and_other_kinds_are_refused(tmp_path: Path) -> None:
    nla = write_added(tmp_path, "qwen2")
    (nla.av / "adapter_model.safetensors").rename(nla.av / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickled weights are refused"):
        load_verbalizer(nla.av, CONFIG)
    file = nla.av / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"peft_type": "IA3"}))
    with pytest.raises(CheckpointError, match=r"adapter of type 'IA3'; LoRA is read. Merge it"):
        load_verbalizer(nla.av, CONFIG)


def test_a_reconstructor_that_does_not_say_how_it_was_built_is_refused(tmp_path: Path) -> None:
    nla = write_added(tmp_path, "qwen2")
    assert nla.ar is not None
    file = nla.ar / "ar_meta.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in known.items() if name != "final_norm_stripped"}))
    with pytest.raises(SidecarError, match="final_norm_stripped missing"):
        load_reconstructor(nla.ar, CONFIG)
    file.write_text(json.dumps({**known, "ar_num_layers": BLOCKS + 1}))
    with pytest.raises(CheckpointError, match=f"{BLOCKS + 1} blocks are wanted and it has {BLOCKS}"):
        load_reconstructor(nla.ar, CONFIG)
    file.write_text(json.dumps(known))
    weights = load_file(nla.ar / "ar_lora_value_head.safetensors")
    weights["value_head.weight"][0, 0] = torch.nan
    save_file(weights, nla.ar / "ar_lora_value_head.safetensors")
    with pytest.raises(NonFiniteWeightsError, match=f"1 of {WIDTH} rows"):
        load_reconstructor(nla.ar, CONFIG)


def test_a_reconstructor_that_needs_pickled_means_is_refused(tmp_path: Path) -> None:
    nla = write_depth(tmp_path, "qwen2")
    assert nla.ar is not None
    content = yaml.safe_load((nla.ar / "nla_meta.yaml").read_text())
    write_yaml(nla.ar / "nla_meta.yaml", content | {"training": {"mean_subtract": True}})
    with pytest.raises(SidecarError, match=r"mean_subtract is set.*pickle"):
        load_reconstructor(nla.ar, _DEPTH)


def test_four_bit_weights_need_a_gpu(tmp_path: Path) -> None:
    nla = write_added(tmp_path, "qwen2")
    with pytest.raises(ConfigError, match=r"nla.quantization = '4bit' needs a GPU and nla.device is 'cpu'"):
        load_verbalizer(nla.av, CONFIG.model_copy(update={"quantization": "4bit"}))


def test_the_adding_dialect_needs_no_scale_and_the_released_one_does(tmp_path: Path) -> None:
    nla = write_released(tmp_path, "qwen2")
    write_yaml(nla.av / "nla_meta.yaml", without_scale(sidecar("qwen2", "av")))
    with pytest.raises(SidecarError, match="injection_scale is missing"):
        load_verbalizer(nla.av, CONFIG)
    assert load_verbalizer(nla.av, CONFIG.model_copy(update={"dialect": "add"})).contract.injection_scale is None


# -- embeddings that are scaled after the prompt is embedded --------------------------------------------------------


def test_a_model_that_scales_after_embedding_gets_the_row_at_the_norm_of_training(
    tmp_path: Path, vectors: Vectors
) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM

    av = write_released(tmp_path, "qwen2").av
    config = GraniteConfig(
        **{
            name: json.loads((av / "config.json").read_text())[name]
            for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        },
        embedding_multiplier=12.0,
        pad_token_id=0,
    )
    GraniteForCausalLM(config).save_pretrained(av)
    verbalizer = load_verbalizer(av, CONFIG)
    seen: list[torch.Tensor] = []
    blocks_of(verbalizer.model)[0].register_forward_pre_hook(lambda _block, args: seen.append(args[0].clone()))
    verbalizer.generate(vectors[:2])
    np.testing.assert_allclose(seen[0][:, 0].norm(dim=-1).numpy(), SCALE, rtol=1e-4)


def test_a_model_with_a_second_embedding_by_token_is_refused(tmp_path: Path) -> None:
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    av = write_released(tmp_path, "gemma3_text").av
    known = json.loads((av / "config.json").read_text())
    config = Gemma3nTextConfig(
        **{
            name: known[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "pad_token_id")
        },
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size_per_layer_input=known["vocab_size"],
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        activation_sparsity_pattern=None,
    )
    Gemma3nForCausalLM(config).save_pretrained(av)
    with pytest.raises(CheckpointError, match="second embedding that is looked up by token"):
        load_verbalizer(av, CONFIG)
