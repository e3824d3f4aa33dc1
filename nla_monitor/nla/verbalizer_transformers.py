"""The AV in process, through transformers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nla_monitor.config import NLAConfig
from nla_monitor.errors import TokenizerContractError
from nla_monitor.nla.attention import use_batched_steps
from nla_monitor.nla.base import Choice, Likelihood, Verbalization
from nla_monitor.nla.checkpoint import open_checkpoint
from nla_monitor.nla.decoding import Draw, SharedPrefixDecoder
from nla_monitor.nla.explanation import OPEN_TAG, ExplanationReader, stop_ids
from nla_monitor.nla.injection import Prompt, build_prompt, check_vectors, rescale
from nla_monitor.nla.injectors import injector_for
from nla_monitor.nla.likelihood import ContinuationScorer
from nla_monitor.nla.linear import use_onednn
from nla_monitor.nla.loading import embedding_weight, load_causal_lm, load_tokenizer
from nla_monitor.nla.sidecar import Role, Sidecar, sidecar_of

_OPENING_TOKENS = 16
"""Tokens in which an AV has written its opening tag, where it writes one."""


def load_verbalizer(path: str | Path, config: NLAConfig) -> TransformersVerbalizer:
    """An AV from a folder or hub id (``config.revision``), checked against its sidecar.

    Raises:
        CheckpointError: it cannot be used; the subclass and message say why and what to do.
        ConfigError: the configured device is not there.
    """
    checkpoint = open_checkpoint(path, "av", revision=config.revision, base=config.base)
    sidecar = sidecar_of(checkpoint, Role.AV, config)
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    prompt = build_prompt(tokenizer, sidecar.verbalizer_contract())
    model = load_causal_lm(checkpoint, config)
    provenance = checkpoint.content_hash(sidecar.source, sidecar.settings)
    return TransformersVerbalizer(model, tokenizer, sidecar, prompt, config=config, content_hash=provenance)


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
        use_onednn(model)
        use_batched_steps(model)
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = config.batch_size
        generation = getattr(model, "generation_config", None)
        self.stop_ids = stop_ids(
            tokenizer, getattr(generation, "eos_token_id", None), model.config.get_text_config().eos_token_id
        )
        _check_vocabulary(prompt.ids, model)
        self._reader = ExplanationReader(tokenizer, self.stop_ids, tagged=self.contract.tagged)
        self.max_new_tokens = config.max_new_tokens
        self._decoder = SharedPrefixDecoder(
            model,
            prompt,
            stop_ids=sorted(self.stop_ids),
            max_new_tokens=config.max_new_tokens,
            injector=injector_for(model, self.contract, prompt.offsets),
        )
        self._scorer = ContinuationScorer(model, tokenizer, batch_size=config.batch_size)

    def verbalize(self, vectors: npt.NDArray[np.float32]) -> list[Verbalization]:
        """Greedy explanations of ``[batch, d_model]`` raw activations, in order, ``batch_size`` at a time.

        Raises:
            ActivationError: a vector is not finite, has zero norm or the wrong width (names the row).
            NonFiniteWeightsError: the model's logits are not finite.
        """
        return [self._reader.read(tokens) for tokens in self.generate(vectors)]

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
            seeds: one per row; the same vector, seed and temperature give the same text in any batch (in float32).
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
            found += self._drawn(rows[part], seeds[part], temperature)
        return [self._reader.read(tokens) for tokens in found]

    def _drawn(self, rows: torch.Tensor, seeds: Sequence[int], temperature: float) -> list[list[int]]:
        draw = Draw(seeds, temperature)
        tokens = self._decoder.decode(rows, draw)
        # In 16 bits rounding is so coarse that most rows would be doubtful: there the batch may change a token.
        if rows.dtype == torch.float32 and len(rows) > 1:
            for number in draw.doubtful:
                tokens[number] = self._decoder.decode(rows[[number]], Draw([seeds[number]], temperature))[0]
        return tokens

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
        return self._scorer.score(self._decoder, rows, opened)

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


def _check_vocabulary(ids: Sequence[int], model: PreTrainedModel) -> None:
    rows = len(embedding_weight(model))
    if max(ids) >= rows:
        raise TokenizerContractError(
            f"the AV's tokenizer makes id {max(ids)} but the model embeds only {rows} tokens. They are not of one "
            "release: take tokenizer and weights from the same folder."
        )
