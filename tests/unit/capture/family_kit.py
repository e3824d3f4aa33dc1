"""Every decoder family of the installed transformers, made tiny: configs shrunk by the names of their fields.

A default config says what a family is made of; ``tiny`` keeps that and makes every size small. What cannot be told from
a field's name stands in ``OVERRIDES``; what cannot be built here at all stands in ``NOT_BUILT`` with its reason.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto import modeling_auto

MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
)
LAYERS, WIDTH, HEADS, HEAD_DIM = 4, 32, 2, 16
ROWS, LENGTH, DECODER_LENGTH = 2, 12, 9
_FIRST_WORD, _LAST_WORD, _VOCAB = 3, 90, 128

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
_SIZES: tuple[tuple[str, int], ...] = tuple(
    (rf"(?:{pattern})", size)
    for pattern, size in (
        ("|".join(_DEPTHS) + "|encoder_layers|num_decoder_layers|num_encoder_layers|depth|n_blocks|layers", LAYERS),
        (
            ".*hidden_size|d_model|n_embd|embed_dim|dim|embedding_size|hidden_dim|d_embed|(?:model|output|projection)_dim",
            WIDTH,
        ),
        (".*attention_heads|n_heads?|.*num_heads|.*key_value_heads|.*kv_heads|.*n_heads", HEADS),
        (".*head_dim|d_kv|key_length|value_length|head_size|attention_head_size|rotary_dim", HEAD_DIM),
        (".*intermediate_size|.*ffn_dim|d_ff|ffn_hidden_size|n_inner|inner_dim|.*mlp_dim", 64),
        (".*vocab_size.*", _VOCAB),
        (".*num_experts|n_routed_experts|num_local_experts|n_experts", 4),
        (".*num_experts_per_tok|.*top_?k|moe_k|experts_per_token", 2),
        (".*n_groups?|topk_group|num_expert_groups?", 1),
        (".*_rank", 16),
        ("max_position_embeddings|n_positions|max_seq_len|seq_length|max_.*positions|context_length|n_ctx", 128),
        ("image_size|img_size", 32),
        ("patch_size", 16),
        ("d_state|.*state_size|mamba_d_state|.*chunk_size|index_kpool", 8),
    )
)
_MROPE = [4, 2, 2]
"""Shares of time, height and width in half of a head."""
_NAMED_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": _MROPE}
_TEXT_ROPE = {"text_config.rope_parameters": _ROPE}
OVERRIDES: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1, 3]},
    "BlenderbotForCausalLM": {"encoder_layers": LAYERS},
    "CodeGenForCausalLM": {"n_head": 4, "rotary_dim": 4},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "Glm46VForConditionalGeneration": _TEXT_ROPE,
    "Glm4vForConditionalGeneration": _TEXT_ROPE,
    "Glm4vMoeForConditionalGeneration": {"text_config.rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "HunYuanDenseV1ForCausalLM": {"head_dim": HEAD_DIM},
    "HunYuanMoEV1ForCausalLM": {"head_dim": HEAD_DIM},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinearForCausalLM": {"num_experts": 8},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "LongcatFlashForCausalLM": {"qk_head_dim": 32},
    "Mamba2ForCausalLM": {"num_heads": 4, "head_dim": 16},
    "MinistralForCausalLM": {"head_dim": HEAD_DIM},
    "NemotronForCausalLM": {"num_key_value_heads": HEADS, "head_dim": HEAD_DIM},
    "PaddleOCRVLForConditionalGeneration": _TEXT_ROPE,
    "Qwen2VLForConditionalGeneration": _TEXT_ROPE,
    "Qwen2_5OmniThinkerForConditionalGeneration": _TEXT_ROPE,
    "Qwen2_5_VLForConditionalGeneration": _TEXT_ROPE,
    "ReformerModelWithLMHead": {"is_decoder": True, "axial_pos_embds": False},
    "XmodForCausalLM": {"default_language": "en_XX"},
}
_IMAGE = "its forward needs an image"
_TIMM = "its vision tower comes from timm, which is not installed"
_SIZES_LINKED = "sizes of its parts depend on each other in a way that their names do not tell"
NOT_BUILT: dict[str, str] = {
    "BailingHybridForCausalLM": _SIZES_LINKED,
    "Blip2ForConditionalGeneration": _IMAGE,
    "BlipForConditionalGeneration": _IMAGE,
    "BltForCausalLM": "its config names no depth where transformers' cache looks for one",
    "ChameleonForConditionalGeneration": "needs the vocabulary of its image tokens",
    "CohereCompassForCausalLM": _SIZES_LINKED,
    "CohereCompassForConditionalGeneration": _SIZES_LINKED,
    "DbrxForCausalLM": "its default attention config lacks a field that the model reads",
    "DeepseekOcr2ForConditionalGeneration": _SIZES_LINKED,
    "DiffusionGemmaForBlockDiffusion": _SIZES_LINKED,
    "Dots1ForCausalLM": "its default config has no number of experts",
    "Dots3NoteForConditionalGeneration": _SIZES_LINKED,
    "Emu3ForConditionalGeneration": "needs the vocabulary of its image tokens",
    "Ernie4_5_VLMoeForConditionalGeneration": _SIZES_LINKED,
    "FastVlmForConditionalGeneration": _TIMM,
    "Gemma3nForConditionalGeneration": _TIMM,
    "Gemma4AssistantForCausalLM": "a draft model, reads the activations of another",
    "Gemma4UnifiedAssistantForCausalLM": "a draft model, reads the activations of another",
    "Glm5NextForConditionalGeneration": _SIZES_LINKED,
    "GlmOcrForConditionalGeneration": _SIZES_LINKED,
    "Granite4VisionForConditionalGeneration": _SIZES_LINKED,
    "HunYuanVLForConditionalGeneration": _SIZES_LINKED,
    "IdeficsForVisionText2Text": _IMAGE,
    "InstructBlipForConditionalGeneration": _IMAGE,
    "InstructBlipVideoForConditionalGeneration": _IMAGE,
    "Kosmos2ForConditionalGeneration": _IMAGE,
    "MiMoV2FlashForCausalLM": _SIZES_LINKED,
    "Mistral4ForCausalLM": _SIZES_LINKED,
    "Molmo2ForConditionalGeneration": _SIZES_LINKED,
    "MusicgenForCausalLM": "reads several codebooks, not one id for each position",
    "MusicgenMelodyForCausalLM": "reads several codebooks, not one id for each position",
    "NemotronH_Omni_Reasoning_V3": _SIZES_LINKED,
    "PI0ForConditionalGeneration": "its forward needs a robot's state",
    "PPFormulaNetForConditionalGeneration": _IMAGE,
    "PerceptionLMForConditionalGeneration": _TIMM,
    "Pix2StructForConditionalGeneration": _IMAGE,
    "Qwen4ExpForCausalLM": _SIZES_LINKED,
    "Qwen4ExpForConditionalGeneration": _SIZES_LINKED,
    "Step3p7ForConditionalGeneration": _SIZES_LINKED,
    "UdopForConditionalGeneration": "its forward needs boxes",
    "VibeVoiceAsrForConditionalGeneration": _SIZES_LINKED,
    "VisionEncoderDecoderModel": _IMAGE,
    "VoxtralRealtimeForConditionalGeneration": "its forward needs audio",
    "Zamba2ForCausalLM": _SIZES_LINKED,
    "ZambaForCausalLM": _SIZES_LINKED,
    "xLSTMForCausalLM": _SIZES_LINKED,
}


@dataclass(frozen=True)
class Family:
    """One model class of transformers and the config that it is built from."""

    name: str
    config_class: type[Any]
    model_class: type[Any]

    @property
    def after_encoder(self) -> bool:
        """Whether the decoder has token ids of its own."""
        return "decoder_input_ids" in inspect.signature(self.model_class.forward).parameters

    def build(self) -> Any:
        """A tiny random model in eval mode."""
        torch.manual_seed(0)
        return self.model_class(tiny(self.config_class, OVERRIDES.get(self.name, {}))).eval()


def families() -> Iterator[Family]:
    """Each model class of the mappings once, in their order."""
    seen: set[str] = set()
    for mapping in MAPPINGS:
        for model_type, class_names in getattr(modeling_auto, mapping).items():
            name = class_names if isinstance(class_names, str) else class_names[0]
            if name not in seen:
                seen.add(name)
                model_class = getattr(transformers, name)
                # Text models are also listed under the config of the multimodal model that they are part of.
                yield Family(name, model_class.config_class or CONFIG_MAPPING[model_type], model_class)


def inputs_of(family: Family) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of a forward pass, and the ids ``[rows, length]`` of the decoder's tokens among them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(_FIRST_WORD, _LAST_WORD, (ROWS, LENGTH), generator=generator)
    if not family.after_encoder:
        return {"input_ids": ids}, ids
    decoder = torch.randint(_FIRST_WORD, _LAST_WORD, (ROWS, DECODER_LENGTH), generator=generator)
    return {"input_ids": ids, "decoder_input_ids": decoder}, decoder


def tiny(config_class: type[Any], overrides: dict[str, Any] | None = None) -> Any:
    """A config of this class with every size small; ``a.b`` in ``overrides`` is field b of sub-config a."""
    default = config_class()
    depth = next((getattr(default, name) for name in _DEPTHS if isinstance(getattr(default, name, None), int)), None)
    values: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            values[name] = tiny(type(value), _inside(name, overrides or {}))
        elif (small := _small(name, value, depth)) is not None:
            values[name] = small
    values.update({name: value for name, value in (overrides or {}).items() if "." not in name})
    return config_class(**values)


def _inside(section: str, overrides: dict[str, Any]) -> dict[str, Any]:
    prefix = f"{section}."
    return {name.removeprefix(prefix): value for name, value in overrides.items() if name.startswith(prefix)}


def _small(name: str, value: Any, depth: int | None) -> Any:
    """The small value of a field, or None to leave it as it is."""
    if isinstance(value, (list, tuple)) and depth and len(value) == depth:
        return _spread(list(value))
    if isinstance(value, dict) and "mrope_section" in value:
        return {**value, "mrope_section": _MROPE}
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return None
    if name in _NAMED_IDS:
        return _NAMED_IDS[name]
    if name.endswith(("_token_id", "_token_index")):
        return min(value, _LAST_WORD + sum(map(ord, name)) % (_VOCAB - _LAST_WORD))
    size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
    return None if size is None else min(size, value)


def _spread(kinds: list[Any]) -> list[Any]:
    """``LAYERS`` of the kinds of blocks, each kind among them where there is room."""
    first = [number for number, kind in enumerate(kinds) if kind not in kinds[:number]]
    rest = [number for number in range(len(kinds)) if number not in first]
    return [kinds[number] for number in sorted((first + rest)[:LAYERS])]
