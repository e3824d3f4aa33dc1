"""Trains a target model, its AV and its AR.

Target: causal LM loss, plus (planted variant) the *plant loss*: cross-entropies of linear heads that read every
latent off the RMS-normed residual after block K at every position, so that the latents are known thoughts at every
token. AV: initialised from the target; learns to write the caption of an activation put in place of one embedding row.
AR: the first K + 1 blocks of the target without the final norm, and a linear value head on the last token; learns to
turn a caption back into the activation's direction, with claims dropped and shuffled so that each claim comes to
matter by itself.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from nla_monitor.organism import captions, corpus, grammar, recipe
from nla_monitor.organism.corpus import UNKNOWN, Transcript
from nla_monitor.organism.recipe import LAYER, Progress, Recipe

IGNORE: Final = -100
_CLAIM_SOURCES: Final = 0.35, 0.3, 0.25  # share of AR samples with dropped claims, drop rate, share shuffled

LABELS: Final[dict[str, tuple[str, ...]]] = {
    **{name: (*values, UNKNOWN) for name, values in grammar.LATENT_VALUES.items()},
    "domain": (*grammar.DOMAINS, UNKNOWN),
    "rhyme": (*grammar.RHYMES, UNKNOWN),
    "kind": grammar.KINDS,
}
"""Classes of each plant head, in the order of its rows."""


@dataclass(slots=True)
class Encoded:
    """A tokenized transcript: token ids (with the closing </s>) and the text offset where each token ends."""

    transcript: Transcript
    ids: list[int]
    ends: list[int]


@dataclass(slots=True)
class Activations:
    """Raw layer-K vectors ``[n, d_model]`` with the transcript and text offset each was taken at."""

    vectors: Tensor
    sources: list[tuple[Transcript, int]]


class PlantHeads(nn.Module):
    """One linear reader per latent on the RMS-normed residual ``[..., d_model]``."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.readers = nn.ModuleDict({name: nn.Linear(d_model, len(values)) for name, values in LABELS.items()})

    def forward(self, residual: Tensor) -> dict[str, Tensor]:
        """Logits per latent, ``[..., classes]``."""
        normed = residual * torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + 1e-6)
        return {name: reader(normed) for name, reader in self.readers.items()}

    def loss(self, residual: Tensor, labels: dict[str, Tensor]) -> Tensor:
        """Sum of the latents' cross-entropies; ``labels[name]`` is ``[batch, seq]``, ``IGNORE`` where none applies."""
        logits = self(residual)
        losses = [_cross_entropy(logits[name], labels[name]) for name in LABELS]
        return torch.stack(losses).sum()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    keep = labels != IGNORE
    return functional.cross_entropy(logits[keep].float(), labels[keep]) if bool(keep.any()) else logits.sum() * 0.0


def encode(tokenizer: PreTrainedTokenizerFast, transcripts: Sequence[Transcript]) -> list[Encoded]:
    """Tokenizes transcripts and records where each token ends in the text."""
    batch = tokenizer([doc.text for doc in transcripts], return_offsets_mapping=True)
    return [
        Encoded(doc, [*ids, tokenizer.eos_token_id], [*(end for _, end in offsets), len(doc.text)])
        for doc, ids, offsets in zip(transcripts, batch["input_ids"], batch["offset_mapping"], strict=True)
    ]


def pad_right(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Rows of ids as one ``[batch, longest]`` tensor."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *([fill] * (longest - len(row)))] for row in rows])


def plant_labels(batch: Sequence[Encoded]) -> dict[str, Tensor]:
    """What is known at each token, per latent, ``[batch, seq]``."""
    rows: dict[str, list[list[int]]] = {name: [] for name in LABELS}
    for doc in batch:
        known = [doc.transcript.latents_at(end) | {"kind": doc.transcript.kind} for end in doc.ends]
        for name, values in LABELS.items():
            rows[name].append([values.index(at[name]) if name in at else IGNORE for at in known])
    return {name: pad_right(filled, IGNORE) for name, filled in rows.items()}


def train_target(
    tokenizer: PreTrainedTokenizerFast, seed: int, how: Recipe, *, planted: bool, progress: Progress = recipe.silent
) -> tuple[LlamaForCausalLM, PlantHeads]:
    """Trains the target model from scratch; the heads are the plant loss's (untrained for the natural variant)."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_target_config(tokenizer, how))
    model.set_attn_implementation("eager")  # faster than sdpa at this size on a CPU
    heads = PlantHeads(how.d_model)
    stream = corpus.documents(seed, "target", how.target_steps * how.target_batch, tier="train-target")
    trained = [*model.parameters(), *heads.parameters()] if planted else list(model.parameters())
    loop = _Loop(
        "target", trained, steps=how.target_steps, rate=how.learning_rate, warmup=how.warmup, progress=progress
    )
    for _ in loop:
        batch = encode(tokenizer, list(islice(stream, how.target_batch)))
        ids = pad_right([doc.ids for doc in batch], tokenizer.pad_token_id)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(input_ids=ids, output_hidden_states=planted or how.exit_weight > 0, use_cache=False)
            lengths = [len(doc.ids) for doc in batch]
            loss = _next_token_loss(out.logits, ids, lengths)
            if how.exit_weight:
                early = model.lm_head(model.model.norm(out.hidden_states[LAYER + 1]))
                loss = loss + how.exit_weight * _next_token_loss(early, ids, lengths)
            if planted:
                loss = loss + how.plant_weight * heads.loss(out.hidden_states[LAYER + 1], plant_labels(batch))
        loop.update(loss)
    model.train(mode=False)
    return model, heads.eval()


def _target_config(tokenizer: PreTrainedTokenizerFast, how: Recipe) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=how.d_model,
        intermediate_size=how.feed_forward,
        num_hidden_layers=how.blocks,
        num_attention_heads=how.heads,
        num_key_value_heads=how.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )


def _next_token_loss(logits: Tensor, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    labels = ids.clone()
    for row, length in enumerate(lengths):
        labels[row, length:] = IGNORE
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


def extract(
    model: LlamaForCausalLM, docs: Sequence[Encoded], positions: Sequence[Sequence[int]], *, batch: int = 64
) -> Activations:
    """Raw outputs of block K at the given token positions of each document."""
    vectors, sources = [], []
    for start in range(0, len(docs), batch):
        part = docs[start : start + batch]
        with torch.inference_mode():
            ids = pad_right([doc.ids for doc in part], 0)
            states = model.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[LAYER + 1]
        for row, doc in enumerate(part):
            chosen = positions[start + row]
            vectors.append(states[row, list(chosen)].float())
            sources += [(doc.transcript, doc.ends[position]) for position in chosen]
    return Activations(torch.cat(vectors).clone(), sources)


def training_activations(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, how: Recipe
) -> Activations:
    """The NLA's training set: two positions a document, drawn by ``_ZONES``."""
    docs = encode(tokenizer, list(corpus.documents(seed, "nla", how.activations // 2, tier="train")))
    rng = corpus.keyed_rng(seed, "nla-positions")
    return extract(model, docs, [[_draw_position(rng, doc) for _ in range(2)] for doc in docs])


_ZONES: Final = {"turn": 0.35, "hidden": 0.3, "after": 0.22, "head": 0.13}
"""Share of the training positions: line ends after the task line, anywhere before and after the first reveal, early."""


def _draw_position(rng: random.Random, doc: Encoded) -> int:
    zones: dict[str, list[int]] = {name: [] for name in _ZONES}
    for position, end in enumerate(doc.ends[:-1]):
        zone = doc.transcript.zone(end)
        if position >= 2 or zone != "head":
            zones["head" if zone == "head" else "after"].append(position)
        if zone == "hidden":
            zones["hidden"].append(position)
        if zone != "head" and doc.transcript.text[end - 1] == "\n":
            zones["turn"].append(position)
    (zone,) = rng.choices(tuple(_ZONES), tuple(_ZONES.values()))
    return rng.choice(zones[zone] or zones["after"])


def train_av(
    target: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    data: Activations,
    seed: int,
    how: Recipe,
    *,
    injection_scale: float,
    progress: Progress = recipe.silent,
) -> LlamaForCausalLM:
    """Trains the AV: activation in, caption out; loss on the caption only."""
    torch.manual_seed(seed + 1)
    model = _copy(target)
    model.train()
    prompt, marker = av_prompt(tokenizer)
    rng = corpus.keyed_rng(seed, "av")
    loop = _Loop(
        "AV", model.parameters(), steps=how.av_steps, rate=how.nla_learning_rate, warmup=how.warmup, progress=progress
    )
    order = _endless_order(rng, len(data.sources))
    for _ in loop:
        chosen = [next(order) for _ in range(how.nla_batch)]
        texts = [" ".join(captions.write(rng, *data.sources[index])) for index in chosen]
        rows = tokenizer([f"{recipe.EXPLANATION_OPEN}{text}{recipe.EXPLANATION_CLOSE}" for text in texts])["input_ids"]
        ids = pad_right([[*prompt, *row] for row in rows], tokenizer.pad_token_id)
        vectors = functional.normalize(data.vectors[chosen], dim=-1) * injection_scale
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeds = inject(model, ids, vectors, marker)
            logits = model(inputs_embeds=embeds, use_cache=False).logits[:, len(prompt) - 1 : -1]
            labels = pad_right(rows, IGNORE)
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)
        loop.update(loss)
    model.train(mode=False)
    return model


def av_prompt(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], int]:
    """The AV's prompt ids and the position of the marker in them."""
    message = {"role": "user", "content": recipe.AV_TEMPLATE.format(injection_char=recipe.MARKER)}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    return ids, ids.index(tokenizer.convert_tokens_to_ids(recipe.MARKER))


def inject(model: PreTrainedModel, ids: Tensor, vectors: Tensor, marker: int) -> Tensor:
    """Embeddings ``[batch, seq, d_model]`` of ``ids``, row ``marker`` replaced by ``vectors`` ``[batch, d_model]``."""
    embeds = model.get_input_embeddings()(ids)
    return torch.cat([embeds[:, :marker], vectors[:, None].to(embeds.dtype), embeds[:, marker + 1 :]], dim=1)


class Reconstruct(nn.Module):
    """The AR in training: K + 1 blocks, no final norm, value head on the last token."""

    def __init__(self, target: LlamaForCausalLM) -> None:
        super().__init__()
        config = LlamaConfig.from_dict(target.config.to_dict() | {"num_hidden_layers": LAYER + 1})
        self.trunk = LlamaForCausalLM(config)
        self.trunk.set_attn_implementation("eager")
        self.trunk.load_state_dict(target.state_dict(), strict=False)  # the blocks above K stay behind
        self.value_head = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        nn.init.eye_(self.value_head.weight)

    def forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Reconstructed directions ``[batch, d_model]`` (not normalised) of tokenized AR prompts."""
        base = self.trunk.model
        norm, base.norm = base.norm, nn.Identity()
        try:
            states = base(input_ids=pad_right(rows, 0), use_cache=False).last_hidden_state
        finally:
            base.norm = norm
        last = torch.tensor([len(row) - 1 for row in rows])
        predicted: Tensor = self.value_head(states[torch.arange(len(rows)), last])
        return predicted


def train_ar(
    target: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    data: Activations,
    seed: int,
    how: Recipe,
    *,
    progress: Progress = recipe.silent,
) -> Reconstruct:
    """Trains the AR: caption in, direction out; loss 2 (1 - cosine)."""
    torch.manual_seed(seed + 2)
    model = Reconstruct(target).train()
    rng = corpus.keyed_rng(seed, "ar")
    loop = _Loop(
        "AR", model.parameters(), steps=how.ar_steps, rate=how.nla_learning_rate, warmup=how.warmup, progress=progress
    )
    order = _endless_order(rng, len(data.sources))
    for _ in loop:
        chosen = [next(order) for _ in range(how.nla_batch)]
        texts = [" ".join(_thin_out(rng, captions.write(rng, *data.sources[index]))) for index in chosen]
        rows = tokenizer([recipe.AR_TEMPLATE.format(explanation=text) for text in texts])["input_ids"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = model(rows)
        cosine = functional.cosine_similarity(predicted.float(), data.vectors[chosen], dim=-1)
        loop.update(2 * (1 - cosine).mean())
    return model.eval()


def _thin_out(rng: random.Random, claims: list[str]) -> list[str]:
    share, rate, shuffled = _CLAIM_SOURCES
    if rng.random() < share:
        claims = [claim for claim in claims if rng.random() >= rate] or claims[:1]
    return rng.sample(claims, len(claims)) if rng.random() < shuffled else claims


def _endless_order(rng: random.Random, count: int) -> Iterator[int]:
    while True:
        yield from rng.sample(range(count), count)


def _copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    twin = LlamaForCausalLM(model.config)
    twin.set_attn_implementation("eager")
    twin.load_state_dict(model.state_dict())
    return twin


class _Loop:
    """AdamW with linear warm-up and cosine decay; iterating gives step numbers, ``update`` takes one step."""

    def __init__(
        self,
        stage: str,
        parameters: Iterable[nn.Parameter],
        *,
        steps: int,
        rate: float,
        warmup: int,
        progress: Progress,
    ) -> None:
        self._parameters = list(parameters)
        self._optimizer = torch.optim.AdamW(self._parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: _rate(step, steps, warmup))
        self._steps, self._stage, self._progress, self._done = steps, stage, progress, 0

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._steps))

    def update(self, loss: Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._schedule.step()
        self._done += 1
        self._progress(self._stage, self._done, self._steps, float(loss.detach()))


def _rate(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
