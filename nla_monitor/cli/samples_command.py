"""``nla-monitor samples``: what was sampled, and what it read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nla_monitor.cli.common import (
    DEFAULT_DATABASE,
    DatabaseOption,
    JsonOption,
    RunOption,
    console,
    cut,
    fidelity_text,
    find_run,
    jsonable,
    opened,
    print_json,
    safe,
)
from nla_monitor.records import Phase

if TYPE_CHECKING:
    from nla_monitor.store.queries import SampleView


def samples(
    database: DatabaseOption = DEFAULT_DATABASE,
    run: RunOption = None,
    step: Annotated[int | None, typer.Option(help="Only of this optimizer step.")] = None,
    phase: Annotated[Phase | None, typer.Option(help="Only of this kind of forward pass.")] = None,
    rule: Annotated[str | None, typer.Option(metavar="ID", help="Only those that this rule matched.")] = None,
    contains: Annotated[str | None, typer.Option(metavar="TEXT", help="Only explanations that hold this text.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 20,
    explanations: Annotated[bool, typer.Option("--explanations", help="Show whole explanations and contexts.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show sampled activations with what the verbalizer read in them."""
    with opened(database) as repository:
        found = repository.samples(
            find_run(repository, run), step=step, phase=phase, matched_by=rule, contains=contains, limit=limit
        )
    if as_json:
        print_json([_json(sample, explanations) for sample in found])
    elif not found:
        sys.stdout.write("No samples.\n")
    elif explanations:
        _print_whole(found)
    else:
        _print_table(found)


def _json(sample: SampleView, explanations: bool) -> Any:
    """Every field; the keys of texts are there only when asked for, since they are content."""
    data = jsonable(sample)
    if not explanations:
        del data["context"]
        if data["explanation"] is not None:
            del data["explanation"]["text"]
    return data


def _place(sample: SampleView) -> str:
    if sample.agent is not None:
        return f"agent {sample.agent.tool or ''}".strip()
    return f"{sample.phase.value} {sample.step if sample.step is not None else ''}".strip()


def _token(sample: SampleView) -> str:
    return cut(repr(sample.token_text), 14) if sample.token_text is not None else f"id {sample.token_id}"


def _trigger(sample: SampleView) -> str:
    """A trigger may be a token such as a line end."""
    return sample.trigger if sample.trigger.isidentifier() else cut(repr(sample.trigger), 14)


def _state(sample: SampleView) -> str:
    return f"{sample.state}: {sample.error}" if sample.error else sample.state


def _print_table(found: Sequence[SampleView]) -> None:
    from rich.table import Table

    out = console()
    wide = out.width >= 90
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    names = ("step", "pos", "token", *(("trigger", "FVE") if wide else ()), "explanation")
    for name in names:
        table.add_column(name, no_wrap=name != "explanation", ratio=1 if name == "explanation" else None)
    room = max(24, out.width - 56) if wide else 60
    for sample in found:
        fve = sample.fidelity.fve if sample.fidelity is not None else None
        extra = (_trigger(sample), "-" if fve is None else f"{fve:.2f}") if wide else ()
        text = (
            cut(sample.explanation.text, room) if sample.explanation is not None else f"({cut(_state(sample), room)})"
        )
        table.add_row(_place(sample), str(sample.position), _token(sample), *extra, text)
    out.print(table)


def _print_whole(found: Sequence[SampleView]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from nla_monitor.cli.alert_page import origin_of

    out = console()
    for sample in found:
        out.print(
            Text(f"{_place(sample)} · position {sample.position} · token {_token(sample)} · {sample.sample_id}", "bold")
        )
        if sample.explanation is None:
            out.print(Padding(Text(f"({safe(_state(sample))})", style="dim"), (0, 0, 0, 2)))
        else:
            out.print(Padding(Text(safe(sample.explanation.text)), (0, 0, 0, 2)))
            told = sample.fidelity
            fidelity = fidelity_text(
                told.cosine if told else None, told.fve if told else None, told.denominator_name if told else None
            )
            out.print(Padding(Text(fidelity, style="dim"), (0, 0, 0, 2)))
        told_of = origin_of(sample.model, sample.adapter, sample.screens)
        if origin := " · ".join(f"{key} {value}" for key, value in told_of):
            out.print(Padding(Text(origin, style="dim"), (0, 0, 0, 2)))
        if sample.context:
            out.print(Padding(Text(f"…{safe(sample.context, one_line=True)[-240:]}", style="dim"), (0, 0, 0, 2)))
        out.print()
