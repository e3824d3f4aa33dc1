"""The AV in process, through transformers."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla_monitor.config import NLAConfig
from nla_monitor.errors import TokenizerContractError
from nla_monitor.nla.base import Choice, Likelihood, Verbalization
from nla_monitor.nla.checkpoint import content_hash, resolve_checkpoint
from nla_monitor.nla.decoding import Draw, SharedPrefixDecoder
from nla_monitor.nla.injection import Prompt, build_prompt, check_vectors, rescale
from nla_monitor.nla.likelihood import ContinuationScorer
from nla_monitor.nla.loading import embedding_weight, load_causal_lm, load_tokenizer
from nla_monitor.nla.sidecar import Role, Sidecar, load_sidecar

OPEN_TAG = "<explanation>"
CLOSE_TAG = "</explanation>"
_OPENING_TOKENS = 16
"""Tokens in which an AV has written its opening tag, where it writes one."""


def load_verbalizer(path: str | Path, config: NLAConfig) -> TransformersVerbalizer:
    """An AV from a folder or hub id (``config.revision``), checked against its sidecar.

    Raises:
        CheckpointError: it cannot be used; the subclass and message say why and what to do.
        ConfigError: the configured device is not there.
    """
    folder = resolve_checkpoint(path, revision=config.revision)
    sidecar = load_sidecar(folder, Role.AV)
    tokenizer = load_tokenizer(folder)
    prompt = build_prompt(tokenizer, sidecar.verbalizer_contract())
    model = load_causal_lm(folder, config)
    return TransformersVerbalizer(model, tokenizer, sidecar, prompt, config=config, content_hash=content_hash(folder))


class TransformersVerbalizer:
    """Greedy explanations of activations; made by ``load_verbalizer``. Not for use from several threads at once.

    Raises:
        TokenizerContractError: the tokenizer makes ids that the embedding does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sidecar: Sidecar,
        prompt: Prompt,
        *,
        config: NLAConfig,
        content_hash: str,
    ) -> None:
        self.d_model: int = sidecar.d_model
        self.layer: int | None = sidecar.layer
        self.content_hash: str = content_hash
        self.sidecar = sidecar
        self.contract = sidecar.verbalizer_contract()
        self.prompt = prompt
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = config.batch_size
        self.stop_ids = _stop_ids(model, tokenizer)
        _check_vocabulary(prompt.ids, model)
        self._silent = self.stop_ids - set(_closing_ids(tokenizer)) | _ids(tokenizer.pad_token_id)
        self._max_new_tokens = config.max_new_tokens
        self._decoder = SharedPrefixDecoder(
            model, prompt, stop_ids=sorted(self.stop_ids), max_new_tokens=config.max_new_tokens
        )
        self._scorer = ContinuationScorer(model, tokenizer, batch_size=config.batch_size)

    def verbalize(self, vectors: npt.NDArray[np.float32]) -> list[Verbalization]:
        """Greedy explanations of ``[batch, d_model]`` raw activations, in order, ``batch_size`` at a time.

        Raises:
            ActivationError: a vector is not finite, has zero norm or the wrong width (names the row).
            NonFiniteWeightsError: the model's logits are not finite.
        """
        return [self._verbalization(tokens) for tokens in self.generate(vectors)]

    def generate(self, vectors: npt.NDArray[np.float32]) -> list[list[int]]:
        """Greedy token ids for each of ``[batch, d_model]``, the stop token included. Raises as ``verbalize``."""
        rows = self._rows(vectors)
        chunks = torch.split(rows, self.batch_size) if len(rows) else ()
        return list(itertools.chain.from_iterable(map(self._decoder.decode, chunks)))

    def resample(
        self, vectors: npt.NDArray[np.float32], seeds: Sequence[int], *, temperature: float = 1.0
    ) -> list[Verbalization]:
        """One drawn explanation for each of ``[batch, d_model]``, in order, ``batch_size`` at a time.

        Args:
            vectors: raw activations; repeat a row for several draws.
            seeds: one per row; the same vector, seed and temperature give the same text in any batch.
            temperature: of the softmax, above 0.

        Raises:
            ActivationError: as ``verbalize``.
            ValueError: there are not as many seeds as vectors, or the temperature is not above 0.
        """
        rows, found = self._rows(vectors), []
        if len(rows) != len(seeds):
            raise ValueError(f"{len(rows)} vectors but {len(seeds)} seeds: give one seed for each vector")
        for start in range(0, len(rows), self.batch_size):
            part = slice(start, start + self.batch_size)
            found += self._decoder.decode(rows[part], Draw(seeds[part], temperature, self._max_new_tokens))
        return [self._verbalization(tokens) for tokens in found]

    def score_continuations(
        self, vectors: npt.NDArray[np.float32], choices: Sequence[Choice]
    ) -> list[list[Likelihood]]:
        """How probable each option is after its explanation's start, for each of ``[batch, d_model]``.

        Teacher-forced: the start counts as written, with whatever this AV writes before the text (its opening tag).

        Raises:
            ActivationError: as ``verbalize``.
            ValueError: there are not as many choices as vectors.
        """
        rows = self._rows(vectors)
        if len(rows) != len(choices):
            raise ValueError(f"{len(rows)} vectors but {len(choices)} choices: give one choice for each vector")
        opened = [
            Choice(opening + choice.start, choice.options)
            for opening, choice in zip(self._openings(rows), choices, strict=True)
        ]
        return self._scorer.score(self._decoder.embeddings, rows, opened)

    def _openings(self, rows: torch.Tensor) -> list[str]:
        """What the AV writes before each explanation's text: white space, and the opening tag where it is generated."""
        found = []
        for chunk in torch.split(rows, self.batch_size) if len(rows) else ():
            for tokens in self._decoder.decode(chunk, limit=_OPENING_TOKENS):
                raw = str(self.tokenizer.decode(tokens, skip_special_tokens=False))
                before, tag, body = raw.partition(OPEN_TAG) if OPEN_TAG in raw else ("", "", raw)
                found.append(before + tag + body[: len(body) - len(body.lstrip())])
        return found

    def prompt_embeddings(self, vectors: npt.NDArray[np.float32]) -> torch.Tensor:
        """What the model reads for each vector, ``[batch, tokens, d_model]``: the prompt with its injected row.

        Raises:
            ActivationError: as ``verbalize``.
        """
        return self._decoder.embeddings(self._rows(vectors))

    def _rows(self, vectors: npt.NDArray[np.float32]) -> torch.Tensor:
        """Rows to inject, rescaled in float32 and only then cast to the model's dtype."""
        rows = rescale(check_vectors(vectors, self.d_model), self.contract.injection_scale)
        return torch.from_numpy(rows).to(device=self.model.device, dtype=self.model.dtype)

    def _verbalization(self, tokens: Sequence[int]) -> Verbalization:
        # Not skip_special_tokens: where the tags are special tokens they would vanish with the rest.
        kept = [token for token in tokens if token not in self._silent]
        text, truncated = parse_explanation(str(self.tokenizer.decode(kept, skip_special_tokens=False)))
        return Verbalization(text=text, truncated=truncated, tokens=len(tokens))


def parse_explanation(raw: str) -> tuple[str, bool]:
    """Text between the explanation tags, stripped, and whether the closing tag is missing.

    A missing opening tag is no fault (some templates end the prompt with it). Half a closing tag is cut off.
    """
    body = raw.partition(OPEN_TAG)[2] if OPEN_TAG in raw else raw
    text, closing, _ = body.partition(CLOSE_TAG)
    if closing:
        return text.strip(), False
    text = text.rstrip()
    partial = next((length for length in range(len(CLOSE_TAG) - 1, 1, -1) if text.endswith(CLOSE_TAG[:length])), 0)
    return text[: len(text) - partial].strip(), True


def _stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Every end token that config or tokenizer name (Gemma has two), and the closing tag where it is one token."""
    generation = getattr(model, "generation_config", None)
    named = (
        getattr(generation, "eos_token_id", None),
        model.config.get_text_config().eos_token_id,
        tokenizer.eos_token_id,
    )
    return set().union(*(_ids(value) for value in named), _closing_ids(tokenizer))


def _closing_ids(tokenizer: PreTrainedTokenizerBase) -> Collection[int]:
    ids = tokenizer.encode(CLOSE_TAG, add_special_tokens=False)
    return ids if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else ()


def _ids(value: object) -> set[int]:
    if isinstance(value, int):
        return {value}
    return {int(item) for item in value} if isinstance(value, list | tuple) else set()


def _check_vocabulary(ids: Sequence[int], model: PreTrainedModel) -> None:
    rows = len(embedding_weight(model))
    if max(ids) >= rows:
        raise TokenizerContractError(
            f"the AV's tokenizer makes id {max(ids)} but the model embeds only {rows} tokens. They are not of one "
            "release: take tokenizer and weights from the same folder."
        )
