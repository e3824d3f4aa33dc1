"""What is known of a sequence beside its forward pass (a reward, chosen or rejected), joined to its samples.

The key is the hash of its token ids, which the host's data and a row of a forward have in common whatever generated
the text, on whatever rank, in whatever batch. Joined on the capture's background thread, before samples are written:
nothing waits for an annotation, and one that comes after its sample was written is not added to it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from nla_monitor.capture.keys import hash_of, hex_of, positions_of, sequence_hash
from nla_monitor.capture.sampling import real_tokens
from nla_monitor.capture.staging import to_host
from nla_monitor.records import ActivationSample, Scalar

_MAX_SEQUENCES: Final = 65_536
_MAX_PENDING: Final = 1_024


@dataclass(frozen=True, slots=True)
class _Pending:
    """Hashes on their way to the host, and what belongs to each."""

    hashes: Tensor
    """``[rows]`` int64, complete after ``event``."""
    event: torch.cuda.Event | None
    attributes: Sequence[Mapping[str, Scalar]]


def sequence_id(token_ids: Sequence[int]) -> str:
    """``ActivationSample.sequence_id`` of a sequence, from its token ids without padding."""
    return hex_of(hash_of([int(token) for token in token_ids]))


class Annotations:
    """Attributes by sequence, bounded: the oldest sequences go first. Safe for several threads."""

    def __init__(self, max_sequences: int = _MAX_SEQUENCES) -> None:
        self._max = max_sequences
        self._lock = threading.Lock()
        self._known: OrderedDict[str, dict[str, Scalar]] = OrderedDict()
        # Appending to and taking from a deque is atomic: the host's thread never waits for ours here.
        self._pending: deque[_Pending] = deque(maxlen=_MAX_PENDING)
        self.joined = 0
        """Samples that got an annotation."""

    def add(self, sequence: str, attributes: Mapping[str, Scalar]) -> None:
        """Samples of this sequence that are written from now on carry these attributes, too."""
        with self._lock:
            self._add(sequence, attributes)

    def add_rows(self, ids: Tensor, mask: Tensor | None, attributes: Sequence[Mapping[str, Scalar]]) -> None:
        """The same for the rows of a batch that is about to be forwarded; waits for no device.

        Args:
            ids: ``[rows, seq]`` token ids.
            mask: ``[rows, seq]``, 0 at padding; None: there is none.
            attributes: one mapping a row.
        """
        real = real_tokens(ids, mask, None)
        hashes = to_host(sequence_hash(ids, real, positions_of(real)))
        event = None
        if ids.device.type == "cuda":
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # torch annotates no events
            event.record(torch.cuda.current_stream(ids.device))
        self._pending.append(_Pending(hashes, event, attributes))

    def join(self, samples: Sequence[ActivationSample]) -> list[ActivationSample]:
        """The samples, with the attributes of their sequences (on the capture's thread)."""
        self._settle()
        with self._lock:
            if not self._known:
                return list(samples)
            found = [self._known.get(sample.sequence_id) for sample in samples]
        self.joined += sum(extra is not None for extra in found)
        return [
            sample if extra is None else replace(sample, attributes={**sample.attributes, **extra})
            for sample, extra in zip(samples, found, strict=True)
        ]

    def _settle(self) -> None:
        while self._pending:
            pending = self._pending.popleft()
            if pending.event is not None:
                pending.event.synchronize()
            with self._lock:
                for value, attributes in zip(pending.hashes.tolist(), pending.attributes, strict=True):
                    self._add(hex_of(value), attributes)

    def _add(self, sequence: str, attributes: Mapping[str, Scalar]) -> None:
        # A new mapping: ``join`` reads the old one outside the lock.
        self._known[sequence] = {**self._known.get(sequence, {}), **attributes}
        self._known.move_to_end(sequence)
        while len(self._known) > self._max:
            self._known.popitem(last=False)
