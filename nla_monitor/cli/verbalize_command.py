"""``nla-monitor verbalize``: a file of activations in, explanations and fidelity out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nla_monitor.cli.common import JsonOption, console, print_json, safe
from nla_monitor.cli.progress import progress
from nla_monitor.errors import ConfigError, NLAMonitorError

if TYPE_CHECKING:
    from nla_monitor.config import NLAConfig
    from nla_monitor.nla.domains import Denominators
    from nla_monitor.vectors_file import VectorFile
    from nla_monitor.verbalize_file import FidelityOf, Readers, Summary

_DEPENDS_ON = ("engine", "max_new_tokens", "dtype", "dialect", "layer", "question", "placeholders", "quantization")
"""Settings that change explanations; going on with others is refused."""


def verbalize(
    file: Annotated[Path, typer.Argument(metavar="FILE.parquet", help="Activations: a column activation_vector.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="A name in .parquet or .jsonl; default: FILE.explanations.parquet."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", metavar="FILE", help="A monitor's YAML; options override it.")
    ] = None,
    av: Annotated[str | None, typer.Option(help="AV checkpoint: folder, hub id or organism:planted/av.")] = None,
    ar: Annotated[str | None, typer.Option(help="AR checkpoint; 'none' explains without fidelity.")] = None,
    device: Annotated[str | None, typer.Option(help="torch device: cpu, cuda, cuda:1.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, max=4096, help="Explanations at a time.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    samples: Annotated[int, typer.Option(min=1, max=1000, help="Explanations per vector.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy; default: 0 for one sample, 1 for several.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of drawn samples: the same seed gives the same, in any batch.")] = 0,
    denominator: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="'training', or a file made by nla-monitor denominator: what FVEs refer to."),
    ] = None,
    column: Annotated[str, typer.Option(metavar="NAME", help="The column of vectors.")] = "activation_vector",
    ignore_layer: Annotated[
        bool, typer.Option("--ignore-layer", help="Read vectors of another layer than the AV's, too.")
    ] = False,
    with_vectors: Annotated[
        bool, typer.Option("--with-vectors", help="Keep the vectors in the output (Parquet only).")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew: replace the output and what is half done.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Explain the activations of a Parquet file. Interrupted, the same command goes on where it was.

    Every row keeps its columns and gets explanation, cosine, mse_nrm, fve with the name of its denominator, and the
    hashes of AV and AR. A row that cannot be read says why in the column error.
    """
    from nla_monitor.vectors_file import VectorFile
    from nla_monitor.verbalize_file import Sampling, check_output, verbalize_file

    drawn = temperature if temperature is not None else (1.0 if samples > 1 else 0.0)
    sampling = Sampling(samples, drawn, seed)
    target = output or file.with_name(f"{file.stem}.explanations.parquet")
    source, readers = VectorFile(file, column=column), None
    try:
        check_output(source, target, with_vectors=with_vectors, overwrite=overwrite)
        nla = settings_of(config, av=av, ar=ar, device=device, batch_size=batch_size, denominator=denominator)
        own = fitting_denominators(source, nla, ignore_layer=ignore_layer)
        readers = load_readers(nla, own)
        done = [0, source.rows]
        with progress("explaining", "rows") as told:

            def noted(now: int, total: int) -> None:
                done[:] = now, total
                told(now, total)

            try:
                found = verbalize_file(
                    source,
                    target,
                    readers,
                    sampling=sampling,
                    batch_size=nla.batch_size,
                    limit=limit,
                    settings={name: value for name in _DEPENDS_ON if (value := getattr(nla, name)) is not None},
                    ignore_layer=ignore_layer,
                    with_vectors=with_vectors,
                    overwrite=overwrite,
                    progress=noted,
                )
            except KeyboardInterrupt:
                sys.stderr.write(f"interrupted: {_kept(target, *done)}\n")
                raise
            except NLAMonitorError as error:
                if done[0]:
                    error.add_note(_kept(target, *done))
                raise
    finally:
        source.close()
        if readers is not None and callable(close := getattr(readers.verbalizer, "close", None)):
            close()  # connections to a server that runs the AV
    _tell(found, as_json=as_json)


def settings_of(
    config: Path | None,
    *,
    av: str | None,
    ar: str | None,
    device: str | None,
    batch_size: int | None,
    denominator: str | None,
) -> NLAConfig:
    """The config file's ``nla`` section (or the defaults) with the command line's options over it.

    Raises:
        ConfigError: the file or an option is wrong.
    """
    from nla_monitor.config import load_config

    data = load_config(config).model_dump()
    given = {"av": av, "device": device, "batch_size": batch_size, "denominator": denominator}
    data["nla"] |= {name: value for name, value in given.items() if value is not None}
    if ar is not None:
        data["nla"]["ar"] = None if ar.lower() == "none" else ar
    elif av is not None and config is None:
        raise ConfigError(f"--av {av}: name its AR as well, with --ar PATH, or --ar none for texts without fidelity")
    return load_config(data).nla


def fitting_denominators(source: VectorFile, nla: NLAConfig, *, ignore_layer: bool) -> Denominators | None:
    """The configured denominators; file and denominators are held against the AV's sidecar before weights are loaded.

    Raises:
        CheckpointError: the sidecar is missing or malformed.
        ConfigError: the denominators are missing, or of another width or layer.
        VectorFileError: the vectors are of another width or layer.
    """
    from nla_monitor.nla.domains import denominators_for
    from nla_monitor.nla.sidecar import Role, load_sidecar
    from nla_monitor.organism import resolve

    sidecar = load_sidecar(resolve(nla.av), Role.AV, revision=nla.revision, config=nla)
    source.require_fit(sidecar.d_model, sidecar.layer, ignore_layer=ignore_layer)
    return denominators_for(nla.denominator, sidecar.d_model, sidecar.layer)


def load_readers(nla: NLAConfig, own: Denominators | None) -> Readers:
    """AV and AR as the config names them, with these denominators.

    Raises:
        CheckpointError: an AV or AR cannot be used.
        EngineError: the server that runs the AV cannot be used.
        ConfigError: they are no pair.
    """
    import torch

    from nla_monitor.nla import load_reconstructor
    from nla_monitor.nla.base import Checkable
    from nla_monitor.nla.engines import open_verbalizer
    from nla_monitor.organism import resolve
    from nla_monitor.verbalize_file import Readers
    from nla_monitor.worker import check_pair

    if nla.threads is not None:
        torch.set_num_threads(nla.threads)
    verbalizer = open_verbalizer(resolve(nla.av), nla)
    if isinstance(verbalizer, Checkable):
        verbalizer.check()
    reconstructor = None
    if nla.ar is not None:
        reconstructor = load_reconstructor(resolve(nla.ar), nla)
        check_pair(verbalizer, reconstructor)
    return Readers(verbalizer, reconstructor, own)


def _kept(target: Path, done: int, total: int) -> str:
    from nla_monitor.verbalize_file import journal_of

    return f"{done} of {total} rows are kept in {journal_of(target)}; the same command goes on there"


def _tell(found: Summary, *, as_json: bool) -> None:
    new = found.rows - found.resumed_from
    rate = new / found.seconds if new and found.seconds else None
    if as_json:
        from nla_monitor.cli.common import jsonable

        print_json({**jsonable(found), "rows_per_second": rate})
        return
    out = console()
    went_on = f" (went on after row {found.resumed_from})" if found.resumed_from else ""
    speed = f", {rate:.3g} rows/s" if rate else ""
    out.print(f"{found.explanations} explanations of {found.rows} rows in {safe(str(found.output))}{went_on}{speed}")
    if found.errors:
        out.print(f"rows that could not be read: {found.errors} (the column error says why)")
    if found.truncated:
        out.print(f"explanations cut off by nla.max_new_tokens: {found.truncated}")
    for one in found.fidelity:
        out.print(_fidelity(one))


def _fidelity(one: FidelityOf) -> str:
    """One denominator's line, with what the constant direction reaches."""
    told: dict[str, Any] = {"cosine": f"{one.cosine:.3f}"}
    if one.fve is None or one.constant_cosine is None:
        return f"mean cosine {told['cosine']} over {one.explanations} explanations, no FVE (no denominator known)"
    name = safe(one.denominator_name or "unnamed", one_line=True)
    line = (
        f"mean FVE {one.fve:.3f} (denominator: {name}), mean cosine {told['cosine']} over {one.explanations} "
        f"explanations; the constant mean direction reaches cosine {one.constant_cosine:.3f}"
    )
    if one.fve <= 0.0:
        line += ": the AR does no better than the mean there, so these explanations are not backed by it"
    return line
