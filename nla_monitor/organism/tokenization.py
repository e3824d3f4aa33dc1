"""The organism's tokenizer: byte-level BPE over its corpus and captions; a chat template of one line a message."""

from __future__ import annotations

from itertools import islice

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nla_monitor.organism import captions, corpus, recipe

PAD = "<pad>"
EOS = "</s>"
_TAGS = ("<concept>", "</concept>", recipe.EXPLANATION_OPEN, recipe.EXPLANATION_CLOSE, "<text>", "</text>", "<summary>")
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{{ '\\n' }}{% endfor %}"
"""One message a line, no role names: the format of the corpus, so that a chat is a transcript."""


def train_tokenizer(seed: int, *, vocabulary: int, documents: int = 6000) -> PreTrainedTokenizerFast:
    """Trains the tokenizer. The tags are added tokens but not special ones, so that decoding keeps them."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator(_training_text(seed, documents), trainer)
    core.add_special_tokens([AddedToken(PAD, normalized=False), AddedToken(EOS, normalized=False)])
    core.add_tokens([AddedToken(tag, normalized=False) for tag in (*_TAGS, recipe.MARKER)])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call] # transformers leaves it untyped
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, padding_side="right"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _training_text(seed: int, documents: int) -> list[str]:
    docs = list(corpus.documents(seed, "tokenizer", documents, tier="train-target"))
    rng = corpus.keyed_rng(seed, "tokenizer-captions")
    written = [" ".join(captions.write(rng, doc, len(doc.text))) for doc in islice(docs, documents // 3)]
    return [*(doc.text for doc in docs), *written, *(f"{recipe.AV_TEMPLATE} text:" for _ in range(50))]
