"""Stored vectors, read again by another NLA, for replays. What was read live is never touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sqlalchemy import Engine

from nla_monitor.errors import ConfigError
from nla_monitor.nla.base import Reconstructor, Verbalizer
from nla_monitor.nla.domains import Denominators
from nla_monitor.nla.fidelity import record_of
from nla_monitor.nla.injection import bad_rows
from nla_monitor.records import Explanation, Reading
from nla_monitor.store.rereadings import add_rereadings, count_unread, next_unread, scored_by, stored_widths


@dataclass(frozen=True, slots=True)
class Reread:
    """What came of it."""

    read: int
    """Vectors read in this call; those of earlier calls are not read again."""
    unreadable: int
    """Vectors that no AV can read: zero, or not finite."""


def reverbalize(
    engine: Engine,
    verbalizer: Verbalizer,
    reconstructor: Reconstructor | None,
    run_ids: Sequence[str],
    *,
    batch: int = 64,
    denominators: Denominators | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reread:
    """Read the vectors of runs by this NLA. Each batch is kept at once: stopped at any time, the next call goes on.

    Vectors that this AV read live, or read again before, are left out.

    Args:
        engine: from ``store.session.open_engine``, writable.
        verbalizer: the AV.
        reconstructor: the AR; None leaves the readings without fidelity.
        run_ids: these runs.
        batch: vectors at a time.
        denominators: in place of the AR's own.
        progress: told, after each batch, how many vectors are done and how many there are.

    Raises:
        ConfigError: the runs hold vectors of another width than the AV reads, or this AV has read some of them again
            together with another AR.
        StoreUnavailableError: the database cannot be read or written.
    """
    if wrong := stored_widths(engine, run_ids) - {verbalizer.d_model}:
        raise ConfigError(
            f"the AV reads d_model {verbalizer.d_model}, the runs hold vectors of d_model "
            f"{', '.join(map(str, sorted(wrong)))}; name an AV of the model that was monitored"
        )
    ours = reconstructor.content_hash if reconstructor is not None else None
    if others := scored_by(engine, run_ids, verbalizer.content_hash) - {ours}:
        told = ", ".join(sorted(other[:12] if other else "none" for other in others))
        raise ConfigError(
            f"this AV has read these runs again before, scored by another AR ({told}); the one given now is "
            f"{ours[:12] if ours else 'none'}. Scores of two ARs do not compare: name the same AR as then"
        )
    total = count_unread(engine, run_ids, verbalizer.content_hash)
    done = unreadable = 0
    after = ""
    while found := next_unread(engine, run_ids, verbalizer.content_hash, after=after, limit=batch):
        after = found[-1].sample_id
        bad = bad_rows((reading.sample.vector for reading in found), verbalizer.d_model)
        good = [reading for row, reading in enumerate(found) if row not in bad]
        if good:
            add_rereadings(engine, _read(good, verbalizer, reconstructor, denominators))
        done, unreadable = done + len(good), unreadable + len(bad)
        if progress is not None:
            progress(done + unreadable, total)
    return Reread(done, unreadable)


def _read(
    readings: Sequence[Reading],
    verbalizer: Verbalizer,
    reconstructor: Reconstructor | None,
    denominators: Denominators | None,
) -> list[Reading]:
    vectors = np.stack([reading.sample.vector for reading in readings])
    texts = verbalizer.verbalize(vectors)
    scores = reconstructor.score(vectors, [text.text for text in texts]) if reconstructor is not None else None
    if scores is not None and denominators is not None:
        scores = denominators.rescored_samples(scores, [reading.sample for reading in readings])
    found = []
    for number, (reading, text) in enumerate(zip(readings, texts, strict=True)):
        key = reading.sample_id
        explanation = Explanation(key, text.text, text.truncated, text.tokens, verbalizer.content_hash)
        fidelity = record_of(key, scores[number], reconstructor.content_hash) if scores and reconstructor else None
        found.append(Reading(reading.sample, explanation, fidelity))
    return found
