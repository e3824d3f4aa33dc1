"""Who runs the AV: this process, a server, or a plug-in.

A plug-in is an entry point of the group ``nla_monitor.verbalizers``: a callable that takes the ``NLAConfig`` and
returns a verbalizer. That is any object with

- ``d_model`` (width of the vectors), ``layer`` (K, or None) and ``content_hash`` (provenance of every explanation);
- ``verbalize(vectors)``: an explanation for each vector (``nla_monitor.nla.base.Verbalizer``);
- where it can, ``resample(vectors, seeds, *, temperature)`` (``Resampler``): without it there is no agreement control;
- where it can, ``score_continuations(vectors, choices)`` (``ClaimScorer``): without it there is no claim probability.

It is named in ``nla.engine``; what else it needs stands in ``nla.options``. The host takes layer and width from the
sidecar of ``nla.av``, so a plug-in's checkpoint has one, too (``role``, ``d_model``, ``extraction_layer_index``).
Errors are those of ``nla_monitor.errors``; ``EngineUnavailableError`` makes the worker wait, everything else costs the
sample that it was raised for.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Final, cast

from nla_monitor.config import HTTP_ENGINES, NLAConfig
from nla_monitor.errors import ConfigError, EngineError, EngineUnavailableError, MissingExtraError, NLAMonitorError
from nla_monitor.nla.base import Checkable, Verbalizer

logger = logging.getLogger(__name__)

GROUP: Final = "nla_monitor.verbalizers"
IN_PROCESS: Final = "transformers"


def open_verbalizer(path: str | Path, config: NLAConfig) -> Verbalizer:
    """The AV as ``config.engine`` says. Nothing is asked of a server yet; see ``Checkable``.

    Args:
        path: the AV's checkpoint, a folder or hub id.
        config: engine, and where and how it runs.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        ConfigError: no such engine, or it cannot be used with this checkpoint or as configured.
        MissingExtraError: the engine needs a package that is not installed.
    """
    if config.engine == IN_PROCESS:
        from nla_monitor.nla.verbalizer_transformers import load_verbalizer  # noqa: PLC0415 -- torch, only when needed

        return load_verbalizer(path, config)
    if config.engine in HTTP_ENGINES:
        try:
            import httpx  # noqa: F401, PLC0415 -- an extra
        except ImportError as error:
            raise MissingExtraError("httpx", "engines", f"nla.engine = {config.engine!r}") from error
        from nla_monitor.nla.engines.served import load_served  # noqa: PLC0415 -- needs the extra

        return load_served(path, config)
    return _plugged(config.model_copy(update={"av": str(path)}))


def greet(verbalizer: Verbalizer) -> None:
    """Check an AV that a server runs; a server that is not there yet is waited for later, which is logged.

    Raises:
        EngineError: it is there, and cannot be used: the message says which flag helps.
    """
    if not isinstance(verbalizer, Checkable):
        return
    try:
        verbalizer.check()
    except EngineUnavailableError as error:
        logger.warning("the AV's server is not there yet; samples wait in the spool: %s", error)
    except EngineError:
        release(verbalizer)  # nobody will use it
        raise


def release(verbalizer: Verbalizer) -> None:
    """Give back what an AV holds (connections to its server), where it holds anything."""
    if callable(close := getattr(verbalizer, "close", None)):
        close()


def _plugged(config: NLAConfig) -> Verbalizer:
    point = _point(config.engine)
    who = f"nla.engine = {config.engine!r} ({point.value}, of {_distribution(point)})"
    try:
        load = cast("Callable[[NLAConfig], object]", point.load())
        made = load(config)
    except NLAMonitorError:
        raise
    except Exception as error:  # a stranger's code: whatever it raises becomes an error that says whose it is
        raise ConfigError(f"{who} cannot be loaded: {type(error).__name__}: {error}") from error
    missing = _missing(made)
    if missing:
        raise ConfigError(f"{who} returned a {type(made).__name__} that is no verbalizer: {'; '.join(missing)}")
    return cast("Verbalizer", made)


def _point(name: str) -> EntryPoint:
    points = entry_points(group=GROUP)
    found = [point for point in points if point.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        owners = ", ".join(sorted(map(_distribution, found)))
        raise ConfigError(f"nla.engine = {name!r} is provided more than once, by {owners}. Uninstall all but one.")
    known = [IN_PROCESS, *HTTP_ENGINES, *sorted({point.name for point in points})]
    near = difflib.get_close_matches(name, known, n=1)
    meant = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    raise ConfigError(
        f"nla.engine = {name!r} is no engine and no installed plug-in (entry point group {GROUP!r}); {meant}"
    )


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else "an unnamed distribution"


def _missing(made: object) -> list[str]:
    """What an object lacks for a verbalizer."""
    width, layer = getattr(made, "d_model", None), getattr(made, "layer", None)
    checks = {
        f"d_model is {width!r}, expected the width of its vectors": isinstance(width, int) and width > 0,
        f"layer is {layer!r}, expected K or None": hasattr(made, "layer") and (layer is None or isinstance(layer, int)),
        "content_hash is no text that names its weights": bool(getattr(made, "content_hash", None)),
        "it has no method verbalize": callable(getattr(made, "verbalize", None)),
    }
    return [told for told, there in checks.items() if not there]
