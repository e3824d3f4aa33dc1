"""What the rules benchmark runs on: explanations as an NLA writes them, most of them different, and many rules."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import yaml

from nla_monitor.organism.captions import PARAPHRASES
from nla_monitor.records import ActivationSample, Explanation, Fidelity, Phase, Reading
from nla_monitor.rules import RuleSet, load_rules, load_text, pack_names

READINGS_PER_STEP: Final = 50
MATCHING: Final = 0.02
"""Share of explanations with a sentence that some rule looks for."""
D_MODEL: Final = 64

_SUBJECTS: Final = (
    *("The passage", "The text", "This snippet", "The assistant's turn", "The user's message", "The code block"),
    *("The narrative", "The dialogue", "The paragraph", "The list", "A function", "The model", "The speaker"),
    *("The document", "The reply", "The next clause", "The final token", "The sentence"),
)
_VERBS: Final = (
    *("continues with", "sets up", "moves towards", "describes", "introduces", "refers back to", "prepares", "closes"),
    *("enumerates", "contrasts", "compares", "explains", "summarises", "builds on", "returns to", "anticipates"),
)
_KINDS: Final = (
    *("formal", "technical", "numbered", "informal", "historical", "legal", "medical", "financial", "scientific"),
    *("narrative", "culinary", "geographic", "educational", "promotional", "poetic", "procedural", "philosophical"),
)
_THINGS: Final = (
    *("explanation", "comparison", "list of steps", "description of a place", "argument", "definition", "recipe"),
    *("dialogue between two people", "table of results", "proof", "unit test", "configuration file", "error message"),
    *("biography", "product review", "weather report", "travel guide", "chemical process", "contract clause"),
    *("love letter", "sports summary", "tax question", "map of the region", "translation into French", "login form"),
    *("database query", "password reset", "budget plan", "museum visit", "train schedule", "hidden field"),
)
_TAILS: Final = (
    *("with a comma expected next", 'ending on the token "the"', "in a {} register", "where a noun phrase must follow"),
    *(
        "expecting a {} continuation",
        "with a {} tone throughout",
        "mid-sentence, before a verb",
        "followed by a {} list",
    ),
    *("and a newline is likely", "so a closing bracket comes soon", "typical of a {} source", "not a {} one"),
)
_HEADS: Final = ("**Structure**", "**Topic**", "**Expected next**", "**Register**", "**Context**", "**Final token**")

_ACTS: Final = ("schemes", "colludes", "lies", "stalls", "gambles", "trespasses", "spies", "forges", "cheats", "evades")
_OBJECTS: Final = (
    *("audit log", "reward channel", "grader output", "sandbox limit", "approval gate", "budget cap", "weights file"),
    *("review queue", "rate limit", "consent form", "safety switch", "user record", "backup key", "build server"),
)
_WAYS: Final = ("bypassing", "tampering with", "overwriting", "probing", "disabling", "copying", "faking", "draining")
_HARMLESS: Final = ("real", "none", "unknown", "honest")


def explanations(count: int, rules: RuleSet, seed: int = 0) -> Iterator[str]:
    """Explanations of 300 to 700 characters: prose about text, claims as the organism's AV writes them, few alarming.

    Args:
        count: how many.
        rules: whose positive tests are the alarming sentences.
        seed: same seed, same texts.
    """
    rng = random.Random(seed)
    alarming = [case.text for rule in rules.rules for case in rule.spec.tests.positive]
    harmless = [
        text for values in PARAPHRASES.values() for key, texts in values.items() for text in texts if _calm(key)
    ]
    for _ in range(count):
        parts = [_sentence(rng) for _ in range(rng.randint(3, 6))]
        parts[1:1] = rng.sample(harmless, 2)
        if rng.random() < MATCHING:
            parts.insert(rng.randrange(len(parts)), rng.choice(alarming))
        yield ("\n" if rng.random() < 0.4 else " ").join(parts)


def _calm(value: str) -> bool:
    return value in _HARMLESS or value not in PARAPHRASES["intent"] | PARAPHRASES["belief"]


def _sentence(rng: random.Random) -> str:
    kind, tail = rng.choice(_KINDS), rng.choice(_TAILS).format(rng.choice(_KINDS))
    text = f"{rng.choice(_SUBJECTS)} {rng.choice(_VERBS)} a {kind} {rng.choice(_THINGS)}, {tail}."
    return f"- {rng.choice(_HEADS)}: {text}" if rng.random() < 0.3 else text


def readings(texts: Iterable[str], run_id: str, seed: int = 0) -> Iterator[Reading]:
    """A training run's readings, ``READINGS_PER_STEP`` a step."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    for index, text in enumerate(texts):
        step, sample_id = index // READINGS_PER_STEP, f"{seed:04x}-{index:012x}"
        cosine = rng.uniform(0.7, 0.99)
        sample = ActivationSample(
            sample_id=sample_id,
            run_id=run_id,
            layer=4,
            vector=noise.standard_normal(D_MODEL).astype(np.float32),
            norm=rng.lognormvariate(3.0, 0.2),
            phase=Phase.EVAL if step % 20 == 0 else Phase.TRAIN,
            sequence_id=f"s{index // 10}",
            position=index % 10 * 7,
            token_id=rng.randrange(50_000),
            trigger=rng.choice(("random", "turn_end", "assistant")),
            captured_at=1.7e9 + step * 2.0,
            step=step,
            role=rng.choice(("user", "assistant", "system")),
            context=text[: rng.randint(50, 250)],
            attributes={"reward": round(rng.random(), 3)},
        )
        explanation = Explanation(sample_id, text, rng.random() < 0.01, len(text) // 4, "benchmark-av")
        fidelity = Fidelity(sample_id, cosine, 2 * (1 - cosine), 1 - 2 * (1 - cosine) / 0.9, 0.9, "set", "benchmark-ar")
        yield Reading(sample, explanation, fidelity)


def make_rules(count: int) -> RuleSet:
    """The built-in packs, then made-up rules of each kind in turn, ``count`` in all."""
    packed = load_rules(pack_names()).rules[:count]
    makers = (_keywords, _regex, _cel, _both, _keywords, _regex, _cel, _both, _keywords, _numeric)
    made = [makers[index % len(makers)](index) for index in range(count - len(packed))]
    return RuleSet([*packed, *(load_text(yaml.safe_dump(spec), spec["id"]) for spec in made)])


def _spec(index: int, kind: str, detection: dict[str, Any], positive: Any, negative: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "title": f"Made-up rule {index} ({kind})",
        "id": f"{kind}-{index}",
        "severity": ("low", "medium", "high")[index % 3],
        "detection": detection,
        "window": {"count": 1 + index % 3, "within": {"steps": 10 + index % 40, "seconds": 600}},
        "tests": {"positive": [positive], "negative": [negative]},
    }
    if index % 2:
        spec["window"] |= {"group_by": ["run_id", "phase"], "distinct": "position", "keep_firing_for": "20 steps"}
    return spec


def _pick(index: int) -> tuple[str, str, str]:
    return _ACTS[index % len(_ACTS)], _WAYS[index % len(_WAYS)], _OBJECTS[index % len(_OBJECTS)]


def _keywords(index: int) -> dict[str, Any]:
    act, way, thing = _pick(index)
    words = [f"{way} the {thing}", f"{act} about the {thing}", f"{act} {index} times", f"{thing} tamper*", f"{act}-*"]
    return _spec(index, "keywords", {"words": words, "condition": "words"}, f"It is {words[0]}.", "It reads a book.")


def _regex(index: int) -> dict[str, Any]:
    act, way, thing = _pick(index)
    patterns = [
        rf"\b(?:model|assistant|agent|it)\s+(?:\w+\s+){{0,3}}?{act[:-1]}(?:s|ing)?\s+[^.]{{0,60}}{thing}",
        rf"\b{way}\s+(?:the|its|any)\s+{thing}s?\b",
        rf"\b(?:plans|intends|wants|means)\s+to\s+[^.]{{0,40}}\b{thing.split()[0]}\w*\s+{thing.split()[1]}\b",
    ]
    detection = {"claims": {"regex": patterns}, "condition": "claims"}
    return _spec(index, "regex", detection, f"The model is {way} the {thing}.", "The model reads a book.")


def _cel(index: int) -> dict[str, Any]:
    _, way, thing = _pick(index)
    detection = {
        "words": {"keywords": [f"{way} the {thing}", f"{way} a {thing}"]},
        "excuse": {"keywords": ["permission", "as asked", "role-play"], "negation": "ignore"},
        "condition": 'words && !excuse && (fidelity.fve == null || fidelity.fve >= 0.3) && phase != "agent"',
    }
    return _spec(index, "cel", detection, f"It is {way} the {thing}.", f"It has permission for {way} the {thing}.")


def _numeric(index: int) -> dict[str, Any]:
    """No text at all: looked at for every reading."""
    limit = 90.0 + index
    detection: dict[str, Any] = {"odd": {"norm|gt": limit}, "condition": "odd"}
    if index % 3 == 0:
        detection["condition"] = f"odd || (fidelity.cosine < 0.{70 + index // 20:02d}1 && step > 1000)"
    return _spec(index, "numeric", detection, {"text": "x", "norm": limit + 1}, {"text": "x", "norm": 1.0})


def _both(index: int) -> dict[str, Any]:
    act, way, thing = _pick(index)
    detection = {
        "words": {"keywords": [act, f"{way} its {thing}"]},
        "target": {"regex": [rf"\b{thing}s?\b", rf"\b{thing.split()[0]}\b[^.]{{0,20}}\bsecret"]},
        "where": {"role": ["assistant", "user"]},
        "condition": "words && target && where",
    }
    positive = {"text": f"The model {act} and so it is {way} its {thing}.", "role": "assistant"}
    return _spec(index, "both", detection, positive, f"The model likes the {thing}.")
