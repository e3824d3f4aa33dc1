"""``nla-monitor denominator``: what FVEs of one's own domain are divided by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nla_monitor.cli.common import DEFAULT_DATABASE, DatabaseOption, JsonOption, console, find_run, opened, print_json
from nla_monitor.cli.progress import progress
from nla_monitor.errors import ConfigError, VectorFileError

if TYPE_CHECKING:
    from nla_monitor.nla.domains import Denominators


def denominator(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Runs of ordinary traffic (id or name), or one .parquet.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The file to write (safetensors).")],
    by: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Tells domains apart: phase, role, meta.<key>, or a column of the file."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the set, shown with every FVE; default: the file's name.")
    ] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="K, where the runs have several.")] = None,
    database: DatabaseOption = DEFAULT_DATABASE,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how much activations of your own domain vary, per domain, so that FVE has a denominator that fits them.

    Set nla.denominator (or verbalize --denominator) to the file; every FVE then carries the name NAME/DOMAIN.
    """
    from nla_monitor.nla.domains import save_denominators

    if output.exists() and not overwrite:
        raise VectorFileError(f"{output} is there already. Name another file, or replace it with --overwrite")
    found = _measured(sources, name or output.stem, by, layer, database)
    save_denominators(output, found)
    if as_json:
        print_json({"output": output, **row(found)})
    else:
        _print(found, output)


def _measured(sources: list[str], name: str, by: str | None, layer: int | None, database: str) -> Denominators:
    from nla_monitor.domains import measure_file, measure_runs

    files = [text for text in sources if text.endswith(".parquet")]
    if files and len(sources) > 1:
        raise ConfigError("name runs, or one .parquet file")
    if files:
        from nla_monitor.vectors_file import VectorFile

        source = VectorFile(Path(files[0]))
        try:
            with progress("measuring", "rows") as told:
                return measure_file(source, name, by=by, progress=told)
        finally:
            source.close()
    with opened(database) as repository, progress("measuring", "samples") as told:
        runs = [run for text in sources if (run := find_run(repository, text)) is not None]
        return measure_runs(repository.engine, runs, name, by=by, layer=layer, progress=told)


def row(found: Denominators) -> dict[str, object]:
    """The denominators for ``--json``."""
    domains = {"all": found.overall, **found.domains}
    figures = [
        {
            "domain": label,
            "denominator_name": f"{found.name}/{label}",
            "vectors": domain.vectors,
            "denominator": domain.denominator,
            "constant_cosine": domain.constant_cosine,
        }
        for label, domain in domains.items()
    ]
    return {"name": found.name, "layer": found.layer, "d_model": found.d_model, "by": found.by, "domains": figures}


def _print(found: Denominators, output: Path) -> None:
    from rich.table import Table

    from nla_monitor.cli.common import safe

    out = console()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for title in ("domain", "activations", "denominator", "cosine of the mean direction"):
        table.add_column(title, justify="left" if title == "domain" else "right")
    for label, domain in {"all": found.overall, **found.domains}.items():
        figures = (str(domain.vectors), f"{domain.denominator:.4f}", f"{domain.constant_cosine:.4f}")
        table.add_row(safe(f"{found.name}/{label}", one_line=True), *figures)
    out.print(table)
    out.print(f"\nwritten to {safe(str(output))}; use it with nla.denominator, or verbalize --denominator")
