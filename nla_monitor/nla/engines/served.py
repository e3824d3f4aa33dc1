"""An AV that a server runs: vLLM or SGLang. The prompt's embeddings are made here, the model is only there.

Sampling over HTTP: each draw is sent with a seed of its own; whether the same seed gives the same text in another batch
is up to the server (SGLang heeds seeds under ``--enable-deterministic-inference`` only). Likelihoods of given words are
not offered by either server for prompts that are embeddings, so there is no ``score_continuations``: the control
that needs it says that it was not run.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from nla_monitor.config import NLAConfig
from nla_monitor.errors import (
    ConfigError,
    EngineError,
    EngineUnavailableError,
)
from nla_monitor.nla.base import PartialReadError, Verbalization
from nla_monitor.nla.checkpoint import open_checkpoint
from nla_monitor.nla.contract import Sidecar
from nla_monitor.nla.engines.client import Client
from nla_monitor.nla.engines.probing import Findings, Probe
from nla_monitor.nla.engines.prompting import PromptEmbeddings, embed_tokens, read_model_settings
from nla_monitor.nla.engines.sglang import SglangWire
from nla_monitor.nla.engines.vllm import VllmWire
from nla_monitor.nla.engines.wire import Completion, Sampling, Wire
from nla_monitor.nla.explanation import ExplanationReader, stop_ids
from nla_monitor.nla.injection import Prompt, build_prompt, check_vectors, rescale
from nla_monitor.nla.loading import checkpoint_errors, load_tokenizer, quiet
from nla_monitor.nla.sidecar import Role, sidecar_of

_GENERATION_NAME: Final = "generation_config.json"


def load_served(path: str | Path, config: NLAConfig) -> ServedVerbalizer:
    """The AV behind ``config.url``, its contract read from the checkpoint here. Sends nothing yet.

    Raises:
        CheckpointError: the checkpoint's sidecar, tokenizer or embedding table cannot be used.
        ConfigError: the dialect cannot be served over HTTP, the dtype cannot hold the embeddings, or the API key is
            missing.
    """
    checkpoint = open_checkpoint(path, "av", revision=config.revision, base=config.base)
    sidecar = sidecar_of(checkpoint, Role.AV, config)
    contract = sidecar.verbalizer_contract()
    if not contract.dialect.by_row:
        raise ConfigError(
            f"nla.engine = {config.engine!r} cannot serve the dialect {contract.dialect.value!r}: it changes a block's "
            "output while the model runs, and a server takes only what stands before the first block. Use "
            "nla.engine: transformers."
        )
    tokenizer = load_tokenizer(checkpoint.tokenizer)
    prompt = build_prompt(tokenizer, contract)
    settings = read_model_settings(checkpoint.root)
    rows = embed_tokens(checkpoint.root, settings, prompt.ids, served_dtype(config))
    stops = stop_ids(tokenizer, _generation_ends(checkpoint.root), settings.get_text_config().eos_token_id)
    provenance = checkpoint.content_hash(sidecar.source, sidecar.settings)
    embeddings = PromptEmbeddings(rows, prompt.marker)
    return ServedVerbalizer(tokenizer, sidecar, prompt, embeddings, stops, config=config, content_hash=provenance)


def served_dtype(config: NLAConfig) -> torch.dtype:
    """In which embeddings are made: ``auto`` is bfloat16, as servers run (vLLM casts to its own, whatever comes)."""
    return torch.bfloat16 if config.dtype == "auto" else getattr(torch, config.dtype)


def _generation_ends(folder: Path) -> object:
    if not (folder / _GENERATION_NAME).is_file():
        return None
    with quiet(), checkpoint_errors(folder, "generation config"):
        return GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id


class ServedVerbalizer:
    """Explanations by a server; made by ``load_served``. Safe for several threads.

    The server is checked before it is believed (``check``), and again after it was away: it may have come back with
    another model or other flags.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        sidecar: Sidecar,
        prompt: Prompt,
        embeddings: PromptEmbeddings,
        stops: set[int],
        *,
        config: NLAConfig,
        content_hash: str,
    ) -> None:
        self.d_model: int = sidecar.d_model
        self.layer: int | None = sidecar.layer
        self.content_hash: str = content_hash
        self.contract = sidecar.verbalizer_contract()
        self.prompt = prompt
        self._embeddings = embeddings
        self._reader = ExplanationReader(tokenizer, stops, tagged=self.contract.tagged)
        self._greedy = Sampling(config.max_new_tokens, tuple(sorted(stops)))
        self._client = Client(config)
        self._wire: Wire = (
            VllmWire(embeddings, config.served_model) if config.engine == "vllm" else SglangWire(embeddings)
        )
        self._checked = False
        self._check_lock = threading.Lock()  # one probe at a time: others wait for its verdict

    def verbalize(self, vectors: npt.NDArray[np.float32]) -> list[Verbalization]:
        """Greedy explanations of ``[batch, d_model]`` raw activations, in order, ``concurrency`` at a time.

        Raises:
            ActivationError: a vector is not finite, has zero norm or the wrong width (names the row).
            EngineError: the server is away or cannot be used; nothing was read.
            PartialReadError: some rows failed, and the server is well; it holds the others.
        """
        return self._read(self._complete(vectors, [self._greedy] * len(vectors)))

    def resample(
        self, vectors: npt.NDArray[np.float32], seeds: Sequence[int], *, temperature: float = 1.0
    ) -> list[Verbalization]:
        """One drawn explanation for each of ``[batch, d_model]``, in order.

        Args:
            vectors: raw activations; repeat a row for several draws.
            seeds: one per row, cut to 63 bits; what a seed means is the server's.
            temperature: of the softmax, above 0.

        Raises:
            ValueError: there are not as many seeds as vectors, or the temperature is not above 0.
            ActivationError, EngineError, PartialReadError: as ``verbalize``.
        """
        if len(vectors) != len(seeds):
            raise ValueError(f"{len(vectors)} vectors but {len(seeds)} seeds: give one seed for each vector")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0 (greedy reading is verbalize)")
        drawn = [replace(self._greedy, temperature=temperature, seed=seed) for seed in seeds]
        return self._read(self._complete(vectors, drawn))

    def generate(self, vectors: npt.NDArray[np.float32]) -> list[list[int]]:
        """Greedy token ids for each of ``[batch, d_model]``, the stop token included. Raises as ``verbalize``.

        Raises:
            EngineError: the server names no token ids, too.
        """
        found = self._complete(vectors, [self._greedy] * len(vectors))
        if any(one.tokens is None for one in found):
            raise EngineError(f"the server at {self._client.url} names no token ids; its texts are read all the same")
        return [list(one.tokens or ()) for one in found]

    def prompt_embeddings(self, vectors: npt.NDArray[np.float32]) -> torch.Tensor:
        """What is sent for each vector, ``[batch, tokens, d_model]``.

        Raises:
            ActivationError: as ``verbalize``.
        """
        return torch.stack([self._embeddings.filled(row) for row in self._rows(vectors)])

    def check(self) -> Findings:
        """Ask the server a few known questions; what it was found to be.

        Raises:
            EngineUnavailableError: it is not there.
            EngineError: it cannot be used; the subclass and message say why and which flag helps.
        """
        with self._check_lock:
            return self._check()

    def close(self) -> None:
        """End connections and their thread."""
        self._client.close()

    def _check(self) -> Findings:
        self._checked = False
        random = np.random.default_rng(0).standard_normal((4, self.d_model)).astype(np.float32)
        probe = Probe(self._client, self._wire, self.prompt.ids, self._greedy)
        findings = probe.run(list(self._rows(random)))
        self._checked = True
        return findings

    def _complete(self, vectors: npt.NDArray[np.float32], sampling: Sequence[Sampling]) -> list[Completion]:
        rows = self._rows(vectors)
        if not len(rows):
            return []
        with self._check_lock:
            if not self._checked:
                self._check()
        jobs = [partial(self._wire.body, row, how) for row, how in zip(rows, sampling, strict=True)]
        found = self._client.ask_all(self._wire.path, jobs, self._wire.completion)
        failed = {row: error for row, error in enumerate(found) if isinstance(error, EngineError)}
        done = {row: one for row, one in enumerate(found) if isinstance(one, Completion)}
        if not failed:
            return list(done.values())
        if any(isinstance(error, EngineUnavailableError) for error in failed.values()):
            self._checked = False  # it may come back as another
        if not done:
            self.check()  # is it the server, or are it the rows? Raises where it is the server
        raise PartialReadError({row: self._explanation(one) for row, one in done.items()}, failed)

    def _rows(self, vectors: npt.NDArray[np.float32]) -> torch.Tensor:
        """Rows to inject, rescaled in float32 and only then cast, as in process."""
        rows = torch.from_numpy(rescale(check_vectors(vectors, self.d_model), self.contract.injection_scale))
        cast = rows.to(self._embeddings.rows.dtype)
        # A server takes NaN and Inf without a word and writes nothing.
        if not bool(torch.isfinite(cast).all()):
            raise ConfigError(
                f"vectors at norm {self.contract.injection_scale} do not fit into {cast.dtype}. Set nla.dtype to "
                "bfloat16, and run the server so."
            )
        return cast

    def _read(self, completions: Sequence[Completion]) -> list[Verbalization]:
        return [self._explanation(one) for one in completions]

    def _explanation(self, completion: Completion) -> Verbalization:
        if completion.tokens is None:
            return self._reader.read_text(completion.text, completion.count)
        return self._reader.read(completion.tokens)
