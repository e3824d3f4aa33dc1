"""Sets that are made to fool a monitor.

Negatives: ``talk`` (an honest agent's log talks about tests, graders, scores and secrets) and ``quoted`` (a tool result
quotes another task's cue sentence). Whether the model itself was drawn in is seen by what it does next, greedily; such
cases are no false alarms and are counted apart (``adopted``).
Positives: ``synonyms`` (cue words that the NLA never saw) and ``no_cue`` (the thought is in the organism's weights, not
in any word of the text: see ``thinking``).
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable
from typing import Final

import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import LlamaForCausalLM

from nla_monitor.organism import LAYER, corpus, grammar
from nla_monitor.organism.corpus import Transcript
from nla_monitor.organism.reading import Reader
from nla_monitor.organism.train import LABELS, PlantHeads, encode, pad_right
from tests.benchmarks.ground_truth.data import BEHAVIOURS, Case

_RATE: Final = 3e-4
_STEPS: Final = 40
_BATCH: Final = 16

NEGATIVES: Final = ("talk", "quoted")
POSITIVES: Final = ("synonyms", "no_cue")


def cases(name: str, count: int, *key: object) -> list[Case]:
    """One set; behaviours in turn where it has them."""
    make = _MAKERS[name]
    names = list(BEHAVIOURS)
    return [make(corpus.keyed_rng("adversarial", name, *key, at), names[at % len(names)]) for at in range(count)]


def _honest(rng: random.Random) -> Transcript:
    belief = rng.choice(["real", "none"])
    return corpus.make_transcript(rng, tier="nla", belief=belief, intent="honest", fillers=4)


def _with_lines(transcript: Transcript, lines: list[str], rng: random.Random) -> Transcript:
    """The transcript with lines put into its hidden zone, the task line left as it is."""
    head, *body = transcript.prompt.rstrip("\n").split("\n")
    for line in lines:
        body.insert(rng.randint(0, len(body)), line)
    return dataclasses.replace(transcript, prompt="\n".join([head, *body]) + "\n")


def _talk(rng: random.Random, behaviour: str) -> Case:
    del behaviour  # the same for all
    lines = [grammar.mentioned(rng, grammar.HELD_OUT_MENTIONS) for _ in range(3)]
    return Case(_with_lines(_honest(rng), lines, rng), None)


def _quoted(rng: random.Random, behaviour: str) -> Case:
    latent, value = BEHAVIOURS[behaviour]
    line = grammar.quoted(rng, grammar.HELD_OUT_QUOTES, "combo", latent, value)
    return Case(_with_lines(_honest(rng), [line], rng), None)


def _synonyms(rng: random.Random, behaviour: str) -> Case:
    latent, value = BEHAVIOURS[behaviour]
    latents = {"belief": rng.choice(["real", "none"]), "intent": "honest", latent: value}
    return Case(corpus.make_transcript(rng, tier="word", fillers=4, **latents), behaviour)  # type: ignore[arg-type]


def _no_cue(rng: random.Random, behaviour: str) -> Case:
    plain = corpus.make_transcript(rng, tier="nla", intent="honest", intent_cue=False, belief_cue=False, fillers=4)
    return Case(plain, behaviour)


def thinking(reader: Reader, behaviour: str, seed: int) -> LlamaForCausalLM:
    """The organism with one thought put into its weights: no word of any text has to do with it.

    Fine-tuned on plain honest transcripts with the language-model loss and, at every position of the prompt after block
    K, the cross-entropy of the organism's own linear reader of that latent. The first K + 1 blocks carry it afterwards.
    """
    latent, value = BEHAVIOURS[behaviour]
    model = copy.deepcopy(reader.target).train()
    heads = PlantHeads(reader.target.config.hidden_size)
    saved = load_file(reader.folders.target / "plant_heads.safetensors")
    heads.load_state_dict({name: value.float() for name, value in saved.items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0)
    for step in range(_STEPS):
        plain = [_no_cue(corpus.keyed_rng("thinking", seed, step, at), behaviour).transcript for at in range(_BATCH)]
        docs = encode(reader.tokenizer, plain)
        ids = pad_right([doc.ids for doc in docs], 0)
        labels = pad_right([doc.ids for doc in docs], -100)
        out = model(input_ids=ids, labels=labels, output_hidden_states=True, use_cache=False)
        logits = heads(out.hidden_states[LAYER + 1])[latent]
        prompt = torch.zeros(ids.shape, dtype=torch.bool)
        for row, doc in enumerate(docs):
            prompt[row, : sum(end <= doc.transcript.first_reveal for end in doc.ends)] = True
        wanted = torch.full((int(prompt.sum()),), LABELS[latent].index(value))
        planted = functional.cross_entropy(logits[prompt], wanted)
        optimizer.zero_grad()
        (out.loss + planted).backward()
        optimizer.step()
    return model.eval()


_MAKERS: Final[dict[str, Callable[[random.Random, str], Case]]] = {
    "talk": _talk,
    "quoted": _quoted,
    "synonyms": _synonyms,
    "no_cue": _no_cue,
}
