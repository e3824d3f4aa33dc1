"""``nla-monitor export``: stored samples as a file of activations."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nla_monitor.cli.common import DEFAULT_DATABASE, DatabaseOption, JsonOption, RunOption, find_run, opened, print_json
from nla_monitor.cli.progress import progress
from nla_monitor.records import Phase


def export(
    output: Annotated[Path, typer.Argument(metavar="FILE.parquet", help="The file to write.")],
    database: DatabaseOption = DEFAULT_DATABASE,
    run: RunOption = None,
    rule: Annotated[
        str | None, typer.Option(metavar="ID", help="Only samples that this rule matched (refuted matches left out).")
    ] = None,
    phase: Annotated[Phase | None, typer.Option(help="Only of this kind of forward pass.")] = None,
    layer: Annotated[int | None, typer.Option(min=0, help="Only of this layer (K).")] = None,
    explained: Annotated[bool, typer.Option("--explained", help="Only samples that have been read.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many, the earliest first.")] = None,
    without_text: Annotated[
        bool, typer.Option("--without-text", help="Leave out contexts, tokens and explanations: content.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write sampled activations as Parquet in the column names of the NLA community, with FILE.nla_meta.yaml beside it.

    Vectors are raw, as the model had them. nla-monitor verbalize reads such a file, with any NLA of that layer.
    """
    from nla_monitor.export_file import export_file
    from nla_monitor.store.export import Choice

    with opened(database) as repository, progress("exporting", "samples") as told:
        found = find_run(repository, run)
        choice = Choice([found] if found is not None else None, rule, phase, layer, explained)
        made = export_file(
            repository.engine,
            output,
            choice,
            limit=limit,
            with_text=not without_text,
            overwrite=overwrite,
            progress=told,
        )
    if as_json:
        print_json(made)
    else:
        sys.stdout.write(f"{made.rows} samples of layer {made.layer} (d_model {made.d_model}) written to {output}\n")
