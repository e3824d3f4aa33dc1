"""Several processes, one run: which rank is this, what is the run called, and when do all of them stop.

Nothing here is a collective operation: a rank whose monitor failed must never hang the others. Shared facts go through
the rendezvous store of ``torch.distributed``, read with a deadline. A leaf: imports nothing of ours.
"""

from __future__ import annotations

import datetime as dt
import logging
import os

import torch.distributed as dist
from torch.distributed import distributed_c10d

logger = logging.getLogger("nla_monitor")

_WAIT = dt.timedelta(seconds=20)
_RUN_KEY = "nla_monitor/run_id"
_STOP_KEY = "nla_monitor/stop_at_step"


def _store() -> distributed_c10d.Store | None:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    # The default store has no public accessor; it is what torch's own elastic and FSDP code uses.
    return distributed_c10d._get_default_store()  # noqa: SLF001


def rank() -> int:
    """Global rank of this process; 0 when it is alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ.get("RANK", "0"))


def shared_run_id(own: str) -> str:
    """Rank 0's run id on every rank.

    A rank that cannot learn it in time goes on under its own id (its samples then form a run of their own).
    """
    store = _store()
    if store is None:
        return own
    if rank() == 0:
        store.set(_RUN_KEY, own)
        return own
    try:
        store.wait([_RUN_KEY], _WAIT)
        return store.get(_RUN_KEY).decode()
    except RuntimeError as error:
        logger.warning(
            "rank %d did not learn the run id from rank 0 (%s); its samples are their own run", rank(), error
        )
        return own


def announce_stop(step: int) -> None:
    """Rank 0, at the end of ``step``: every rank shall stop at the end of the same later step.

    Why two steps later: no rank can finish step + 1 before rank 0 takes part in its gradient reduction, and rank 0 does
    so after this call. So every rank sees the key at the end of step + 1 at the latest.
    """
    store = _store()
    if store is not None:
        store.set(_STOP_KEY, str(step + 2))


def stop_step() -> int | None:
    """The step at whose end all ranks stop, if one was announced."""
    store = _store()
    if store is None or not store.check([_STOP_KEY]):
        return None
    return int(store.get(_STOP_KEY).decode())


def alone() -> bool:
    """Whether there are no other ranks to agree with."""
    return _store() is None
