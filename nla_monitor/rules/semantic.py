"""``semantic``: does a sentence of the explanation mean what one of the rule's sentences means?

Two methods:

- ``embedding``: cosine of sentence embeddings (sentence-transformers, the extra ``semantic``) to the nearest sentence
  of ``like``;
- ``zero_shot``: probability that the explanation's sentence entails one of ``like`` (a model trained on inference,
  through transformers' zero-shot pipeline, each hypothesis by itself).

A sentence meets the selection when its score reaches ``min`` and is above that of every sentence of ``unlike``.
Sentences that are negated, quoted or merely talk about it are left out, as with keywords: embeddings are weak on
negation.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import Field

from nla_monitor.errors import MissingExtraError, RuleError
from nla_monitor.records import Judgement
from nla_monitor.rules.scope import MENTION, Guards, Scope, quotations
from nla_monitor.rules.section import Section, Texts

logger = logging.getLogger(__name__)

EXTRA: Final = "semantic"
MAX_SENTENCES: Final = 64
"""Sentences of one explanation that are looked at; an explanation has a handful."""
# A run of closing marks is looked at once, from its start: no text makes the search quadratic.
_SENTENCE: Final = re.compile(
    r"[^\s.!?\n][^\n]*?(?:(?<![.!?\u2026\u3002])[.!?\u2026\u3002]++[\"'\u2019\u201d)\]*_]*+(?=\s|$)|(?=\n)|$)"
)
_TERM: Final = 2
_BULLET: Final = re.compile(r"(?:[-*+\u2022]\s+|\d{1,3}[.)]\s+)")

Method = Literal["embedding", "zero_shot"]
Scores = np.ndarray[tuple[int, int], np.dtype[np.float64]]
Scorer = Callable[[Sequence[str], Sequence[str]], Scores]
"""Sentences ``[n]`` and the rule's sentences ``[m]`` to scores ``[n, m]``."""


class SemanticSpec(Section):
    """Sentences to compare with, and the model that compares."""

    like: Texts = Field(min_length=1, max_length=64, description="sentences that say what is looked for")
    unlike: Texts = Field((), max_length=64, description="sentences that a true one must be nearer to `like` than to")
    min: float = Field(0.6, ge=-1, le=1, description="least cosine (embedding) or probability (zero_shot)")
    model: str = Field(min_length=1, description="folder (relative to the rule file) or Hugging Face id")
    method: Method = "embedding"
    revision: str | None = Field(None, description="commit of a Hugging Face model")
    fingerprint: str | None = Field(None, description="written by the loader: content of a local model")

    @property
    def definition(self) -> dict[str, Any]:
        """What decides the answer: a local model counts by its content, not by its place."""
        found = self.model_dump(mode="json", exclude_defaults=True)
        if self.fingerprint is not None:
            found.pop("model")
        return found


class SemanticOracle:
    """Answers with the model of a ``semantic`` selection."""

    kind = "semantic"

    def __init__(self, spec: SemanticSpec, guards: Guards) -> None:
        self._spec = spec
        self._guards = guards
        self.definition: Mapping[str, Any] = {
            **spec.definition,
            "guards": [guards.negation, guards.quotes, guards.mentions],
        }

    def ask(self, texts: Sequence[str]) -> list[Judgement]:
        """One answer for each text; all their sentences go through the model together.

        Raises:
            MissingExtraError: the extra is not installed.
            RuleError: the model cannot be loaded.
        """
        sentences = [list(self._claims(text)) for text in texts]
        flat = [scored for found in sentences for _, scored in found]
        scores = self._scores(flat)
        answers, start = [], 0
        for found in sentences:
            answers.append(self._judge([sentence for sentence, _ in found], scores[start : start + len(found)]))
            start += len(found)
        return answers

    def check(self) -> None:
        """Loads the model.

        Raises:
            MissingExtraError: the extra is not installed.
            RuleError: there is no such model.
        """
        self._scorer()

    def _scorer(self) -> Scorer:
        load = _zero_shot if self._spec.method == "zero_shot" else _embedding
        return load(self._spec.model, self._spec.revision)

    def _claims(self, text: str) -> Iterator[tuple[str, str]]:
        """Sentences that the guards leave over, with what of each is scored: longer quotations are left out."""
        scope = Scope(text)
        quoted = quotations(text) if self._guards.quotes else []
        for start, end in sentences_of(text):
            sentence = text[start:end]
            talked_about = self._guards.mentions and MENTION.search(sentence)
            if not talked_about and scope.claimed(start, end, self._guards):
                yield sentence, _without(text, start, end, quoted)

    def _scores(self, sentences: Sequence[str]) -> Scores:
        options = [*self._spec.like, *self._spec.unlike]
        return self._scorer()(sentences, options) if sentences else np.zeros((0, len(options)))

    def _judge(self, sentences: Sequence[str], scores: Scores) -> Judgement:
        if not sentences:
            return Judgement(self.kind, "no", "", None, self._spec.model)
        wanted = scores[:, : len(self._spec.like)].max(axis=1)
        other = scores[:, len(self._spec.like) :].max(axis=1, initial=-np.inf)
        # The best sentence among those that are nearer to what is looked for than to what it is not.
        best = int(np.where(wanted > other, wanted, -np.inf).argmax())
        met = bool(wanted[best] > other[best] and wanted[best] >= self._spec.min)
        score = float(wanted[best])
        return Judgement(self.kind, "yes" if met else "no", sentences[best] if met else "", score, self._spec.model)


def sentences_of(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of each sentence or line, without bullets; at most ``MAX_SENTENCES``."""
    for count, hit in enumerate(_SENTENCE.finditer(text)):
        if count >= MAX_SENTENCES:
            return
        lead = _BULLET.match(text, hit.start(), hit.end())
        start = lead.end() if lead is not None else hit.start()
        end = start + len(text[start : hit.end()].rstrip())
        if any(char.isalnum() for char in text[start:end]):
            yield start, end


def _without(text: str, start: int, end: int, quoted: Sequence[tuple[int, int]]) -> str:
    """``text[start:end]`` without the quotations of more than two words (one or two are emphasis, or a term)."""
    parts, position = [], start
    for begin, stop in quoted:
        if start <= begin and stop <= end and len(text[begin:stop].split()) > _TERM:
            parts.append(text[position:begin])
            position = stop
    return " ".join([*parts, text[position:end]])


def pin_model(spec: SemanticSpec, folder: Path) -> SemanticSpec:
    """The spec with a local model's full path and the fingerprint of its content; unchanged for a Hugging Face id.

    Raises:
        ValueError: a path where nothing is, or a fingerprint that the files no longer have.
    """
    path = folder / Path(spec.model).expanduser()
    if not path.is_dir():
        if spec.model.startswith((".", "/", "~")) or spec.fingerprint is not None:
            raise ValueError(f"there is no model in {path}; give its folder or a Hugging Face id")
        return spec
    found = _fingerprint(path)
    if spec.fingerprint not in {None, found}:
        raise ValueError(f"the model in {path} is not the one that the rule was written for (another fingerprint)")
    return spec.model_copy(update={"model": str(path.resolve()), "fingerprint": found})


_WHOLE: Final = 1 << 20


def _fingerprint(folder: Path) -> str:
    """Names and sizes of all files, content of the small ones and of both ends of the large ones."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_WHOLE))
            if size > _WHOLE:
                stream.seek(max(_WHOLE, size - _WHOLE))
                digest.update(stream.read(_WHOLE))
    return digest.hexdigest()


@lru_cache(maxsize=8)
def _embedding(model: str, revision: str | None) -> Scorer:
    try:
        from sentence_transformers import SentenceTransformer  # noqa: PLC0415 -- optional extra
    except ImportError as error:
        raise MissingExtraError("sentence-transformers", EXTRA, "A semantic selection") from error
    try:
        encoder = SentenceTransformer(model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _no_model(model, error) from error
    encode = lru_cache(maxsize=64)(
        lambda texts: np.asarray(
            encoder.encode(list(texts), normalize_embeddings=True, show_progress_bar=False), dtype=np.float64
        )
    )

    def score(sentences: Sequence[str], options: Sequence[str]) -> Scores:
        found: Scores = encode(tuple(sentences)) @ encode(tuple(options)).T
        return found

    return score


@lru_cache(maxsize=8)
def _zero_shot(model: str, revision: str | None) -> Scorer:
    from transformers import pipeline  # noqa: PLC0415 -- heavy

    try:
        classify = pipeline("zero-shot-classification", model=model, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _no_model(model, error) from error

    def score(sentences: Sequence[str], options: Sequence[str]) -> Scores:
        answers = classify(list(sentences), list(options), hypothesis_template="{}", multi_label=True)
        by_option = [dict(zip(answer["labels"], answer["scores"], strict=True)) for answer in answers]
        return np.array([[found[option] for option in options] for found in by_option], dtype=np.float64)

    return score


def _no_model(model: str, error: Exception) -> RuleError:
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return RuleError(
        f"the model {model!r} of a semantic selection cannot be loaded: {first}; give a folder that holds one, or"
        f" download it first: hf download {model}"
    )
