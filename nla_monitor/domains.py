"""Denominators measured on one's own activations: stored runs, or a file. See ``nla.domains`` for what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from sqlalchemy import Engine

from nla_monitor.errors import ConfigError
from nla_monitor.explanations_file import plain_values
from nla_monitor.nla.domains import FEWEST, Denominators, DomainStatistics, label_of
from nla_monitor.nla.injection import bad_rows
from nla_monitor.store.export import Choice, extent, stored_samples
from nla_monitor.vectors_file import VectorFile, vectors_in

_BATCH: Final = 1024
_SAMPLE_LABELS: Final = ("phase", "role", "model", "adapter", "trigger")


def measure_runs(
    engine: Engine,
    run_ids: Sequence[str],
    name: str,
    *,
    by: str | None = None,
    layer: int | None = None,
    fewest: int = FEWEST,
    progress: Callable[[int, int], None] | None = None,
) -> Denominators:
    """Denominators of the stored activations of runs, read or not.

    Args:
        engine: from ``store.session.open_engine``.
        run_ids: full ids.
        name: of the set.
        by: what tells domains apart: ``phase``, ``role``, ``model``, ``adapter``, ``trigger`` or ``meta.<key>``.
        layer: K, where the runs have several.
        fewest: activations from which a domain gets a denominator of its own.
        progress: told how many activations are done, and how many there are.

    Raises:
        ConfigError: ``by`` is none of these, or the runs hold nothing, or several layers or widths.
        VectorFileError: there are too few activations.
    """
    if by is not None and by not in _SAMPLE_LABELS and not by.startswith("meta."):
        raise ConfigError(f"--by {by!r}: valid are {', '.join(_SAMPLE_LABELS)} and meta.<key>")
    choice = Choice(run_ids=run_ids, layer=layer)
    found = extent(engine, choice)
    if len(found.layers) != 1 or len(found.widths) != 1:
        told = f"layers {found.layers}, widths {found.widths}" if found.samples else "no sample"
        raise ConfigError(f"the runs hold {told}; denominators are of one layer and width: choose with --layer")
    statistics, done = DomainStatistics(found.widths[0]), 0
    for page in stored_samples(engine, choice, page=_BATCH):
        samples = [one.sample for one in page]
        bad = bad_rows((sample.vector for sample in samples), found.widths[0])
        good = [sample for row, sample in enumerate(samples) if row not in bad]
        if good:
            statistics.add(np.stack([sample.vector for sample in good]), [label_of(sample, by) for sample in good])
        done += len(page)
        if progress is not None:
            progress(done, max(done, found.samples))
    return statistics.finish(name, layer=found.layers[0], by=by, source=run_ids, fewest=fewest)


def measure_file(
    source: VectorFile,
    name: str,
    *,
    by: str | None = None,
    fewest: int = FEWEST,
    progress: Callable[[int, int], None] | None = None,
) -> Denominators:
    """Denominators of a file of activations.

    Args:
        source: the file.
        name: of the set.
        by: column that tells domains apart.
        fewest: activations from which a domain gets a denominator of its own.
        progress: told how many rows are done, and how many there are.

    Raises:
        ConfigError: there is no such column, or the file names several layers.
        VectorFileError: there are too few readable activations.
    """
    if by is not None and by not in source.carried:
        raise ConfigError(f"--by {by!r}: {source.path} has no such column; it has {', '.join(source.carried)}")
    layers = source.layers()
    if len(layers) > 1:
        told = ", ".join(map(str, sorted(layers)))
        raise ConfigError(f"{source.path} holds activations of layers {told}; denominators are of one: split the file")
    d_model = source.common_width()
    statistics, done = DomainStatistics(d_model), 0
    for table in source.batches(columns=[source.column, *([by] if by else [])], size=_BATCH):
        found = vectors_in(table, source.column, d_model)
        labels = plain_values(table.column(by)) if by else [None] * table.num_rows
        told_of = [labels[at] for at in found.places.tolist()]
        if len(found.matrix):
            statistics.add(found.matrix, [None if label is None else str(label) for label in told_of])
        done += table.num_rows
        if progress is not None:
            progress(done, source.rows)
    layer = next(iter(layers), None)
    return statistics.finish(name, layer=layer, by=by, source=[source.path.name], fewest=fewest)
