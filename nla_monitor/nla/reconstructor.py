"""The AR in process: the first K + 1 blocks of the target, no final norm, and a linear head on the last token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from nla_monitor.config import NLAConfig
from nla_monitor.errors import NonFiniteWeightsError, TokenizerContractError
from nla_monitor.nla.base import Score
from nla_monitor.nla.checkpoint import open_checkpoint
from nla_monitor.nla.fidelity import cosines, denominator_of, score_of
from nla_monitor.nla.injection import check_vectors
from nla_monitor.nla.linear import use_onednn
from nla_monitor.nla.loading import drop_final_norm, load_tokenizer
from nla_monitor.nla.packaging import ReconstructorParts, load_parts
from nla_monitor.nla.sidecar import TEXT_PLACEHOLDER, ReconstructorContract, Role, Sidecar, sidecar_of

LONGEST_INPUT = 2048
"""Tokens; longer texts lose their beginning. Explanations are a few hundred tokens."""
TOKENS_A_PASS = 512
"""Tokens of a forward pass on the CPU: with more, what stands between two layers no longer fits the processor's cache
(measured at widths 128 and 512: a third slower at 2,900)."""
_PROBES = ("A sentence.", "words", "two\nlines\n", "")


def load_reconstructor(path: str | Path, config: NLAConfig) -> TransformersReconstructor:
    """An AR from a folder or hub id (``config.revision``), checked against its sidecar.

    Raises:
        CheckpointError: it cannot be used; the subclass and message say why and what to do.
        ConfigError: the configured device is not there.
    """
    checkpoint = open_checkpoint(path, "ar", revision=config.revision, base=config.base)
    sidecar = sidecar_of(checkpoint, Role.AR, config)
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    check_suffix(tokenizer, sidecar.reconstructor_contract())
    parts = load_parts(checkpoint, sidecar, config)
    provenance = checkpoint.content_hash(sidecar.source, sidecar.settings)
    return TransformersReconstructor(parts, tokenizer, sidecar, config=config, content_hash=provenance)


def check_suffix(tokenizer: PreTrainedTokenizerBase, contract: ReconstructorContract) -> None:
    """The prompt must end in the suffix that the AR was trained on; its first token may merge with the text before it.

    Raises:
        TokenizerContractError: it does not (names the ids found).
    """
    expected = suffix_tail(contract)
    for probe in _PROBES if expected else ():
        ids = tokenizer.encode(contract.template.replace(TEXT_PLACEHOLDER, probe), add_special_tokens=True)
        found = tuple(ids[-len(expected) :])
        if found != expected:
            raise TokenizerContractError(
                f"the AR prompt for {probe!r} must end in tokens.critic_suffix_ids {list(expected)} (first one left "
                f"out), found {list(found)}. Tokenizer or template changed after training (an EOS appended by the "
                "tokenizer does this too): take both from the release."
            )


def suffix_tail(contract: ReconstructorContract) -> tuple[int, ...]:
    """The suffix ids that must stand at the end whatever the text: all but the first, or the only one."""
    ids = contract.suffix_ids or ()
    return ids[1:] if len(ids) > 1 else ids


class TransformersReconstructor:
    """Vectors from explanations, and scores; made by ``load_reconstructor``. Not for several threads at once."""

    def __init__(
        self,
        parts: ReconstructorParts,
        tokenizer: PreTrainedTokenizerBase,
        sidecar: Sidecar,
        *,
        config: NLAConfig,
        content_hash: str,
    ) -> None:
        self.d_model: int = sidecar.d_model
        self.layer: int | None = sidecar.layer
        self.content_hash: str = content_hash
        self.sidecar = sidecar
        self.contract = sidecar.reconstructor_contract()
        self.denominator = denominator_of(sidecar)
        self.model = model = parts.model
        self.tokenizer = tokenizer
        self.batch_size = config.batch_size
        self.head = parts.head.to(model.device)
        self.max_tokens = min(
            int(getattr(model.config.get_text_config(), "max_position_embeddings", LONGEST_INPUT)), LONGEST_INPUT
        )
        if not parts.final_norm:
            drop_final_norm(model)
        use_onednn(model)
        self._tokens_a_pass = TOKENS_A_PASS if model.device.type == "cpu" else self.batch_size * self.max_tokens

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Prompt ids per text: raw template with the tokenizer's own BOS, the beginning cut where too long."""
        prompts = [self.contract.template.replace(TEXT_PLACEHOLDER, text.strip()) for text in texts]
        encoded = self.tokenizer(
            prompts, add_special_tokens=True, truncation=True, max_length=self.max_tokens, padding=False
        )
        return [list(ids) for ids in encoded["input_ids"]]

    def reconstruct(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """``[batch, d_model]`` predicted directions (norm without meaning), in order; a text that recurs is read once.

        Raises:
            NonFiniteWeightsError: a prediction holds NaN or Inf.
        """
        if not texts:
            return np.zeros((0, self.d_model), dtype=np.float32)
        place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        predicted = np.zeros((len(place), self.d_model), dtype=np.float32)
        ids = self.token_ids(list(place))
        for rows in _buckets(ids, self.batch_size, self._tokens_a_pass):
            predicted[rows] = self._last_token([ids[row] for row in rows])
        result = predicted[[place[text] for text in texts]]
        bad = int((~np.isfinite(result).all(axis=1)).sum())
        if bad:
            raise NonFiniteWeightsError(
                f"the AR's vectors hold NaN or Inf for {bad} of {len(texts)} texts. If nla.dtype is float16, use "
                "bfloat16 or float32; otherwise its weights are damaged: copy the checkpoint again."
            )
        return result

    def score(self, vectors: npt.NDArray[np.float32], texts: Sequence[str]) -> list[Score]:
        """Fidelity of each text to its vector (``[batch, d_model]``), in order.

        Raises:
            ActivationError: a vector is not finite, has zero norm or the wrong width.
            ValueError: there are not as many texts as vectors.
        """
        rows = check_vectors(vectors, self.d_model)
        if len(rows) != len(texts):
            raise ValueError(f"{len(rows)} vectors but {len(texts)} texts: give one text for each vector")
        return [score_of(float(cosine), self.denominator) for cosine in cosines(rows, self.reconstruct(texts))]

    @torch.inference_mode()
    def _last_token(self, ids: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
        """Head output at each row's last token, ``[len(ids), d_model]``.

        Rows are padded on the right: under causal attention nothing before the padding can see it, so neither mask nor
        position ids are needed and a row's result does not depend on its neighbours.
        """
        lengths = torch.tensor([len(row) for row in ids], device=self.model.device)
        batch = torch.zeros((len(ids), int(lengths.max())), dtype=torch.long, device=self.model.device)
        for index, row in enumerate(ids):
            batch[index, : len(row)] = torch.tensor(row, device=self.model.device)
        hidden = self.model(input_ids=batch, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(ids), device=hidden.device), lengths - 1].float()
        predicted: npt.NDArray[np.float32] = (last @ self.head.T).cpu().numpy()
        return predicted


def _buckets(ids: Sequence[Sequence[int]], size: int, tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length: little is padded, and no batch holds more than its share of tokens.

    Args:
        ids: rows of any length.
        size: rows of a batch, at most.
        tokens: of a batch with its padding, at most; a longer row goes alone.
    """
    bucket: list[int] = []
    for row in sorted(range(len(ids)), key=lambda row: len(ids[row])):
        if bucket and (len(bucket) == size or (len(bucket) + 1) * len(ids[row]) > tokens):
            yield bucket
            bucket = []
        bucket.append(row)
    if bucket:
        yield bucket
