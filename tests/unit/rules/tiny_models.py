"""Models of the real formats, small enough to be made in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT = (
    "the model plans to deceive its overseer it intends hide truth from user reports results honestly weather is nice"
    " today does not a an of and in secret cheat on tests"
)
MARKS = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}


def word_tokenizer() -> Any:
    """A word tokenizer (tokenizers library)."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace

    vocabulary = {word: number for number, word in enumerate([*MARKS.values(), *sorted(set(TEXT.split()))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=MARKS["unk_token"]))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def embedding_model(folder: Path) -> Path:
    """A sentence-transformers model: the mean of random word vectors, so that sentences with common words are near."""
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = word_tokenizer()
    weights = np.random.default_rng(0).normal(size=(tokenizer.get_vocab_size(), 64)).astype(np.float32)
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)]).save(str(folder))
    return folder


def inference_model(folder: Path, *, entails: bool) -> Path:
    """A transformers model for inference with three labels that always says the same."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), **MARKS)
    labels = {0: "contradiction", 1: "neutral", 2: "entailment"}
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        id2label=labels,
        label2id={name: number for number, name in labels.items()},
    )
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 0.0, 4.0] if entails else [4.0, 0.0, 0.0]))
    model.save_pretrained(str(folder))
    fast.save_pretrained(str(folder))
    return folder
