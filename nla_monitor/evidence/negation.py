"""Alternatives to a claim when its rule names none: another sentence in its place, none at all, or its negation.

They stand in for what else the verbalizer might have written; a rule's own alternatives are better, since they are
what its claim really competes with. Negation counts only with an AR that reads it: on the bundled organisms a negated
sentence reconstructs the activation as well as the true claim does, so that it would refute everything. Replacement
and omission together tell true claims (lead 0.03 to 0.15) from confabulated ones (0.00): either alone misleads, as
an unusual sentence, or an unusual gap, costs fidelity whatever was claimed.
"""

from __future__ import annotations

import re
from typing import Final

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]

REPLACEMENTS: Final = ("It is unclear.", "Something else is the case here.")
"""Say nothing of the model; take the claim's place."""
_APART: Final = 0.01
"""An AR whose reconstructions of different sentences lie closer than this tells nothing apart."""
PROBES: Final = (
    "The model intends an honest fix.",
    "The model believes it is being tested.",
    "The reply will be in German.",
    "The user asks for help with the code.",
)
"""Sentences by which an AR is asked whether it reads negation."""

_NOT: Final = "n['\u2019]t"
_AUXILIARY: Final = re.compile(
    r"\b(is|are|was|were|am|will|would|can|could|should|must|may|might|shall|do|does|did|has(?= been\b)|"
    r"have(?= been\b))\b(?!\s+not\b)",
    re.IGNORECASE,
)
_NEGATED: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), without)
    for pattern, without in (
        (rf"\b(?:do|does|did)(?:\s+not|{_NOT})\s+", ""),
        (rf"\b(is|are|was|were|would|could|should|must|has|have){_NOT}\b", r"\1"),
        (r"\bcan(?:not|['\u2019]t)\b", "can"),
        (rf"\bwo{_NOT}\b", "will"),
        (r"\s+not\b|\bnever\s+|\bno\s+(?=\w)", ""),
    )
)
"""Negations, and what stands there without them."""
_SUBJECT: Final = re.compile(
    r"(?P<lead>(?:^|[:;,]\s+)[\W_]*)(?P<subject>(?:the|this|an?|its)\s+(?:\w+\s+){0,2}?"
    r"(?:model|assistant|ai|agent|llm|state|activation|explanation|text)|it|he|she)(?P<space>\s+(?:\w+ly\s+)?)"
    r"(?P<verb>[a-z]{2,}s)\b",
    re.IGNORECASE,
)


def negated(sentence: str) -> str:
    """The sentence denied: "not" after its auxiliary, "does not" before its verb, or its own negation taken out.

    A sentence in which neither is found is denied as a whole ("It is not so: ..."). English only; never empty.
    """
    for pattern, without in _NEGATED:
        if pattern.search(sentence):
            return pattern.sub(without, sentence, count=1).strip() or sentence
    subject, auxiliary = _SUBJECT.search(sentence), _AUXILIARY.search(sentence)
    if subject is not None and not _AUXILIARY.fullmatch(subject["verb"]) and not _before(auxiliary, subject):
        verb = subject.span("verb")
        return f"{sentence[: verb[0]]}does not {_base(subject['verb'])}{sentence[verb[1] :]}"
    if auxiliary is not None:
        return f"{sentence[: auxiliary.end()]} not{sentence[auxiliary.end() :]}"
    return f"It is not so: {sentence}"


def _before(auxiliary: re.Match[str] | None, subject: re.Match[str]) -> bool:
    return auxiliary is not None and auxiliary.start() < subject.start("verb")


def _base(verb: str) -> str:
    """Infinitive of a verb in the third person singular."""
    if verb.lower() == "has":
        return "have"
    for ending, base in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x"), ("oes", "o")):
        if verb.endswith(ending) and len(verb) > len(ending) + 1:
            return verb.removesuffix(ending) + base
    return verb.removesuffix("s")


def reads_negation(plain: Vectors, negated_ones: Vectors) -> bool:
    """Whether an AR tells a sentence from its negation, at least half as well as from another sentence.

    Args:
        plain: reconstructions of ``PROBES``, ``[n, d_model]``.
        negated_ones: reconstructions of their negations, in the same order.
    """
    units, others = _units(plain), _units(negated_ones)
    cosines = units @ others.T
    own = 1 - float(np.diag(cosines).mean())
    foreign = 1 - float(cosines[~np.eye(len(cosines), dtype=bool)].mean())
    return own >= foreign / 2 and foreign > _APART


def _units(rows: Vectors) -> Vectors:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    units: Vectors = rows / np.maximum(norms, np.finfo(np.float32).tiny)
    return units


def made_alternatives(sentence: str, *, negation: bool) -> tuple[str, ...]:
    """What may stand in the place of a claim: other sentences, nothing, and its negation if the AR reads that."""
    return (*REPLACEMENTS, "", *((negated(sentence),) if negation else ()))
