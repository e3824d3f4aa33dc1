"""The command tree, exit codes, and what happens to errors.

Commands are loaded when they are named, so that ``--version`` and ``alerts list`` do not pay for the demo's imports.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from nla_monitor.errors import NLAMonitorError, StoreError, WorkerError

EXIT_PROBLEM: Final = 1
EXIT_USAGE: Final = 2
EXIT_STORE: Final = 3
EXIT_WORKER: Final = 4
EXIT_INTERRUPTED: Final = 130
EXIT_PIPE: Final = 141

EPILOG: Final = (
    "Exit codes: 0 done; 1 a check found problems (rules lint, rules test, db check, doctor); 2 wrong usage, "
    "configuration, checkpoint or rule; 3 the database cannot be used; 4 the worker failed; 130 interrupted."
)

_COMMANDS: Final = {
    "demo": "nla_monitor.cli.demo_command:demo",
    "worker": "nla_monitor.cli.worker_command:worker",
    "alerts": "nla_monitor.cli.alerts_command:app",
    "samples": "nla_monitor.cli.samples_command:samples",
    "verbalize": "nla_monitor.cli.verbalize_command:verbalize",
    "export": "nla_monitor.cli.export_command:export",
    "denominator": "nla_monitor.cli.denominator_command:denominator",
    "rules": "nla_monitor.cli.rules_command:app",
    "report": "nla_monitor.cli.report_command:report",
    "db": "nla_monitor.cli.db_command:app",
    "assets": "nla_monitor.cli.assets_command:app",
    "doctor": "nla_monitor.cli.doctor_command:doctor",
}
"""Name of the command and where it lives: a Typer application (a group) or a function (one command)."""


class LazyGroup(TyperGroup):
    """Loads a command's module when the command is asked for, and turns our errors into one line and an exit code."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of the table."""
        return list(_COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        home = _COMMANDS.get(cmd_name)
        if home is None:
            return None
        module, _, attribute = home.partition(":")
        found = getattr(import_module(module), attribute)
        if not isinstance(found, typer.Typer):
            single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            single.command(cmd_name)(found)
            found = single
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command

    def invoke(self, ctx: Any) -> Any:
        """Run a command; only ``SystemExit`` and Typer's own exceptions leave it, unless there is a fault of ours."""
        try:
            return super().invoke(ctx)
        except NLAMonitorError as error:
            for line in (f"error: {error}", *getattr(error, "__notes__", ())):
                sys.stderr.write(f"nla-monitor: {line}\n")
            raise typer.Exit(exit_code(error)) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(EXIT_INTERRUPTED) from error
        except BrokenPipeError as error:
            _close_output()
            raise typer.Exit(EXIT_PIPE) from error


def exit_code(error: NLAMonitorError) -> int:
    """What the process ends with after this error."""
    if isinstance(error, StoreError):
        return EXIT_STORE
    return EXIT_WORKER if isinstance(error, WorkerError) else EXIT_USAGE


app = typer.Typer(
    cls=LazyGroup,
    name="nla-monitor",
    help="Reads what a model represents, not only what it says: activation in, evidence-backed alert out.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from nla_monitor import __version__

        sys.stdout.write(f"nla-monitor {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # An explanation may hold any character; a narrow terminal encoding must not turn it into a traceback.
            stream.reconfigure(errors="backslashreplace")
    code = 0
    try:
        app(args=None if arguments is None else list(arguments), prog_name="nla-monitor")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _close_output()
        return EXIT_PIPE
    return code


def _close_output() -> None:
    """The reader of our output is gone (``| head``): write into nothing, so that the end of the process is quiet."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
