"""The two halves of a Natural Language Autoencoder: the AV writes about a vector, the AR reads it back.

``sidecar`` and ``checkpoint`` read a checkpoint's contract without torch; the names below load models and therefore
import torch when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nla_monitor.nla.base import Reconstructor, Score, Verbalization, Verbalizer
from nla_monitor.nla.checkpoint import content_hash, resolve_checkpoint
from nla_monitor.nla.injection import bad_rows, check_vectors
from nla_monitor.nla.sidecar import Role, Sidecar, load_sidecar

if TYPE_CHECKING:
    from nla_monitor.nla.reconstructor import TransformersReconstructor, load_reconstructor
    from nla_monitor.nla.selftest import SelfTestReport, run_selftest
    from nla_monitor.nla.verbalizer_transformers import TransformersVerbalizer, load_verbalizer

__all__ = [
    "Reconstructor",
    "Role",
    "Score",
    "SelfTestReport",
    "Sidecar",
    "TransformersReconstructor",
    "TransformersVerbalizer",
    "Verbalization",
    "Verbalizer",
    "bad_rows",
    "check_vectors",
    "content_hash",
    "load_reconstructor",
    "load_sidecar",
    "load_verbalizer",
    "resolve_checkpoint",
    "run_selftest",
]

_HEAVY = {
    "TransformersReconstructor": "reconstructor",
    "load_reconstructor": "reconstructor",
    "TransformersVerbalizer": "verbalizer_transformers",
    "load_verbalizer": "verbalizer_transformers",
    "SelfTestReport": "selftest",
    "run_selftest": "selftest",
}


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HEAVY[name]}"), name)
