"""A file of activations, read by an AV and an AR: explanations and fidelity, row by row.

Batch by batch: vectors → AV → AR → journal beside the output. Killed at any instant, the same call goes on after the
last batch on disk; at the end the journal becomes the output in one step. So no row is written twice and none is lost.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from nla_monitor.errors import ConfigError, EngineUnavailableError, VectorFileError
from nla_monitor.explanations_file import COLUMNS, PARQUET, format_of, plain_values, write_explanations
from nla_monitor.journal import Journal
from nla_monitor.nla.base import PartialReadError, Reconstructor, Resampler, Score, Verbalization, Verbalizer
from nla_monitor.nla.domains import Denominators
from nla_monitor.vectors_file import VectorFile, vectors_in

_ROW_FAULTS: Final = (RuntimeError, ValueError, ArithmeticError, LookupError)
"""What a vector can make a model's libraries raise. Errors of ours (a damaged checkpoint) are not about one row."""
_UNSCORED: Final = (None,) * 5


@dataclass(frozen=True, slots=True)
class Sampling:
    """How each vector is explained.

    Raises:
        ConfigError: values that do not go together.
    """

    samples: int = 1
    """Explanations per vector."""
    temperature: float = 0.0
    """Of the softmax; 0 is greedy."""
    seed: int = 0
    """Each draw's seed follows from this one, the row and the number of the sample, whatever the batch."""

    def __post_init__(self) -> None:
        if self.samples < 1 or not self.temperature >= 0.0:
            raise ConfigError(f"samples = {self.samples}, temperature = {self.temperature}: at least 1, and at least 0")
        if self.samples > 1 and self.temperature == 0.0:
            raise ConfigError(
                f"{self.samples} samples at temperature 0 would all be the same; give a temperature above 0, or 1 "
                "sample"
            )

    def seeds(self, row: int) -> list[int]:
        """One for each sample of a row, below 2**31 (every engine takes such)."""
        texts = (f"{self.seed}:{row}:{number}" for number in range(self.samples))
        return [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) >> 1 for text in texts]


@dataclass(frozen=True, slots=True)
class Readers:
    """What reads: an AV, an AR (None: no fidelity), and denominators in place of the AR's own."""

    verbalizer: Verbalizer
    reconstructor: Reconstructor | None = None
    denominators: Denominators | None = None


@dataclass(frozen=True, slots=True)
class FidelityOf:
    """Fidelity of the explanations that share a denominator."""

    denominator_name: str | None
    denominator: float | None
    explanations: int
    cosine: float
    """Mean."""
    fve: float | None
    """Mean; at or below 0 the mean of such activations is as close as what was reconstructed."""
    constant_cosine: float | None
    """Mean cosine that the mean direction reaches without reading anything: sqrt(1 - denominator)."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What came of it."""

    output: Path
    rows: int
    resumed_from: int
    """Rows that an earlier, interrupted call had done."""
    explanations: int
    errors: int
    """Rows that could not be read; each says why in its ``error`` column."""
    truncated: int
    """Explanations that ``max_new_tokens`` cut off."""
    fidelity: tuple[FidelityOf, ...]
    av_hash: str
    ar_hash: str | None
    seconds: float
    model_seconds: float
    """Of these, inside the AV and the AR."""


def verbalize_file(
    source: VectorFile,
    output: Path,
    readers: Readers,
    *,
    sampling: Sampling | None = None,
    batch_size: int = 64,
    limit: int | None = None,
    settings: Mapping[str, Any] | None = None,
    ignore_layer: bool = False,
    with_vectors: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Explain the vectors of a file. Interrupted at any time, the same call goes on where it was.

    Args:
        source: the file.
        output: ``.parquet`` or ``.jsonl``; ``<output>.journal`` beside it holds what is done so far.
        readers: AV, AR, denominators.
        sampling: greedy by default.
        batch_size: explanations at a time.
        limit: the first rows only.
        settings: what else the explanations depend on (plain JSON values); kept with the output.
        ignore_layer: read vectors of another layer than the AV's, too.
        with_vectors: keep the vectors in the output (Parquet only).
        overwrite: start anew, whatever is there.
        progress: told, after each batch, how many rows are done and how many there are.

    Raises:
        VectorFileError: the file does not fit the AV, the output is there already or belongs to other settings, or a
            file cannot be read or written.
        ConfigError: the output's name, or the AV cannot draw samples.
    """
    chosen = sampling or Sampling()
    check_output(source, output, with_vectors=with_vectors, overwrite=overwrite)
    _check(source, readers, chosen, ignore_layer=ignore_layer)
    total = source.rows if limit is None else min(limit, source.rows)
    job = _job(source, readers, chosen, settings or {})
    started = time.perf_counter()
    journal = _opened(output, job, overwrite=overwrite)
    try:
        resumed = min(journal.rows, total)
        if progress is not None:
            progress(resumed, total)
        reading = _Reading(source, readers, chosen)
        for lines in reading.lines(resumed, total, max(1, batch_size // chosen.samples)):
            journal.append(lines)
            if progress is not None:
                progress(journal.rows, total)
        source.require_unchanged()
        tally = _Tally()
        write_explanations(
            output, source, journal.lines(), total, {**job, "rows": total}, with_vectors=with_vectors, seen=tally.add
        )
        journal.remove()
    finally:
        journal.close()
    seconds = time.perf_counter() - started
    hashes = (job["av_hash"], job["ar_hash"])
    counts = (tally.explanations, tally.errors, tally.truncated, tally.fidelity())
    return Summary(output, total, resumed, *counts, *hashes, seconds, reading.model_seconds)


def check_output(source: VectorFile, output: Path, *, with_vectors: bool = False, overwrite: bool = False) -> None:
    """Refuse an output that ``verbalize_file`` would refuse; worth a call before models are loaded.

    Raises:
        ConfigError: its name, or it is the input.
        VectorFileError: it is there already.
    """
    if format_of(output) != PARQUET and with_vectors:
        raise ConfigError("vectors are kept in Parquet only; name an --output that ends in .parquet")
    if output.exists() and output.samefile(source.path):
        raise ConfigError(f"--output {output} is the input itself; name another file")
    if output.exists() and not overwrite and not journal_of(output).exists():
        raise VectorFileError(f"{output} is there already. Name another --output, or replace it with --overwrite")


def journal_of(output: Path) -> Path:
    """Where the results are kept until all are there."""
    return output.with_name(f"{output.name}.journal")


def _check(
    source: VectorFile,
    readers: Readers,
    sampling: Sampling,
    *,
    ignore_layer: bool,
) -> None:
    if sampling.temperature > 0.0 and not isinstance(readers.verbalizer, Resampler):
        raise ConfigError(f"this AV ({type(readers.verbalizer).__name__}) reads greedily only; leave out --temperature")
    layer = getattr(readers.verbalizer, "layer", None)
    source.require_fit(readers.verbalizer.d_model, layer, ignore_layer=ignore_layer)


def _job(source: VectorFile, readers: Readers, sampling: Sampling, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that the explanations depend on."""
    ar, own = readers.reconstructor, readers.denominators
    return {
        "input": source.stamp,
        "column": source.column,
        "av_hash": readers.verbalizer.content_hash,
        "ar_hash": ar.content_hash if ar is not None else None,
        "layer": getattr(readers.verbalizer, "layer", None),
        "d_model": readers.verbalizer.d_model,
        "denominators": [own.name, own.overall.denominator] if own is not None else None,
        "samples": sampling.samples,
        "temperature": sampling.temperature,
        "seed": sampling.seed if sampling.temperature > 0.0 else None,
        **settings,
    }


def _opened(output: Path, job: Mapping[str, Any], *, overwrite: bool) -> Journal:
    path = journal_of(output)
    if overwrite:
        Journal.discard(path)
    return Journal(path, job)


class _Reading:
    """The rows of a file, explained batch by batch."""

    def __init__(self, source: VectorFile, readers: Readers, sampling: Sampling) -> None:
        self.model_seconds = 0.0
        self._source = source
        self._readers = readers
        self._sampling = sampling
        self._worked = False
        own = readers.denominators
        wanted = (own.by, own.by.removeprefix("meta.")) if own is not None and own.by is not None else ()
        self._label_column = next((name for name in wanted if name in source.carried), None)

    def lines(self, start: int, end: int, size: int) -> Any:
        """Journal lines of the rows from ``start`` to before ``end``, ``size`` rows at a time."""
        columns = [self._source.column, *([self._label_column] if self._label_column else [])]
        at = start
        for table in self._source.batches(columns=columns, size=size, start=start) if start < end else ():
            part = table.slice(0, end - at)
            yield self._batch(part, at)
            at += part.num_rows
            if at >= end:
                return

    def _batch(self, table: Any, first: int) -> list[list[Any]]:
        d_model = self._readers.verbalizer.d_model
        found = vectors_in(table, self._source.column, d_model)
        lines: list[list[Any]] = [[first + at, None, found.errors.get(at), []] for at in range(table.num_rows)]
        if not len(found.matrix):
            return lines
        labels = plain_values(table.column(self._label_column)) if self._label_column else [None] * table.num_rows
        places = found.places.tolist()
        started = time.perf_counter()
        told = self._explained(found.matrix, [first + at for at in places], [labels[at] for at in places])
        self.model_seconds += time.perf_counter() - started
        self._require_some(told, first)
        norms = np.linalg.norm(found.matrix.astype(np.float64), axis=1).tolist()
        for at, norm, said in zip(places, norms, told, strict=True):
            lines[at][1] = norm
            lines[at][2 if isinstance(said, str) else 3] = said
        return lines

    def _require_some(self, told: Sequence[list[Any] | str], first: int) -> None:
        """Give up where nothing can be read: that is a fault of the model or the device, not of a row."""
        failed = [said for said in told if isinstance(said, str)]
        if len(failed) == len(told) and (len(told) > 1 or not self._worked):
            raise VectorFileError(
                f"none of the {len(told)} vectors from row {first} on could be read: {failed[0]}. What was done before "
                "is kept; the same command goes on once this is mended"
            )
        self._worked = True

    def _explained(
        self, matrix: npt.NDArray[np.float32], rows: Sequence[int], labels: Sequence[Any]
    ) -> list[list[Any] | str]:
        """The samples of each row, or why there are none. A batch that fails is tried again in halves."""
        try:
            return self._read(matrix, rows, labels)
        except _ROW_FAULTS as error:
            if len(rows) == 1:
                return [f"{type(error).__name__}: {error}"]
        half = len(rows) // 2
        first = self._explained(matrix[:half], rows[:half], labels[:half])
        return first + self._explained(matrix[half:], rows[half:], labels[half:])

    def _read(
        self, matrix: npt.NDArray[np.float32], rows: Sequence[int], labels: Sequence[Any]
    ) -> list[list[Any] | str]:
        count, drawn = self._sampling.samples, self._sampling.temperature > 0.0
        seeds = [seed for row in rows for seed in self._sampling.seeds(row)] if drawn else [None] * len(rows)
        vectors = np.repeat(matrix, count, axis=0) if count > 1 else matrix
        texts, failed = self._texts(vectors, seeds)
        good = sorted(texts)
        scores = self._scores(vectors[good], [texts[at] for at in good], [labels[at // count] for at in good])
        told: list[list[Any] | str] = [[] for _ in rows]
        for at, score in zip(good, scores, strict=True):
            text, samples = texts[at], told[at // count]
            if isinstance(samples, list):
                samples.append([seeds[at], _storable(text.text), text.truncated, text.tokens, *score])
        for at, error in failed.items():
            told[at // count] = f"{type(error).__name__}: {error}"
        return told

    def _texts(
        self, vectors: npt.NDArray[np.float32], seeds: Sequence[int | None]
    ) -> tuple[Mapping[int, Verbalization], Mapping[int, Exception]]:
        """What the AV says of each vector, and why it says nothing of others, by row."""
        verbalizer = self._readers.verbalizer
        drawn = [seed for seed in seeds if seed is not None]
        try:
            if drawn and isinstance(verbalizer, Resampler):
                said = verbalizer.resample(vectors, drawn, temperature=self._sampling.temperature)
            else:
                said = verbalizer.verbalize(vectors)
        except PartialReadError as partial:
            away = (error for error in partial.failed.values() if isinstance(error, EngineUnavailableError))
            if (error := next(away, None)) is not None:  # it may come back: these rows are not lost
                raise error from partial
            return partial.done, partial.failed
        return dict(enumerate(said)), {}

    def _scores(
        self, vectors: npt.NDArray[np.float32], texts: Sequence[Verbalization], labels: Sequence[Any]
    ) -> list[tuple[Any, ...]]:
        ar, own = self._readers.reconstructor, self._readers.denominators
        if ar is None:
            return [_UNSCORED] * len(texts)
        scores = ar.score(vectors, [text.text for text in texts])
        if own is not None:
            scores = [own.rescored(score, label) for score, label in zip(scores, labels, strict=True)]
        return [_numbers(score) for score in scores]


def _numbers(score: Score) -> tuple[Any, ...]:
    return score.cosine, score.mse_nrm, score.fve, score.denominator, score.denominator_name


def _storable(text: str) -> str:
    """Text without lone surrogates, which no UTF-8 file holds."""
    return text.encode("utf-8", "replace").decode()


_AT: Final = {name: number for number, name in enumerate(COLUMNS)}


@dataclass(slots=True)
class _Sums:
    denominator: float | None
    explanations: int = 0
    cosine: float = 0.0
    fve: float = 0.0


@dataclass(slots=True)
class _Tally:
    """Counts over all result rows."""

    explanations: int = 0
    errors: int = 0
    truncated: int = 0
    sums: dict[str | None, _Sums] = field(default_factory=dict)

    def add(self, rows: Sequence[tuple[Any, ...]]) -> None:
        for row in rows:
            if row[_AT["error"]] is not None:
                self.errors += 1
                continue
            self.explanations += 1
            self.truncated += row[_AT["truncated"]]
            if row[_AT["cosine"]] is None:
                continue
            sums = self.sums.setdefault(row[_AT["denominator_name"]], _Sums(row[_AT["denominator"]]))
            sums.explanations += 1
            sums.cosine += row[_AT["cosine"]]
            sums.fve += row[_AT["fve"]] or 0.0

    def fidelity(self) -> tuple[FidelityOf, ...]:
        return tuple(
            FidelityOf(
                name,
                sums.denominator,
                sums.explanations,
                sums.cosine / sums.explanations,
                None if sums.denominator is None else sums.fve / sums.explanations,
                None if sums.denominator is None else max(0.0, 1.0 - sums.denominator) ** 0.5,
            )
            for name, sums in sorted(self.sums.items(), key=lambda item: str(item[0]))
        )
