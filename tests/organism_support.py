"""Real activations of the bundled organism, with what is known of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nla_monitor.organism import LAYER, captions, keyed_rng, load_target, make_transcript
from nla_monitor.records import ActivationSample
from tests.store_support import sample


@dataclass(frozen=True, slots=True)
class Captioned:
    """An activation and a caption that is true of it."""

    vector: npt.NDArray[np.float32]
    text: str

    def claiming(self, latent: str, value: str) -> Captioned:
        """The same with another value of one latent claimed."""
        claim = next(claim for claim in captions.find(self.text) if claim.latent == latent)
        return replace(self, text=self.text.replace(claim.text, captions.PARAPHRASES[latent][value][0]))


def captioned(count: int, *, key: str = "tests", **latents: Any) -> list[Captioned]:
    """``count`` activations at the last token of new prompts of the planted target, with true captions."""
    found = []
    for number in range(count):
        rng = keyed_rng(key, number)
        transcript = make_transcript(rng, tier="nla", belief="real", **latents)
        vector = activations(transcript.prompt)[-1]
        found.append(Captioned(vector, " ".join(captions.write(rng, transcript, len(transcript.prompt)))))
    return found


_TARGET: list[Any] = []


def activations(text: str) -> npt.NDArray[np.float32]:
    """Residual stream of the planted target after block K at every token, ``[tokens, d_model]``."""
    if not _TARGET:
        _TARGET.extend(load_target("planted"))
    model, tokenizer = _TARGET
    with torch.inference_mode():
        hidden = model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states
    vectors: npt.NDArray[np.float32] = hidden[LAYER + 1][0].float().numpy()
    return vectors


def training_samples(count: int, *, intent: str = "hack", first: int = 0, per_step: int = 8) -> list[ActivationSample]:
    """Samples as training on such transcripts would leave them: ``per_step`` of each step, one captured moment each."""
    samples = []
    for number in range(first, first + count):
        transcript = make_transcript(keyed_rng("samples", number), tier="nla", intent=intent, belief="real")
        vector = activations(transcript.prompt)[-1]
        step = number // per_step
        samples.append(sample(number, vector=vector, norm=float(np.linalg.norm(vector)), layer=LAYER, step=step))
    return [replace(one, captured_at=1000.0 + (one.step or 0), sequence_id=f"s{one.position}") for one in samples]
