"""Small random NLAs in every released packaging and dialect, and what they must give, from the documented contract.

``write_*`` make checkpoint folders as their training code does (peft writes peft's files). ``Plain`` computes a decoder
from the safetensors and ``config.json`` alone: no cache, no batch, no model class.

    released       full folders; Qwen2 (no BOS), Llama (BOS), Gemma-3 text, Gemma-3 inside a multimodal config
    added          rsLoRA verbalizer on a base, or merged; reconstructor as ``ar_meta.json`` or full ``critic/``
    depth          LoRA pair for any layer; the prompts name the depth, the AV's opens the explanation
    oracle         LoRA with ``ao_config.json``: questions about placeholders
    peft           LoRA pair of the released dialect with sidecars ``*.nla_meta.yaml``
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
)

WIDTH, BLOCKS, LAYER = 32, 4, 2
RANK, ALPHA = 4, 8
MARKER = "\u320e"
SCALE = 20.0
FAMILIES = ("qwen2", "llama", "gemma3_text", "gemma3")
AV_TEMPLATE = "Here is a vector: <concept>{injection_char}</concept>. Explain it."
AR_TEMPLATE = "Summary of the text: <text>{explanation}</text> <summary>"
DEPTH_AV_TEMPLATE = "The vector from depth {pct}%: <concept>{injection_char}</concept>. Explain it.\n\n<explanation>"
DEPTH_AR_TEMPLATE = "Summary of the text from depth {pct}%: <text>{explanation}</text> <summary>{inj}"
ORACLE_QUESTION = "Is this a test ?"
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_VISION = re.compile("vision|multi_modal")
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
_CORPUS = [
    "Here is a vector: <concept>x</concept>. Explain it.",
    "Summary of the text: <text>A log of failing tests.</text> <summary>",
    "Layer: 2\n ? ? ? ? \nIs this a test ?",
    "<explanation>Agent transcript. The model suspects a test.</explanation>",
] * 20


class Nla(NamedTuple):
    """Where a pair lies, and what one needs to compute it by hand."""

    av: Path
    ar: Path | None
    av_weights: Path
    """Folder of the AV's full weights (a base, for adapters)."""
    ar_weights: Path | None


@cache
def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE; all families but qwen2 put a BOS first."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([part for text in _CORPUS for part in (text, *text.split())], trainer)
    core.add_special_tokens([AddedToken(token, normalized=False) for token in ("<pad>", "<eos>", "<bos>", "<|end|>")])
    core.add_tokens([AddedToken(MARKER, normalized=False)])
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    if family != "qwen2":
        core.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
        )
        special |= {"bos_token": "<bos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)  # type: ignore[no-untyped-call]
    tokenizer.chat_template = CHAT if family == "qwen2" else "{{ bos_token }}" + CHAT
    return tokenizer


def _model(family: str, seed: int, blocks: int) -> PreTrainedModel:
    tokenizer = tokenizer_of(family)
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**common))
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**common))
    # A window shorter than the prompt and two kinds of blocks, as in the real ones.
    text = Gemma3TextConfig(
        **common, head_dim=8, query_pre_attn_scalar=8, sliding_window=16, layer_types=_kinds(blocks)
    )
    if family == "gemma3_text":
        return Gemma3ForCausalLM(text)
    vision = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    nested = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, tie_word_embeddings=False)
    return Gemma3ForConditionalGeneration(nested)


def _kinds(blocks: int) -> list[str]:
    return ["full_attention" if number % 2 else "sliding_attention" for number in range(blocks)]


def _save(model: PreTrainedModel, family: str, folder: Path) -> Path:
    tokenizer = tokenizer_of(family)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _write_head(folder: Path, seed: int) -> Tensor:
    head = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed))
    save_file({"weight": head}, folder / "value_head.safetensors")
    return head


def write_yaml(file: Path, content: object) -> None:
    """YAML with its characters as they are."""
    file.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")


def prompt_ids(family: str, content: str) -> list[int]:
    """A user message in the chat template, written out by hand."""
    text = f"<|user|>\n{content}<|end|>\n<|assistant|>\n"
    start = [] if family == "qwen2" else [tokenizer_of(family).bos_token_id]
    return [*start, *tokenizer_of(family).encode(text, add_special_tokens=False)]


def marker_id(family: str) -> int:
    """The marker's token."""
    return int(tokenizer_of(family).encode(MARKER, add_special_tokens=False)[0])


def sidecar(family: str, role: str, *, av: str = AV_TEMPLATE, ar: str = AR_TEMPLATE) -> dict[str, Any]:
    """``nla_meta.yaml`` as released, schema 2."""
    ids = prompt_ids(family, av.replace("{injection_char}", MARKER))
    at = ids.index(marker_id(family))
    suffix = ar.partition("{explanation}")[2].replace("{inj}", MARKER)
    suffix_ids = tokenizer_of(family).encode(suffix, add_special_tokens=False)
    return {
        "kind": "nla_model",
        "schema_version": 2,
        "role": role,
        "base_checkpoint": f"tests/{family}",
        "d_model": WIDTH,
        "extraction_layer_index": LAYER,
        "extraction": {"injection_scale": SCALE if role == "av" else None, "mse_scale": math.sqrt(WIDTH)},
        "tokens": {
            "injection_char": MARKER,
            "injection_token_id": ids[at],
            "injection_left_neighbor_id": ids[at - 1],
            "injection_right_neighbor_id": ids[at + 1],
            "critic_suffix_ids": list(suffix_ids) if role == "ar" else None,
        },
        "prompt_templates": {"av": av, "ar": ar},
    }


def without_scale(content: dict[str, Any]) -> dict[str, Any]:
    """A sidecar of the adding dialect: nothing in it uses a scale."""
    return {**content, "extraction": {}}


def write_released(root: Path, family: str) -> Nla:
    """Full folders with all that a release has."""
    av = _save(_model(family, 0, BLOCKS), family, root / "av")
    write_yaml(av / "nla_meta.yaml", sidecar(family, "av"))
    ar = _cut(_model(family, 1, LAYER + 1), family, root / "ar")
    _write_head(ar, 1)
    write_yaml(ar / "nla_meta.yaml", sidecar(family, "ar"))
    return Nla(av, ar, av, ar)


def _cut(model: PreTrainedModel, family: str, folder: Path) -> Path:
    """An AR's blocks: the model without its language head."""
    model.model.save_pretrained(folder)
    tokenizer_of(family).save_pretrained(folder)
    return folder


def write_base(root: Path, family: str) -> Path:
    """A plain model, the target of adapters."""
    return _save(_model(family, 32, BLOCKS), family, root / "base")


def write_adapter(base: Path, folder: Path, *, rslora: bool, seed: int = 2, blocks: int = BLOCKS) -> PeftModel:
    """A LoRA adapter in peft's own format, its weights drawn at random, on the first blocks of a base."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config_of_base = AutoConfig.from_pretrained(base)
    if blocks != BLOCKS:
        config_of_base.num_hidden_layers, config_of_base.layer_types = blocks, config_of_base.layer_types[:blocks]

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=rslora, target_modules=_TARGETS, lora_dropout=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that will go
        peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base, config=config_of_base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in peft.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    peft.save_pretrained(str(folder))
    return peft


def write_added(root: Path, family: str, *, merged: bool = False) -> Nla:
    """A verbalizer trained by adding: rsLoRA and ``ar_meta.json``, or merged with a full ``critic/``; one root sidecar.

    The full critic has a block more than K + 1, as one of the released ones has.
    """
    base = write_base(root, family)
    peft = write_adapter(base, root / "av", rslora=True)
    write_yaml(root / "nla_meta.yaml", without_scale(sidecar(family, "av")))
    if not merged:
        ar = write_described_adapter(root / "ar", base)
        return Nla(root / "av", ar, base, base)
    whole = root / "merged"
    _save(peft.merge_and_unload(), family, whole)
    write_yaml(whole / "nla_meta.yaml", without_scale(sidecar(family, "actor")))
    critic = _cut(_model(family, 7, LAYER + 2), family, root / "critic")
    _write_head(critic, 3)
    write_yaml(critic / "nla_meta.yaml", sidecar(family, "critic"))
    return Nla(whole, critic, whole, critic)


def write_described_adapter(folder: Path, base: Path, *, stripped: bool = True) -> Path:
    """A reconstructor's LoRA and head, as its trainer saves them."""
    folder.mkdir(parents=True)
    config = json.loads((base / "config.json").read_text())
    text = config.get("text_config", config)
    inside = "model.language_model" if "text_config" in config else "model"
    head_size = text.get("head_dim") or WIDTH // text["num_attention_heads"]
    heads = {"q": text["num_attention_heads"], "k": text["num_key_value_heads"], "v": text["num_key_value_heads"]}
    generator, tensors = torch.Generator().manual_seed(4), dict[str, Tensor]()
    for block in range(LAYER + 1):
        for part in "qkvo":
            name = f"backbone.{inside}.layers.{block}.self_attn.{part}_proj.lora"
            read, written = (heads["q"] * head_size, WIDTH) if part == "o" else (WIDTH, heads[part] * head_size)
            tensors[f"{name}_A.default.weight"] = torch.randn(RANK, read, generator=generator) * 0.2
            tensors[f"{name}_B.default.weight"] = torch.randn(written, RANK, generator=generator) * 0.2
    tensors["value_head.weight"] = torch.randn(WIDTH, WIDTH, generator=generator)
    save_file(tensors, folder / "ar_lora_value_head.safetensors")
    meta = {
        "ar_num_layers": LAYER + 1,
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "quant": "4bit",
        "target_modules": _TARGETS,
        "final_norm_stripped": stripped,
        "base_ckpt": str(base),
    }
    (folder / "ar_meta.json").write_text(json.dumps(meta))
    return folder


def write_depth(root: Path, family: str) -> Nla:
    """A LoRA pair for any layer; the reconstruction is the state at the marker that ends the AR's prompt."""
    base = write_base(root, family)
    for role in ("av", "ar"):
        write_adapter(base, root / role, rslora=False, seed=8 if role == "av" else 9)
        content = sidecar(family, role, av=DEPTH_AV_TEMPLATE, ar=DEPTH_AR_TEMPLATE)
        del content["extraction_layer_index"]
        write_yaml(root / role / "nla_meta.yaml", content)
        tokenizer_of(family).save_pretrained(root / role)
    return Nla(root / "av", root / "ar", base, base)


def write_oracle(root: Path, family: str, **settings: object) -> Nla:
    """An activation oracle: LoRA and ``ao_config.json``, no sidecar, no AR."""
    base = write_base(root, family)
    write_adapter(base, root / "oracle", rslora=False, seed=11)
    known = {"model_name": "tests/base", "hook_onto_layer": 1, "steering_coefficient": 1.0, "act_layers": [1, LAYER]}
    (root / "oracle" / "ao_config.json").write_text(json.dumps(known | settings))
    return Nla(root / "oracle", None, base, None)


def write_peft(root: Path, family: str) -> Nla:
    """The released dialect as a LoRA pair; sidecars are named for the half."""
    base = write_base(root, family)
    for role in ("av", "ar"):
        blocks, seed = (BLOCKS, 12) if role == "av" else (LAYER + 1, 13)
        write_adapter(base, root / role, rslora=False, seed=seed, blocks=blocks)
        write_yaml(root / role / f"{role}.nla_meta.yaml", sidecar(family, role))
    _write_head(root / "ar", 6)
    return Nla(root / "av", root / "ar", base, base)


class Plain:
    """A decoder from its files: Qwen2, Llama and Gemma-3 blocks in plain PyTorch, one sequence, float32.

    Args:
        folder: full weights and ``config.json``.
        lora: adapter weights to add, ``W + scaling * B A``; names as in their file.
        scaling: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        blocks: how many; all by default.
    """

    def __init__(
        self, folder: Path, *, lora: Path | None = None, scaling: float = ALPHA / RANK, blocks: int | None = None
    ) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.config: Mapping[str, Any] = config.get("text_config", config)
        self.gemma = "gemma" in self.config["model_type"]
        self.blocks = blocks or self.config["num_hidden_layers"]
        stored = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
        self.weights = {_short(name): value for name, value in stored.items() if not _VISION.search(name)}
        self.language_head = self.weights.get("lm_head.weight", self.weights["embed_tokens.weight"])
        added = {} if lora is None else load_file(lora)
        for name, value in added.items():
            if "lora_A" in name and not _VISION.search(name):
                right = added[name.replace("lora_A", "lora_B")].float()
                self.weights[_short(name).split(".lora_A")[0] + ".weight"] += scaling * right @ value.float()

    def embed(self, ids: Sequence[int]) -> Tensor:
        """``[tokens, d_model]``; Gemma's are multiplied by ``sqrt(d_model)``."""
        rows = self.weights["embed_tokens.weight"][torch.tensor(list(ids))]
        return rows * torch.tensor(math.sqrt(WIDTH)) if self.gemma else rows

    def stream(self, rows: Tensor, add: Mapping[int, tuple[Sequence[int], Tensor]] | None = None) -> Tensor:
        """Output of the last block, ``[tokens, d_model]``, without the final norm.

        Args:
            rows: embeddings.
            add: by block, positions and the vector that is added there at the norm of the stream.
        """
        for block in range(self.blocks):
            rows = self._block(rows, block).clone()
            positions, vector = (add or {}).get(block, ((), rows[0]))
            for at in positions:
                rows[at] = rows[at] + rows[at].norm() * vector / vector.norm()
        return rows

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm after the last block."""
        return self._norm(hidden, "norm")

    def greedy(
        self,
        rows: Tensor,
        *,
        limit: int,
        stop: set[int],
        add: Mapping[int, tuple[Sequence[int], Tensor]] | None = None,
    ) -> list[int]:
        """Most probable tokens after a prompt, everything computed anew for each."""
        tokens: list[int] = []
        while len(tokens) < limit and not (tokens and tokens[-1] in stop):
            last = self.final_norm(self.stream(rows, add)[-1])
            tokens.append(int((self.language_head @ last).argmax()))
            rows = torch.cat([rows, self.embed(tokens[-1:])])
        return tokens

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return (
            x
            * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"])
            * (1 + weight if self.gemma else weight)
        )

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return functional.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _block(self, rows: Tensor, block: int) -> Tensor:
        at = f"layers.{block}"
        mixed = self._attention(self._norm(rows, f"{at}.input_layernorm"), block)
        before = "pre_feedforward_layernorm" if self.gemma else "post_attention_layernorm"
        if self.gemma:
            mixed = self._norm(mixed, f"{at}.post_attention_layernorm")
        rows = rows + mixed
        x = self._norm(rows, f"{at}.{before}")
        gate = self._linear(x, f"{at}.mlp.gate_proj")
        gate = functional.gelu(gate, approximate="tanh") if self.gemma else functional.silu(gate)
        out = self._linear(gate * self._linear(x, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
        return rows + (self._norm(out, f"{at}.post_feedforward_layernorm") if self.gemma else out)

    def _attention(self, x: Tensor, block: int) -> Tensor:
        at, heads = f"layers.{block}.self_attn", self.config["num_attention_heads"]
        size = self.config.get("head_dim") or WIDTH // heads
        query, key, value = (self._linear(x, f"{at}.{name}_proj").view(len(x), -1, size) for name in "qkv")
        if self.gemma:
            query, key = self._norm(query, f"{at}.q_norm"), self._norm(key, f"{at}.k_norm")
        query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        kind = self.config["layer_types"][block] if self.gemma else "full_attention"
        rope = self.config["rope_parameters"]
        theta = rope.get(kind, rope)["rope_theta"]
        angles = torch.outer(torch.arange(len(x)).float(), theta ** -(torch.arange(0, size, 2).float() / size))
        turn = torch.cat([angles, angles], -1)
        query, key = _rotate(query, turn), _rotate(key, turn)
        key, value = (part.repeat_interleave(heads // len(part), dim=0) for part in (key, value))
        scale = (self.config["query_pre_attn_scalar"] if self.gemma else size) ** -0.5
        distance = torch.arange(len(x))[:, None] - torch.arange(len(x))[None]
        hidden = distance < 0
        if kind == "sliding_attention":
            hidden |= distance >= self.config["sliding_window"]
        scores = (query @ key.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        return self._linear((scores.softmax(-1) @ value).transpose(0, 1).reshape(len(x), -1), f"{at}.o_proj")


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * turn.cos() + torch.cat([-right, left], -1) * turn.sin()


def _short(name: str) -> str:
    """A weight's name inside the decoder, whatever wraps it."""
    return re.sub(r"^.*?(?=layers\.|embed_tokens|norm\.weight$|lm_head)", "", name, count=1)
