"""What the LangChain tests share: a tiny random Llama, a byte tokenizer, and a monitor that records sessions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

from nla_monitor.guard import Guard
from nla_monitor.records import AgentContext, Completion, MessageSpan, Scalar

LAYER = 1
SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(*, chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level, with a beginning token put before every text: a template's text is tokenized with one too many."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **SPECIAL)
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """Four blocks of width 32, random weights; its greedy text is arbitrary and the same each time."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def text_pipeline(model: Any, tokenizer: Any, **settings: Any) -> Any:
    """A transformers pipeline as ``HuggingFacePipeline`` takes it."""
    # A length limit in the model's own generation settings makes transformers warn about two limits.
    model.generation_config.max_length = None
    settings = {"max_new_tokens": 6, "do_sample": False, **settings}
    return pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu", **settings)


@dataclass(eq=False)
class Session:
    """A session as the recording monitor hands it out."""

    context: AgentContext
    token_ids: list[int] | None
    traceparent: str | None
    attributes: dict[str, Scalar]
    thread: int
    forwards: int = 0
    closed: bool = False
    completion: Completion | None = None
    spans: Callable[[], Sequence[MessageSpan]] | None = None
    seen: list[list[int]] = field(default_factory=list)

    def describe(self, outline: Callable[[], Sequence[MessageSpan]]) -> None:
        self.spans = outline


class RecordingMonitor:
    """Keeps every session; ``watching(model)`` also assigns the model's prefills as the real capture does."""

    def __init__(self, tokenizer: Any = None) -> None:
        self.guard = Guard()
        self.tokenizer = tokenizer
        self.sessions: list[Session] = []
        self.stray: list[list[int]] = []
        self._lock = threading.Lock()

    def open_session(
        self,
        context: AgentContext,
        token_ids: Sequence[int] | None,
        *,
        traceparent: str | None = None,
        attributes: Mapping[str, Scalar] | None = None,
    ) -> Session:
        ids = None if token_ids is None else list(token_ids)
        session = Session(context, ids, traceparent, dict(attributes or {}), threading.get_ident())
        with self._lock:
            self.sessions.append(session)
        return session

    def close_session(self, handle: Session, *, completion: Completion | None = None) -> None:
        assert not handle.closed, "closed twice"
        handle.closed, handle.completion = True, completion

    @property
    def open(self) -> list[Session]:
        return [session for session in self.sessions if not session.closed]

    def session(self, run_id: object) -> Session:
        """The one session of a run."""
        (found,) = [session for session in self.sessions if session.context.agent_run_id == str(run_id)]
        return found

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        hook = model.register_forward_pre_hook(self._forward, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _forward(self, module: Any, args: Any, kwargs: Any) -> None:
        mask, ids = kwargs.get("attention_mask"), kwargs["input_ids"]
        if ids.shape[1] == 1:
            return
        for row, tokens in enumerate(ids.tolist()):
            keep = [True] * len(tokens) if mask is None else mask[row].bool().tolist()
            self._assign([token for token, real in zip(tokens, keep, strict=True) if real])

    def _assign(self, tokens: list[int]) -> None:
        with self._lock:
            here = threading.get_ident()
            exact = [s for s in self.open if s.token_ids is None and s.thread == here]
            same = [s for s in self.open if s.token_ids == tokens and not s.forwards]
            found = exact or sorted(same, key=lambda session: session.thread != here)
            if not found:
                self.stray.append(tokens)
                return
            found[0].forwards += 1
            found[0].seen.append(tokens)
